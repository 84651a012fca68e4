"""Lists: hash chains, the LRU ring, free slots and free blocks.

All of them are numbers in fixed arrays: a link names a slot or a block, and 0 names
none.  Each operation is O(1), but for removing from a hash chain and for runs of
several blocks, which are O(length).  The caller holds the lock of the shard.

Damage: a link that cannot be right raises ``Corrupt`` before anything is changed, so
that unlinking never spreads damage; the shard is rebuilt then.

Death in the middle: any of these lists may be left half changed.  They say nothing that
the records do not say, and the next holder of the lock rebuilds all of them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        F_CHAIN,
        F_HASH,
        F_LRU_NEXT,
        F_LRU_PREV,
        S_BLOCKS_USED,
        S_FREE_BLOCK,
        S_FREE_SLOT,
        S_FRESH_BLOCK,
        S_FRESH_SLOT,
        Index,
        Word,
    )
    from shmcache._engine.words import Corrupt, Words


if cython.compiled:
    from cython.cimports.shmcache._engine.memory import write_fence


@cython.cclass
class Lists(Words):
    """The linked lists of a shard."""

    # --- hash chains ----------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _chain_insert(self, b: Index, slot: Index, h32: Word) -> cython.int:
        # A record enters at the head, so a reader meets the newer of two records of one
        # key first.
        head: Index = self._bucket(b, h32)
        self.w32[2 * self._record(b, slot) + F_CHAIN] = self.w32[head]
        if cython.compiled:
            write_fence()
        self.w32[head] = slot
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _chain_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        at: Index = self._bucket(b, self.w32[r + F_HASH])
        steps: Index = 0
        node: Index = self.w32[at]
        while node != slot:
            steps += 1
            if node == 0 or steps > self.slots:
                raise Corrupt("hash chain")
            at = 2 * self._record(b, node) + F_CHAIN
            node = self.w32[at]
        self.w32[at] = self.w32[r + F_CHAIN]
        return 0

    # --- the LRU ring ---------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _lru_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        before: Index = 2 * self._record(b, self.w32[r + F_LRU_PREV])
        after: Index = 2 * self._record(b, self.w32[r + F_LRU_NEXT])
        if (
            self.w32[before + F_LRU_NEXT] != slot
            or self.w32[after + F_LRU_PREV] != slot
        ):
            # The neighbours do not know this slot.
            raise Corrupt("LRU ring")
        self.w32[before + F_LRU_NEXT] = self.w32[r + F_LRU_NEXT]
        self.w32[after + F_LRU_PREV] = self.w32[r + F_LRU_PREV]
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _lru_front(self, b: Index, slot: Index) -> cython.int:
        sentinel: Index = 2 * self._record(b, 0)
        r: Index = 2 * self._record(b, slot)
        first: Index = self.w32[sentinel + F_LRU_NEXT]
        self.w32[r + F_LRU_PREV] = 0
        self.w32[r + F_LRU_NEXT] = first
        self.w32[2 * self._record(b, first) + F_LRU_PREV] = slot
        self.w32[sentinel + F_LRU_NEXT] = slot
        return 0

    # --- slots and blocks -----------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _take_slot(self, b: Index) -> Index:
        # The slot that was freed last, which is still in the CPU's cache; else a fresh
        # one.
        slot: Index = cython.cast(Index, self.w64[b + S_FREE_SLOT])
        if slot:
            self.w64[b + S_FREE_SLOT] = self.w32[2 * self._record(b, slot) + F_CHAIN]
            return slot
        slot = cython.cast(Index, self.w64[b + S_FRESH_SLOT]) + 1
        if slot < 1 or slot > self.slots:
            raise Corrupt("slots")
        self.w64[b + S_FRESH_SLOT] = slot
        return slot

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _give_slot(self, b: Index, slot: Index) -> cython.int:
        self.w32[2 * self._record(b, slot) + F_CHAIN] = cython.cast(
            cython.uint, self.w64[b + S_FREE_SLOT]
        )
        self.w64[b + S_FREE_SLOT] = slot
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _take_blocks(self, b: Index, n: Index) -> Index:
        # The first block of a run of n, whose last link is 0; the caller has made sure
        # that there are n.
        links: Index = 2 * b + self.links4
        first: Index = cython.cast(Index, self.w64[b + S_FREE_BLOCK])
        last: Index = 0
        got: Index = 0
        block: Index = first
        while got < n and block:
            if block < 0 or block > self.blocks:
                raise Corrupt("block")
            last = block
            block = self.w32[links + block]
            got += 1
        self.w64[b + S_FREE_BLOCK] = block
        if got < n:
            block = cython.cast(Index, self.w64[b + S_FRESH_BLOCK])
            if block < 0 or block > self.blocks - (n - got):
                raise Corrupt("blocks")
            self.w64[b + S_FRESH_BLOCK] = block + n - got
            while got < n:
                block += 1
                got += 1
                if last:
                    self.w32[links + last] = block
                else:
                    first = block
                last = block
        self.w32[links + last] = 0
        self.w64[b + S_BLOCKS_USED] += n
        return first

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _give_blocks(self, b: Index, first: Index, n: Index) -> cython.int:
        # Put a run of n blocks at the head of the free list.
        links: Index = 2 * b + self.links4
        last: Index = first
        _i: Index
        for _i in range(n - 1):
            if last == 0 or last > self.blocks:
                raise Corrupt("block")
            last = self.w32[links + last]
        if last == 0 or last > self.blocks or first == 0 or first > self.blocks:
            raise Corrupt("block")
        self.w32[links + last] = cython.cast(cython.uint, self.w64[b + S_FREE_BLOCK])
        if self.w64[b + S_BLOCKS_USED] < cython.cast(Word, n):
            raise Corrupt("blocks")
        self.w64[b + S_FREE_BLOCK] = first
        self.w64[b + S_BLOCKS_USED] -= n
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _blocks_left(self, b: Index) -> Index:
        used: Word = self.w64[b + S_BLOCKS_USED]
        if used > cython.cast(Word, self.blocks):
            raise Corrupt("blocks")
        return self.blocks - cython.cast(Index, used)
