"""The in-flight table: which worker computes which absent key.

Problem: single flight (``_recipes/single_flight.py``) needs one worker of the host to
compute a key, and the others to see when that worker is done or dead.

Mechanism: each shard has a small open-addressed table, under the shard's lock.  A pair
in it is the hash of a key and the token of a worker.  A pair with token 0 is free.

Death in the middle: the token is stored last and cleared first, so a half-written pair
is a free one.  The pairs of a dead worker keep its token, so any process that meets one
takes it over or frees it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import IN_FLIGHT, S_IN_FLIGHT, Index, Word
    from shmcache._engine.steps import Steps


@cython.cclass
class InFlight(Steps):
    """Entering and leaving the in-flight table."""

    def _enter_flight(self, s: int, h: int, dead: int) -> int:
        """Enter a key into the in-flight table, unless another worker has entered it.

        Args:
            s: The shard of the key.
            h: The hash of the key.
            dead: A token whose pair is taken over; 0 means that none is.

        Returns:
            0 if this worker computes the key now; else the token of the worker that
            does; 1 if the table is full.
        """
        b: Index = self._base(s)
        hh: Word = h
        gone: Word = dead
        home: Index = cython.cast(Index, hh & (IN_FLIGHT - 1))
        free: Index = -1
        cython.declare(at=Index, i=Index)
        result: Word = 1
        self._require_joined()
        self._begin(s, b)
        try:
            for i in range(IN_FLIGHT):
                at = b + S_IN_FLIGHT + 2 * ((home + i) & (IN_FLIGHT - 1))
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

    def _leave_flight(self, s: int, h: int) -> None:
        """Free this worker's pair of a key."""
        self._free_pairs(s, self.token, h, False)

    def _free_flights(self, s: int, token: int) -> None:
        """Free all pairs of a dead worker."""
        self._free_pairs(s, token, 0, True)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _free_pairs(
        self, s: Index, token: Word, h: Word, any_key: cython.bint
    ) -> cython.int:
        b: Index = self._base(s)
        cython.declare(at=Index, i=Index)
        self._require_joined()
        self._begin(s, b)
        for i in range(IN_FLIGHT):
            at = b + S_IN_FLIGHT + 2 * i
            if self.w64[at + 1] == token and (any_key or self.w64[at] == h):
                self._put_word(at + 1, 0)
                self.w64[at] = 0
        self._end(s, b)
        return 0

    def _fliers(self, s: int) -> Any:
        """Return the set of tokens in the table of a shard, read without the lock."""
        b: Index = self._base(s)
        i: Index
        tokens = set()
        for i in range(IN_FLIGHT):
            tokens.add(self.w64[b + S_IN_FLIGHT + 2 * i + 1])
        tokens.discard(0)
        return tokens
