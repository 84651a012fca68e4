"""The segment format: every offset, every flag, and the plan of a geometry.

One segment is one named cache.  All numbers are native-endian; the magic word reads
differently on a machine of the other byte order, so such a segment is refused.  The
file consists of page-aligned pieces, each a whole number of 64-byte lines::

    byte 0        header            magic, format, geometry, settings, names
    byte 512      retired counters  sums over workers that have gone, two copies
    byte 4096     worker rows       ROWS x 256 bytes, one for each attached process
    shard_0       shard 0           stride bytes, page-aligned
    shard_0 + stride  shard 1       ...

    shard:  +0       shard words  lock line, counts, counters, timer wheel,
                                  in-flight table, eviction mailbox
            +16384   buckets      u32[slots]          head of a hash chain, 0 = empty
            +...     records      64 B x (slots + 1)  one entry's bookkeeping
            +...     links        u32[blocks + 1]     next block of a run, 0 = end
            +...     arena        block_size x (blocks + 1)

Slots and blocks are numbered from 1, and 0 means "none".  So a zero-filled shard is a
valid empty one, and creating a segment takes a few stores, however large it is.  Record
0 is the sentinel of the LRU ring: its ``next`` is the most recently used entry, its
``prev`` the least recently used.

A record, in 32-bit words (``version`` and ``expires`` are 64-bit)::

     0  version    u64: write sequence of the shard << 1 | live
     2  expires    u64: CLOCK_MONOTONIC ns, NEVER = no expiry
     4  hash       low half of the key's 64-bit hash
     5  chain      next slot in the hash chain; next free slot if the record is free
     6  lru_prev   7  lru_next
     8  wheel_prev WHEEL_FIRST | list number, if the entry is first in its wheel list
     9  wheel_next
    10  block      first block of the run that holds the key's and the value's bytes
    11  value_len  bytes of the value
    12  meta       key length | key kind << 16 | value tag << 20 | flags << 24
    13  ttl        time to live, see ``pack_ttl``
    14  stamp      time of writing, in units of 2**STAMP_SHIFT ns since created_at
    15  checksum   of the value, see ``checksum``

``version`` is the truth about an entry: an odd one means that all other fields and the
bytes are in place.  It is stored last when an entry is made and cleared first when it
goes.  Buckets, ring, wheel, free lists and counts can be rebuilt from the live records
alone.  If two live records have the same key, the one with the higher version counts.

Who may write what:

- before the magic word is stored, the process that creates the segment writes the
  header; nobody changes it later, except for the words named next;
- a process that has the admin lock (a kernel lock on the lock file) writes
  ``GENERATION``, ``RETIRED``, ``RECOVERED``, ``LOST``, ``FREED`` and the retired
  counters, and takes and clears worker rows;
- the process that has a row writes the counters of the row, and no other process does;
- the holder of a shard's lock writes everything in the shard, with two exceptions:
  ``HOLDER`` changes by compare-and-swap, and a reader of a sliding cache extends
  ``expires`` of a live record by compare-and-swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64_intdigest

MAGIC = int.from_bytes(b"shmcache", "little")
FORMAT = 2

PAGE = 4096
LINE = 64

# --- header: 64-bit words -------------------------------------------------------
H_MAGIC = 0  # stored last at creation
H_FORMAT = 1
H_SIZE = 2  # bytes of the whole segment
H_SEED = 3  # of the key hash
H_CREATED_WALL = 4  # wall clock at creation, ns
H_CREATED_AT = 5  # the cache's clock at creation, ns; stamps count from here
H_SHARDS = 6
H_SLOTS = 7  # records of a shard, without the sentinel
H_BLOCKS = 8  # blocks of a shard
H_BLOCK_SIZE = 9
H_STRIDE = 10  # bytes from shard to shard
H_ROWS = 11
H_MAX_ENTRIES = 12
H_MAX_BYTES = 13
H_TTL = 14  # ns, 0 = never
H_JITTER = 15  # parts per million
H_CLEANUP = 16  # ns
H_FLAGS = 17
H_GENERATION = 18  # generation of the last worker that was given a row
H_RETIRED = 19  # which copy of the retired counters is valid: 0 or 1
H_LOCK_INODE = 20  # inode of the lock file
# When a persistent segment was last taken into use again:
H_RECOVERED = 21  # entries that were found
H_LOST = 22  # entries that were given up
H_FREED = 23  # rows freed so far; a process that sees it change knows a worker has gone

FLAG_PERSIST = 1
FLAG_SLIDING = 2

CODEC_AT, CODEC_SIZE = 256, 64  # bytes: length, then UTF-8
NAME_AT, NAME_SIZE = 320, 192

# Retired counters: the sums of the counters of workers that have gone.  They are
# double-buffered: new sums are written to the copy that is not valid, then one store
# makes it the valid one.  The last word of a copy is the token of the worker that was
# added last, so that none is added twice if a process dies before it clears the row.
RETIRED_AT = 512 // 8
RETIRED_WORDS = 32
RETIRED_TOKEN = RETIRED_WORDS - 1

# --- worker rows: 64-bit words --------------------------------------------------
ROWS_AT = PAGE
ROW_SIZE = 256
ROW_WORDS = ROW_SIZE // 8
ROWS = 1024  # 500 workers, and as many again while a server restarts them
R_TOKEN = 0  # generation << 16 | row + 1; 0 = free row
R_PID = 1  # for people to read; whether a worker lives is told by its lock
R_STARTED = 2  # wall clock, ns
R_HITS = 3  # the first counter: words R_HITS to the end are added to the retired ones
R_MISSES = 4
R_SWEEPS = 5
R_SWEEP_NS = 6
R_SWEEP_BUCKETS = 7  # histogram of sweep times, by SWEEP_BOUNDS
R_CALLBACKS = 13
R_CALLBACK_FAILURES = 14
R_OPENED = 15  # handles registered
R_CLOSED = 16  # handles that have gone and whose callback, if any, has ended
R_LEASES = 17  # leases on handles that were begun
R_RETURNED = 18  # leases on handles that have ended
R_COUNTERS = R_HITS


def row_at(row: int) -> int:
    """Return the number of the first 64-bit word of a worker row."""
    return (ROWS_AT + row * ROW_SIZE) // 8


# --- shard words: 64-bit words from the shard's start ---------------------------
# The lock line, which all processes read.
S_SEQ = 0  # seqlock: odd while a writer is inside
S_HOLDER = 1  # token of the worker inside, 0 = none
S_ACQUISITIONS = 2  # how often the lock was taken: tells a waiter that others progress
# The lock guards all words from here on.
# The number of the last write; it begins with the time of creation, see header.py.  A
# record's version is sequence << 1 | live.
S_SEQUENCE = 8
S_ENTRIES = 9
S_BLOCKS_USED = 10
S_FREE_SLOT = 11  # head of the list of slots that were used and are free
S_FRESH_SLOT = 12  # slots 1..fresh have been used, the others never
S_FREE_BLOCK = 13  # the same for blocks
S_FRESH_BLOCK = 14
S_TICK = 15  # the wheel has collected all entries that were due before this tick
S_DUE = 16  # no entry of the wheel expires before this, ns; 0 = not set yet
# The redo words say which number is being overwritten in place, and with what, so that
# the next holder of the lock can finish it.
S_REDO_SLOT = 17  # 0 = none
S_REDO_VERSION = 18
S_REDO_VALUE = 19  # its eight bytes
S_REDO_CHECKSUM = 20
# A key may have no record for a moment although it is not absent: 1 << 32 | low half of
# its hash, while it is overwritten and both records do not fit; ALL_IN_DOUBT in a
# rebuild; 0 = none.  It concerns readers that do not wait for a writer that is stopped.
S_IN_DOUBT = 21
# The slot of the entry that was used last, if the LRU ring does not say so yet: the
# next holder of the lock moves it to the front, see recency.py; 0 = none.
S_LATE_USE = 22
# From here on there are counters.
S_HITS = 24  # hits of the interpreted engine, which reads under the lock
S_MISSES = 25
S_SETS = 26
S_TOO_LARGE = 27
S_GONE = 28  # entries that have gone, by Cause: 8 words
S_UNREAD = 36  # evicted entries that were never read
S_LOCK_WAITS = 39
S_LOCK_WAIT_NS = 40
S_LOCK_TIMEOUTS = 41
S_RECOVERIES = 42  # takeovers of a dead holder's lock
S_DROPPED = 43  # entries given up when the shard was rebuilt
S_LOCK_BUCKETS = 44  # histogram of waits for the lock, by LOCK_BOUNDS
S_AGE_BUCKETS = 50  # histogram of the ages of evicted entries, by AGE_BOUNDS
S_AGES = 58  # the sum of their ages, in units of stamps
S_COUNTERS, S_COUNTERS_END = S_HITS, 59

# The timer wheel: WHEEL_LEVELS words of occupancy bits, then the heads (u32).
S_WHEEL_BITS = 64
S_WHEEL_HEADS = 72
WHEEL_LEVELS = 7
WHEEL_SLOTS = 64
WHEEL_TICK_BITS = 20  # a tick is 2**20 ns, 1.05 ms
WHEEL_FIRST = 0x8000_0000

# The in-flight table of get_or_set: pairs (hash of the key, token of the worker that
# computes its value).
S_IN_FLIGHT = 320
IN_FLIGHT = 256

# The eviction mailbox tells the owners of handles what went: a ring of (token of the
# owner, number of the handle, cause, 0).
S_MAILBOX_HEAD = 832  # how many were ever written
S_MAILBOX = 1024
MAILBOX_SIZE = 256
MAILBOX_WORDS = 4

SHARD_HEADER = 16384

# Upper bounds of the histograms' buckets in seconds.  A value is counted in the first
# bucket whose bound it does not exceed, and only there; a value above all bounds is
# counted in the total alone.
SWEEP_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 1.0)
LOCK_BOUNDS = (0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0)
AGE_BOUNDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 604_800.0)

# --- records: 32-bit words ------------------------------------------------------
RECORD = 64
RECORD_WORDS = RECORD // 4
F_VERSION = 0  # 64-bit
F_EXPIRES = 2  # 64-bit
F_HASH = 4
F_CHAIN = 5
F_LRU_PREV = 6
F_LRU_NEXT = 7
F_WHEEL_PREV = 8
F_WHEEL_NEXT = 9
F_BLOCK = 10
F_VALUE_LEN = 11
F_META = 12
F_TTL = 13
F_STAMP = 14
F_CHECKSUM = 15
# The two wide fields, and the record, in 64-bit words.
RECORD_WORDS64 = RECORD // 8
F64_VERSION = F_VERSION // 2
F64_EXPIRES = F_EXPIRES // 2

META_KEY = 0xF_FFFF  # key length and kind, which must agree for a key to match
META_TAG_SHIFT = 20
META_FETCHED = 1 << 24  # the entry was read at least once since it was written

MAX_KEY = 0xFFFF
NEVER = 0xFFFF_FFFF_FFFF_FFFF
STAMP_SHIFT = 26  # a stamp counts units of 2**26 ns, 67 ms: 32 bits last nine years

MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
ALL_IN_DOUBT = MASK64  # a value of S_IN_DOUBT
LAST_SEQUENCE = (1 << 61) - 1  # no write has a higher number


# The name of the codec of a segment that holds handles.  Its values begin with the
# owner's token and the handle's number, 8 bytes each.
HANDLES = "shmcache.handles"
HANDLE_PREFIX = 16


class Kind(IntEnum):
    """The type that a key had before it became bytes: 1, "1" and b"1" differ."""

    STR = 1
    BYTES = 2
    INT = 3
    TUPLE = 4


class Tag(IntEnum):
    """How the bytes of a value are to be decoded."""

    CODEC = 0  # by the cache's codec
    BYTES = 1
    STR = 2  # UTF-8
    INT = 3  # 8 bytes, signed
    FLOAT = 4  # 8 bytes, IEEE 754
    NONE = 5
    TRUE = 6
    FALSE = 7


class Cause(IntEnum):
    """Why an entry went; only the first two are evictions."""

    EXPIRED = 0
    CAPACITY = 1
    DELETED = 2
    REPLACED = 3
    CLEARED = 4
    OWNER_DIED = 5
    CLOSED = 6

    @property
    def evicted(self) -> bool:
        """True if the cache gave the entry up by itself, not at a caller's request."""
        return self <= Cause.CAPACITY


# A record keeps its TTL in 32 bits, because a sliding cache renews it at each read: 30
# bits count the finest unit in which the TTL fits, 2 bits say which unit.
_TTL_UNITS = (1, 1_000, 1_000_000, 1_000_000_000)  # ns, us, ms, s
TTL_VALUE = (1 << 30) - 1
MAX_TTL_NS = TTL_VALUE * _TTL_UNITS[3]  # 34 years


def pack_ttl(ns: int) -> int:
    """Pack a TTL into 32 bits.

    Args:
        ns: The TTL in nanoseconds, at most MAX_TTL_NS; 0 means "never".

    Returns:
        unit << 30 | count, with the count rounded up.

    Raises:
        ValueError: The TTL is too long.
    """
    for unit, size in enumerate(_TTL_UNITS):
        count = -(-ns // size)
        if count <= TTL_VALUE:
            return unit << 30 | count
    raise ValueError(f"ttl of {ns} ns is over {MAX_TTL_NS} ns")


def unpack_ttl(word: int) -> int:
    """Return a packed TTL in nanoseconds."""
    return (word & TTL_VALUE) * _TTL_UNITS[word >> 30]


def checksum(value: bytes, key_hash: int, tag: int) -> int:
    """Return 32 bits that change if a value, its tag or its key changes.

    Args:
        value: The bytes of the value, of which half of the XXH3 is taken.
        key_hash: The hash of the key, or its low half.
        tag: The tag of the value.

    Returns:
        The checksum of the record.
    """
    return (xxh3_64_intdigest(value) ^ key_hash ^ tag << 28) & MASK32


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets of a segment, in bytes unless stated otherwise."""

    shards: int  # number of shards
    slots: int  # records of a shard: its share of max_entries, and a spare one
    blocks: int  # blocks of a shard
    block_size: int
    stride: int  # from shard to shard
    size: int  # of the whole segment

    # offsets from the start of a shard
    buckets_at: int
    records_at: int
    links_at: int
    arena_at: int

    @property
    def shards_at(self) -> int:
        """The offset of shard 0."""
        return ROWS_AT + ROWS * ROW_SIZE

    def shard_at(self, shard: int) -> int:
        """Return the number of the first 64-bit word of a shard."""
        return (self.shards_at + shard * self.stride) // 8

    def blocks_of(self, length: int) -> int:
        """Return how many blocks an entry takes.

        Args:
            length: Bytes of its key and its value together.

        Returns:
            The number of blocks; an entry without any bytes takes one.
        """
        return max(1, -(-length // self.block_size))


def _up(n: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-n // to) * to


def plan(shards: int, slots: int, blocks: int, block_size: int) -> Geometry:
    """Lay out a segment.

    Args:
        shards: Number of shards.
        slots: Records of a shard.
        blocks: Blocks of a shard.
        block_size: Bytes of a block.

    Returns:
        The geometry, which these four numbers determine.
    """
    buckets_at = SHARD_HEADER
    records_at = _up(buckets_at + 4 * slots, LINE)
    links_at = records_at + RECORD * (slots + 1)
    arena_at = _up(links_at + 4 * (blocks + 1), LINE)
    stride = _up(arena_at + block_size * (blocks + 1), PAGE)
    return Geometry(
        shards=shards,
        slots=slots,
        blocks=blocks,
        block_size=block_size,
        stride=stride,
        size=ROWS_AT + ROWS * ROW_SIZE + shards * stride,
        buckets_at=buckets_at,
        records_at=records_at,
        links_at=links_at,
        arena_at=arena_at,
    )


# A cache of up to so many entries has one shard: LRU is exact, and max_entries keys all
# fit.  In a larger cache, less contention for the locks matters more.
SINGLE_SHARD_ENTRIES = 16_384
ENTRIES_PER_SHARD = 8_192
MAX_DEFAULT_SHARDS = 64
MAX_SHARDS = 256
# The arena of a shard limits the size of an entry, so shards must not become tiny.
MIN_SHARD_BYTES = 1 << 20
DEFAULT_BYTES_PER_ENTRY = 512
DEFAULT_MIN_BYTES = 1 << 20
MIN_BLOCK, MAX_BLOCK = 64, 4096
UNCOUNTED_BLOCK = 256  # for max_entries=0, where there is a slot for each block
MAX_INDEX = (1 << 31) - 2  # of slots and blocks: links have 32 bits, one of them a mark


def default_max_bytes(max_entries: int) -> int:
    """Return the default of max_bytes: 512 for each entry, at least 1 MiB."""
    return max(DEFAULT_MIN_BYTES, DEFAULT_BYTES_PER_ENTRY * max_entries)


def default_shards(max_entries: int, max_bytes: int) -> int:
    """Return the default number of shards, a power of two.

    Args:
        max_entries: The limit of entries, or 0 if there is none.
        max_bytes: The limit of bytes of keys and values.

    Returns:
        1 for up to 16,384 entries; for more, about one for 8,192 entries, at most 64.
    """
    entries = max_entries or max_bytes // UNCOUNTED_BLOCK
    if entries <= SINGLE_SHARD_ENTRIES:
        return 1
    wanted = min(MAX_DEFAULT_SHARDS, entries // ENTRIES_PER_SHARD)
    affordable = max(1, min(wanted, max_bytes // MIN_SHARD_BYTES))
    return 1 << (affordable.bit_length() - 1)


def plan_for(max_entries: int, max_bytes: int, shards: int) -> Geometry:
    """Lay out a segment for given limits.

    A block is about a quarter of the average room of an entry (max_bytes /
    max_entries), a power of two from 64 to 4096 bytes.  Then an average entry loses an
    eighth of its room to rounding, and no entry needs a long run of blocks.

    Args:
        max_entries: The limit of entries, or 0 if there is none.
        max_bytes: The limit of bytes of keys and values.
        shards: Number of shards.

    Returns:
        The geometry.  Both limits are rounded down to what all shards hold together.
    """
    if max_entries:
        room = max_bytes // max_entries // 4
        block_size = min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(0, room.bit_length() - 1)))
    else:
        block_size = UNCOUNTED_BLOCK
    blocks = max(1, max_bytes // shards // block_size)
    entries = -(-max_entries // shards) if max_entries else blocks
    return plan(shards, entries + 1, blocks, block_size)


def shard_capacity(max_entries: int, shards: int, shard: int, blocks: int) -> int:
    """Return how many entries a shard may hold.

    Args:
        max_entries: The limit of entries of the cache, or 0 if there is none.
        shards: Number of shards.
        shard: Which of them.
        blocks: Blocks of a shard.

    Returns:
        The limit; the sum over all shards is max_entries.
    """
    if not max_entries:
        return blocks
    return max_entries // shards + (shard < max_entries % shards)
