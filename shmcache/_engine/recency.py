"""Recency: which entries were used last, without a store to shared memory at each hit.

Problem: exact LRU moves an entry to the front of a shared ring at each hit, which needs
the lock, and makes readers write to memory that all processes read.

Mechanism: each process keeps a recency buffer for each shard, in its own memory: slot
and version of its hits.  The buffer is applied to the ring under the lock, before the
process's next write to the shard, or when the buffer is full and the lock is free (see
``_remember_use`` in ``lookup.py``).  So LRU order is exact within one process; other
processes see a use after at most one buffer of hits, however few keys they are of.

If an entry has been overwritten since a hit, its version differs, and the hit is
dropped: every overwrite, also one in place, is a use, which was applied at once and is
the later one.

An increment is a use at once, but the holder of the lock would have to wait until its
stores to the neighbours in the ring arrive in memory.  So it writes the slot into the
shard's word ``late use`` and fetches the neighbours; whoever takes the lock next moves
the entry before all else.  Nobody evicts without the lock, so nobody sees a difference.

Death in the middle: the buffer of the process is lost, which costs recency and nothing
else.  A ring that is half changed is rebuilt by the next holder of the lock.
"""

from array import array
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        F_LRU_NEXT,
        F_LRU_PREV,
        F_META,
        META_FETCHED,
        RECENCY,
        RECENCY_SHARE,
        RECENCY_SIZE,
        S_LATE_USE,
        Index,
        Word,
    )
    from shmcache._engine.lists import Lists
    from shmcache._format.fields import is_live


if cython.compiled:
    from cython.cimports.shmcache._engine.memory import prefetch


def recency_buffers(shards: int) -> Any:
    """Make the recency buffers for a process's first use of a segment.

    All Cache objects of a process that are on one segment share them, because any of
    them may be the next to write.

    Args:
        shards: How many shards the segment has.

    Returns:
        Three views: slots, versions (both ``RECENCY_SIZE`` for each shard), and how
        many of them are in use (one number for each shard).
    """
    return (
        memoryview(array("I", bytes(4 * RECENCY_SIZE * shards))),
        memoryview(array("Q", bytes(8 * RECENCY_SIZE * shards))),
        memoryview(array("I", bytes(4 * shards))),
    )


@cython.cclass
class Recency(Lists):
    """The recency buffers of a process, and the moves within the LRU ring."""

    recent_slot: cython.uint[::1]
    recent_version: cython.ulonglong[::1]
    recent_count: cython.uint[::1]
    recency_limit: Index  # so many hits fill the buffer of a shard
    in_step: cython.bint  # see _fetch_block

    def _bind_recency(self, buffers: Any, capacity: int) -> None:
        """Use these buffers, which come from ``recency_buffers``.

        Args:
            buffers: The three views.
            capacity: How many entries a shard may hold.
        """
        self.recent_slot, self.recent_version, self.recent_count = buffers
        self.recency_limit = max(1, min(RECENCY_SIZE, capacity // RECENCY_SHARE))
        self.in_step = True

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _use(self, b: Index, slot: Index) -> cython.int:
        # Make an entry the most recently used.  This does what _lru_remove and
        # _lru_front do, in half the time, because each hit costs it.
        r: Index = 2 * self._record(b, slot)
        sentinel: Index = 2 * self._record(b, 0)
        before: Index = self.w32[r + F_LRU_PREV]
        if not self.w32[r + F_META] & META_FETCHED:
            self.w32[r + F_META] |= META_FETCHED
        if before == 0:
            return 0
        after: Index = self.w32[r + F_LRU_NEXT]
        first: Index = self.w32[sentinel + F_LRU_NEXT]
        self.w32[2 * self._record(b, before) + F_LRU_NEXT] = after
        self.w32[2 * self._record(b, after) + F_LRU_PREV] = before
        self.w32[r + F_LRU_PREV] = 0
        self.w32[r + F_LRU_NEXT] = first
        self.w32[2 * self._record(b, first) + F_LRU_PREV] = slot
        self.w32[sentinel + F_LRU_NEXT] = slot
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _use_late(self, b: Index, slot: Index) -> cython.int:
        # Make an entry the most recently used, as far as anyone can tell: the next
        # holder of the lock moves it before all else.
        r: Index = 2 * self._record(b, slot)
        if self.w32[r + F_LRU_PREV] or not self.w32[r + F_META] & META_FETCHED:
            self.w64[b + S_LATE_USE] = slot
            if cython.compiled:
                self._fetch_neighbours(b, slot)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _apply_recency(self, s: Index, b: Index) -> cython.int:
        # Apply the late use of a shard, then empty the buffer into its ring; the caller
        # holds the lock.  The word is cleared last: to move an entry twice is harmless.
        at: Index = s * RECENCY
        late: Index = cython.cast(Index, self.w64[b + S_LATE_USE])
        if late:
            if is_live(self.w64[self._record(b, late)]):
                self._use(b, late)
            self.w64[b + S_LATE_USE] = 0
        n: Index = self.recent_count[s]
        cython.declare(i=Index, r=Index, slot=Index)
        self.recent_count[s] = 0
        if cython.compiled and n > 4:
            # The records are scattered over the segment: their cache lines are fetched
            # in parallel.
            for i in range(n):
                r = 2 * self._record(b, self.recent_slot[at + i])
                prefetch(cython.address(self.w32[r]))
            for i in range(n):
                self._fetch_neighbours(b, self.recent_slot[at + i])
        for i in range(n):
            slot = self.recent_slot[at + i]
            if self.w64[self._record(b, slot)] == self.recent_version[at + i]:
                self._use(b, slot)
        return 0

    # The functions below fetch cache lines that will be needed soon, while there is
    # other work to do.

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_record(self, b: Index, h32: Word) -> cython.int:
        # Fetch the first record of a bucket.  Without the lock, another record may be
        # first when it is read; then the fetch was in vain.
        slot: Index = self.w32[self._bucket(b, h32)]
        if slot <= self.slots:
            prefetch(cython.address(self.w32[2 * self._record(b, slot)]))
            self._fetch_block(b, slot)
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_block(self, b: Index, slot: Index) -> cython.int:
        # If all entries take one block each, slots and blocks are taken and freed
        # together and so have the same numbers.  Then the block can be fetched before
        # the record, which names it, has arrived.  The guess is made as long as it was
        # right for the last entry that was found.
        if self.in_step and slot <= self.blocks:
            at: Index = 8 * b + self.arena + (slot << self.block_shift)
            prefetch(cython.address(self.mem[at]))
            if self.block_shift > 6:
                prefetch(cython.address(self.mem[at + 64]))
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _fetch_neighbours(self, b: Index, slot: Index) -> cython.int:
        # Fetch the records before and behind a slot in the LRU ring.
        r: Index = 2 * self._record(b, slot)
        near: Index = self.w32[r + F_LRU_PREV]
        prefetch(cython.address(self.w32[2 * self._record(b, near)]))
        near = self.w32[r + F_LRU_NEXT]
        prefetch(cython.address(self.w32[2 * self._record(b, near)]))
        return 0
