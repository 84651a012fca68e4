"""The segment format: every offset, every flag, and the plan of a geometry.

One segment is one named cache.  All numbers are native-endian; the magic word
reads differently on a machine of the other byte order, so such a segment is
refused.  The file is page-aligned pieces, each a whole number of 64-byte lines::

    byte 0        header          magic, format, geometry, settings, names
    byte 512      fold banks      counters of workers that have gone, two copies
    byte 4096     worker rows     ROWS x 256 bytes, one for each attached process
    shard_0       shard 0         stride bytes, page-aligned
    shard_0 + stride  shard 1     ...

    shard:  +0       shard words  lock line, counts, counters, wheel, claims, notices
            +16384   buckets      u32[slots]          head of a hash chain, 0 = empty
            +...     records      64 B x (slots + 1)  one entry's bookkeeping
            +...     links        u32[blocks + 1]     next block of a chain, 0 = end
            +...     arena        block_size x (blocks + 1)

Slots and blocks are numbered from 1; 0 means "none", so a zero-filled segment
is a valid empty one, and creation writes a few words however large it is.
Record 0 is the sentinel of the LRU ring: its ``next`` is the most recently used
entry, its ``prev`` the least.

A record, in 32-bit words (``version`` and ``expires`` are 64-bit)::

     0  version    u64: write sequence of the shard << 1 | live
     2  expires    u64: CLOCK_MONOTONIC ns, NEVER = no expiry
     4  hash       low half of the key's 64-bit hash
     5  chain      next slot in the bucket; next free slot when free
     6  lru_prev   7  lru_next
     8  wheel_prev WHEEL_FIRST | head number, for the first of a wheel list
     9  wheel_next
    10  block      first block of the key's and value's bytes
    11  value_len
    12  meta       key length | key kind << 16 | value tag << 20 | flags << 24
    13  ttl        time to live, see ``pack_ttl``
    14  stamp      time of writing, in STAMP_NS since the segment's creation
    15  checksum   of the value, see ``checksum``

``version`` is the truth about an entry: odd means that all other fields and the
bytes are in place.  It is stored last when an entry is born and cleared first
when it dies; buckets, ring, wheel, free lists and counts can be rebuilt from the
live records alone.  Of two live records with one key the higher version counts.

Who may write what:

- written once, before the magic word: the header, but the words named next;
- under the admin lock (a kernel lock on the lease file): ``INCARNATION``, ``FOLD``,
  ``RECOVERED``, ``LOST``, the fold banks, a row's claiming and clearing;
- by the row's own process only: the counters of a row;
- by the holder of the shard's lock only: everything in a shard, but ``HOLDER``,
  which changes by compare-and-swap, and ``expires`` of a live record, which a
  reader of a sliding cache extends by compare-and-swap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xxhash import xxh3_64_intdigest

MAGIC = int.from_bytes(b"shmcache", "little")
FORMAT = 1

PAGE = 4096
LINE = 64

# --- header: 64-bit words -------------------------------------------------------
H_MAGIC = 0  # stored last at creation
H_FORMAT = 1
H_SIZE = 2  # of the whole segment, bytes
H_SEED = 3  # of the key hash
H_CREATED_WALL = 4  # wall clock, ns
H_CREATED_AT = 5  # the cache's clock at creation, ns: zero of the stamps
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
H_GENERATION = 18  # of the last worker row handed out
H_RETIRED = 19  # which fold bank counts: 0 or 1
H_LOCK_INODE = 20  # inode of the lease file
H_RECOVERED = 21  # entries found, and given up, when a persistent segment was last
H_LOST = 22  # taken into use again
H_FREED = 23  # rows freed so far: tells who looks that a worker has gone

FLAG_PERSIST = 1
FLAG_SLIDING = 2

CODEC_AT, CODEC_SIZE = 256, 64  # bytes: length, then UTF-8
NAME_AT, NAME_SIZE = 320, 192

# Two banks of counters of workers that have gone, and in the last word of a bank
# the token of the worker folded into it last: see _process/rows.py.
RETIRED_AT = 512 // 8
RETIRED_WORDS = 32
RETIRED_TOKEN = RETIRED_WORDS - 1

# --- worker rows: 64-bit words --------------------------------------------------
ROWS_AT = PAGE
ROW_SIZE = 256
ROW_WORDS = ROW_SIZE // 8
ROWS = 1024  # 500 workers, as many again while a server restarts them
R_TOKEN = 0  # incarnation << 16 | row + 1; 0 = free row
R_PID = 1  # for people to read; liveness is the lease
R_STARTED = 2  # wall clock, ns
R_HITS = 3  # first of the counters: words R_HITS to the end are folded
R_MISSES = 4
R_SWEEPS = 5
R_SWEEP_NS = 6
R_SWEEP_BUCKETS = 7  # sweeps of up to each of SWEEP_BOUNDS
R_CALLBACKS = 13
R_CALLBACK_FAILURES = 14
R_OPENED = 15  # handles registered
R_CLOSED = 16  # handles that have gone and whose callback, if any, has ended
R_LEASES = 17  # leases on handles, begun
R_RETURNED = 18  # and ended
R_COUNTERS = R_HITS


def row_at(row: int) -> int:
    """The first 64-bit word of a worker row."""
    return (ROWS_AT + row * ROW_SIZE) // 8


# --- shard words: 64-bit words from the shard's start ---------------------------
# The lock line, which everyone looks at.
S_SEQ = 0  # odd while a writer is inside
S_HOLDER = 1  # token of the worker inside, 0 = nobody
S_ACQUISITIONS = 2  # acquisitions: a waiter sees by it that something moves
# Guarded by the lock from here on.
S_SEQUENCE = 8  # of the last write: a record's version is sequence << 1 | live
S_ENTRIES = 9
S_BLOCKS_USED = 10
S_FREE_SLOT = 11  # head of the list of slots that were used and are free
S_FRESH_SLOT = 12  # slots 1..fresh have been used; the others never
S_FREE_BLOCK = 13
S_FRESH_BLOCK = 14
S_TICK = 15  # where the wheel stands
S_DUE = 16  # no entry of the wheel expires before this, ns; 0 = not set yet
# A number that is being overwritten in place, so that the next holder can finish it.
S_REDO_SLOT = 17  # 0: none
S_REDO_VERSION = 18
S_REDO_VALUE = 19  # its eight bytes
S_REDO_CHECKSUM = 20
# Counters.
S_HITS = 24  # of the interpreted engine, which reads under the lock
S_MISSES = 25
S_SETS = 26
S_TOO_LARGE = 27
S_GONE = 28  # entries gone, by Cause: 8 words
S_UNREAD = 36  # entries evicted that nobody ever read
S_LOCK_WAITS = 39
S_LOCK_WAIT_NS = 40
S_LOCK_TIMEOUTS = 41
S_RECOVERIES = 42  # takeovers from a dead holder
S_DROPPED = 43  # entries given up in repairs
S_LOCK_BUCKETS = 44  # waits of up to each of LOCK_BOUNDS
S_AGE_BUCKETS = 50  # entries evicted at an age of up to each of AGE_BOUNDS
S_AGES = 58  # the sum of their ages, in stamps
S_COUNTERS, S_COUNTERS_END = S_HITS, 59

# The timer wheel: WHEEL_LEVELS words of occupancy bits, then the heads (u32).
S_WHEEL_BITS = 64
S_WHEEL_HEADS = 72
WHEEL_LEVELS = 7
WHEEL_SLOTS = 64
WHEEL_TICK_BITS = 20  # a tick is 2**20 ns, 1.05 ms
WHEEL_FIRST = 0x8000_0000

# Claims of get_or_set: pairs (hash of the key, token of the worker that computes).
S_IN_FLIGHT = 320
IN_FLIGHT = 256

# Notices to the owners of handles: a ring of (token, number, cause, 0), see handles.py.
S_MAILBOX_HEAD = 832  # how many were written ever
S_MAILBOX = 1024
MAILBOX_SIZE = 256
MAILBOX_WORDS = 4

SHARD_HEADER = 16384

# Upper bounds of the histograms' buckets in seconds; what is over the last one is only
# in the total.  A value is counted in one bucket, not in all above it.
SWEEP_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 1.0)
LOCK_BOUNDS = (0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0)
AGE_BOUNDS = (1.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 604_800.0)

# --- records: 32-bit words ------------------------------------------------------
RECORD = 64
RECORD_WORDS = RECORD // 4
F_VERSION = 0  # 64-bit word 0 of the record
F_EXPIRES = 2  # 64-bit word 1
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

META_KEY = 0xF_FFFF  # key length and kind: what must agree for a key to match
META_TAG_SHIFT = 20
META_FETCHED = 1 << 24  # read at least once since it was written

MAX_KEY = 0xFFFF
NEVER = 0xFFFF_FFFF_FFFF_FFFF
STAMP_SHIFT = 26  # a stamp counts 2**26 ns, 67 ms: 32 bits last for nine years

MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF


# The codec of a segment that holds handles.  Its values begin with the owner's token
# and the handle's number, 8 bytes each.
HANDLES = "shmcache.handles"
HANDLE_PREFIX = 16


class Kind(IntEnum):
    """What a key was before it became bytes; 1, "1" and b"1" are three keys."""

    STR = 1
    BYTES = 2
    INT = 3
    TUPLE = 4


class Tag(IntEnum):
    """How a value's bytes are to be read."""

    CODEC = 0  # by the cache's codec
    BYTES = 1
    STR = 2  # UTF-8
    INT = 3  # 8 bytes, signed
    FLOAT = 4  # 8 bytes, IEEE 754
    NONE = 5
    TRUE = 6
    FALSE = 7


class Cause(IntEnum):
    """Why an entry went.  Only the first two are evictions."""

    EXPIRED = 0
    CAPACITY = 1
    DELETED = 2
    REPLACED = 3
    CLEARED = 4
    OWNER_DIED = 5
    CLOSED = 6

    @property
    def evicted(self) -> bool:
        """Whether the cache gave the entry up by itself, not at a caller's wish."""
        return self <= Cause.CAPACITY


# A TTL in 32 bits, for renewals: 30 bits of the finest unit in which it fits.
_TTL_UNITS = (1, 1_000, 1_000_000, 1_000_000_000)  # ns, us, ms, s
TTL_VALUE = (1 << 30) - 1
MAX_TTL_NS = TTL_VALUE * _TTL_UNITS[3]  # 34 years


def pack_ttl(ns: int) -> int:
    """A TTL as unit << 30 | count, rounded up; 0 for "never"."""
    for unit, size in enumerate(_TTL_UNITS):
        count = -(-ns // size)
        if count <= TTL_VALUE:
            return unit << 30 | count
    raise ValueError(f"ttl of {ns} ns is over {MAX_TTL_NS} ns")


def unpack_ttl(word: int) -> int:
    """A packed TTL in ns."""
    return (word & TTL_VALUE) * _TTL_UNITS[word >> 30]


def checksum(value: bytes, key_hash: int, tag: int) -> int:
    """32 bits that change when a value, its tag or its key does: half of its XXH3."""
    return (xxh3_64_intdigest(value) ^ key_hash ^ tag << 28) & MASK32


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets of a segment, in bytes unless said otherwise."""

    shards: int
    slots: int  # records of a shard: its share of max_entries, and a spare one
    blocks: int  # of a shard
    block_size: int
    stride: int
    size: int

    # offsets from the start of a shard
    buckets_at: int
    records_at: int
    links_at: int
    arena_at: int

    @property
    def shards_at(self) -> int:
        return ROWS_AT + ROWS * ROW_SIZE

    def shard_at(self, shard: int) -> int:
        """The first 64-bit word of a shard."""
        return (self.shards_at + shard * self.stride) // 8

    def blocks_of(self, length: int) -> int:
        """How many blocks an entry takes whose key and value have so many bytes."""
        return max(1, -(-length // self.block_size))


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def plan(shards: int, slots: int, blocks: int, block_size: int) -> Geometry:
    """The geometry of a segment from the four numbers that determine it."""
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


# Up to here one shard serves: LRU is exact, and a cache filled with exactly
# max_entries keys keeps them all.  Above, contention counts for more.
SINGLE_SHARD_ENTRIES = 16_384
ENTRIES_PER_SHARD = 8_192
MAX_DEFAULT_SHARDS = 64
MAX_SHARDS = 256
# A shard's arena bounds its largest entry; sharding must not make that tiny.
MIN_SHARD_BYTES = 1 << 20
DEFAULT_BYTES_PER_ENTRY = 512
DEFAULT_MIN_BYTES = 1 << 20
MIN_BLOCK, MAX_BLOCK = 64, 4096
UNCOUNTED_BLOCK = 256  # for max_entries=0, where a slot goes with every block
MAX_INDEX = (1 << 31) - 2  # of slots and blocks: links are 32-bit, one bit is a mark


def default_max_bytes(max_entries: int) -> int:
    """512 bytes of keys and values an entry, at least 1 MiB."""
    return max(DEFAULT_MIN_BYTES, DEFAULT_BYTES_PER_ENTRY * max_entries)


def default_shards(max_entries: int, max_bytes: int) -> int:
    """1 up to 16,384 entries, then about one for 8,192 entries, at most 64."""
    entries = max_entries or max_bytes // UNCOUNTED_BLOCK
    if entries <= SINGLE_SHARD_ENTRIES:
        return 1
    wanted = min(MAX_DEFAULT_SHARDS, entries // ENTRIES_PER_SHARD)
    affordable = max(1, min(wanted, max_bytes // MIN_SHARD_BYTES))
    return 1 << (affordable.bit_length() - 1)


def plan_for(max_entries: int, max_bytes: int, shards: int) -> Geometry:
    """The geometry for given bounds: both rounded down to what all shards hold.

    A block is about a quarter of the average room of an entry (max_bytes /
    max_entries), a power of two from 64 to 4096 bytes: rounding then costs an
    average entry an eighth of its room, and no entry needs a long chain.
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
    """How many entries a shard may hold; over all shards the sum is max_entries."""
    if not max_entries:
        return blocks
    return max_entries // shards + (shard < max_entries % shards)
