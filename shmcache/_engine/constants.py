"""The numbers of the layout as C constants, and the engine's own numbers.

A module-level Python int in a hot expression costs about 30 times as much as a C
constant, and Cython cannot import a C constant from Python.  So each number of
``_format/layout.py`` that the engine uses has a twin of the same name here.
"""

from typing import TYPE_CHECKING

from shmcache._format import layout as L

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._format.richtypes import RICH


# --- words of a shard -------------------------------------------------------------
S_SEQ = cython.declare(cython.Py_ssize_t, L.S_SEQ)
S_HOLDER = cython.declare(cython.Py_ssize_t, L.S_HOLDER)
S_ACQUISITIONS = cython.declare(cython.Py_ssize_t, L.S_ACQUISITIONS)
S_SEQUENCE = cython.declare(cython.Py_ssize_t, L.S_SEQUENCE)
S_ENTRIES = cython.declare(cython.Py_ssize_t, L.S_ENTRIES)
S_BLOCKS_USED = cython.declare(cython.Py_ssize_t, L.S_BLOCKS_USED)
S_FREE_SLOT = cython.declare(cython.Py_ssize_t, L.S_FREE_SLOT)
S_FRESH_SLOT = cython.declare(cython.Py_ssize_t, L.S_FRESH_SLOT)
S_FREE_BLOCK = cython.declare(cython.Py_ssize_t, L.S_FREE_BLOCK)
S_FRESH_BLOCK = cython.declare(cython.Py_ssize_t, L.S_FRESH_BLOCK)
S_TICK = cython.declare(cython.Py_ssize_t, L.S_TICK)
S_DUE = cython.declare(cython.Py_ssize_t, L.S_DUE)
S_REDO_SLOT = cython.declare(cython.Py_ssize_t, L.S_REDO_SLOT)
S_REDO_VERSION = cython.declare(cython.Py_ssize_t, L.S_REDO_VERSION)
S_REDO_VALUE = cython.declare(cython.Py_ssize_t, L.S_REDO_VALUE)
S_REDO_CHECKSUM = cython.declare(cython.Py_ssize_t, L.S_REDO_CHECKSUM)
S_IN_DOUBT = cython.declare(cython.Py_ssize_t, L.S_IN_DOUBT)
S_LATE_USE = cython.declare(cython.Py_ssize_t, L.S_LATE_USE)
S_HITS = cython.declare(cython.Py_ssize_t, L.S_HITS)
S_MISSES = cython.declare(cython.Py_ssize_t, L.S_MISSES)
S_SETS = cython.declare(cython.Py_ssize_t, L.S_SETS)
S_TOO_LARGE = cython.declare(cython.Py_ssize_t, L.S_TOO_LARGE)
S_GONE = cython.declare(cython.Py_ssize_t, L.S_GONE)
S_UNREAD = cython.declare(cython.Py_ssize_t, L.S_UNREAD)
S_LOCK_WAITS = cython.declare(cython.Py_ssize_t, L.S_LOCK_WAITS)
S_LOCK_WAIT_NS = cython.declare(cython.Py_ssize_t, L.S_LOCK_WAIT_NS)
S_LOCK_TIMEOUTS = cython.declare(cython.Py_ssize_t, L.S_LOCK_TIMEOUTS)
S_RECOVERIES = cython.declare(cython.Py_ssize_t, L.S_RECOVERIES)
S_DROPPED = cython.declare(cython.Py_ssize_t, L.S_DROPPED)
S_LOCK_BUCKETS = cython.declare(cython.Py_ssize_t, L.S_LOCK_BUCKETS)
S_AGE_BUCKETS = cython.declare(cython.Py_ssize_t, L.S_AGE_BUCKETS)
S_AGES = cython.declare(cython.Py_ssize_t, L.S_AGES)
S_COUNTERS = cython.declare(cython.Py_ssize_t, L.S_COUNTERS)
S_COUNTERS_END = cython.declare(cython.Py_ssize_t, L.S_COUNTERS_END)
S_WHEEL_BITS = cython.declare(cython.Py_ssize_t, L.S_WHEEL_BITS)
S_WHEEL_HEADS = cython.declare(cython.Py_ssize_t, L.S_WHEEL_HEADS)
S_IN_FLIGHT = cython.declare(cython.Py_ssize_t, L.S_IN_FLIGHT)
S_MAILBOX_HEAD = cython.declare(cython.Py_ssize_t, L.S_MAILBOX_HEAD)
S_MAILBOX = cython.declare(cython.Py_ssize_t, L.S_MAILBOX)

# --- sizes of the tables in a shard -----------------------------------------------
CAUSES = cython.declare(cython.Py_ssize_t, len(L.Cause))
IN_FLIGHT = cython.declare(cython.Py_ssize_t, L.IN_FLIGHT)
MAILBOX_SIZE = cython.declare(cython.ulonglong, L.MAILBOX_SIZE)
MAILBOX_WORDS = cython.declare(cython.Py_ssize_t, L.MAILBOX_WORDS)
OWNER_SIZE = cython.declare(cython.Py_ssize_t, L.HANDLE_PREFIX)
WHEEL_LEVELS = cython.declare(cython.Py_ssize_t, L.WHEEL_LEVELS)
WHEEL_TICK_BITS = cython.declare(cython.uint, L.WHEEL_TICK_BITS)
WHEEL_FIRST = cython.declare(cython.uint, L.WHEEL_FIRST)

# --- a record: 32-bit words, and the 64-bit word that follows its version ----------
F_HASH = cython.declare(cython.Py_ssize_t, L.F_HASH)
F_CHAIN = cython.declare(cython.Py_ssize_t, L.F_CHAIN)
F_LRU_PREV = cython.declare(cython.Py_ssize_t, L.F_LRU_PREV)
F_LRU_NEXT = cython.declare(cython.Py_ssize_t, L.F_LRU_NEXT)
F_WHEEL_PREV = cython.declare(cython.Py_ssize_t, L.F_WHEEL_PREV)
F_WHEEL_NEXT = cython.declare(cython.Py_ssize_t, L.F_WHEEL_NEXT)
F_BLOCK = cython.declare(cython.Py_ssize_t, L.F_BLOCK)
F_VALUE_LEN = cython.declare(cython.Py_ssize_t, L.F_VALUE_LEN)
F_META = cython.declare(cython.Py_ssize_t, L.F_META)
F_TTL = cython.declare(cython.Py_ssize_t, L.F_TTL)
F_STAMP = cython.declare(cython.Py_ssize_t, L.F_STAMP)
F_CHECKSUM = cython.declare(cython.Py_ssize_t, L.F_CHECKSUM)
F64_EXPIRES = cython.declare(cython.Py_ssize_t, L.F64_EXPIRES)
META_KEY = cython.declare(cython.uint, L.META_KEY)
META_FETCHED = cython.declare(cython.uint, L.META_FETCHED)
META_KNOWN = cython.declare(cython.uint, L.META_FETCHED * 2 - 1)

# --- a worker row -----------------------------------------------------------------
ROWS = cython.declare(cython.Py_ssize_t, L.ROWS)
R_HITS = cython.declare(cython.Py_ssize_t, L.R_HITS)
R_MISSES = cython.declare(cython.Py_ssize_t, L.R_MISSES)

# --- values of words --------------------------------------------------------------
NEVER = cython.declare(cython.ulonglong, L.NEVER)
MASK32 = cython.declare(cython.ulonglong, L.MASK32)
MASK64 = cython.declare(cython.ulonglong, L.MASK64)
SHARDS = cython.declare(cython.ulonglong, L.MAX_SHARDS)
ALL_IN_DOUBT = cython.declare(cython.ulonglong, L.ALL_IN_DOUBT)
LONGEST_KEY = cython.declare(cython.Py_ssize_t, L.MAX_KEY)
STAMP_SHIFT = cython.declare(cython.uint, L.STAMP_SHIFT)
TTL_VALUE = cython.declare(cython.ulonglong, L.TTL_VALUE)
LONGEST_TTL = cython.declare(cython.ulonglong, L.MAX_TTL_NS)
# No clock reaches this, so an expiry after it is damage, unless it is NEVER.  (The
# wheel would meet an entry that is due more than one turn ahead again and again.)
MAX_EXPIRES = cython.declare(cython.ulonglong, 1 << 62)
# No shard lives long enough for a higher version, so one in a record is damage.
MAX_VERSION = cython.declare(cython.ulonglong, L.LAST_SEQUENCE << 1 | 1)
# After damage the write sequence goes on so far ahead: no shard sees more writes.
SEQUENCE_LEAP = cython.declare(cython.ulonglong, 1 << 40)
EXPIRED = cython.declare(cython.Py_ssize_t, L.Cause.EXPIRED)
CAPACITY = cython.declare(cython.Py_ssize_t, L.Cause.CAPACITY)
DELETED = cython.declare(cython.Py_ssize_t, L.Cause.DELETED)
REPLACED = cython.declare(cython.Py_ssize_t, L.Cause.REPLACED)
CLEARED = cython.declare(cython.Py_ssize_t, L.Cause.CLEARED)
STR_KEY = cython.declare(cython.uint, L.Kind.STR)
BYTES_KEY = cython.declare(cython.uint, L.Kind.BYTES)
LAST_KIND = cython.declare(cython.uint, max(L.Kind))
CODEC_TAG = cython.declare(cython.uint, L.Tag.CODEC)
BYTES_TAG = cython.declare(cython.uint, L.Tag.BYTES)
INT_TAG = cython.declare(cython.uint, L.Tag.INT)
FLOAT_TAG = cython.declare(cython.uint, L.Tag.FLOAT)
LAST_TAG = cython.declare(cython.uint, max(L.Tag))

# --- modes ------------------------------------------------------------------------
# Modes of ``_put``: they say whether an entry must exist, must not exist, or may do
# both.
ANY = cython.declare(cython.int, 0)
ADD = cython.declare(cython.int, 1)
REPLACE = cython.declare(cython.int, 2)
CAS = cython.declare(cython.int, 3)

# Bits of the mode of ``_lookup``.
COUNTS_AS_USE = cython.declare(cython.int, 1)
WANTS_VALUE = cython.declare(cython.int, 2)

# --- numbers that were chosen -----------------------------------------------------
# The recency buffer holds this many hits of one process for each shard, and fewer in a
# small shard: an eighth of its entries.  Hits that are applied late rank higher than
# what was used since, so together they must be a small part of the order.  Moving 64
# entries whose records were prefetched costs little more than moving 64 cached ones.
RECENCY_SIZE = 64
RECENCY = cython.declare(cython.Py_ssize_t, RECENCY_SIZE)
RECENCY_SHARE = 8
# Each insert also removes at most this many expired entries.
EXPIRED_PER_INSERT = cython.declare(cython.Py_ssize_t, 4)
# A reader tries this many optimistic reads before it queues up with the writers.
ATTEMPTS = cython.declare(cython.int, 8)
# A waiter looks at a busy lock this often before it sleeps: that is about 2 us, the
# length of several write sections.
SPINS = cython.declare(cython.int, 40)
# A sleeping waiter wakes at this interval (ns) to see whether the holder still lives.
LOOK_NS = cython.declare(cython.ulonglong, 25_000_000)
# After this many looks a reader takes it that the writer inside the shard is stuck: the
# rebuild of a shard of 100,000 entries takes less time.
PATIENCE = cython.declare(cython.int, 4)
# A reader beside a stuck holder walks twice, so many seconds apart, before it believes
# "not found".  That is some ten times the length of a write section.
STUCK_PAUSE = cython.declare(cython.double, 0.000_1)
# Placeholder token when the dead process left HOLDER empty; no real token is so small.
UNKNOWN = cython.declare(cython.ulonglong, 1)
# The first byte of a value that a bare unpackb() cannot read.
RICH_BYTE = cython.declare(cython.uchar, RICH)
# xxh3.h hashes up to this many bytes; the xxhash package hashes longer texts.
XXH3_MAX = cython.declare(cython.Py_ssize_t, 128)

# Index is the type of numbers of words and bytes; Word is the type of the words.
Index = cython.typedef(cython.Py_ssize_t)
Word = cython.typedef(cython.ulonglong)
