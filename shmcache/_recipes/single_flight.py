"""Single flight: of all callers of the host that miss one key, one computes.

Problem: N workers miss the same key at once and all do the same slow work; the one
that does it may fail, or be killed.

Mechanism: each shard has a small table of claims (hash of the key, token of the
worker).  Who enters its claim computes; the others look again and again, at growing
distances, whether the value has come, the claim has gone, or the claimant's lease
has.  A claim of a dead worker is taken over by the first who sees it.  Looking
costs a waiter a lookup and a short hold of the lock every few milliseconds; in
return nobody has to be told anything, so nobody can miss being told.

Death in the middle: a claim is two words; the token is stored last, and is that of
a dead worker as soon as the kernel has dropped its lease.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shmcache._engine import MISSING
from shmcache.errors import LockTimeout, ReentrantCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmcache.cache import Cache

_FIRST_PAUSE = 0.000_5
_LONGEST_PAUSE = 0.02
_CROWD_PATIENCE = 1.0
CROWDED = 1  # what Engine._enter_flight says when the table is full


class Flight:
    """One caller's part in computing one key."""

    def __init__(
        self, cache: Cache, key: Any, who: object, timeout: float | None
    ) -> None:
        self._cache = cache
        self._key = key
        self.who = who
        self._timeout = timeout
        _, _, self._hash, self._shard = cache._key_hash(key)
        self.value: Any = MISSING

    def pauses(self) -> Iterator[float]:
        """How long to wait, again and again.

        Ends when it is our turn to compute, or when ``value`` has come from elsewhere.
        Used inside ``landing()``.  Of the threads or tasks of one process one stands
        for all in the shared table; the others wait for it in ``flights``.
        """
        cache = self._cache
        attachment = cache._attachment
        started = time.monotonic()
        pause = _FIRST_PAUSE
        dead = 0
        while True:
            holder = attachment.token
            first = attachment.flights.setdefault(self._hash, self)
            if first is self:
                holder = cache._enter_flight(self._shard, self._hash, dead)
                if holder == CROWDED:
                    if self._make_room():
                        continue
                    if self._may_go_unclaimed(time.monotonic() - started):
                        holder = 0
                if holder == 0:
                    # Between our miss and our claim another may have been done with it.
                    self.value = cache.peek(self._key, MISSING)
                    return
                if holder != CROWDED and (
                    holder == attachment.token or not attachment.alive(holder)
                ):
                    # Its worker died, or (ours) was thrown out before it could tell.
                    dead = holder
                    continue
            elif first.who == self.who:
                raise ReentrantCall(
                    f"the factory of {self._key!r} asks for {self._key!r} again,"
                    " which would wait for itself; use another key inside"
                )
            if self._timeout is not None:
                left = self._timeout - (time.monotonic() - started)
                if left <= 0:
                    raise LockTimeout(
                        f"the value of {self._key!r} did not come within"
                        f" {self._timeout} s; process {attachment.pid(holder)}"
                        " computes it: raise timeout, or look what keeps it"
                    )
                pause = min(pause, left)
            yield pause
            pause = min(pause * 1.6, _LONGEST_PAUSE)
            self.value = cache.peek(self._key, MISSING)
            if self.value is not MISSING:
                return

    def _make_room(self) -> bool:
        # Give back what the dead have claimed; whether there was any.
        cache = self._cache
        alive = cache._attachment.alive
        dead = [t for t in cache._fliers(self._shard) if not alive(t)]
        for token in dead:
            cache._free_flights(self._shard, token)
        return bool(dead)

    def _may_go_unclaimed(self, waited: float) -> bool:
        # A second of work done twice is better than to wait for ever: the claims may be
        # our own, of a deep recursion, or of callers that wait for us.
        others = list(self._cache._attachment.flights.values())
        nested = any(other.who == self.who for other in others if other is not self)
        return nested or waited > _CROWD_PATIENCE

    @contextmanager
    def landing(self) -> Iterator[None]:
        """The flight as a whole: however it ends, what was claimed is given back."""
        cache = self._cache
        flights = cache._attachment.flights
        try:
            yield
        finally:
            if flights.get(self._hash) is self:
                try:
                    cache._leave_flight(self._shard, self._hash)
                finally:
                    flights.pop(self._hash, None)
