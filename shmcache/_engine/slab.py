# cython: language_level=3, auto_pickle=False
# cython: wraparound=False, cdivision=True, initializedcheck=False
# C types mean nothing to mypy, so what it would say of them is switched off:
# mypy: disable-error-code="valid-type, operator, untyped-decorator, no-any-return"
# mypy: disable-error-code="unreachable, misc, type-arg, index, attr-defined"
"""The engine: everything that runs inside, or in place of, a shard's lock.

One class, one compilation unit, because no Python code may run between taking a
shard's lock and giving it back: a signal handler, a finalizer started by the
garbage collector or another thread would find the shard half changed.  For the
same reason nothing here allocates objects that the collector tracks while the
lock is held.  The file reads from the inside out:

    words and bytes     the views, and where things lie
    lists               chains, LRU ring, blocks, free lists
    timer wheel         O(1) to enter and leave, O(expired) to collect
    entries             find, store, retire, evict
    repair              all lists anew from the live records
    lock                semaphore, holder, epoch
    reading             without the lock (compiled), and the touch buffer
    operations          the public methods of a cache

The same text runs compiled by Cython and interpreted.  ``if cython.compiled:``
stands only where the two must differ: memory order, raw copies, semaphores.

What holds at every single store (so at every instant at which a process may die):
an entry is in the cache if and only if its record's version is odd, and then its
other fields, key and value are in place.  So a writer fills a free record and
fresh blocks first and publishes by storing the version; an entry that goes has
its version cleared first; an overwrite publishes a second record and retires the
first.  Everything else is derived, and ``_rebuild`` derives it.
"""

from __future__ import annotations

import functools
import gc
import os
import struct
import sys
from array import array
from threading import get_ident
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from msgpack import unpackb
from xxhash import xxh3_64_intdigest

from shmcache._arguments import Ttl, ttl_to_ns
from shmcache._format import layout as L
from shmcache._format.keys import encode_key
from shmcache._format.richtypes import RICH
from shmcache._format.values import decode_tagged
from shmcache._segment.create import Gone
from shmcache.errors import EntryTooLarge, LockTimeout, SegmentCorrupt, UnsupportedValue

if TYPE_CHECKING:
    from types import FrameType

try:
    import cython
except ImportError:
    from shmcache._format import shim as cython

if cython.compiled:
    from cython.cimports.cpython.bytes import (
        PyBytes_AS_STRING,
        PyBytes_FromStringAndSize,
    )
    from cython.cimports.cpython.exc import PyErr_CheckSignals
    from cython.cimports.cpython.unicode import PyUnicode_AsUTF8String
    from cython.cimports.shmcache._engine.memory import (
        CHECKSUMS,
        cas,
        checksum,
        has_left,
        load,
        lowest_bit,
        memcmp,
        memcpy,
        now_ns,
        on_exit,
        pause,
        prefetch,
        read_fence,
        sem_close,
        sem_open,
        sem_post,
        sem_try,
        sem_value,
        sem_wait,
        store,
        write_fence,
        xxh3,
    )
else:
    from signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals

    from posix_ipc import BusyError, SignalError
    from posix_ipc import Semaphore as PosixSemaphore

    _SIGNALS = valid_signals()

compiled: bool = cython.compiled

# C twins of the layout's numbers: a module-level Python int costs 30 times as much.
_S_SEQ = cython.declare(cython.Py_ssize_t, L.S_SEQ)
_S_HOLDER = cython.declare(cython.Py_ssize_t, L.S_HOLDER)
_S_ACQUISITIONS = cython.declare(cython.Py_ssize_t, L.S_ACQUISITIONS)
_S_SEQUENCE = cython.declare(cython.Py_ssize_t, L.S_SEQUENCE)
_S_ENTRIES = cython.declare(cython.Py_ssize_t, L.S_ENTRIES)
_S_BLOCKS_USED = cython.declare(cython.Py_ssize_t, L.S_BLOCKS_USED)
_S_FREE_SLOT = cython.declare(cython.Py_ssize_t, L.S_FREE_SLOT)
_S_FRESH_SLOT = cython.declare(cython.Py_ssize_t, L.S_FRESH_SLOT)
_S_FREE_BLOCK = cython.declare(cython.Py_ssize_t, L.S_FREE_BLOCK)
_S_FRESH_BLOCK = cython.declare(cython.Py_ssize_t, L.S_FRESH_BLOCK)
_S_TICK = cython.declare(cython.Py_ssize_t, L.S_TICK)
_S_DUE = cython.declare(cython.Py_ssize_t, L.S_DUE)
_S_REDO_SLOT = cython.declare(cython.Py_ssize_t, L.S_REDO_SLOT)
_S_REDO_VERSION = cython.declare(cython.Py_ssize_t, L.S_REDO_VERSION)
_S_REDO_VALUE = cython.declare(cython.Py_ssize_t, L.S_REDO_VALUE)
_S_REDO_CHECKSUM = cython.declare(cython.Py_ssize_t, L.S_REDO_CHECKSUM)
_S_HITS = cython.declare(cython.Py_ssize_t, L.S_HITS)
_S_MISSES = cython.declare(cython.Py_ssize_t, L.S_MISSES)
_S_SETS = cython.declare(cython.Py_ssize_t, L.S_SETS)
_S_TOO_LARGE = cython.declare(cython.Py_ssize_t, L.S_TOO_LARGE)
_S_GONE = cython.declare(cython.Py_ssize_t, L.S_GONE)
_S_UNREAD = cython.declare(cython.Py_ssize_t, L.S_UNREAD)
_S_LOCK_WAITS = cython.declare(cython.Py_ssize_t, L.S_LOCK_WAITS)
_S_LOCK_WAIT_NS = cython.declare(cython.Py_ssize_t, L.S_LOCK_WAIT_NS)
_S_LOCK_TIMEOUTS = cython.declare(cython.Py_ssize_t, L.S_LOCK_TIMEOUTS)
_S_RECOVERIES = cython.declare(cython.Py_ssize_t, L.S_RECOVERIES)
_S_DROPPED = cython.declare(cython.Py_ssize_t, L.S_DROPPED)
_S_LOCK_BUCKETS = cython.declare(cython.Py_ssize_t, L.S_LOCK_BUCKETS)
_S_AGE_BUCKETS = cython.declare(cython.Py_ssize_t, L.S_AGE_BUCKETS)
_S_AGES = cython.declare(cython.Py_ssize_t, L.S_AGES)
_S_MAILBOX_HEAD = cython.declare(cython.Py_ssize_t, L.S_MAILBOX_HEAD)
_S_MAILBOX = cython.declare(cython.Py_ssize_t, L.S_MAILBOX)
_MAILBOX_SIZE = cython.declare(cython.ulonglong, L.MAILBOX_SIZE)
_MAILBOX_WORDS = cython.declare(cython.Py_ssize_t, L.MAILBOX_WORDS)
_HANDLE_PREFIX = cython.declare(cython.Py_ssize_t, L.HANDLE_PREFIX)
_S_WHEEL_BITS = cython.declare(cython.Py_ssize_t, L.S_WHEEL_BITS)
_S_WHEEL_HEADS = cython.declare(cython.Py_ssize_t, L.S_WHEEL_HEADS)
_S_COUNTERS = cython.declare(cython.Py_ssize_t, L.S_COUNTERS)
_S_COUNTERS_END = cython.declare(cython.Py_ssize_t, L.S_COUNTERS_END)
_CAUSES = cython.declare(cython.Py_ssize_t, len(L.Cause))
_ROWS = cython.declare(cython.ulonglong, L.ROWS)
# No clock gets there, so an expiry after it, but for NEVER, is damage.  (An entry
# due over a round of the wheel away would come again and again.)
_MAX_EXPIRES = cython.declare(cython.ulonglong, 1 << 62)
# No shard lives long enough for a higher version: one in it is damage.
_MAX_VERSION = cython.declare(cython.ulonglong, 1 << 62)
_S_IN_FLIGHT = cython.declare(cython.Py_ssize_t, L.S_IN_FLIGHT)
_IN_FLIGHT = cython.declare(cython.Py_ssize_t, L.IN_FLIGHT)
_WHEEL_LEVELS = cython.declare(cython.Py_ssize_t, L.WHEEL_LEVELS)
_WHEEL_TICK_BITS = cython.declare(cython.uint, L.WHEEL_TICK_BITS)
_WHEEL_FIRST = cython.declare(cython.uint, L.WHEEL_FIRST)
_F_HASH = cython.declare(cython.Py_ssize_t, L.F_HASH)
_F_CHAIN = cython.declare(cython.Py_ssize_t, L.F_CHAIN)
_F_LRU_PREV = cython.declare(cython.Py_ssize_t, L.F_LRU_PREV)
_F_LRU_NEXT = cython.declare(cython.Py_ssize_t, L.F_LRU_NEXT)
_F_WHEEL_PREV = cython.declare(cython.Py_ssize_t, L.F_WHEEL_PREV)
_F_WHEEL_NEXT = cython.declare(cython.Py_ssize_t, L.F_WHEEL_NEXT)
_F_BLOCK = cython.declare(cython.Py_ssize_t, L.F_BLOCK)
_F_VALUE_LEN = cython.declare(cython.Py_ssize_t, L.F_VALUE_LEN)
_F_META = cython.declare(cython.Py_ssize_t, L.F_META)
_F_TTL = cython.declare(cython.Py_ssize_t, L.F_TTL)
_F_STAMP = cython.declare(cython.Py_ssize_t, L.F_STAMP)
_F_CHECKSUM = cython.declare(cython.Py_ssize_t, L.F_CHECKSUM)
_META_KEY = cython.declare(cython.uint, L.META_KEY)
_META_TAG_SHIFT = cython.declare(cython.uint, L.META_TAG_SHIFT)
_META_KNOWN = cython.declare(cython.uint, L.META_FETCHED * 2 - 1)
_META_FETCHED = cython.declare(cython.uint, L.META_FETCHED)
_R_HITS = cython.declare(cython.Py_ssize_t, L.R_HITS)
_R_MISSES = cython.declare(cython.Py_ssize_t, L.R_MISSES)
_NEVER = cython.declare(cython.ulonglong, L.NEVER)
_MASK32 = cython.declare(cython.ulonglong, L.MASK32)
_MASK64 = cython.declare(cython.ulonglong, L.MASK64)
_MAX_KEY = cython.declare(cython.Py_ssize_t, L.MAX_KEY)
_STAMP_SHIFT = cython.declare(cython.uint, L.STAMP_SHIFT)
_TTL_VALUE = cython.declare(cython.ulonglong, L.TTL_VALUE)
_MAX_TTL_NS = cython.declare(cython.ulonglong, L.MAX_TTL_NS)
_EXPIRED = cython.declare(cython.Py_ssize_t, L.Cause.EXPIRED)
_CAPACITY = cython.declare(cython.Py_ssize_t, L.Cause.CAPACITY)
_DELETED = cython.declare(cython.Py_ssize_t, L.Cause.DELETED)
_REPLACED = cython.declare(cython.Py_ssize_t, L.Cause.REPLACED)
_CLEARED = cython.declare(cython.Py_ssize_t, L.Cause.CLEARED)
_STR = cython.declare(cython.uint, L.Kind.STR)
_BYTES_KEY = cython.declare(cython.uint, L.Kind.BYTES)
_TAG_CODEC = cython.declare(cython.uint, L.Tag.CODEC)
_TAG_BYTES = cython.declare(cython.uint, L.Tag.BYTES)
_TAG_STR = cython.declare(cython.uint, L.Tag.STR)
_TAG_INT = cython.declare(cython.uint, L.Tag.INT)
_TAG_FLOAT = cython.declare(cython.uint, L.Tag.FLOAT)

# What _put may do with an entry that is there, or is not.
_ANY = cython.declare(cython.int, 0)
_ADD = cython.declare(cython.int, 1)
_REPLACE = cython.declare(cython.int, 2)
_CAS = cython.declare(cython.int, 3)

# How _lookup leaves its mark on an entry found; the odd ones do.
_QUIET = cython.declare(cython.int, 0)
_USE = cython.declare(cython.int, 1)
_PROBE = cython.declare(cython.int, 2)  # as _QUIET, and the value is not wanted
_RENEW = cython.declare(cython.int, 3)  # as _USE, and the value is not wanted

# Hits of one process that wait to be applied to a shard's LRU ring.  64 is far
# less than any shard holds that has more than one user, and 64 moves with the
# records prefetched cost little more than 64 cached ones.
TOUCHES = 64
_TOUCHES = cython.declare(cython.Py_ssize_t, TOUCHES)
# An insert pays for at most this many expired entries of others.
_RIDE = cython.declare(cython.Py_ssize_t, 4)
# Optimistic reads before a reader queues up with the writers.
_ATTEMPTS = cython.declare(cython.int, 8)
# Looks at a busy lock before sleeping: about 2 us, several write sections long.
_SPINS = cython.declare(cython.int, 40)
# A sleeping waiter wakes this often to see whether the holder still lives.
_LOOK_NS = cython.declare(cython.ulonglong, 25_000_000)
# A reader believes that the writer inside stands still after so many looks: repair of
# a shard of 100,000 entries is done by then.
_PATIENCE = cython.declare(cython.int, 4)
# Stands for a dead worker that had not signed, or no longer; no token is so small.
_UNKNOWN = cython.declare(cython.ulonglong, 1)


_LONG = struct.Struct("<q")
_DOUBLE = struct.Struct("<d")

_RICH = cython.declare(cython.uchar, RICH)
# What xxh3() of _memory.pxd takes.
_XXH3_MAX = cython.declare(cython.Py_ssize_t, 128)

# Numbers of words and bytes, and the words themselves.
Index = cython.typedef(cython.Py_ssize_t)
Word = cython.typedef(cython.ulonglong)


class _Missing:
    """The value of what is not there, where None is a value."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()
_UNSURE = _Missing()  # of a look without the lock that told nothing


class Corrupt(IndexError):
    """A number in the segment points where nothing can be.

    An IndexError, as that is what the bounds check of a view raises.
    """


def touch_buffers(shards: int) -> Any:
    """Room for the hits that a process has noted and not yet applied to the LRU rings.

    All Cache objects of a process that are on one segment share it, as any of them
    may be the next to write.  Slots, versions, and how many there are in each shard.
    """
    return (
        memoryview(array("I", bytes(4 * TOUCHES * shards))),
        memoryview(array("Q", bytes(8 * TOUCHES * shards))),
        memoryview(array("I", bytes(4 * shards))),
    )


def leave_on_exit(lease: int, rows: int, count: int, paths: Any) -> int:
    """Have this process leave when it calls C's ``exit`` and does not finalize Python.

    It removes the files if it is the last one out.  ``rows``, ``count``: the bytes of
    the lease file that hold the workers' locks; ``paths``: what to remove, the lease
    file first.  Interpreted it does nothing.
    """
    if cython.compiled:
        data: bytes = b"\0".join([os.fsencode(path) for path in paths]) + b"\0"
        return on_exit(lease, rows, count, PyBytes_AS_STRING(data), len(data))
    return 0


def left_before_exit(leaver: int, lease: int) -> None:
    """Take ``leave_on_exit`` back, given what it returned and its lease file."""
    if cython.compiled:
        if leaver:
            has_left(leaver, lease)


def close_semaphores(opened: Any) -> None:
    """Close what ``_open_semaphores`` returned; once is enough, twice does nothing."""
    if cython.compiled:
        i: Index
        address: Word
        for i in range(len(opened)):
            address = opened[i]
            opened[i] = 0
            if address:
                sem_close(address)
    else:
        try:
            while True:
                opened.pop().close()
        except IndexError:
            pass  # none is left, whoever else closed them


@cython.cfunc
@cython.inline
def _key_bytes(key: object) -> object:
    # kind, bytes of the rarer kinds, and all refusals: _codec.encode_key
    if type(key) is str:
        try:
            if cython.compiled:
                return PyUnicode_AsUTF8String(key)
            return key.encode()
        except UnicodeEncodeError:
            return encode_key(key)[1]  # raises, with the remedy
    if type(key) is bytes:
        return key
    return encode_key(key)[1]


@cython.cfunc
@cython.inline
@cython.exceptval(-1)
def _key_kind(key: object) -> cython.uint:
    if type(key) is str:
        return _STR
    if type(key) is bytes:
        return _BYTES_KEY
    return encode_key(key)[0]


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def _pack_ttl(ns: Word) -> cython.uint:
    # twin of _layout.pack_ttl
    unit: cython.uint = 0
    while ns > _TTL_VALUE:
        ns = (ns + 999) // 1000
        unit += 1
    return cython.cast(cython.uint, unit << 30 | ns)


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def _unpack_ttl(word: cython.uint) -> Word:
    ns: Word = word & _TTL_VALUE
    unit: cython.uint = word >> 30
    while unit > 0:
        ns = ns * 1000
        unit -= 1
    return ns


@cython.cclass
class Slab:
    """One attached segment: its shards, their locks, and the operations on them.

    ``shmcache.Cache`` is the class to use; it adds what need not be fast.
    """

    # --- words and bytes ------------------------------------------------------------

    w64: cython.ulonglong[::1]
    w32: cython.uint[::1]
    mem: cython.uchar[::1]
    guard: cython.ulonglong[::1]  # this process's token; the kernel zeroes it at fork
    sems: cython.ulonglong[::1]
    touch_slot: cython.uint[::1]
    touch_version: cython.ulonglong[::1]
    touch_count: cython.uint[::1]
    capacity: cython.ulonglong[::1]

    token: Word
    row: Index  # first 64-bit word of our worker row
    shards: Word
    shards8: Index  # 64-bit word of shard 0
    stride8: Index
    slots: Index
    blocks: Index
    block_shift: cython.uint
    block_size: Index
    buckets4: Index  # 32-bit words from the shard's start
    records8: Index
    links4: Index
    arena: Index  # bytes from the shard's start
    sliding: cython.bint
    fast_tags: cython.bint
    fast_unpack: cython.bint
    default_ttl: Word
    jitter: Word  # parts per million
    stamp_zero: Word
    lock_timeout: Word
    random: Word
    has_news: cython.bint
    in_step: cython.bint  # see _fetch_block
    waiting: cython.int  # threads of this process that sleep on a semaphore
    inside: dict  # interpreted, the threads that use one, and of which shard
    seed: Word
    codec: object
    encode: object
    decode: object
    clock: object
    news: object
    owners: object
    opened: object  # the semaphores, for close_semaphores
    pysems: object
    raw_only: cython.bint
    notify: cython.bint  # entries stand for handles, whose owners must be told
    noting: cython.bint  # evictions, to be logged once the lock is given up
    notes: list
    lock_bounds: cython.ulonglong[::1]  # ns
    age_bounds: cython.ulonglong[::1]  # stamps

    def _bind(
        self,
        words: Any,
        geometry: Any,
        capacity: Any,
        seed: int,
        codec: Any,
        clock: Any,
        settings: Any,
        touches: Any,
    ) -> None:
        """Point the engine at a mapped segment (a memoryview of its bytes).

        ``touches``: this process's own, from ``touch_buffers``.
        """
        self.mem = words
        self.w64 = words.cast("Q")
        self.w32 = words.cast("I")
        self.shards = geometry.shards
        self.shards8 = geometry.shards_at // 8
        self.stride8 = geometry.stride // 8
        self.slots = geometry.slots
        self.blocks = geometry.blocks
        self.block_size = geometry.block_size
        self.block_shift = geometry.block_size.bit_length() - 1
        self.buckets4 = geometry.buckets_at // 4
        self.records8 = geometry.records_at // 8
        self.links4 = geometry.links_at // 4
        self.arena = geometry.arena_at
        self.capacity = memoryview(array("Q", capacity))
        self.seed = seed
        self.codec = codec
        self.encode = codec.encode
        self.decode = codec.decode
        self.fast_tags = codec.name in {"msgpack", "pickle"}
        self.fast_unpack = codec.name == "msgpack"
        self.raw_only = codec.name == "raw"
        self.notify = codec.name == L.HANDLES
        self.lock_bounds = memoryview(
            array("Q", [round(bound * 1e9) for bound in L.LOCK_BOUNDS])
        )
        self.age_bounds = memoryview(
            array("Q", [round(bound * 1e9) >> L.STAMP_SHIFT for bound in L.AGE_BOUNDS])
        )
        self.clock = clock
        self.sliding = settings.sliding
        self.default_ttl = settings.ttl_ns
        self.jitter = settings.jitter_ppm
        self.stamp_zero = settings.created_at_ns
        self.lock_timeout = settings.lock_timeout_ns
        self.token = 0
        self.guard = memoryview(array("Q", [1]))  # unequal to the token: not joined
        self.row = 0
        self.random = 1
        self.has_news = False
        self.in_step = True
        self.news = []
        self.noting = False
        self.notes = []
        self.owners = {}
        self.pysems = []
        self.sems = memoryview(array("Q"))
        self.opened = []
        self.waiting = 0
        self.inside = {}
        self.touch_slot, self.touch_version, self.touch_count = touches

    def _open_semaphores(self, names: Any) -> Any:
        """Open the shards' semaphores, which exist; what ``close_semaphores`` takes."""
        if not cython.compiled:
            self.opened = self.pysems = [PosixSemaphore(name) for name in names]
            return self.opened
        opened = memoryview(array("Q", bytes(8 * len(names))))
        i: Index = 0
        for name in names:
            encoded: bytes = name.encode()
            opened[i] = sem_open(PyBytes_AS_STRING(encoded))
            if opened[i] == 0:
                close_semaphores(opened)
                raise SegmentCorrupt(
                    f"semaphore {name} is missing although its segment is in use;"
                    " stop all users of the cache, then attach again"
                )
            i += 1
        self.sems = opened
        self.opened = opened
        return opened

    def _close_semaphores(self) -> None:
        # A thread that uses one of them calls again when it does no more.  What stands
        # for this one is of a call that an exception from a signal handler has ended.
        if self.waiting or len(self.inside) > (get_ident() in self.inside):
            return
        close_semaphores(self.opened)

    def _join(self, guard: Any, token: int, row: int, seed: int, owners: Any) -> None:
        """Act from now on as the worker with this token and row."""
        self.guard = guard
        self.owners = owners
        self.row = row
        self.random = seed | 1
        self.waiting = 0  # the threads that waited are those of who forked us
        self.inside = {}
        self.token = token

    def _unbind(self) -> None:
        """Let go of the views, so that the mapping can be closed.

        Should another thread be in the middle of a call (in a codec or clock written
        in Python), its next step finds no words, or no semaphore.
        """
        self.token = 0
        self.guard = memoryview(array("Q", [1]))  # unequal to the token: closed
        if cython.compiled:
            self.w64 = memoryview(array("Q"))
            self.w32 = memoryview(array("I"))
            self.mem = memoryview(bytearray())
        else:
            self.w64 = self.w32 = self.mem = Gone()

    def _enter_process(self) -> None:
        """Become a worker: at the first use in a process, and after a fork."""
        raise NotImplementedError

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _now(self) -> Word:
        if self.clock is not None:
            return self.clock()
        if cython.compiled:
            return now_ns()
        return monotonic_ns()

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _hash(self, key: bytes, kind: cython.uint) -> Word:
        # Keys of one spelling and different kinds have nothing to do with each other.
        seed: Word = (self.seed + kind) & _MASK64
        if cython.compiled:
            n: Index = len(key)
            if n <= _XXH3_MAX:
                return xxh3(PyBytes_AS_STRING(key), n, seed)
        return xxh3_64_intdigest(key, seed)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def _shard(self, h: Word) -> Index:
        return cython.cast(Index, ((h >> 32) * self.shards) >> 32)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def _base(self, s: Index) -> Index:
        return self.shards8 + s * self.stride8

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _record(self, b: Index, slot: Index) -> Index:
        # First 64-bit word of a record; 0 is the sentinel.
        if slot < 0 or slot > self.slots:
            raise Corrupt("slot")
        return b + self.records8 + slot * 8

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def _bucket(self, b: Index, h32: Word) -> Index:
        # 32-bit word of the bucket of a hash; multiply-shift instead of modulo
        slots: Word = cython.cast(Word, self.slots)
        index: Word = (h32 * slots) >> 32
        return 2 * b + self.buckets4 + cython.cast(Index, index)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _block_at(self, b: Index, block: Index) -> Index:
        # First byte of a block.
        if block <= 0 or block > self.blocks:
            raise Corrupt("block")
        return 8 * b + self.arena + (block << self.block_shift)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _stamp(self, now: Word) -> cython.uint:
        return cython.cast(
            cython.uint, ((now - self.stamp_zero) >> _STAMP_SHIFT) & _MASK32
        )

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _put_word(self, i: Index, value: Word) -> cython.int:
        # A 64-bit store that no other store overtakes, in either direction.
        if cython.compiled:
            store(cython.address(self.w64[i]), value)
            write_fence()
        else:
            self.w64[i] = value & _MASK64
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _get_word(self, i: Index) -> Word:
        # A 64-bit load that no later load overtakes.
        if cython.compiled:
            return load(cython.address(self.w64[i]))
        return self.w64[i]

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _read_fence(self) -> cython.int:
        if cython.compiled:
            read_fence()
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _count(self, i: Index, n: Word) -> cython.int:
        # Add to a counter where an exception would leave the lock behind: no word that
        # damage may have put there makes the sum too large.
        self.w64[i] = (self.w64[i] + n) & _MASK64
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def _need(self, key_len: Index, value_len: Index) -> Index:
        # Blocks of an entry: at least one.
        n: Index = key_len + value_len
        if n == 0:
            return 1
        return (n + self.block_size - 1) >> self.block_shift

    @cython.cfunc
    @cython.exceptval(-1)
    def _copy_in(
        self, b: Index, block: Index, offset: Index, data: bytes
    ) -> cython.int:
        # Write bytes into a chain, from an offset on.
        n: Index = len(data)
        done: Index = 0
        cython.declare(piece=Index, at=Index)
        while offset >= self.block_size:
            offset -= self.block_size
            block = self.w32[2 * b + self.links4 + block]
        while done < n:
            at = self._block_at(b, block) + offset
            piece = self.block_size - offset
            if piece > n - done:
                piece = n - done
            if cython.compiled:
                memcpy(
                    cython.address(self.mem[at]), PyBytes_AS_STRING(data) + done, piece
                )
            else:
                self.mem[at : at + piece] = data[done : done + piece]
            done += piece
            offset = 0
            if done < n:
                block = self.w32[2 * b + self.links4 + block]
        return 0

    @cython.cfunc
    def _copy_out(self, b: Index, block: Index, offset: Index, n: Index) -> bytes:
        # Bytes of a chain.  What a reader without the lock gets may be garbage, but
        # every index is checked and n, checked by the caller, bounds the walk.
        at: Index
        done: Index = 0
        cython.declare(piece=Index, following=Index)
        while offset >= self.block_size:
            if block == 0 or block > self.blocks:
                raise Corrupt("block")
            offset -= self.block_size
            block = self.w32[2 * b + self.links4 + block]
        if cython.compiled:
            out: bytes = PyBytes_FromStringAndSize(cython.NULL, n)
            while done < n:
                at = self._block_at(b, block) + offset
                piece = self.block_size - offset
                # Chains are laid in order as far as possible: copy runs at once.
                while piece < n - done:
                    following = self.w32[2 * b + self.links4 + block]
                    if following != block + 1 or following > self.blocks:
                        break
                    block = following
                    piece += self.block_size
                if piece > n - done:
                    piece = n - done
                memcpy(
                    PyBytes_AS_STRING(out) + done, cython.address(self.mem[at]), piece
                )
                done += piece
                offset = 0
                if done < n:
                    block = self.w32[2 * b + self.links4 + block]
            return out
        pieces = []
        while done < n:
            at = self._block_at(b, block) + offset
            piece = min(self.block_size - offset, n - done)
            pieces.append(bytes(self.mem[at : at + piece]))
            done += piece
            offset = 0
            if done < n:
                block = self.w32[2 * b + self.links4 + block]
        return b"".join(pieces)

    @cython.cfunc
    @cython.exceptval(-1)
    def _same_key(self, b: Index, block: Index, key: bytes) -> cython.bint:
        n: Index = len(key)
        if not cython.compiled:
            return self._copy_out(b, block, 0, n) == key
        done: Index = 0
        cython.declare(piece=Index, at=Index)
        while True:
            at = self._block_at(b, block)
            piece = n - done
            if piece > self.block_size:
                piece = self.block_size
            if (
                memcmp(
                    cython.address(self.mem[at]), PyBytes_AS_STRING(key) + done, piece
                )
                != 0
            ):
                return False
            done += piece
            if done >= n:
                return True
            block = self.w32[2 * b + self.links4 + block]

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _checksum(self, value: bytes, h: Word, tag: cython.uint) -> cython.uint:
        if cython.compiled:
            # twin of _layout.checksum
            n: Index = len(value)
            total: Word = h ^ cython.cast(Word, tag) << 28
            if n <= _XXH3_MAX:
                total ^= checksum(PyBytes_AS_STRING(value), n)
            elif CHECKSUMS:
                total ^= xxh3_64_intdigest(value)
            return cython.cast(cython.uint, total & _MASK32)
        return L.checksum(value, h & _MASK32, tag)

    # --- lists ----------------------------------------------------------------------

    @cython.cfunc
    @cython.exceptval(-1)
    def _chain_insert(self, b: Index, slot: Index, h32: Word) -> cython.int:
        # At the head: of two records of one key a reader meets the newer one first.
        head: Index = self._bucket(b, h32)
        self.w32[2 * self._record(b, slot) + _F_CHAIN] = self.w32[head]
        if cython.compiled:
            write_fence()
        self.w32[head] = slot
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _chain_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        at: Index = self._bucket(b, self.w32[r + _F_HASH])
        steps: Index = 0
        node: Index = self.w32[at]
        while node != slot:
            steps += 1
            if node == 0 or steps > self.slots:
                raise Corrupt("chain")
            at = 2 * self._record(b, node) + _F_CHAIN
            node = self.w32[at]
        self.w32[at] = self.w32[r + _F_CHAIN]
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _lru_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        before: Index = 2 * self._record(b, self.w32[r + _F_LRU_PREV])
        after: Index = 2 * self._record(b, self.w32[r + _F_LRU_NEXT])
        if (
            self.w32[before + _F_LRU_NEXT] != slot
            or self.w32[after + _F_LRU_PREV] != slot
        ):
            # Neighbours that do not know it: unlinking would spread the damage.
            raise Corrupt("ring")
        self.w32[before + _F_LRU_NEXT] = self.w32[r + _F_LRU_NEXT]
        self.w32[after + _F_LRU_PREV] = self.w32[r + _F_LRU_PREV]
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _lru_front(self, b: Index, slot: Index) -> cython.int:
        sentinel: Index = 2 * self._record(b, 0)
        r: Index = 2 * self._record(b, slot)
        first: Index = self.w32[sentinel + _F_LRU_NEXT]
        self.w32[r + _F_LRU_PREV] = 0
        self.w32[r + _F_LRU_NEXT] = first
        self.w32[2 * self._record(b, first) + _F_LRU_PREV] = slot
        self.w32[sentinel + _F_LRU_NEXT] = slot
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _take_slot(self, b: Index) -> Index:
        # The slot freed last, which is still in the CPU's cache; then a fresh one.
        slot: Index = cython.cast(Index, self.w64[b + _S_FREE_SLOT])
        if slot:
            self.w64[b + _S_FREE_SLOT] = self.w32[2 * self._record(b, slot) + _F_CHAIN]
            return slot
        slot = cython.cast(Index, self.w64[b + _S_FRESH_SLOT]) + 1
        if slot < 1 or slot > self.slots:
            raise Corrupt("slots")
        self.w64[b + _S_FRESH_SLOT] = slot
        return slot

    @cython.cfunc
    @cython.exceptval(-1)
    def _take_blocks(self, b: Index, n: Index) -> Index:
        # A chain of n blocks, the last link 0; the caller has made sure of n.
        links: Index = 2 * b + self.links4
        first: Index = cython.cast(Index, self.w64[b + _S_FREE_BLOCK])
        last: Index = 0
        got: Index = 0
        block: Index = first
        while got < n and block:
            if block < 0 or block > self.blocks:
                raise Corrupt("block")
            last = block
            block = self.w32[links + block]
            got += 1
        self.w64[b + _S_FREE_BLOCK] = block
        if got < n:
            block = cython.cast(Index, self.w64[b + _S_FRESH_BLOCK])
            if block < 0 or block > self.blocks - (n - got):
                raise Corrupt("blocks")
            self.w64[b + _S_FRESH_BLOCK] = block + n - got
            while got < n:
                block += 1
                got += 1
                if last:
                    self.w32[links + last] = block
                else:
                    first = block
                last = block
        self.w32[links + last] = 0
        self.w64[b + _S_BLOCKS_USED] += n
        return first

    @cython.cfunc
    @cython.exceptval(-1)
    def _give_blocks(self, b: Index, first: Index, n: Index) -> cython.int:
        links: Index = 2 * b + self.links4
        last: Index = first
        _i: Index
        for _i in range(n - 1):
            if last == 0 or last > self.blocks:
                raise Corrupt("block")
            last = self.w32[links + last]
        if last == 0 or last > self.blocks or first == 0 or first > self.blocks:
            raise Corrupt("block")
        self.w32[links + last] = cython.cast(cython.uint, self.w64[b + _S_FREE_BLOCK])
        if self.w64[b + _S_BLOCKS_USED] < cython.cast(Word, n):
            raise Corrupt("blocks")
        self.w64[b + _S_FREE_BLOCK] = first
        self.w64[b + _S_BLOCKS_USED] -= n
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _blocks_left(self, b: Index) -> Index:
        used: Word = self.w64[b + _S_BLOCKS_USED]
        if used > cython.cast(Word, self.blocks):
            raise Corrupt("blocks")
        return self.blocks - cython.cast(Index, used)

    # --- timer wheel ----------------------------------------------------------------
    #
    # Problem: find what has expired without looking at what has not.
    # Mechanism: a hierarchical wheel (Varghese and Lauck 1987; the levels chosen by
    # the highest differing bit, as Kafka and tokio do).  Time is counted in ticks
    # of 2**20 ns.  An entry due at tick t lies at level l, where l is the highest
    # 6-bit digit in which t differs from the wheel's own tick, in the list of t's
    # digit there.  So all of level l is due before all of level l + 1, a word of
    # bits finds the first list, and an entry moves at most six times in its life.
    # The list of the current tick may hold entries due a moment later; they stay.
    # A reader of a sliding cache moves ``expires`` forward without the lock and
    # leaves the entry where it is: met too early, it is entered anew.
    # Death in the middle: repair enters every live record anew.

    @cython.cfunc
    @cython.exceptval(-1)
    def _wheel_insert(
        self, b: Index, slot: Index, expires: Word, now: Word
    ) -> cython.int:
        due: Word = self.w64[b + _S_DUE]
        if due == 0 or due == _NEVER:
            # Nothing else is in the wheel: it may stand at the present.
            self.w64[b + _S_TICK] = now >> _WHEEL_TICK_BITS
            due = _NEVER
        tick: Word = self.w64[b + _S_TICK]
        t: Word = expires >> _WHEEL_TICK_BITS
        if t < tick:
            t = tick
        differ: Word = t ^ tick
        level: Index = 0
        while differ >= 64 and level < _WHEEL_LEVELS - 1:
            differ >>= 6
            level += 1
        index: Index = cython.cast(
            Index, (t >> cython.cast(cython.uint, 6 * level)) & 63
        )
        number: Index = level * 64 + index
        head: Index = 2 * (b + _S_WHEEL_HEADS) + number
        first: Index = self.w32[head]
        r: Index = 2 * self._record(b, slot)
        self.w32[r + _F_WHEEL_PREV] = _WHEEL_FIRST | number
        self.w32[r + _F_WHEEL_NEXT] = first
        if first:
            self.w32[2 * self._record(b, first) + _F_WHEEL_PREV] = slot
        self.w32[head] = slot
        self.w64[b + _S_WHEEL_BITS + level] |= cython.cast(Word, 1) << cython.cast(
            cython.uint, index
        )
        if expires < due:
            self.w64[b + _S_DUE] = expires
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _wheel_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        before: cython.uint = self.w32[r + _F_WHEEL_PREV]
        if before == 0:
            return 0  # never expires
        after: Index = self.w32[r + _F_WHEEL_NEXT]
        number: Index
        if after and self.w32[2 * self._record(b, after) + _F_WHEEL_PREV] != slot:
            raise Corrupt("wheel")
        if before & _WHEEL_FIRST:
            number = before & ~_WHEEL_FIRST
            if (
                number >= 64 * _WHEEL_LEVELS
                or self.w32[2 * (b + _S_WHEEL_HEADS) + number] != slot
            ):
                raise Corrupt("wheel")
            self.w32[2 * (b + _S_WHEEL_HEADS) + number] = after
            if after == 0:
                self.w64[b + _S_WHEEL_BITS + (number >> 6)] &= ~(
                    cython.cast(Word, 1) << cython.cast(cython.uint, number & 63)
                )
        else:
            if self.w32[2 * self._record(b, before) + _F_WHEEL_NEXT] != slot:
                raise Corrupt("wheel")
            self.w32[2 * self._record(b, before) + _F_WHEEL_NEXT] = after
        if after:
            self.w32[2 * self._record(b, after) + _F_WHEEL_PREV] = before
        self.w32[r + _F_WHEEL_PREV] = 0
        self.w32[r + _F_WHEEL_NEXT] = 0
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _wheel_next(self, b: Index) -> Index:
        # Number of the list that is due first, or -2 when the wheel is empty.  A list
        # of a higher level whose time has begun (its spreading was interrupted) comes
        # before all others.
        tick: Word = self.w64[b + _S_TICK]
        level: Index = _WHEEL_LEVELS - 1
        cython.declare(bits=Word, digit=cython.uint)
        while level > 0:
            digit = cython.cast(
                cython.uint, (tick >> cython.cast(cython.uint, 6 * level)) & 63
            )
            if (self.w64[b + _S_WHEEL_BITS + level] >> digit) & 1:
                return level * 64 + digit
            level -= 1
        for level in range(_WHEEL_LEVELS):
            bits = self.w64[b + _S_WHEEL_BITS + level]
            if bits:
                if cython.compiled:
                    return level * 64 + lowest_bit(bits)
                return level * 64 + (bits & -bits).bit_length() - 1
        return -2

    @cython.cfunc
    @cython.exceptval(-1)
    def _reclaim(
        self, b: Index, now: Word, limit: Index, thorough: cython.bint
    ) -> Index:
        # Retire what has expired, how many.  At most limit entries leave the list that
        # they are in.  Those that stay, as they expire within this tick, but later, do
        # not count when thorough: there may be any number before the one that has.
        removed: Index = 0
        stays: Index = self.slots if thorough else limit
        target: Word = now >> _WHEEL_TICK_BITS
        cython.declare(
            tick=Word,
            start=Word,
            later=Word,
            expires=Word,
            number=Index,
            slot=Index,
            after=Index,
            shift=cython.uint,
        )
        while limit > 0:
            tick = self.w64[b + _S_TICK]
            if tick > _MAX_EXPIRES >> _WHEEL_TICK_BITS:
                raise Corrupt("tick")
            number = self._wheel_next(b)
            if number == -2:
                self.w64[b + _S_DUE] = _NEVER
                return removed
            shift = cython.cast(cython.uint, 6 * (number >> 6))
            start = ((tick >> (shift + 6)) << (shift + 6)) | (
                cython.cast(Word, number & 63) << shift
            )
            if start > target:
                self.w64[b + _S_DUE] = start << _WHEEL_TICK_BITS
                if target > tick:
                    self.w64[b + _S_TICK] = target
                return removed
            if start > tick:
                self.w64[b + _S_TICK] = start
            later = _NEVER
            slot = self.w32[2 * (b + _S_WHEEL_HEADS) + number]
            if slot == 0:
                raise Corrupt("wheel")
            while slot and limit > 0:
                after = self.w32[2 * self._record(b, slot) + _F_WHEEL_NEXT]
                expires = self.w64[self._record(b, slot) + 1]
                if expires <= now:
                    self._retire(b, slot, _EXPIRED, now)
                    removed += 1
                    limit -= 1
                elif expires > _MAX_EXPIRES:
                    raise Corrupt("expires")
                elif shift or expires >> _WHEEL_TICK_BITS > self.w64[b + _S_TICK]:
                    self._wheel_remove(b, slot)
                    self._wheel_insert(b, slot, expires, now)
                    limit -= 1
                elif stays:
                    stays -= 1
                    if expires < later:
                        later = expires
                elif thorough:
                    raise Corrupt("wheel")  # a list of more than there are
                else:
                    return removed
                slot = after
            if slot == 0 and later != _NEVER:
                # Only the current tick keeps entries, and all that is left is later.
                self.w64[b + _S_DUE] = later
                return removed
        return removed

    # --- entries --------------------------------------------------------------------

    @cython.cfunc
    @cython.exceptval(-1)
    def _find(self, b: Index, h32: Word, kind: cython.uint, key: bytes) -> Index:
        # The slot of a key, or 0.  The caller holds the lock.
        slot: Index = self.w32[self._bucket(b, h32)]
        want: cython.uint = cython.cast(cython.uint, len(key)) | kind << 16
        r: Index
        steps: Index = 0
        while slot:
            r = 2 * self._record(b, slot)
            if (
                self.w32[r + _F_HASH] == h32
                and self.w32[r + _F_META] & _META_KEY == want
                and self._same_key(b, self.w32[r + _F_BLOCK], key)
            ):
                self.in_step = self.w32[r + _F_BLOCK] == slot
                return slot
            slot = self.w32[r + _F_CHAIN]
            steps += 1
            if steps > self.slots:
                raise Corrupt("chain")
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _retire(self, b: Index, slot: Index, cause: Index, now: Word) -> cython.int:
        # Take an entry out: its version first, then all that refers to it.
        v: Index = self._record(b, slot)
        r: Index = 2 * v
        if not self.w64[v] & 1:
            raise Corrupt("version")
        self._put_word(v, self.w64[v] - 1)
        self._chain_remove(b, slot)
        self._lru_remove(b, slot)
        self._wheel_remove(b, slot)
        meta: cython.uint = self.w32[r + _F_META]
        need: Index = self._need(meta & _MAX_KEY, self.w32[r + _F_VALUE_LEN])
        if need > self.blocks or self.w64[b + _S_ENTRIES] == 0:
            raise Corrupt("length")
        if self.notify:
            self._post_notice(b, r, cause)
        if self.noting and cause <= _CAPACITY:
            self._note_eviction(b, r, cause)
        self._give_blocks(b, self.w32[r + _F_BLOCK], need)
        self.w32[r + _F_CHAIN] = cython.cast(cython.uint, self.w64[b + _S_FREE_SLOT])
        self.w64[b + _S_FREE_SLOT] = slot
        self.w64[b + _S_ENTRIES] -= 1
        self.w64[b + _S_GONE + cause] += 1
        if cause <= _CAPACITY:
            self._count_age(b, (self._stamp(now) - self.w32[r + _F_STAMP]) & _MASK32)
            if not meta & _META_FETCHED:
                self.w64[b + _S_UNREAD] += 1
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _note_eviction(self, b: Index, r: Index, cause: Index) -> cython.int:
        # For the log, which nothing may be written to here.  A flat list of bytes and
        # small ints: the collector tracks neither.
        meta: cython.uint = self.w32[r + _F_META]
        self.notes.append(cause << 4 | (meta >> 16 & 15))
        self.notes.append(self._copy_out(b, self.w32[r + _F_BLOCK], 0, meta & _MAX_KEY))
        self.has_news = True
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _count_age(self, b: Index, age: Word) -> cython.int:
        i: Index
        self._count(b + _S_AGES, age)
        for i in range(self.age_bounds.shape[0]):
            if age <= self.age_bounds[i]:
                self._count(b + _S_AGE_BUCKETS + i, 1)
                break
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _post_notice(self, b: Index, r: Index, cause: Index) -> cython.int:
        # Tell the owner of a handle, whose record this is, that it has gone.  The head
        # is stored last: who reads up to it finds whole notices.
        key_len: Index = self.w32[r + _F_META] & _MAX_KEY
        block: Index = self.w32[r + _F_BLOCK]
        head: Word = self.w64[b + _S_MAILBOX_HEAD]
        at: Index = (
            b
            + _S_MAILBOX
            + _MAILBOX_WORDS * cython.cast(Index, head & (_MAILBOX_SIZE - 1))
        )
        if self.w32[r + _F_VALUE_LEN] < _HANDLE_PREFIX:
            raise Corrupt("handle")
        self.w64[at] = _word_of(self._copy_out(b, block, key_len, 8))
        self.w64[at + 1] = _word_of(self._copy_out(b, block, key_len + 8, 8))
        self.w64[at + 2] = cause
        self._put_word(b + _S_MAILBOX_HEAD, (head + 1) & _MASK64)
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _blocks_of(self, b: Index, slot: Index) -> Index:
        r: Index = 2 * self._record(b, slot)
        return self._need(self.w32[r + _F_META] & _MAX_KEY, self.w32[r + _F_VALUE_LEN])

    @cython.cfunc
    @cython.exceptval(-1)
    def _evict(self, b: Index, now: Word, keep: Index) -> cython.bint:
        # Make room by one entry at least: expired ones first, then the least recently
        # used that is not ``keep``.  False when there is none.
        # Looking for them is bounded, but not below what a single shard holds by
        # default, where the order of eviction is exact.
        rounds: cython.int = 0
        while now >= self.w64[b + _S_DUE] and self.w64[b + _S_DUE] and rounds < 256:
            if self._reclaim(b, now, 64, True):
                return True
            rounds += 1
        slot: Index = self.w32[2 * self._record(b, 0) + _F_LRU_PREV]
        if slot == keep and slot:
            slot = self.w32[2 * self._record(b, slot) + _F_LRU_PREV]
        if slot == 0:
            return False
        self._retire(b, slot, _CAPACITY, now)
        return True

    @cython.cfunc
    @cython.exceptval(-1)
    def _store(
        self,
        s: Index,
        b: Index,
        old: Index,
        h: Word,
        kind: cython.uint,
        key: bytes,
        tag: cython.uint,
        value: bytes,
        expires: Word,
        ttl: cython.uint,
        now: Word,
    ) -> Word:
        # A new record for the key, in place of ``old`` if that is not 0; its version.
        if cython.compiled and old:
            self._fetch_neighbours(b, old)
        key_len: Index = len(key)
        value_len: Index = len(value)
        need: Index = self._need(key_len, value_len)
        if self.w64[b + _S_ENTRIES] > self.capacity[s]:
            raise Corrupt("entries")  # before all are evicted for it
        if old == 0:
            while self.w64[b + _S_ENTRIES] >= self.capacity[s]:
                if not self._evict(b, now, 0):
                    raise Corrupt("entries")
        while self._blocks_left(b) < need:
            if old and need + self._blocks_of(b, old) > self.blocks:
                # Old and new can never both fit: for an instant there is neither.
                self._retire(b, old, _REPLACED, now)
                old = 0
            elif not self._evict(b, now, old):
                raise Corrupt("blocks")
        slot: Index = self._take_slot(b)
        first: Index = self._take_blocks(b, need)
        self._copy_in(b, first, 0, key)
        self._copy_in(b, first, key_len, value)
        v: Index = self._record(b, slot)
        r: Index = 2 * v
        h32: Word = h & _MASK32
        self.w64[v + 1] = expires
        self.w32[r + _F_HASH] = cython.cast(cython.uint, h32)
        self.w32[r + _F_BLOCK] = first
        self.w32[r + _F_VALUE_LEN] = value_len
        self.w32[r + _F_META] = (
            cython.cast(cython.uint, key_len) | kind << 16 | tag << _META_TAG_SHIFT
        )
        self.w32[r + _F_TTL] = ttl
        self.w32[r + _F_STAMP] = self._stamp(now)
        self.w32[r + _F_CHECKSUM] = self._checksum(value, h32, tag)
        self.w32[r + _F_WHEEL_PREV] = 0
        self.w32[r + _F_WHEEL_NEXT] = 0
        sequence: Word = self.w64[b + _S_SEQUENCE] + 1
        self.w64[b + _S_SEQUENCE] = sequence
        version: Word = sequence << 1 | 1
        self._put_word(v, version)
        self._chain_insert(b, slot, h32)
        self._lru_front(b, slot)
        if expires != _NEVER:
            self._wheel_insert(b, slot, expires, now)
        if old:
            self._retire(b, old, _REPLACED, now)
        # Last, as len() looks without the lock and shall never see one too many.
        self.w64[b + _S_ENTRIES] += 1
        self.w64[b + _S_SETS] += 1
        return version

    # Overwriting a number in place
    #
    # Problem: a counter that moves to a new record and block at each step, for the sake
    # of a death that seldom comes, costs thrice what the step itself does.
    # Mechanism: number, version and checksum are written down in the shard's header (a
    # redo record, as in a database's log) before the entry is touched, so an overwrite
    # that was begun can be finished by anybody.  Readers are kept off as by any writer:
    # the version is even meanwhile, and another one afterwards.
    # Death in the middle: ``_rebuild`` begins with ``_redo``.  If the death came before
    # REDO_SLOT was stored, nothing of the entry has been changed.

    @cython.cfunc
    @cython.exceptval(-1)
    def _rewrite(
        self, s: Index, b: Index, slot: Index, data: bytes, checksum: cython.uint
    ) -> cython.int:
        # Eight bytes in place of the eight that are the entry's value.
        sequence: Word = self.w64[b + _S_SEQUENCE] + 1
        version: Word = sequence << 1 | 1
        self.w64[b + _S_SEQUENCE] = sequence
        self.w64[b + _S_REDO_VERSION] = version
        self.w64[b + _S_REDO_VALUE] = _word_of(data)
        self.w64[b + _S_REDO_CHECKSUM] = checksum
        self._put_word(b + _S_REDO_SLOT, slot)
        self._finish_rewrite(b, slot, data)
        self._note(s, b, slot, version)
        if cython.compiled:
            self._fetch_neighbours(b, slot)  # our next write applies the note
        self._count(b + _S_GONE + _REPLACED, 1)
        self._count(b + _S_SETS, 1)
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _finish_rewrite(self, b: Index, slot: Index, data: bytes) -> cython.int:
        v: Index = self._record(b, slot)
        key_len: Index = self.w32[2 * v + _F_META] & _MAX_KEY
        version: Word = self.w64[b + _S_REDO_VERSION]
        checksum: cython.uint = cython.cast(
            cython.uint, self.w64[b + _S_REDO_CHECKSUM] & _MASK32
        )
        self._put_word(v, version - 1)
        self._copy_in(b, self.w32[2 * v + _F_BLOCK], key_len, data)
        self.w32[2 * v + _F_CHECKSUM] = checksum
        self._put_word(v, version)
        self._put_word(b + _S_REDO_SLOT, 0)
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _redo(self, b: Index) -> cython.int:
        # Finish what a dead writer began; nothing if the words make no sense.
        slot: Word = self.w64[b + _S_REDO_SLOT]
        version: Word = self.w64[b + _S_REDO_VERSION]
        if 0 < slot <= cython.cast(Word, self.slots):
            v: Index = self._record(b, cython.cast(Index, slot))
            # Of a record that has become another's, the checksum will not agree.
            if (
                self.w64[v] < version <= self.w64[b + _S_SEQUENCE] << 1 | 1
                and version & 1
                and version <= _MAX_VERSION
                and self.w32[2 * v + _F_VALUE_LEN] == 8
            ):
                try:
                    self._finish_rewrite(
                        b,
                        cython.cast(Index, slot),
                        _bytes_of(self.w64[b + _S_REDO_VALUE]),
                    )
                except IndexError:
                    pass  # a chain of blocks that leads nowhere; the record is given up
        if slot:
            self.w64[b + _S_REDO_SLOT] = 0
        return 0

    # --- repair ---------------------------------------------------------------------
    #
    # Problem: whoever held the lock died, or was thrown out by an exception, or met an
    # index that makes no sense; the lists may be in any state.
    # Mechanism: the live records are the truth.  Each is examined (lengths, blocks that
    # nobody else has, hash of the key, checksum of the value) and given up if it is
    # damaged; then all lists and counts are written anew from the others.  The order of
    # the LRU ring is kept as far as its links hold, from both ends; what neither walk
    # reached goes to the end that is evicted first.
    # Death in the middle: nothing but a damaged record's version is changed before the
    # lists are, and these are derived again by the next repair.  The ring is laid from
    # the most recently used on, each link in place of the old one, so that a second
    # repair finds the same order.

    @cython.cfunc
    @cython.exceptval(-1)
    def _sound(self, b: Index, slot: Index, claimed: cython.uchar[::1]) -> cython.bint:
        # Whether a live record can be kept; claims its blocks if so.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + _F_META]
        key_len: Index = meta & _MAX_KEY
        kind: cython.uint = (meta >> 16) & 15
        tag: cython.uint = (meta >> _META_TAG_SHIFT) & 15
        value_len: Index = self.w32[r + _F_VALUE_LEN]
        expires: Word = self.w64[r // 2 + 1]
        if kind < 1 or kind > 4 or tag > 7 or expires == 0:
            return False
        if expires > _MAX_EXPIRES and expires != _NEVER:
            return False
        if meta & ~_META_KNOWN:
            self.w32[r + _F_META] = meta & _META_KNOWN
        ttl: cython.uint = _pack_ttl(_unpack_ttl(self.w32[r + _F_TTL]))
        if ttl != self.w32[r + _F_TTL]:
            self.w32[r + _F_TTL] = ttl
        need: Index = self._need(key_len, value_len)
        if need > self.blocks:
            return False
        links: Index = 2 * b + self.links4
        first: Index = self.w32[r + _F_BLOCK]
        block: Index = first
        got: Index = 0
        good: cython.bint = True
        while got < need:
            if block == 0 or block > self.blocks or claimed[block]:
                good = False
                break
            claimed[block] = 1
            block = self.w32[links + block]
            got += 1
        if good and block != 0:
            good = False
        if good:
            key: bytes = self._copy_out(b, first, 0, key_len)
            h: Word = self._hash(key, kind)
            value: bytes = self._copy_out(b, first, key_len, value_len)
            good = (
                self._base(self._shard(h)) == b
                and self.w32[r + _F_HASH] == h & _MASK32
                and self.w32[r + _F_CHECKSUM] == self._checksum(value, h & _MASK32, tag)
            )
        if not good:
            block = first
            while got > 0:
                got -= 1
                claimed[block] = 0
                block = self.w32[links + block]
        return good

    @cython.cfunc
    @cython.exceptval(-1)
    def _tidy(self, b: Index) -> cython.int:
        # Repair of what no record tells: counters that cannot be, and halves of claims.
        cython.declare(i=Index, at=Index, token=Word, evicted=Word)
        for i in range(_S_COUNTERS, _S_COUNTERS_END):
            if self.w64[b + i] >> 62:  # and room to count on below the bound
                self.w64[b + i] = 0
        for i in range(_S_GONE + _CAUSES, _S_UNREAD):
            self.w64[b + i] = 0
        evicted = self.w64[b + _S_GONE + _EXPIRED] + self.w64[b + _S_GONE + _CAPACITY]
        if self.w64[b + _S_UNREAD] > evicted:
            self.w64[b + _S_UNREAD] = evicted
        if self.w64[b + _S_ACQUISITIONS] >> 62:
            self.w64[b + _S_ACQUISITIONS] = 0
        if self.w64[self._record(b, 0)] & 1:
            self.w64[self._record(b, 0)] = 0  # the sentinel is no entry
        for i in range(_IN_FLIGHT):
            at = b + _S_IN_FLIGHT + 2 * i
            token = self.w64[at + 1]
            if token >> 16 == 0 or not 1 <= token & 0xFFFF <= _ROWS:
                if token:
                    self.w64[at + 1] = 0
                if self.w64[at]:
                    self.w64[at] = 0
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _rebuild(self, b: Index) -> Index:
        # Repair a shard whose lock we hold; how many entries were given up.
        slots: Index = self.slots
        claimed: cython.uchar[::1] = bytearray(self.blocks + 1)
        state: cython.uchar[::1] = bytearray(slots + 1)  # 1 live and sound, 2 in order
        order: cython.uint[::1] = memoryview(array("I", bytes(4 * (slots + 1))))
        capacity: Word = self.capacity[(b - self.shards8) // self.stride8]
        dropped: Index = 0
        fresh: Index = 0
        count: Index = 0
        sequence: Word = 0
        # The wheel's time.  A clock of the user's is Python code, so not asked now; a
        # wheel that stands in the past turns by itself, one in the future would not.
        now: Word = self._now() if self.clock is None else 0
        cython.declare(slot=Index, other=Index, v=Index, i=Index)
        self._tidy(b)
        self._redo(b)
        for slot in range(1, slots + 1):
            v = self._record(b, slot)
            if self.w64[v] == 0:
                continue
            fresh = slot
            if self.w64[v] & 1:
                if 1 < self.w64[v] <= _MAX_VERSION and self._sound(b, slot, claimed):
                    state[slot] = 1
                    if self.w64[v] >> 1 > sequence:
                        sequence = self.w64[v] >> 1
                    if self.w64[v + 1] < now:
                        now = self.w64[v + 1]
                else:
                    self._put_word(v, self.w64[v] - 1)
                    dropped += 1
        if not sequence <= self.w64[b + _S_SEQUENCE] <= _MAX_VERSION:
            self.w64[b + _S_SEQUENCE] = sequence

        # The order of use: down from the most recent, then up from the least.
        slot = self.w32[2 * self._record(b, 0) + _F_LRU_NEXT]
        while 0 < slot <= slots and state[slot] == 1:
            state[slot] = 2
            order[count] = slot
            count += 1
            slot = self.w32[2 * self._record(b, slot) + _F_LRU_NEXT]
        tail: Index = slots + 1
        slot = self.w32[2 * self._record(b, 0) + _F_LRU_PREV]
        while 0 < slot <= slots and state[slot] == 1 and tail > count + 1:
            state[slot] = 2
            tail -= 1
            order[tail] = slot
            slot = self.w32[2 * self._record(b, slot) + _F_LRU_PREV]
        for i in range(tail, slots + 1):
            order[count] = order[i]
            count += 1
        for slot in range(1, slots + 1):
            if state[slot] == 1:
                order[count] = slot
                count += 1

        for i in range(slots):
            self.w32[2 * b + self.buckets4 + i] = 0
        for i in range(_WHEEL_LEVELS):
            self.w64[b + _S_WHEEL_BITS + i] = 0
        for i in range(64 * _WHEEL_LEVELS):
            if self.w32[2 * (b + _S_WHEEL_HEADS) + i]:
                self.w32[2 * (b + _S_WHEEL_HEADS) + i] = 0
        self.w64[b + _S_DUE] = _NEVER
        self.w64[b + _S_TICK] = 0  # the first entry to enter sets it
        used: Index = 0
        entries: Word = 0
        for i in range(count):
            slot = order[i]
            other = self._twin(b, slot)
            if other:
                # Its overwrite was under way: the newer record counts.
                if self.w64[self._record(b, other)] > self.w64[self._record(b, slot)]:
                    self._unclaim(b, slot, claimed)
                    continue
                # The older one is in the lists already; it leaves, this one enters.
                used -= self._unclaim(b, other, claimed)
                entries -= 1
                self._chain_remove(b, other)
                self._wheel_remove(b, other)
            if entries == capacity:
                # Damage brought a removed entry back to life.
                self._unclaim(b, slot, claimed)
                dropped += 1
                continue
            v = self._record(b, slot)
            self.w32[2 * v + _F_WHEEL_PREV] = 0
            self.w32[2 * v + _F_WHEEL_NEXT] = 0
            self._chain_insert(b, slot, self.w32[2 * v + _F_HASH])
            if self.w64[v + 1] != _NEVER:
                self._wheel_insert(b, slot, self.w64[v + 1], now)
            used += self._need(
                self.w32[2 * v + _F_META] & _MAX_KEY, self.w32[2 * v + _F_VALUE_LEN]
            )
            entries += 1
        other = 0
        for i in range(count):
            slot = order[i]
            if self.w64[self._record(b, slot)] & 1:
                self.w32[2 * self._record(b, other) + _F_LRU_NEXT] = slot
                self.w32[2 * self._record(b, slot) + _F_LRU_PREV] = other
                other = slot
        self.w32[2 * self._record(b, other) + _F_LRU_NEXT] = 0
        self.w32[2 * self._record(b, 0) + _F_LRU_PREV] = other

        self.w64[b + _S_ENTRIES] = entries
        self.w64[b + _S_BLOCKS_USED] = used
        self.w64[b + _S_FRESH_SLOT] = fresh
        self.w64[b + _S_FREE_SLOT] = 0
        for slot in range(fresh, 0, -1):
            v = self._record(b, slot)
            if not self.w64[v] & 1:
                self.w32[2 * v + _F_CHAIN] = cython.cast(
                    cython.uint, self.w64[b + _S_FREE_SLOT]
                )
                self.w64[b + _S_FREE_SLOT] = slot
        fresh = self.blocks
        while fresh > 0 and not claimed[fresh]:
            fresh -= 1
        self.w64[b + _S_FRESH_BLOCK] = fresh
        self.w64[b + _S_FREE_BLOCK] = 0
        for i in range(fresh, 0, -1):
            if not claimed[i]:
                self.w32[2 * b + self.links4 + i] = cython.cast(
                    cython.uint, self.w64[b + _S_FREE_BLOCK]
                )
                self.w64[b + _S_FREE_BLOCK] = i
        if self.notify:
            # Which notices are missing nobody knows: as if more had come than there is
            # room for, so that every owner compares what it has with what is here.
            self._count(b + _S_MAILBOX_HEAD, _MAILBOX_SIZE + 1)
        self._count(b + _S_DROPPED, dropped)
        return dropped

    @cython.cfunc
    @cython.exceptval(-1)
    def _twin(self, b: Index, slot: Index) -> Index:
        # Another record of the same key that is in its bucket already, or 0.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + _F_META]
        key: bytes = self._copy_out(b, self.w32[r + _F_BLOCK], 0, meta & _MAX_KEY)
        return self._find(b, self.w32[r + _F_HASH], (meta >> 16) & 15, key)

    @cython.cfunc
    @cython.exceptval(-1)
    def _unclaim(self, b: Index, slot: Index, claimed: cython.uchar[::1]) -> Index:
        # Give up a sound record during repair; the number of its blocks.
        v: Index = self._record(b, slot)
        self._put_word(v, self.w64[v] - 1)
        need: Index = self._need(
            self.w32[2 * v + _F_META] & _MAX_KEY, self.w32[2 * v + _F_VALUE_LEN]
        )
        block: Index = self.w32[2 * v + _F_BLOCK]
        _i: Index
        for _i in range(need):
            claimed[block] = 0
            block = self.w32[2 * b + self.links4 + block]
        return need

    # --- lock -----------------------------------------------------------------------
    #
    # Problem: a POSIX semaphore has no owner; when the process that took it is killed,
    # it stays taken for ever, and nobody can tell whether the data is whole.
    # Mechanism: the semaphore is only the queue.  Who has its permit becomes the holder
    # by changing HOLDER from 0 to its token, and only the holder may write.  EPOCH is
    # odd while it does.  A waiter that sleeps too long looks at the holder: if the
    # kernel has dropped the holder's lease, the waiter puts its own token in the dead
    # one's place - the permit passes on - and repairs the shard if EPOCH is odd.
    # Death in the gap between permit and HOLDER, on the way in or out, loses the
    # permit: HOLDER is 0 and TURNS stands still.  A waiter that sees this twice goes
    # in without a permit, and so brings one back when it comes out.  Should the old
    # one turn up after all (its taker was only stopped), two processes come with
    # permits; the one that finds HOLDER taken drops its own and queues up again.  So
    # exclusion rests on HOLDER alone, and a spare permit is harmless.
    # The interpreted engine has no compare-and-swap; it looks and then stores under a
    # kernel lock, which also goes when its owner dies.

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _try_acquire(self, s: Index, b: Index) -> cython.bint:
        if cython.compiled:
            if not sem_try(self.sems[s]):
                return False  # taken, or closed
            if not cas(cython.address(self.w64[b + _S_HOLDER]), 0, self.token):
                return False  # a spare permit, dropped
            self._count(b + _S_ACQUISITIONS, 1)
            return True
        return self._take_permit(s, 0) and self._interpreted_hold(s, b)

    def _take_permit(self, s: int, timeout: float) -> bool:
        # posix_ipc lets other threads run meanwhile, and one of them may close the
        # cache: it sees that we wait, or we see that it has begun.
        if cython.compiled:
            raise NotImplementedError
        me = get_ident()
        got = False
        self.inside[me] = s
        try:
            if not self.closed:
                self.pysems[s].acquire(timeout)
                got = True
                if self.closed:
                    self.pysems[s].release()
                    got = False
        except (BusyError, IndexError):
            pass
        finally:
            self.inside.pop(me, None)
            if self.closed:
                self._close_semaphores()
        return got

    def _interpreted_hold(self, s: int, b: int) -> bool:
        # With the permit in hand; False when it turns out to be a spare one.
        return self._take_over(s, b, 0)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _acquire(self, s: Index, b: Index) -> cython.int:
        if not self._try_acquire(s, b):
            self._wait(s, b, True)
        if self.w64[b + _S_SEQ] & 1:
            self._mend(s, b, 0)
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _wait(self, s: Index, b: Index, patient: cython.bint) -> cython.bint:
        # The slow way in: spin a little, then sleep; from time to time look who holds.
        # Who is not patient comes back with False when a living holder makes no move.
        if self.guard[0] != self.token:
            self._enter_process()  # closed since the call began
        started: Word = monotonic_ns()
        now: Word = started
        holder: Word
        last_holder: Word = 1
        turns: Word = 0
        last_turns: Word = self.w64[b + _S_ACQUISITIONS]
        looks: cython.int = 0
        got: cython.int = 0
        _spin: cython.int
        if cython.compiled:
            for _spin in range(_SPINS):
                pause()
                if load(cython.address(self.w64[b + _S_HOLDER])) == 0:
                    if self._try_acquire(s, b):
                        self._waited(b, started)
                        return True
        elif self.w64[b + _S_HOLDER] == self.token:
            self._check_reentry(s)
        while True:
            got = self._sleep(s)
            if self.guard[0] != self.token:
                # Closed by another thread meanwhile.
                if got > 0:
                    self._post(s)
                if self.token == 0:
                    self._close_semaphores()
                self._enter_process()
            if cython.compiled and got < 0:
                PyErr_CheckSignals()
            if got > 0:
                if cython.compiled:
                    if cas(cython.address(self.w64[b + _S_HOLDER]), 0, self.token):
                        self._count(b + _S_ACQUISITIONS, 1)
                        self._waited(b, started)
                        return True
                elif self._interpreted_hold(s, b):
                    self._waited(b, started)
                    return True
            holder = self.w64[b + _S_HOLDER]
            turns = self.w64[b + _S_ACQUISITIONS]
            if got == 0:
                if holder and self._holder_is_dead(s, holder):
                    if self._take_over(s, b, holder):
                        self._mend(s, b, holder)
                        self._waited(b, started)
                        return True
                elif (
                    holder == 0
                    and last_holder == 0
                    and turns == last_turns
                    and self._permit_is_gone(s)
                    and self._take_over(s, b, 0)
                ):
                    self._mend(s, b, _UNKNOWN)
                    self._waited(b, started)
                    return True
                looks = looks + 1 if turns == last_turns and holder else 0
                if not patient and looks == _PATIENCE:
                    return False
                last_holder = holder
                last_turns = turns
            now = monotonic_ns()
            if now - started > self.lock_timeout:
                # One more counter that is exact only if nobody else times out just now.
                self._count(b + _S_LOCK_TIMEOUTS, 1)
                raise LockTimeout(self._describe_wait(s, holder, now - started))

    @cython.cfunc
    @cython.exceptval(-1)
    def _sleep(self, s: Index) -> cython.int:
        # Wait a while for a permit: 1, it is ours; 0, no; -1, a signal came.
        got: cython.int = 0
        if cython.compiled:
            self.waiting += 1
            sem: Word = self.sems[s]
            with cython.nogil:
                got = sem_wait(sem, _LOOK_NS)
            self.waiting -= 1
            return got
        before = pthread_sigmask(SIG_BLOCK, ())
        try:
            # posix_ipc would lose what a signal handler raises during the wait.
            pthread_sigmask(SIG_BLOCK, _SIGNALS)
            return self._take_permit(s, _LOOK_NS / 1e9)
        except SignalError:
            return -1
        finally:
            pthread_sigmask(SIG_SETMASK, before)

    @cython.cfunc
    @cython.exceptval(-1)
    def _waited(self, b: Index, started: Word) -> cython.int:
        i: Index
        waited: Word = monotonic_ns() - started
        self._count(b + _S_LOCK_WAITS, 1)
        self._count(b + _S_LOCK_WAIT_NS, waited)
        for i in range(self.lock_bounds.shape[0]):
            if waited <= self.lock_bounds[i]:
                self._count(b + _S_LOCK_BUCKETS + i, 1)
                break
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _post(self, s: Index) -> cython.int:
        if cython.compiled:
            sem_post(self.sems[s])
        else:
            self.pysems[s].release()
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _release(self, s: Index, b: Index) -> cython.int:
        self._put_word(b + _S_HOLDER, 0)
        self._post(s)
        if self.has_news:
            self._tell()
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _take_over(self, s: Index, b: Index, dead: Word) -> cython.bint:
        if cython.compiled:
            if not cas(cython.address(self.w64[b + _S_HOLDER]), dead, self.token):
                return False
            self._count(b + _S_ACQUISITIONS, 1)
            return True
        with self._recovery_lock(s):
            if self.w64[b + _S_HOLDER] != dead:
                return False
            self.owners[s] = get_ident()
            self.w64[b + _S_HOLDER] = self.token
            self._count(b + _S_ACQUISITIONS, 1)
            return True

    @cython.cfunc
    @cython.exceptval(-1)
    def _mend(self, s: Index, b: Index, dead: Word) -> cython.int:
        # With the lock held: repair what a holder left half done, and note the facts.
        started: Word = monotonic_ns()
        torn: cython.bint = self.w64[b + _S_SEQ] & 1
        dropped: Index = 0
        collecting: cython.bint = gc.isenabled()
        gc.disable()  # no finalizers while the lock is held
        try:
            if not torn and not dead:
                self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
                torn = True
            if torn:
                dropped = self._rebuild(b)
                self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
            self._count(b + _S_RECOVERIES, 1)
            self.news.append((s, dead, torn, dropped, monotonic_ns() - started))
            self.has_news = True
        except BaseException:
            # No memory: the epoch stays odd, and tells the next one to repair.
            self._release(s, b)
            raise
        finally:
            if collecting:
                gc.enable()
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _begin(self, s: Index, b: Index) -> cython.int:
        # Enter the write section.
        if not self._try_acquire(s, b):
            self._wait(s, b, True)
        self._start(s, b)
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _start(self, s: Index, b: Index) -> cython.int:
        # Begin to write, with the lock just acquired.
        if self.w64[b + _S_SEQ] & 1:
            self._mend(s, b, 0)
        self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
        if self.touch_count[s]:
            try:
                self._apply_touches(s, b)
            except BaseException as error:
                self._abort(s, b, error)
                raise
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _end(self, s: Index, b: Index) -> cython.int:
        self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
        self._release(s, b)
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _abort(self, s: Index, b: Index, error: object) -> cython.int:
        # Leave the write section after an exception; raises if that was damage: an
        # index out of bounds, or a number that an interpreted view cannot hold.
        if self.guard[0] != self.token:
            self._enter_process()  # closed since the call began
        damage: cython.bint = isinstance(error, IndexError) or (
            not cython.compiled
            and type(error) is ValueError
            and "memoryview" in str(error)
        )
        if damage or self.w64[b + _S_SEQ] & 1:
            self._mend(s, b, 0)
        self._release(s, b)
        if damage:
            raise SegmentCorrupt(
                f"shard {s} of the segment was damaged and has been repaired as far as"
                " its records were whole; repeat the call, and look for what else"
                " writes to the segment"
            ) from error
        return 0

    def _holder_is_dead(self, s: int, holder: int) -> bool:
        raise NotImplementedError

    def _recovery_lock(self, s: int) -> Any:
        raise NotImplementedError

    def _end_recoveries(self) -> None:
        raise NotImplementedError

    def _permit_is_gone(self, s: int) -> bool:
        if cython.compiled:
            return sem_value(self.sems[s]) == 0
        return bool(self.pysems[s].value == 0)

    def _check_reentry(self, s: int) -> None:
        raise NotImplementedError

    def _describe_wait(self, s: int, holder: int, waited: int) -> str:
        raise NotImplementedError

    def _tell(self) -> None:
        raise NotImplementedError

    # --- reading --------------------------------------------------------------------
    #
    # Problem: a lock around every read makes readers wait for readers.
    # Mechanism: a compiled reader takes no lock.  It walks the chain, which may change
    # under it (so every index is checked and the steps are counted), copies the value,
    # and then looks at the record's version once more: unchanged and odd means that the
    # copy is of one live entry, whatever happened to others meanwhile.  That nothing
    # was found holds only if the shard's epoch was even and is unchanged.  After a few
    # vain attempts it takes the lock like a writer - unless the writer inside makes no
    # progress and yet lives (it was stopped, or its host is starved): then nothing
    # moves either, so what a walk finds is there, and what it does not find is missing.
    # Recency: a hit is noted in a buffer of this process and applied under the lock
    # before its next write to the shard, or when the buffer is full and the lock free;
    # so LRU is exact in one process, and a buffer late for the others.
    # Death in the middle: readers write nothing to the shard but ``expires`` of sliding
    # entries, one compare-and-swap.

    @cython.cfunc
    def _lookup(self, key: object, how: cython.int) -> object:
        # The value of a key (True for a probe), or MISSING.
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            value = self._glance(s, b, h, kind, kb, how, False)
            if value is not _UNSURE:
                return value
        return self._locked_lookup(s, b, h, kind, kb, how)

    @cython.cfunc
    def _glance(
        self,
        s: Index,
        b: Index,
        h: Word,
        kind: cython.uint,
        kb: bytes,
        how: cython.int,
        stuck: cython.bint,
    ) -> object:
        # Look without the lock; _UNSURE when the lock must tell.
        h32: Word = h & _MASK32
        head: Index = self._bucket(b, h32)
        want: cython.uint = cython.cast(cython.uint, len(kb)) | kind << 16
        cython.declare(
            _attempt=cython.int, epoch=Word, version=Word, expires=Word, slot=Index
        )
        v: Index = 0
        cython.declare(
            r=Index,
            steps=Index,
            value_len=Index,
            meta=cython.uint,
            tag=cython.uint,
            block=Index,
        )
        data: bytes
        found: cython.bint
        try:
            for _attempt in range(_ATTEMPTS):
                epoch = self._get_word(b + _S_SEQ)
                slot = self.w32[head]
                if cython.compiled and slot:
                    self._fetch_block(b, slot)
                steps = 0
                found = False
                while slot:
                    v = self._record(b, slot)
                    r = 2 * v
                    version = self._get_word(v)
                    meta = self.w32[r + _F_META]
                    if (
                        self.w32[r + _F_HASH] == h32
                        and meta & _META_KEY == want
                        and version & 1
                    ):
                        block = self.w32[r + _F_BLOCK]
                        if self._same_key(b, block, kb):
                            self.in_step = block == slot
                            found = True
                            break
                    slot = self.w32[r + _F_CHAIN]
                    steps += 1
                    if steps > self.slots:
                        break
                if not found:
                    self._read_fence()
                    if (
                        (stuck or epoch & 1 == 0)
                        and epoch == self._get_word(b + _S_SEQ)
                        and slot == 0
                    ):
                        if how & 1:
                            self.w64[self.row + _R_MISSES] += 1
                        return MISSING
                    if cython.compiled:
                        pause()
                    continue
                value_len = self.w32[r + _F_VALUE_LEN]
                expires = self.w64[v + 1]
                self._read_fence()
                if version != self._get_word(v):
                    continue
                if how == _PROBE:
                    if expires != _NEVER and expires <= self._now():
                        return MISSING if stuck else _UNSURE
                    return True
                if how == _RENEW:
                    if expires != _NEVER and not self._still_good(v, expires, how):
                        return MISSING if stuck else _UNSURE
                    self.w64[self.row + _R_HITS] += 1
                    self._note(s, b, slot, version)
                    return True
                # Only now is the length known to be that of the entry.
                if self._need(len(kb), value_len) > self.blocks:
                    break
                tag = (meta >> _META_TAG_SHIFT) & 15
                data = self._copy_out(b, block, len(kb), value_len)
                self._read_fence()
                if version != self._get_word(v):
                    continue
                if self.w32[r + _F_CHECKSUM] != self._checksum(data, h32, tag):
                    break
                if expires != _NEVER:
                    if not self._still_good(v, expires, how):
                        return MISSING if stuck else _UNSURE
                if how == _USE:
                    self.w64[self.row + _R_HITS] += 1
                    self._note(s, b, slot, version)
                if tag == _TAG_CODEC:
                    return self._decode(data)
                if tag == _TAG_BYTES:
                    return data
                return decode_tagged(self.codec, tag, data)
        except IndexError:
            if self.guard[0] != self.token:
                self._enter_process()  # closed since the call began
        # Too busy a shard, an expired entry, or damage: all are settled under the lock.
        return _UNSURE

    @cython.cfunc
    def _decode(self, data: bytes) -> object:
        # What most values are goes to msgpack without a detour.
        if self.fast_unpack and len(data) and data[0] != _RICH:
            try:
                return unpackb(data)
            except Exception:  # noqa: BLE001, S110 - the codec knows what to say
                pass
        return self.decode(data)

    @cython.cfunc
    @cython.exceptval(-1)
    def _still_good(self, v: Index, expires: Word, how: cython.int) -> cython.bint:
        # Whether an entry with an expiry lives; in a sliding cache a use renews it.
        now: Word = self._now()
        if expires <= now:
            return False
        cython.declare(ttl=cython.uint, later=Word)
        if self.sliding and how & 1:
            ttl = self.w32[2 * v + _F_TTL]
            later = now + _unpack_ttl(ttl)
            if ttl and later > expires:
                if cython.compiled:
                    # Should the record have become another entry's since, this fails,
                    # but for one that was to expire at the same nanosecond.
                    cas(cython.address(self.w64[v + 1]), expires, later)
                else:
                    self.w64[v + 1] = later
        return True

    def _locked_lookup(
        self, s: int, b: int, h: int, kind: int, kb: bytes, how: int
    ) -> Any:
        # The same under the lock; what has expired leaves on this occasion.
        tag: cython.uint = 0
        data: bytes = b""
        now: Word = self._now()
        bb: Index = b
        if not self._try_acquire(s, bb) and not self._wait(s, bb, False):
            value = self._glance(s, bb, h, kind, kb, how, True)
            if value is not _UNSURE:
                return value
            self._wait(s, bb, True)
        self._start(s, bb)
        try:
            slot: Index = self._find(bb, h & _MASK32, kind, kb)
            if slot:
                v: Index = self._record(bb, slot)
                tag = (self.w32[2 * v + _F_META] >> _META_TAG_SHIFT) & 15
                if self.w64[v + 1] <= now:
                    self._retire(bb, slot, _EXPIRED, now)
                    slot = 0
            if slot:
                if how < _PROBE:
                    data = self._value(bb, slot, h)
                if how & 1:
                    self.w64[bb + _S_HITS] += 1
                    self._use(bb, slot)
                    if self.sliding and self.w64[v + 1] != _NEVER:
                        self._still_good(v, self.w64[v + 1], how)
            elif how & 1:
                self.w64[bb + _S_MISSES] += 1
        except BaseException as error:
            self._abort(s, bb, error)
            raise
        self._end(s, bb)
        if slot == 0:
            return MISSING
        if how >= _PROBE:
            return True
        return decode_tagged(self.codec, tag, data)

    @cython.cfunc
    def _key(self, b: Index, v: Index) -> bytes:
        # A live entry's key, under the lock, for who did not come with it; its hash
        # must agree.
        meta: cython.uint = self.w32[2 * v + _F_META]
        kind: cython.uint = (meta >> 16) & 15
        if self.w64[v] & 1 == 0 or kind > 4:
            raise Corrupt("key")
        key: bytes = self._copy_out(b, self.w32[2 * v + _F_BLOCK], 0, meta & _MAX_KEY)
        h: Word = self._hash(key, kind)
        if h & _MASK32 != self.w32[2 * v + _F_HASH]:
            raise Corrupt("key")
        return key

    @cython.cfunc
    def _value(self, b: Index, slot: Index, h: Word) -> bytes:
        # A live entry's bytes, under the lock; their checksum must agree.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + _F_META]
        value_len: Index = self.w32[r + _F_VALUE_LEN]
        if self._need(meta & _MAX_KEY, value_len) > self.blocks:
            raise Corrupt("length")
        data: bytes = self._copy_out(
            b, self.w32[r + _F_BLOCK], meta & _MAX_KEY, value_len
        )
        if self.w32[r + _F_CHECKSUM] != self._checksum(
            data, h & _MASK32, (meta >> _META_TAG_SHIFT) & 15
        ):
            raise Corrupt("checksum")
        return data

    @cython.cfunc
    @cython.exceptval(-1)
    def _use(self, b: Index, slot: Index) -> cython.int:
        # Make an entry the most recently used.
        r: Index = 2 * self._record(b, slot)
        sentinel: Index = 2 * (b + self.records8)
        before: Index = self.w32[r + _F_LRU_PREV]
        if not self.w32[r + _F_META] & _META_FETCHED:
            self.w32[r + _F_META] |= _META_FETCHED
        if before == 0:
            return 0
        after: Index = self.w32[r + _F_LRU_NEXT]
        first: Index = self.w32[sentinel + _F_LRU_NEXT]
        self.w32[2 * self._record(b, before) + _F_LRU_NEXT] = after
        self.w32[2 * self._record(b, after) + _F_LRU_PREV] = before
        self.w32[r + _F_LRU_PREV] = 0
        self.w32[r + _F_LRU_NEXT] = first
        self.w32[2 * self._record(b, first) + _F_LRU_PREV] = slot
        self.w32[sentinel + _F_LRU_NEXT] = slot
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _note(self, s: Index, b: Index, slot: Index, version: Word) -> cython.int:
        # Remember a hit; when the buffer is full apply it, or forget its older half.
        at: Index = s * _TOUCHES
        n: Index = self.touch_count[s]
        i: Index
        if n and self.touch_version[at + n - 1] == version:
            return 0
        if n == _TOUCHES:
            if self._try_acquire(s, b):
                if self.w64[b + _S_SEQ] & 1:
                    self._mend(s, b, 0)
                self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
                try:
                    self._apply_touches(s, b)
                except BaseException as error:
                    self._abort(s, b, error)
                    raise
                self._end(s, b)
                n = 0
            else:
                n = _TOUCHES // 2
                for i in range(n):
                    self.touch_slot[at + i] = self.touch_slot[at + n + i]
                    self.touch_version[at + i] = self.touch_version[at + n + i]
        self.touch_slot[at + n] = slot
        self.touch_version[at + n] = version
        self.touch_count[s] = n + 1
        return 0

    # Lines of the slab that will be needed soon, asked for while there is other work.

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_record(self, b: Index, h32: Word) -> cython.int:
        # The first record of a bucket.  Without the lock: it may be another's by then.
        slot: Index = self.w32[self._bucket(b, h32)]
        if slot <= self.slots:
            prefetch(cython.address(self.w32[2 * (b + self.records8 + slot * 8)]))
            self._fetch_block(b, slot)
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_block(self, b: Index, slot: Index) -> cython.int:
        # Of entries of one block each, slots and blocks are taken and freed together,
        # so they have the same numbers: ask for the block before the record, which
        # names it, has come.  As long as the last entry found was such a one.
        if self.in_step and slot <= self.blocks:
            at: Index = 8 * b + self.arena + (slot << self.block_shift)
            prefetch(cython.address(self.mem[at]))
            if self.block_shift > 6:
                prefetch(cython.address(self.mem[at + 64]))
        return 0

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_neighbours(self, b: Index, slot: Index) -> cython.int:
        # The records that are before and behind in the LRU ring.
        r: Index = 2 * self._record(b, slot)
        near: Index = self.w32[r + _F_LRU_PREV]
        prefetch(cython.address(self.w32[2 * self._record(b, near)]))
        near = self.w32[r + _F_LRU_NEXT]
        prefetch(cython.address(self.w32[2 * self._record(b, near)]))
        return 0

    @cython.cfunc
    @cython.exceptval(-1)
    def _apply_touches(self, s: Index, b: Index) -> cython.int:
        at: Index = s * _TOUCHES
        n: Index = self.touch_count[s]
        cython.declare(i=Index, r=Index, slot=Index)
        self.touch_count[s] = 0
        if cython.compiled and n > 4:
            # The records are all over the slab: have their lines fetched side by side.
            for i in range(n):
                r = 2 * self._record(b, self.touch_slot[at + i])
                prefetch(cython.address(self.w32[r]))
            for i in range(n):
                self._fetch_neighbours(b, self.touch_slot[at + i])
        for i in range(n):
            slot = self.touch_slot[at + i]
            if self.w64[self._record(b, slot)] == self.touch_version[at + i]:
                self._use(b, slot)
        return 0

    def _flush_touches(self) -> None:
        """Apply this process's noted hits to the LRU rings."""
        s: Index
        for s in range(self.touch_count.shape[0]):
            if self.touch_count[s]:
                self._step(s, 0)

    # --- operations -----------------------------------------------------------------

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _ttl(self, ttl: object) -> Word:
        # ns, 0 for "never"; an Ellipsis, as in the signatures, is "left out".
        if ttl is ...:
            return self.default_ttl
        if ttl is None:
            return 0
        return ttl_to_ns(ttl)

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _shorten(self, ns: Word) -> Word:
        # A TTL less a random part of at most ``jitter``, by xorshift64.
        if self.jitter == 0 or ns == 0:
            return ns
        x: Word = self.random
        x = (x ^ (x << 13)) & _MASK64
        x ^= x >> 7
        x = (x ^ (x << 17)) & _MASK64
        self.random = x
        cut: Word = ns // 1_000_000 * (x % (self.jitter + 1))
        if cut == 0:
            cut = ns * (x % (self.jitter + 1)) // 1_000_000
        return ns - cut if cut < ns else 1

    @cython.cfunc
    @cython.exceptval(-1)
    def _put(
        self, key: object, value: object, ttl: object, mode: cython.int, token: Word
    ) -> Word:
        # Store; the new version, or 0 when the mode forbids it.
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            self._fetch_record(b, h & _MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        tag: cython.uint
        data: bytes
        if type(value) is bytes and (self.fast_tags or self.raw_only):
            tag = _TAG_BYTES
            data = value
        else:
            pair: tuple = self.encode(value)
            tag = pair[0]
            data = pair[1]
        now: Word = self._now()
        expires: Word = now + ns if ns else _NEVER
        word: cython.uint = _pack_ttl(ns)
        version: Word = 0
        slot: Index
        if not self._fits(len(kb), len(data)):
            self._refuse(s, b, len(kb), len(data))
        self._begin(s, b)
        try:
            if now >= self.w64[b + _S_DUE] and self.w64[b + _S_DUE]:
                self._reclaim(b, now, _RIDE, False)
            slot = self._find(b, h & _MASK32, kind, kb)
            if slot and self.w64[self._record(b, slot) + 1] <= now:
                self._retire(b, slot, _EXPIRED, now)
                slot = 0
            if (
                mode == _ANY
                or (mode == _ADD and slot == 0)
                or (mode == _REPLACE and slot)
                or (mode == _CAS and slot and self.w64[self._record(b, slot)] == token)
            ):
                version = self._store(
                    s, b, slot, h, kind, kb, tag, data, expires, word, now
                )
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return version

    @cython.cfunc
    @cython.inline
    @cython.exceptval(-1)
    def _fits(self, key_len: Index, value_len: Index) -> cython.bint:
        # Whether an entry can be stored at all, be the shard empty.
        return (
            self._need(key_len, value_len) <= self.blocks
            and key_len <= _MAX_KEY
            and cython.cast(Word, value_len) <= _MASK32
        )

    def _refuse(self, s: int, b: int, key_len: int, value_len: int) -> None:
        bb: Index = b
        self._begin(s, bb)
        self._count(bb + _S_TOO_LARGE, 1)
        self._end(s, bb)
        if key_len > _MAX_KEY:
            raise EntryTooLarge(
                f"a key of {key_len:,} bytes is over the limit of {_MAX_KEY:,};"
                " use a digest of it as the key"
            )
        if value_len > L.MASK32:
            raise EntryTooLarge(
                f"a value of {value_len:,} bytes is over the limit of {L.MASK32:,};"
                " store it in parts"
            )
        room = self.blocks * self.block_size
        raise EntryTooLarge(
            f"key ({key_len:,} bytes) and value ({value_len:,} bytes) can never fit:"
            f" a shard holds {room:,} bytes; raise max_bytes"
            + (", or lower shards" if self.shards > 1 else "")
        )

    @cython.cfunc
    def _take(self, key: object, want: cython.bint) -> object:
        # Remove an entry: its value (True if not wanted), or MISSING.
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            self._fetch_record(b, h & _MASK32)
        now: Word = self._now()
        data: bytes = b""
        tag: cython.uint = 0
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot and self.w64[self._record(b, slot) + 1] <= now:
                self._retire(b, slot, _EXPIRED, now)
                slot = 0
            if slot:
                if want:
                    data = self._value(b, slot, h)
                    tag = (
                        self.w32[2 * self._record(b, slot) + _F_META] >> _META_TAG_SHIFT
                    ) & 15
                self._retire(b, slot, _DELETED, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return MISSING
        return decode_tagged(self.codec, tag, data) if want else True

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key, or ``default``.  A hit is a use: it renews LRU rank.

        O(1), without a lock when compiled.  Raises UnsupportedKey, CacheClosed, and
        SegmentCorrupt when damage was met (and mended).
        """
        if self.guard[0] != self.token:
            self._enter_process()
        value = self._lookup(key, _USE)
        return default if value is MISSING else value

    def peek(self, key: Any, default: Any = None) -> Any:
        """As ``get``, but it counts neither as a use nor as a hit or miss."""
        if self.guard[0] != self.token:
            self._enter_process()
        value = self._lookup(key, _QUIET)
        return default if value is MISSING else value

    def __contains__(self, key: Any) -> bool:
        """Whether a key is there; not a use.  O(1)."""
        if self.guard[0] != self.token:
            self._enter_process()
        return self._lookup(key, _PROBE) is not MISSING

    def __getitem__(self, key: Any) -> Any:
        """As ``get``; KeyError when absent."""
        if self.guard[0] != self.token:
            self._enter_process()
        value = self._lookup(key, _USE)
        if value is MISSING:
            raise KeyError(key)
        return value

    def set(self, key: Any, value: Any, ttl: Ttl = ...) -> None:
        """Store a value, in place of the key's former one if any.

        ``ttl``: seconds (float) after which the entry expires; left out, the cache's
        default; None, never.  A full cache gives up what has expired, then its least
        recently used entries.  O(1).  Raises EntryTooLarge, UnsupportedKey,
        UnsupportedValue, LockTimeout; nothing is changed then.
        """
        if self.guard[0] != self.token:
            self._enter_process()
        self._put(key, value, ttl, _ANY, 0)

    def __setitem__(self, key: Any, value: Any) -> None:
        """As ``set`` with the cache's default TTL."""
        if self.guard[0] != self.token:
            self._enter_process()
        self._put(key, value, ..., _ANY, 0)

    def add(self, key: Any, value: Any, ttl: Ttl = ...) -> bool:
        """Store only if the key is absent; whether it was stored.  Atomic.  O(1)."""
        if self.guard[0] != self.token:
            self._enter_process()
        return self._put(key, value, ttl, _ADD, 0) != 0

    def replace(self, key: Any, value: Any, ttl: Ttl = ...) -> bool:
        """Store only if the key is there; whether it was stored.  Atomic.  O(1)."""
        if self.guard[0] != self.token:
            self._enter_process()
        return self._put(key, value, ttl, _REPLACE, 0) != 0

    def gets(self, key: Any) -> tuple[Any, int | None]:
        """``(value, token)`` for ``cas``; ``(None, None)`` when absent.  O(1).

        The token names this very version of the entry, and no other ever again.
        """
        if self.guard[0] != self.token:
            self._enter_process()
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            self._fetch_record(b, h & _MASK32)
        now: Word = self._now()
        data: bytes = b""
        tag: cython.uint = 0
        version: Word = 0
        v: Index
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot and self.w64[self._record(b, slot) + 1] <= now:
                self._retire(b, slot, _EXPIRED, now)
                slot = 0
            if slot:
                v = self._record(b, slot)
                data = self._value(b, slot, h)
                tag = (self.w32[2 * v + _F_META] >> _META_TAG_SHIFT) & 15
                version = self.w64[v]
                self.w64[b + _S_HITS] += 1
                self._use(b, slot)
                if self.w64[v + 1] != _NEVER:
                    self._still_good(v, self.w64[v + 1], _USE)
            else:
                self.w64[b + _S_MISSES] += 1
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return None, None
        return decode_tagged(self.codec, tag, data), version

    def cas(self, key: Any, value: Any, token: Any, ttl: Ttl = ...) -> bool:
        """Store only if the entry is unchanged; whether it was stored.  O(1).

        ``token`` is from ``gets``: the entry must still be the one that was returned
        with it; None: the key must still be absent.
        """
        if self.guard[0] != self.token:
            self._enter_process()
        if token is None:
            return self._put(key, value, ttl, _ADD, 0) != 0
        if type(token) is not int:
            raise TypeError(f"token must be one that gets() returned, not {token!r}")
        if not 0 < token <= L.MASK64:
            token = 0  # of no entry, as any other that gets() did not return
        return self._put(key, value, ttl, _CAS, token) != 0

    def delete(self, key: Any) -> bool:
        """Remove an entry; whether it was there.  O(1)."""
        if self.guard[0] != self.token:
            self._enter_process()
        return self._take(key, False) is not MISSING

    def __delitem__(self, key: Any) -> None:
        """As ``delete``; KeyError when absent."""
        if self.guard[0] != self.token:
            self._enter_process()
        if self._take(key, False) is MISSING:
            raise KeyError(key)

    def pop(self, key: Any, default: Any = MISSING) -> Any:
        """Remove an entry and return its value; ``default``, or KeyError, when absent.

        Of several processes that pop one key, one gets the value.  O(1).
        """
        if self.guard[0] != self.token:
            self._enter_process()
        value = self._take(key, True)
        if value is MISSING:
            if default is MISSING:
                raise KeyError(key)
            return default
        return value

    def touch(self, key: Any, ttl: Ttl = ...) -> bool:
        """Give an entry a new time to live from now on; whether it was there.

        It is a use, too: the entry becomes the most recently used.  O(1).
        """
        if self.guard[0] != self.token:
            self._enter_process()
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            self._fetch_record(b, h & _MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        now: Word = self._now()
        v: Index
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot and self.w64[self._record(b, slot) + 1] <= now:
                self._retire(b, slot, _EXPIRED, now)
                slot = 0
            if slot:
                v = self._record(b, slot)
                self._wheel_remove(b, slot)
                self._put_word(v + 1, now + ns if ns else _NEVER)
                self.w32[2 * v + _F_TTL] = _pack_ttl(ns)
                if ns:
                    self._wheel_insert(b, slot, now + ns, now)
                self._use(b, slot)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return slot != 0

    def ttl(self, key: Any) -> Any:
        """Seconds an entry has left, None for "never"; KeyError when absent.  O(1)."""
        if self.guard[0] != self.token:
            self._enter_process()
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        now: Word = self._now()
        s: Index = self._shard(h)
        b: Index = self._base(s)
        expires: Word = 0
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot:
                expires = self.w64[self._record(b, slot) + 1]
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if expires <= now:
            raise KeyError(key)
        if expires == _NEVER:
            return None
        return (expires - now) / 1e9

    def incr(
        self, key: Any, delta: Any = 1, *, initial: Any = None, ttl: Ttl = ...
    ) -> Any:
        """Add to a number, atomically over all processes; the new number.  O(1).

        Absent: ``initial + delta`` is stored, or KeyError without ``initial``.
        ``ttl`` left out keeps an entry's expiry (in a sliding cache it is a hit that
        renews it).  An int and a float make a float.
        Raises TypeError when the value is not a number, OverflowError when the int
        leaves 64 bits; nothing is changed then.
        """
        if self.guard[0] != self.token:
            self._enter_process()
        if self.raw_only:
            raise UnsupportedValue(
                'codec "raw" holds bytes only, so incr() has no number to add to;'
                " use another codec for counters"
            )
        if type(delta) not in (int, float) or (
            initial is not None and type(initial) not in (int, float)
        ):
            raise TypeError(
                f"delta and initial must be int or float, not {delta!r} and {initial!r}"
            )
        if _is_far(delta) or _is_far(initial):
            raise OverflowError(
                "delta or initial is so far beyond 64 bits that the sum must be, too;"
                " use smaller numbers"
            )
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        if cython.compiled:
            self._fetch_record(b, h & _MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        fresh = None if initial is None else initial + delta
        now: Word = self._now()
        expires: Word = now + ns if ns else _NEVER
        word: cython.uint = _pack_ttl(ns)
        if not self._fits(len(kb), 8):
            self._refuse(s, b, len(kb), 8)
        number = None
        tag: cython.uint = _TAG_INT
        old_tag: cython.uint = _TAG_CODEC
        v: Index
        data: bytes
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot and self.w64[self._record(b, slot) + 1] <= now:
                self._retire(b, slot, _EXPIRED, now)
                slot = 0
            if slot:
                v = self._record(b, slot)
                old_tag = (self.w32[2 * v + _F_META] >> _META_TAG_SHIFT) & 15
                data = self._value(b, slot, h)  # so that the tag is to be believed
                if (old_tag == _TAG_INT or old_tag == _TAG_FLOAT) and len(data) == 8:
                    number = _number(data, old_tag) + delta
                if ttl is ...:
                    expires = self.w64[v + 1]
                    word = self.w32[2 * v + _F_TTL]
                    if self.sliding and word and now + _unpack_ttl(word) > expires:
                        expires = now + _unpack_ttl(word)
            else:
                number = fresh
            if number is not None:
                data = _number_bytes(number)
                if data is not None:
                    tag = _TAG_INT if type(number) is int else _TAG_FLOAT
                    if (
                        tag == old_tag
                        and expires == self.w64[v + 1]
                        and word == self.w32[2 * v + _F_TTL]
                    ):
                        self._rewrite(
                            s, b, slot, data, self._checksum(data, h & _MASK32, tag)
                        )
                        self.w32[2 * v + _F_STAMP] = self._stamp(now)
                    else:
                        self._store(
                            s, b, slot, h, kind, kb, tag, data, expires, word, now
                        )
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if number is None:
            if slot == 0:
                raise KeyError(key)
            raise TypeError(
                f"the value of {key!r} is not an int of 64 bits or a float, so nothing"
                " can be added to it; set() a number first"
            )
        if data is None:
            raise OverflowError(
                f"{number} does not fit into 64 bits; set() a smaller number first"
            )
        return number

    def decr(
        self, key: Any, delta: Any = 1, *, initial: Any = None, ttl: Ttl = ...
    ) -> Any:
        """Subtract from a number: ``incr`` with ``-delta``."""
        if type(delta) is int or type(delta) is float:
            delta = -delta
        return self.incr(key, delta, initial=initial, ttl=ttl)

    def get_many(self, keys: Any) -> Any:
        """A dict of those of the keys that are there.  O(keys)."""
        if self.guard[0] != self.token:
            self._enter_process()
        found = {}
        for key in keys:
            value = self._lookup(key, _USE)
            if value is not MISSING:
                found[key] = value
        return found

    def set_many(self, mapping: Any, ttl: Ttl = ...) -> None:
        """Store several entries, each by itself.  O(entries)."""
        if self.guard[0] != self.token:
            self._enter_process()
        if not hasattr(mapping, "items"):
            raise TypeError(
                f"set_many() takes a mapping, not a {type(mapping).__qualname__};"
                " make a dict of pairs"
            )
        self._ttl(ttl)  # refused also if there is nothing to store
        for key, value in mapping.items():
            self._put(key, value, ttl, _ANY, 0)

    def delete_many(self, keys: Any) -> int:
        """Remove several entries; how many were there.  O(keys)."""
        if self.guard[0] != self.token:
            self._enter_process()
        count = 0
        for key in keys:
            if self._take(key, False) is not MISSING:
                count += 1
        return count

    def _is_joined(self) -> bool:
        """Whether this process may go ahead without ``_enter_process``."""
        return self.guard[0] == self.token

    def _take_news(self) -> Any:
        """What _mend noted since the last call.

        Tuples of shard, token of the dead holder or 0, whether lists were rebuilt,
        entries dropped, ns it took.
        """
        news, self.news = self.news, []
        self.has_news = False
        return news

    def _note_evictions(self, on: bool) -> None:
        """Whether evictions are to be noted from now on."""
        self.noting = on

    def _take_notes(self) -> Any:
        """What this process evicted since the last call: cause, kind and key."""
        notes: list = self.notes
        self.notes = []
        return [
            (notes[i] >> 4, notes[i] & 15, notes[i + 1])
            for i in range(0, len(notes) - 1, 2)
        ]

    # --- steps: pieces of work that Cache repeats, each a short hold of one lock -----

    def _step(self, s: int, limit: int) -> int:
        """Apply our touches to a shard, and retire up to ``limit`` expired entries.

        How many went, or -1 if no more are due.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        removed: Index = 0
        due: Word
        self._begin(s, b)
        try:
            if self.w64[b + _S_ENTRIES] > self.capacity[s]:
                raise Corrupt("entries")
            due = self.w64[b + _S_DUE]
            if limit and due and now >= due:
                removed = self._reclaim(b, now, limit, True)
                due = self.w64[b + _S_DUE]
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if removed == 0 and (due == 0 or now < due):
            return -1
        return removed

    def _due(self, s: int) -> bool:
        """Whether a shard may hold something expired; a look without the lock."""
        due: Word = self.w64[self._base(s) + _S_DUE]
        return due != 0 and self._now() >= due

    def _scan(self, s: int, bucket: int, limit: int, values: bool) -> Any:
        """Up to about ``limit`` live entries of a shard from a bucket on.

        Returns the next bucket, or -1 at the end, and a flat list of meta, key bytes,
        value bytes, expiry (ns) and stamp of each.  Buckets are the stable order: an
        entry that is overwritten moves to another slot, never to another bucket.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        bb: Index = bucket
        out = [None] * (5 * (limit + 64))
        room: Index = limit
        n: Index = 0
        seen: Index = 0
        cython.declare(steps=Index, v=Index, slot=Index, meta=cython.uint)
        self._begin(s, b)
        try:
            while bb < self.slots and n < room and seen < 64 * room:
                slot = self.w32[2 * b + self.buckets4 + bb]
                bb += 1
                seen += 1
                steps = 0
                while slot:
                    v = self._record(b, slot)
                    if self.w64[v + 1] > now:
                        meta = self.w32[2 * v + _F_META]
                        if n >= room + 64:
                            raise Corrupt("chain")
                        out[5 * n] = meta
                        out[5 * n + 1] = self._key(b, v)
                        if values:
                            out[5 * n + 2] = self._value(
                                b, slot, self.w32[2 * v + _F_HASH]
                            )
                        out[5 * n + 3] = self.w64[v + 1]
                        out[5 * n + 4] = self.w32[2 * v + _F_STAMP]
                        n += 1
                    slot = self.w32[2 * v + _F_CHAIN]
                    steps += 1
                    if steps > self.slots:
                        raise Corrupt("chain")
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        del out[5 * n :]
        return (bb if bb < self.slots else -1), out

    def _clear_step(
        self, s: int, bucket: int, limit: int, newest: int, kind: int, prefix: bytes
    ) -> Any:
        """Clear up to about ``limit`` entries of a shard from a bucket on.

        Those whose version is at most ``newest``, and whose key is of a kind (0: any)
        and begins with a prefix.
        Returns the next bucket, or -1 at the end, and how many live ones went.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        bb: Index = bucket
        room: Index = limit
        n: Index = 0
        seen: Index = 0
        cython.declare(steps=Index, v=Index, slot=Index, after=Index, meta=cython.uint)
        want: cython.uint = kind
        self._begin(s, b)
        try:
            while bb < self.slots and n < room and seen < 64 * room:
                slot = self.w32[2 * b + self.buckets4 + bb]
                bb += 1
                seen += 1
                steps = 0
                while slot:
                    v = self._record(b, slot)
                    after = self.w32[2 * v + _F_CHAIN]
                    meta = self.w32[2 * v + _F_META]
                    if self.w64[v] <= newest and (
                        want == 0
                        or (
                            (meta >> 16) & 15 == want
                            and meta & _MAX_KEY >= cython.cast(cython.uint, len(prefix))
                            and self._copy_out(
                                b, self.w32[2 * v + _F_BLOCK], 0, len(prefix)
                            )
                            == prefix
                        )
                    ):
                        if self.w64[v + 1] <= now:
                            self._retire(b, slot, _EXPIRED, now)
                        else:
                            self._retire(b, slot, _CLEARED, now)
                            n += 1
                    slot = after
                    steps += 1
                    if steps > self.slots:
                        raise Corrupt("chain")
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return (bb if bb < self.slots else -1), n

    def _pop_oldest(self, s: int) -> Any:
        """Take the least recently used live entry of a shard.

        Kind, key bytes, tag, value bytes; None when the shard is empty.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        key: bytes = b""
        data: bytes = b""
        meta: cython.uint = 0
        v: Index
        slot: Index = 0
        self._begin(s, b)
        try:
            while True:
                slot = self.w32[2 * self._record(b, 0) + _F_LRU_PREV]
                if slot == 0:
                    break
                v = self._record(b, slot)
                if self.w64[v + 1] <= now:
                    self._retire(b, slot, _EXPIRED, now)
                    continue
                meta = self.w32[2 * v + _F_META]
                key = self._key(b, v)
                data = self._value(b, slot, self.w32[2 * v + _F_HASH])
                self._retire(b, slot, _DELETED, now)
                break
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return None
        return (meta >> 16) & 15, key, (meta >> _META_TAG_SHIFT) & 15, data

    def _repair(self, s: int) -> int:
        """Rebuild a shard from its records; how many entries were given up."""
        b: Index = self._base(s)
        dropped: Index = 0
        self._acquire(s, b)
        try:
            self._put_word(b + _S_SEQ, self.w64[b + _S_SEQ] + 1)
            dropped = self._rebuild(b)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return dropped

    def _snapshot(self, s: int, first: int, last: int) -> bytes:
        """A copy of a shard's bytes, taken under its lock."""
        b: Index = self._base(s)
        data: bytes = b""
        at: Index = 8 * b + first
        n: Index = last - first
        self._acquire(s, b)
        try:
            if cython.compiled:
                data = PyBytes_FromStringAndSize(
                    cython.cast("const char *", cython.address(self.mem[at])), n
                )
            else:
                data = bytes(self.mem[at : at + n])
        finally:
            self._put_word(b + _S_HOLDER, 0)
            self._post(s)
        if self.has_news:
            self._tell()
        return data

    # Handles: what handles.py needs of the lock.

    def _renew(self, key: Any) -> bool:
        """As ``get``, when only whether the entry is there is of interest."""
        if self.guard[0] != self.token:
            self._enter_process()
        return self._lookup(key, _RENEW) is not MISSING

    def _discard(self, key: Any, owner: int, number: int, cause: int) -> bool:
        """Remove a handle's entry if it is this owner's, with this number (0: any)."""
        if self.guard[0] != self.token:
            self._enter_process()
        kb: bytes = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = self._shard(h)
        b: Index = self._base(s)
        now: Word = self._now()
        data: bytes
        mine: cython.bint = False
        self._begin(s, b)
        try:
            slot: Index = self._find(b, h & _MASK32, kind, kb)
            if slot:
                data = self._value(b, slot, h)
                if len(data) < _HANDLE_PREFIX:
                    raise Corrupt("handle")
                mine = _word_of(data[:8]) == owner and (
                    number == 0 or _word_of(data[8:16]) == number
                )
                if mine:
                    self._retire(b, slot, cause, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return mine

    def _notices(self, s: int, since: int) -> Any:
        """The notices of a shard from a number on, without the lock.

        Returns the number of the next one, and a flat list of owner, number and cause;
        None for the list if some of them have been written over, or may have been.
        """
        b: Index = self._base(s)
        first: Word = since
        head: Word = self._get_word(b + _S_MAILBOX_HEAD)
        n: Word = first
        at: Index
        out: list = []
        if head - first >= _MAILBOX_SIZE or head < first:
            return head, None
        while n < head:
            at = (
                b
                + _S_MAILBOX
                + _MAILBOX_WORDS * cython.cast(Index, n & (_MAILBOX_SIZE - 1))
            )
            out += (self.w64[at], self.w64[at + 1], self.w64[at + 2])
            n += 1
        self._read_fence()
        if self._get_word(b + _S_MAILBOX_HEAD) - first >= _MAILBOX_SIZE:
            return head, None
        return head, out

    # Claims of get_or_set: a small open table of (hash, token) under the lock.

    def _claim(self, s: int, h: int, dead: int) -> int:
        """Claim the computation of a key, unless another has it.

        0 when it is ours now, else the token of the worker that has it; 1 when the
        table is crowded.  A claim of ``dead`` is taken over.
        """
        b: Index = self._base(s)
        hh: Word = h
        gone: Word = dead
        home: Index = cython.cast(Index, hh & 255)
        free: Index = -1
        cython.declare(at=Index, i=Index)
        result: Word = 1
        self._begin(s, b)
        try:
            for i in range(_IN_FLIGHT):
                at = b + _S_IN_FLIGHT + 2 * ((home + i) & (_IN_FLIGHT - 1))
                if self.w64[at + 1] == 0:
                    if free < 0:
                        free = at
                elif self.w64[at] == hh:
                    result = self.w64[at + 1]
                    free = at if result == gone else -2
                    break
            if free >= 0:
                self.w64[free] = hh
                self._put_word(free + 1, self.token)
                result = 0
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return result

    def _unclaim_key(self, s: int, h: int) -> None:
        """Give a claim of ours back."""
        b: Index = self._base(s)
        hh: Word = h
        cython.declare(at=Index, i=Index)
        self._begin(s, b)
        for i in range(_IN_FLIGHT):
            at = b + _S_IN_FLIGHT + 2 * i
            if self.w64[at + 1] == self.token and self.w64[at] == hh:
                self._put_word(at + 1, 0)
                self.w64[at] = 0
        self._end(s, b)

    def _claimants(self, s: int) -> Any:
        """The tokens of those who have claims in a shard; a look without the lock."""
        b: Index = self._base(s)
        tokens = set()
        for i in range(_IN_FLIGHT):
            tokens.add(self.w64[b + _S_IN_FLIGHT + 2 * i + 1])
        tokens.discard(0)
        return tokens

    def _disclaim(self, s: int, gone: int) -> None:
        """Give all claims of a dead worker back."""
        b: Index = self._base(s)
        dead: Word = gone
        cython.declare(at=Index, i=Index)
        self._begin(s, b)
        for i in range(_IN_FLIGHT):
            at = b + _S_IN_FLIGHT + 2 * i
            if self.w64[at + 1] == dead:
                self._put_word(at + 1, 0)
                self.w64[at] = 0
        self._end(s, b)

    def _key_hash(self, key: Any) -> Any:
        """(kind, bytes, hash, shard) of a key."""
        kb = _key_bytes(key)
        kind: cython.uint = _key_kind(key)
        h: Word = self._hash(kb, kind)
        return kind, kb, h, self._shard(h)


@cython.cfunc
@cython.exceptval(-1)
def _is_far(number: object) -> cython.bint:
    # Whether an int is of more than 64 bits: no sum of it and 64 bits is within 64.
    if type(number) is not int:
        return False
    if cython.compiled:
        word: cython.longlong
        try:
            word = number
        except OverflowError:
            pass
        else:
            return word == 0 and number != 0
    return number.bit_length() > 64


@cython.cfunc
def _number_bytes(number: object) -> object:
    # Eight bytes of an int or float; None for an int that needs more.
    if cython.compiled:
        word: cython.longlong
        real: cython.double
        if type(number) is float:
            real = number
            return PyBytes_FromStringAndSize(
                cython.cast("const char *", cython.address(real)), 8
            )
        try:
            word = number
        except OverflowError:
            return None
        return PyBytes_FromStringAndSize(
            cython.cast("const char *", cython.address(word)), 8
        )
    if type(number) is float:
        return _DOUBLE.pack(number)
    try:
        return _LONG.pack(number)
    except struct.error:
        return None


@cython.cfunc
@cython.inline
@cython.exceptval(-1)
def _word_of(data: bytes) -> Word:
    # Eight bytes as a word of this machine.
    if cython.compiled:
        return cython.cast(
            cython.p_ulonglong, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
        )[0]
    return int.from_bytes(data, sys.byteorder)


@cython.cfunc
def _bytes_of(word: Word) -> bytes:
    if cython.compiled:
        return PyBytes_FromStringAndSize(
            cython.cast("const char *", cython.address(word)), 8
        )
    return word.to_bytes(8, sys.byteorder)


@cython.cfunc
def _number(data: bytes, tag: cython.uint) -> object:
    if cython.compiled:
        if tag == _TAG_INT:
            return cython.cast(
                cython.p_longlong, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
            )[0]
        return cython.cast(
            cython.p_double, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
        )[0]
    return (_LONG if tag == _TAG_INT else _DOUBLE).unpack(data)[0]


# Interpreted, an exception out of a signal handler may strike between any two
# bytecodes, and so also between taking the lock and the ``try`` that would give it
# back.  The outermost call of a thread therefore looks for what it still holds.

if not cython.compiled:

    def _let_go(slab: Slab, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals is globals():
                return  # of a signal handler, or a codec, inside another call
            frame = frame.f_back
        slab._end_recoveries()
        me = get_ident()
        for s, owner in list(slab.owners.items()):
            b = slab._base(s)
            if owner == me and slab.w64[b + _S_HOLDER] == slab.token:
                if slab.w64[b + _S_SEQ] & 1:
                    slab._mend(s, b, 0)
                slab._release(s, b)

    # What is raised where words, semaphores or lease have gone.
    _OF_CLOSING = (IndexError, OSError, ValueError)

    def _guarded(method: Any) -> Any:
        @functools.wraps(method)
        def guarded(self: Slab, /, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except BaseException as error:
                if self.token and self.guard[0] == self.token:
                    _let_go(self, sys._getframe(1))
                elif self.token == 0 and type(error) in _OF_CLOSING:
                    self._enter_process()  # says that another thread has closed it
                raise

        return guarded

    for _name in (
        *("get", "peek", "__contains__", "__getitem__", "gets", "get_many", "ttl"),
        *("set", "__setitem__", "add", "replace", "cas", "set_many", "touch"),
        *("incr", "decr", "delete", "__delitem__", "pop", "delete_many"),
        *("_flush_touches", "_step", "_scan", "_clear_step", "_pop_oldest"),
        *("_repair", "_snapshot", "_claim", "_unclaim_key", "_disclaim"),
        *("_renew", "_discard"),
    ):
        setattr(Slab, _name, _guarded(getattr(Slab, _name)))
