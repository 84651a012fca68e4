"""Rebuilding a shard: all lists and counts anew from the live records.

Problem: the holder of the lock died, or was stopped by an exception, or met an index
that makes no sense.  The lists may be in any state.

Mechanism: the live records are the truth.  Each is examined (lengths, blocks that no
other record has, hash of the key, checksum of the value) and given up if it is damaged;
then all lists and counts are written anew from the others.  The order of the LRU ring
is kept as far as its links hold, from both ends; an entry that neither walk reached was
being inserted or moved to the front, and goes to the front.

Death in the middle: until the lists are written, only the versions of damaged records
are changed, and the next rebuild derives the lists again.  The ring is linked from its
end on, each link in place of the old one, so that a second rebuild finds the same
order.

The caller holds the lock.
"""

import gc
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        ALL_IN_DOUBT,
        CAPACITY,
        CAUSES,
        EXPIRED,
        F64_EXPIRES,
        F_BLOCK,
        F_CHECKSUM,
        F_HASH,
        F_LRU_NEXT,
        F_LRU_PREV,
        F_META,
        F_TTL,
        F_VALUE_LEN,
        F_WHEEL_NEXT,
        F_WHEEL_PREV,
        IN_FLIGHT,
        LAST_KIND,
        LAST_TAG,
        MAILBOX_SIZE,
        MASK32,
        MAX_EXPIRES,
        MAX_VERSION,
        META_KNOWN,
        NEVER,
        ROWS,
        S_ACQUISITIONS,
        S_BLOCKS_USED,
        S_COUNTERS,
        S_COUNTERS_END,
        S_DROPPED,
        S_DUE,
        S_ENTRIES,
        S_FREE_BLOCK,
        S_FREE_SLOT,
        S_FRESH_BLOCK,
        S_FRESH_SLOT,
        S_GONE,
        S_IN_DOUBT,
        S_IN_FLIGHT,
        S_LATE_USE,
        S_MAILBOX_HEAD,
        S_SEQUENCE,
        S_TICK,
        S_UNREAD,
        S_WHEEL_BITS,
        S_WHEEL_HEADS,
        SEQUENCE_LEAP,
        STR_KEY,
        WHEEL_LEVELS,
        Index,
        Word,
    )
    from shmcache._engine.entries import Entries
    from shmcache._engine.words import monotonic, pack_ttl, unpack_ttl
    from shmcache._format.fields import (
        generation_of,
        is_live,
        key_len_of,
        kind_of,
        row_of,
        sequence_of,
        shard_of,
        tag_of,
    )


@cython.cclass
class Examined:
    """What a rebuild has found out about the slots and blocks of its shard."""

    claimed: cython.uchar[::1]  # blocks that a sound record has
    state: cython.uchar[::1]  # slots: 1, live and sound; 2, in ``order`` as well
    order: cython.uint[::1]  # sound slots, the most recently used first
    count: Index  # how many there are
    newest: Index  # the one that was written last; 0 if there is none
    now: Word  # the time that the wheel starts from
    dropped: Index  # entries given up

    def __init__(self, slots: int, blocks: int, now: int) -> None:
        self.claimed = bytearray(blocks + 1)
        self.state = bytearray(slots + 1)
        self.order = memoryview(array("I", bytes(4 * (slots + 1))))
        self.count = 0
        self.newest = 0
        self.now = now
        self.dropped = 0


@cython.cclass
class Rebuild(Entries):
    """Rebuilds the shard whose lock is held."""

    first_sequence: Word  # the write sequence that each shard began with

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _rebuild(self, b: Index) -> Index:
        # Rebuild a shard, and return how many entries were given up.  This allocates
        # objects, and the collector would run finalizers while the lock is held.
        collecting: cython.bint = gc.isenabled()
        gc.disable()
        try:
            return self._rebuild_from_records(b)
        finally:
            if collecting:
                gc.enable()

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _rebuild_from_records(self, b: Index) -> Index:
        # A user's clock is Python code, so it is not asked now, and the wheel starts
        # from 0 instead: a wheel in the past catches up by itself, while one in the
        # future would not.
        seen: Examined = Examined(
            self.slots, self.blocks, monotonic() if self.clock is None else 0
        )
        # From here on a live key may be missing from the lists.
        self._put_word(b + S_IN_DOUBT, ALL_IN_DOUBT)
        self._clean_counters(b)
        self._redo(b)
        self._examine(b, seen)
        self._find_order(b, seen)
        self._empty_lists(b)
        self._readmit(b, seen)
        self._relink_ring(b, seen)
        late: Word = self.w64[b + S_LATE_USE]
        if late > cython.cast(Word, self.slots) or not is_live(
            self.w64[self._record(b, cython.cast(Index, late))]
        ):
            self.w64[b + S_LATE_USE] = 0
        self._refree_slots(b)
        self._refree_blocks(b, seen)
        if self.notify:
            # Nobody knows which messages are missing.  The head moves on as if more
            # messages had been posted than the mailbox holds, so every owner compares
            # its handles with the map.
            self._count(b + S_MAILBOX_HEAD, MAILBOX_SIZE + 1)
        self._count(b + S_DROPPED, seen.dropped)
        self._put_word(b + S_IN_DOUBT, 0)
        return seen.dropped

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _clean_counters(self, b: Index) -> cython.int:
        # Clean what cannot be derived from the records: impossible counters, and
        # half-written pairs of the in-flight table.  This is safe, because each store
        # makes one word plausible.
        cython.declare(i=Index, at=Index, token=Word, evicted=Word)
        for i in range(S_COUNTERS, S_COUNTERS_END):
            if self.w64[b + i] >> 62:  # the bound leaves room to count on
                self.w64[b + i] = 0
        for i in range(S_GONE + CAUSES, S_UNREAD):
            self.w64[b + i] = 0
        evicted = self.w64[b + S_GONE + EXPIRED] + self.w64[b + S_GONE + CAPACITY]
        if self.w64[b + S_UNREAD] > evicted:
            self.w64[b + S_UNREAD] = evicted
        if self.w64[b + S_ACQUISITIONS] >> 62:
            self.w64[b + S_ACQUISITIONS] = 0
        if is_live(self.w64[self._record(b, 0)]):
            self.w64[self._record(b, 0)] = 0  # the sentinel is no entry
        for i in range(IN_FLIGHT):
            at = b + S_IN_FLIGHT + 2 * i
            token = self.w64[at + 1]
            if generation_of(token) == 0 or not 0 <= row_of(token) < ROWS:
                if token:
                    self.w64[at + 1] = 0
                if self.w64[at]:
                    self.w64[at] = 0
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _examine(self, b: Index, seen: Examined) -> cython.int:
        # Find the sound records, and give up the damaged ones.  This is safe, because
        # no reader accepts a damaged record as an entry.
        fresh: Index = 0
        sequence: Word = self.first_sequence
        cython.declare(slot=Index, v=Index)
        for slot in range(1, self.slots + 1):
            v = self._record(b, slot)
            if self.w64[v] == 0:
                continue
            fresh = slot
            if is_live(self.w64[v]):
                if 1 < self.w64[v] <= MAX_VERSION and self._is_sound(b, slot, seen):
                    seen.state[slot] = 1
                    if sequence_of(self.w64[v]) >= sequence:
                        sequence = sequence_of(self.w64[v])
                        seen.newest = slot
                    if self.w64[v + F64_EXPIRES] < seen.now:
                        seen.now = self.w64[v + F64_EXPIRES]
                else:
                    self._put_word(v, self.w64[v] - 1)
                    seen.dropped += 1
        if not sequence <= self.w64[b + S_SEQUENCE] <= MAX_VERSION >> 1:
            # The versions of entries that have gone are not known any more.  The leap
            # keeps them from being given out again.
            self.w64[b + S_SEQUENCE] = sequence + SEQUENCE_LEAP
        self.w64[b + S_FRESH_SLOT] = fresh
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _is_sound(self, b: Index, slot: Index, seen: Examined) -> cython.bint:
        # Return whether a live record can be kept; if so, claim its blocks for it.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + F_META]
        key_len: Index = key_len_of(meta)
        kind: cython.uint = kind_of(meta)
        tag: cython.uint = tag_of(meta)
        value_len: Index = self.w32[r + F_VALUE_LEN]
        expires: Word = self.w64[r // 2 + F64_EXPIRES]
        if kind < STR_KEY or kind > LAST_KIND or tag > LAST_TAG or expires == 0:
            return False
        if expires > MAX_EXPIRES and expires != NEVER:
            return False
        if meta & ~META_KNOWN:
            self.w32[r + F_META] = meta & META_KNOWN
        ttl: cython.uint = pack_ttl(unpack_ttl(self.w32[r + F_TTL]))
        if ttl != self.w32[r + F_TTL]:
            self.w32[r + F_TTL] = ttl
        if self._need(key_len, value_len) > self.blocks:
            return False
        if not self._claim_blocks(b, slot, seen):
            return False
        first: Index = self.w32[r + F_BLOCK]
        key: bytes = self._copy_out(b, first, 0, key_len)
        value: bytes = self._copy_out(b, first, key_len, value_len)
        h: Word = self._hash(key, kind)
        if (
            self._base(shard_of(h, self.shards)) == b
            and self.w32[r + F_HASH] == h & MASK32
            and self.w32[r + F_CHECKSUM] == self._checksum(value, h & MASK32, tag)
        ):
            return True
        self._unclaim_blocks(b, first, self._blocks_of(b, slot), seen)
        return False

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _claim_blocks(self, b: Index, slot: Index, seen: Examined) -> cython.bint:
        # Claim the whole run of blocks of a record, or nothing.
        need: Index = self._blocks_of(b, slot)
        links: Index = 2 * b + self.links4
        first: Index = self.w32[2 * self._record(b, slot) + F_BLOCK]
        block: Index = first
        got: Index = 0
        while got < need:
            if block == 0 or block > self.blocks or seen.claimed[block]:
                break
            seen.claimed[block] = 1
            block = self.w32[links + block]
            got += 1
        if got == need and block == 0:
            return True
        self._unclaim_blocks(b, first, got, seen)
        return False

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _unclaim_blocks(
        self, b: Index, first: Index, n: Index, seen: Examined
    ) -> cython.int:
        block: Index = first
        _i: Index
        for _i in range(n):
            seen.claimed[block] = 0
            block = self.w32[2 * b + self.links4 + block]
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _find_order(self, b: Index, seen: Examined) -> cython.int:
        # Put the sound slots into the order of their use.  It only reads the shard.
        slots: Index = self.slots
        count: Index = 0
        unmet: Index = 0
        cython.declare(slot=Index, i=Index)
        # First walk down from the most recently used one, as far as the links hold ...
        slot = self.w32[2 * self._record(b, 0) + F_LRU_NEXT]
        while 0 < slot <= slots and seen.state[slot] == 1:
            seen.state[slot] = 2
            seen.order[count] = slot
            count += 1
            slot = self.w32[2 * self._record(b, slot) + F_LRU_NEXT]
        # ... then walk up from the least recently used one, and collect at the end.
        tail: Index = slots + 1
        slot = self.w32[2 * self._record(b, 0) + F_LRU_PREV]
        while 0 < slot <= slots and seen.state[slot] == 1 and tail > count + 1:
            seen.state[slot] = 2
            tail -= 1
            seen.order[tail] = slot
            slot = self.w32[2 * self._record(b, slot) + F_LRU_PREV]
        for i in range(tail, slots + 1):
            seen.order[count] = seen.order[i]
            count += 1
        # What neither walk has met was just being inserted, or moved to the front.
        for slot in range(1, slots + 1):
            if seen.state[slot] == 1:
                unmet += 1
        for i in range(count - 1, -1, -1):
            seen.order[i + unmet] = seen.order[i]
        i = 0
        for slot in range(1, slots + 1):
            if seen.state[slot] == 1:
                seen.order[i] = slot
                i += 1
        seen.count = count + unmet
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _empty_lists(self, b: Index) -> cython.int:
        # Empty the hash chains and the wheel.  This is safe, because SEQ is odd:
        # readers do not believe "not found" now, and after a death the lists are
        # emptied again.
        i: Index
        for i in range(self.slots):
            self.w32[2 * b + self.buckets4 + i] = 0
        for i in range(WHEEL_LEVELS):
            self.w64[b + S_WHEEL_BITS + i] = 0
        for i in range(64 * WHEEL_LEVELS):
            if self.w32[2 * (b + S_WHEEL_HEADS) + i]:
                self.w32[2 * (b + S_WHEEL_HEADS) + i] = 0
        self.w64[b + S_DUE] = NEVER
        self.w64[b + S_TICK] = 0  # the first entry that enters sets it
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _readmit(self, b: Index, seen: Examined) -> cython.int:
        # Insert the sound records into hash chains and wheel.  If an overwrite was
        # under way, a key has two records; the newer one is kept.  It was the last
        # write, and is inserted first, so that a reader who met it before the rebuild
        # does not meet the older one in the middle of it.
        capacity: Word = self.capacity[(b - self.shards8) // self.stride8]
        used: Index = 0
        entries: Word = 0
        cython.declare(slot=Index, other=Index, v=Index, i=Index)
        for i in range(-1, seen.count):
            slot = seen.newest if i < 0 else seen.order[i]
            if slot == 0 or (i >= 0 and slot == seen.newest):
                continue
            other = self._twin(b, slot)
            if other:
                if self.w64[self._record(b, other)] > self.w64[self._record(b, slot)]:
                    self._give_up(b, slot, seen)
                    continue
                # The older one is in the lists already; it is removed, and this one is
                # inserted.
                used -= self._give_up(b, other, seen)
                entries -= 1
                self._chain_remove(b, other)
                self._wheel_remove(b, other)
            if entries == capacity:
                # Damage brought a removed entry back to life.
                self._give_up(b, slot, seen)
                seen.dropped += 1
                continue
            v = self._record(b, slot)
            self.w32[2 * v + F_WHEEL_PREV] = 0
            self.w32[2 * v + F_WHEEL_NEXT] = 0
            self._chain_insert(b, slot, self.w32[2 * v + F_HASH])
            if self.w64[v + F64_EXPIRES] != NEVER:
                self._wheel_insert(b, slot, self.w64[v + F64_EXPIRES], seen.now)
            used += self._blocks_of(b, slot)
            entries += 1
        self.w64[b + S_ENTRIES] = entries
        self.w64[b + S_BLOCKS_USED] = used
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _twin(self, b: Index, slot: Index) -> Index:
        # Return another record of the same key that is in its bucket already, or 0.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + F_META]
        key: bytes = self._copy_out(b, self.w32[r + F_BLOCK], 0, key_len_of(meta))
        return self._find(b, self.w32[r + F_HASH], kind_of(meta), key)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _give_up(self, b: Index, slot: Index, seen: Examined) -> Index:
        # Give up a sound record, and return the number of its blocks.
        v: Index = self._record(b, slot)
        self._put_word(v, self.w64[v] - 1)
        need: Index = self._blocks_of(b, slot)
        self._unclaim_blocks(b, self.w32[2 * v + F_BLOCK], need, seen)
        return need

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _relink_ring(self, b: Index, seen: Examined) -> cython.int:
        # Link the LRU ring.  The links down are stored first, from the end on.  So at
        # each store the old links lead to the new ones, and a second rebuild finds the
        # same order.  Then come the links up, which it does not need any more.
        after: Index = 0
        before: Index = 0
        cython.declare(slot=Index, i=Index)
        for i in range(seen.count - 1, -1, -1):
            slot = seen.order[i]
            if is_live(self.w64[self._record(b, slot)]):
                self.w32[2 * self._record(b, slot) + F_LRU_NEXT] = after
                after = slot
        self.w32[2 * self._record(b, 0) + F_LRU_NEXT] = after
        for i in range(seen.count):
            slot = seen.order[i]
            if is_live(self.w64[self._record(b, slot)]):
                self.w32[2 * self._record(b, slot) + F_LRU_PREV] = before
                before = slot
        self.w32[2 * self._record(b, 0) + F_LRU_PREV] = before
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _refree_slots(self, b: Index) -> cython.int:
        # Free slots are those whose record is no entry.  _examine found the last slot
        # that was ever used.
        slot: Index
        self.w64[b + S_FREE_SLOT] = 0
        for slot in range(cython.cast(Index, self.w64[b + S_FRESH_SLOT]), 0, -1):
            if not is_live(self.w64[self._record(b, slot)]):
                self._give_slot(b, slot)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _refree_blocks(self, b: Index, seen: Examined) -> cython.int:
        # Free blocks are those that no record has claimed.
        block: Index
        fresh: Index = self.blocks
        while fresh > 0 and not seen.claimed[fresh]:
            fresh -= 1
        self.w64[b + S_FRESH_BLOCK] = fresh
        self.w64[b + S_FREE_BLOCK] = 0
        for block in range(fresh, 0, -1):
            if not seen.claimed[block]:
                self.w32[2 * b + self.links4 + block] = cython.cast(
                    cython.uint, self.w64[b + S_FREE_BLOCK]
                )
                self.w64[b + S_FREE_BLOCK] = block
        return 0
