"""Words and bytes: the views of the segment, and the functions that address them.

A segment is seen as 64-bit words (``w64``), as 32-bit words (``w32``) and as bytes
(``mem``).  The letters that run through all parts are:

    s   number of a shard
    b   its first 64-bit word (``2 * b`` is its first 32-bit word)
    v   first 64-bit word of a record (``2 * v`` is its first 32-bit word, called ``r``)
    h   the 64-bit hash of a key; its lower half is ``h32``
    kb  the bytes of a key

Bounds are checked twice: the views check every index, and ``_record`` and ``_block_at``
check numbers that come from the segment, so a damaged number becomes ``Corrupt`` (an
IndexError, which is what a view raises) and never a wild access.

Death in the middle: only ``_copy_in`` changes the segment here, and it fills blocks
that belong to no entry yet.
"""

import sys
from array import array
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64_intdigest

from shmcache._arguments import ttl_to_ns
from shmcache._format import layout as L

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        BYTES_KEY,
        LONGEST_TTL,
        MASK32,
        MASK64,
        STAMP_SHIFT,
        STR_KEY,
        TTL_VALUE,
        XXH3_MAX,
        Index,
        Word,
    )
    from shmcache._format.fields import bucket_of, shard_of
    from shmcache._format.keys import encode_key


if cython.compiled:
    from cython.cimports.cpython.bytes import (
        PyBytes_AS_STRING,
        PyBytes_FromStringAndSize,
    )
    from cython.cimports.cpython.unicode import PyUnicode_AsUTF8String
    from cython.cimports.libc.math import nearbyint
    from cython.cimports.shmcache._engine.memory import (
        CHECKSUMS,
        checksum,
        load,
        memcmp,
        memcpy,
        now_ns,
        read_fence,
        store,
        write_fence,
        xxh3,
    )


class Missing:
    """A value that no entry can have, for places where None is a value."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = Missing()
# These are C variables, because a module's names are looked up in a dict, which is
# slow.
ABSENT = cython.declare(object, MISSING)
UNSURE = cython.declare(object, Missing())  # a read without the lock could not tell
MOVED = cython.declare(object, Missing())  # the record has changed during the copy


class Corrupt(IndexError):
    """Raised when a number in the segment points where nothing can be.

    It is an IndexError because that is what the bounds check of a view raises.
    """


@cython.cfunc
@cython.inline
def key_bytes(key: Any) -> Any:
    # encode_key makes the bytes of the rarer kinds, and refuses what is no key.
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
def key_kind(key: Any) -> cython.uint:
    if type(key) is str:
        return STR_KEY
    if type(key) is bytes:
        return BYTES_KEY
    return encode_key(key)[0]


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def pack_ttl(ns: Word) -> cython.uint:
    # This is the C twin of layout.pack_ttl.
    unit: cython.uint = 0
    while ns > TTL_VALUE:
        ns = (ns + 999) // 1000
        unit += 1
    return cython.cast(cython.uint, unit << 30 | ns)


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def unpack_ttl(word: cython.uint) -> Word:
    # This is the C twin of layout.unpack_ttl.
    ns: Word = word & TTL_VALUE
    unit: cython.uint = word >> 30
    while unit > 0:
        ns = ns * 1000
        unit -= 1
    return ns


@cython.cfunc
@cython.inline
@cython.exceptval(-1)
def ttl_ns(ttl: Any) -> Word:
    # Return seconds as nanoseconds; ttl_to_ns checks all unusual arguments.
    if cython.compiled:
        ns: cython.double
        if type(ttl) is float:
            ns = cython.cast(cython.double, ttl) * 1e9
            if 1 <= ns < LONGEST_TTL:
                return cython.cast(Word, nearbyint(ns))
    return ttl_to_ns(ttl)


@cython.cfunc
@cython.inline
@cython.exceptval(-1)
def word_of(data: bytes) -> Word:
    # Return eight bytes as a word in the byte order of this machine.
    if cython.compiled:
        return cython.cast(
            cython.p_ulonglong, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
        )[0]
    return int.from_bytes(data, sys.byteorder)


@cython.cfunc
def bytes_of(word: Word) -> bytes:
    # Return a word as eight bytes: the reverse of word_of.
    if cython.compiled:
        return PyBytes_FromStringAndSize(
            cython.cast("const char *", cython.address(word)), 8
        )
    return word.to_bytes(8, sys.byteorder)


@cython.cfunc
@cython.inline
@cython.exceptval(-1)
def monotonic() -> Word:
    # Return CLOCK_MONOTONIC in ns.
    if cython.compiled:
        return now_ns()
    return monotonic_ns()


@cython.cclass
class Words:
    """The views of one segment, its geometry, and the settings of one cache."""

    w64: cython.ulonglong[::1]
    w32: cython.uint[::1]
    mem: cython.uchar[::1]
    # The token of this process; the kernel zeroes it in a forked child.
    guard: cython.ulonglong[::1]
    capacity: cython.ulonglong[::1]  # of each shard, in entries

    token: Word
    row: Index  # first 64-bit word of the worker row of this process
    shards: Word
    shards8: Index  # first 64-bit word of shard 0
    stride8: Index  # 64-bit words from shard to shard
    slots: Index
    blocks: Index
    block_shift: cython.uint
    block_size: Index
    buckets4: Index  # 32-bit words from the start of a shard
    records8: Index  # 64-bit words from the start of a shard
    links4: Index  # 32-bit words from the start of a shard
    arena: Index  # bytes from the start of a shard
    stamp_zero: Word  # ns of the cache's clock at creation
    seed: Word
    clock: Any
    visit: Word  # a random number of each time that this object joins a segment
    hashing: cython.int  # compiled: threads that let others run while they hash
    # The engine asks it about the processes around it: see _process/peers.py.
    peers: Any
    if cython.compiled:
        # close() sets it; threads that are inside a call at that time read it.
        closed = cython.declare(cython.bint, visibility="public")

    def _bind_words(self, words: Any, geometry: Any, seed: int) -> None:
        """Point the engine at a mapped segment.

        Args:
            words: The segment's bytes, a memoryview.
            geometry: Its ``layout.Geometry``.
            seed: The seed of its key hashes.
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
        self.seed = seed
        self.token = 0
        self.guard = memoryview(array("Q", [1]))  # differs from the token: not joined
        self.row = 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _require_joined(self) -> cython.int:
        # A process joins with its first call, and again after a fork; close() makes
        # the guard differ for ever, and peers.enter raises CacheClosed.
        if self.guard[0] != self.token:
            self.peers.enter(self)
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _now(self) -> Word:
        # Return the time by the cache's clock.  It is the last Python code of an
        # operation: codec and clock have run when it returns.  They may have closed the
        # cache or forked, so this process joins again; ``visit`` tells that it did.  No
        # caller holds a lock.
        if self.clock is not None or self.guard[0] != self.token:
            return self._now_joined()
        return monotonic()

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _now_joined(self) -> Word:
        now: Word = monotonic() if self.clock is None else self.clock()
        self._require_joined()
        return now

    # --- where things are -----------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _hash(self, key: bytes, kind: cython.uint) -> Word:
        # The kind is part of the seed, so that 1, "1" and b"1" are unrelated keys.
        seed: Word = (self.seed + kind) & MASK64
        if cython.compiled:
            n: Index = len(key)
            if n <= XXH3_MAX:
                return xxh3(PyBytes_AS_STRING(key), n, seed)
        return xxh3_64_intdigest(key, seed)

    @cython.cfunc
    @cython.final
    @cython.inline
    def _place(self, key: Any, kb: bytes) -> tuple[cython.uint, Word, Index, Index]:
        # Return the kind and hash of a key, the number of its shard, and the shard's
        # first word.  Python code that ran when ``kb`` was made may have closed the
        # cache, or forked, so this is where an operation joins.
        self._require_joined()
        kind: cython.uint = key_kind(key)
        h: Word = self._hash(kb, kind)
        s: Index = shard_of(h, self.shards)
        return kind, h, s, self._base(s)

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(check=False)
    def _base(self, s: Index) -> Index:
        return self.shards8 + s * self.stride8

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _record(self, b: Index, slot: Index) -> Index:
        # Return the first 64-bit word of a record; slot 0 is the sentinel of the LRU
        # ring.
        if slot < 0 or slot > self.slots:
            raise Corrupt("slot")
        return b + self.records8 + slot * 8

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(check=False)
    def _bucket(self, b: Index, h32: Word) -> Index:
        # Return the 32-bit word of the bucket of a hash.
        return 2 * b + self.buckets4 + bucket_of(h32, cython.cast(Word, self.slots))

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _block_at(self, b: Index, block: Index) -> Index:
        # Return the first byte of a block.
        if block <= 0 or block > self.blocks:
            raise Corrupt("block")
        return 8 * b + self.arena + (block << self.block_shift)

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _stamp(self, now: Word) -> cython.uint:
        return cython.cast(
            cython.uint, ((now - self.stamp_zero) >> STAMP_SHIFT) & MASK32
        )

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(check=False)
    def _need(self, key_len: Index, value_len: Index) -> Index:
        # Return the number of blocks that an entry takes: at least one.
        n: Index = key_len + value_len
        if n == 0:
            return 1
        return (n + self.block_size - 1) >> self.block_shift

    # --- loads and stores -----------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _put_word(self, i: Index, value: Word) -> cython.int:
        # Store 64 bits; no store before or after it in the program overtakes it.
        if cython.compiled:
            store(cython.address(self.w64[i]), value)
            write_fence()
        else:
            self.w64[i] = value & MASK64
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _get_word(self, i: Index) -> Word:
        # Load 64 bits; no later load overtakes this one.
        if cython.compiled:
            return load(cython.address(self.w64[i]))
        return self.w64[i]

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _read_fence(self) -> cython.int:
        if cython.compiled:
            read_fence()
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _count(self, i: Index, n: Word) -> cython.int:
        # Add to a counter.  The sum is masked because an exception here would leave the
        # lock behind, and damage may have put any number into the word.
        self.w64[i] = (self.w64[i] + n) & MASK64
        return 0

    # --- bytes of an entry ----------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _copy_in(
        self, b: Index, block: Index, offset: Index, data: bytes
    ) -> cython.int:
        # Write bytes into a run of blocks, from an offset on.
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
    @cython.final
    def _copy_out(self, b: Index, block: Index, offset: Index, n: Index) -> bytes:
        # Return bytes of a run of blocks.  A reader without the lock may get garbage,
        # but every index is checked, and n, which the caller has checked, bounds the
        # walk.
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
                # Blocks are taken in order as far as possible: neighbours are copied
                # at once.
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
    @cython.final
    @cython.exceptval(-1)
    def _same_key(self, b: Index, block: Index, key: bytes) -> cython.bint:
        # Return whether a run of blocks begins with the bytes of a key.
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
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _checksum(self, value: bytes, h: Word, tag: cython.uint) -> cython.uint:
        if cython.compiled:
            # This is the C twin of layout.checksum.
            n: Index = len(value)
            total: Word = h ^ cython.cast(Word, tag) << 28
            if n <= XXH3_MAX:
                total ^= checksum(PyBytes_AS_STRING(value), n)
            elif CHECKSUMS:
                self.hashing += 1
                try:
                    total ^= xxh3_64_intdigest(value)
                finally:
                    self.hashing -= 1
            return cython.cast(cython.uint, total & MASK32)
        return L.checksum(value, h & MASK32, tag)
