"""The timer wheel: finding what has expired without looking at what has not.

Problem: a sweep must cost O(expired), however many entries are alive.

Mechanism: a hierarchical wheel (Varghese and Lauck 1987; levels are chosen by the
highest differing bit, as Kafka and tokio do).  Time is counted in ticks of 2**20 ns.
An entry that is due at tick t lies at level l, where l is the highest 6-bit digit in
which t differs from the wheel's own tick, in the list of t's digit at that level.  So
all entries of level l are due before those of level l + 1, one word of bits finds the
first list of a level, and an entry moves at most six times in its life.  The list of
the current tick may hold entries that are due a moment later; they stay in it.

A reader of a sliding cache moves ``expires`` forward without the lock and leaves the
entry where it is: if the wheel meets the entry too early, it inserts it again.

Death in the middle: the rebuild inserts every live record again.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        F_WHEEL_NEXT,
        F_WHEEL_PREV,
        NEVER,
        S_DUE,
        S_TICK,
        S_WHEEL_BITS,
        S_WHEEL_HEADS,
        WHEEL_FIRST,
        WHEEL_LEVELS,
        WHEEL_TICK_BITS,
        Index,
        Word,
    )
    from shmcache._engine.recency import Recency
    from shmcache._engine.words import Corrupt


if cython.compiled:
    from cython.cimports.shmcache._engine.memory import lowest_bit


@cython.cclass
class Wheel(Recency):
    """The timer wheel of a shard; ``_reclaim`` in ``entries.py`` turns it."""

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _wheel_insert(
        self, b: Index, slot: Index, expires: Word, now: Word
    ) -> cython.int:
        due: Word = self.w64[b + S_DUE]
        if due == 0 or due == NEVER:
            # Nothing else is in the wheel, so its tick may be set to the present.
            self.w64[b + S_TICK] = now >> WHEEL_TICK_BITS
            due = NEVER
        tick: Word = self.w64[b + S_TICK]
        t: Word = expires >> WHEEL_TICK_BITS
        if t < tick:
            t = tick
        differ: Word = t ^ tick
        level: Index = 0
        while differ >= 64 and level < WHEEL_LEVELS - 1:
            differ >>= 6
            level += 1
        index: Index = cython.cast(
            Index, (t >> cython.cast(cython.uint, 6 * level)) & 63
        )
        number: Index = level * 64 + index
        head: Index = 2 * (b + S_WHEEL_HEADS) + number
        first: Index = self.w32[head]
        r: Index = 2 * self._record(b, slot)
        self.w32[r + F_WHEEL_PREV] = WHEEL_FIRST | number
        self.w32[r + F_WHEEL_NEXT] = first
        if first:
            self.w32[2 * self._record(b, first) + F_WHEEL_PREV] = slot
        self.w32[head] = slot
        self.w64[b + S_WHEEL_BITS + level] |= cython.cast(Word, 1) << cython.cast(
            cython.uint, index
        )
        if expires < due:
            self.w64[b + S_DUE] = expires
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _wheel_remove(self, b: Index, slot: Index) -> cython.int:
        r: Index = 2 * self._record(b, slot)
        before: cython.uint = self.w32[r + F_WHEEL_PREV]
        if before == 0:
            return 0  # the entry never expires
        after: Index = self.w32[r + F_WHEEL_NEXT]
        number: Index
        if after and self.w32[2 * self._record(b, after) + F_WHEEL_PREV] != slot:
            raise Corrupt("wheel")
        if before & WHEEL_FIRST:
            number = before & ~WHEEL_FIRST
            if (
                number >= 64 * WHEEL_LEVELS
                or self.w32[2 * (b + S_WHEEL_HEADS) + number] != slot
            ):
                raise Corrupt("wheel")
            self.w32[2 * (b + S_WHEEL_HEADS) + number] = after
            if after == 0:
                self.w64[b + S_WHEEL_BITS + (number >> 6)] &= ~(
                    cython.cast(Word, 1) << cython.cast(cython.uint, number & 63)
                )
        else:
            if self.w32[2 * self._record(b, before) + F_WHEEL_NEXT] != slot:
                raise Corrupt("wheel")
            self.w32[2 * self._record(b, before) + F_WHEEL_NEXT] = after
        if after:
            self.w32[2 * self._record(b, after) + F_WHEEL_PREV] = before
        self.w32[r + F_WHEEL_PREV] = 0
        self.w32[r + F_WHEEL_NEXT] = 0
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-2)
    def _wheel_next(self, b: Index) -> Index:
        # Return the number of the list that is due first, or -1 if the wheel is empty.
        # A list of a higher level comes first if its time has begun: an earlier call
        # stopped in the middle of spreading it.
        tick: Word = self.w64[b + S_TICK]
        level: Index = WHEEL_LEVELS - 1
        cython.declare(bits=Word, digit=cython.uint)
        while level > 0:
            digit = cython.cast(
                cython.uint, (tick >> cython.cast(cython.uint, 6 * level)) & 63
            )
            if (self.w64[b + S_WHEEL_BITS + level] >> digit) & 1:
                return level * 64 + digit
            level -= 1
        for level in range(WHEEL_LEVELS):
            bits = self.w64[b + S_WHEEL_BITS + level]
            if bits:
                if cython.compiled:
                    return level * 64 + lowest_bit(bits)
                return level * 64 + (bits & -bits).bit_length() - 1
        return -1
