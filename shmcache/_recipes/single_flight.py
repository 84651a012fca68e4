"""Single flight: if many callers of the host miss one key, one computes the value.

Problem: N workers miss the same key at once and all do the same slow work; and a worker
that does it may fail, or be killed.

Mechanism: each shard has a small in-flight table of pairs (hash of a key, token of a
worker).  The worker whose pair is in the table computes.  The others look again at
growing intervals whether the value has come, the pair has been removed, or its worker
has died.  The first that sees a dead worker's pair replaces it by its own.  Looking
costs a waiter a lookup and a short hold of the lock every few milliseconds.  In return
no process needs to be notified, so no notification can be lost.

In the shared table, one thread or task represents all those of its process; the others
wait for it in the process's own table, ``flights``.

Death in the middle: a pair is two words.  The token is stored last, and it is the token
of a dead worker as soon as the kernel has dropped that worker's lock.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from shmcache._arguments import shown
from shmcache._engine import MISSING
from shmcache.errors import LockTimeout, ReentrantCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache._process.attachment import Attachment

# All of these are in seconds.
_FIRST_PAUSE = 0.000_5
_LONGEST_PAUSE = 0.02
_CROWD_PATIENCE = 1.0
CROWDED = 1  # the result of ``claim`` if the table is full


class InFlightTable(NamedTuple):
    """The in-flight table of a cache, and all else that single flight needs.

    A new object is made for each flight, so that it keeps no cache alive.

    Attributes:
        attachment: It knows which workers live, and the flights of this process.
        locate: ``locate(key)`` returns kind, bytes, hash and shard of a key.
        claim: ``claim(shard, hash, dead)`` enters the pair of this worker, unless
            another worker's is there; a pair of the worker ``dead`` is replaced.  It
            returns 0 if the pair was entered, else the token of the other worker, or
            CROWDED.
        release: ``release(shard, hash)`` removes the pair of this worker.
        release_worker: ``release_worker(shard, token)`` removes all pairs of a worker.
        holders: ``holders(shard)`` returns the tokens in the table.
        peek: ``peek(key, default)`` returns the value of a key without using it.
    """

    attachment: Attachment
    locate: Callable[[Any], tuple[int, bytes, int, int]]
    claim: Callable[[int, int, int], int]
    release: Callable[[int, int], None]
    release_worker: Callable[[int, int], None]
    holders: Callable[[int], set[int]]
    peek: Callable[[Any, Any], Any]


class Flight:
    """One caller's part in computing one key, as a context manager.

    However the block ends, the pair in the in-flight table is removed.

    Args:
        table: The in-flight table of the cache.
        key: The key.
        who: The calling thread or task, which must not wait for itself.
        timeout: Seconds to wait for another caller's value; None means no limit.
    """

    def __init__(
        self, table: InFlightTable, key: Any, who: object, timeout: float | None
    ) -> None:
        self._table = table
        self._key = key
        self.who = who
        self._timeout = timeout
        _, _, self._hash, self._shard = table.locate(key)
        self.value: Any = MISSING

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Remove the pair, unless that was done.

        The caller does it once more after the ``with`` block, because an exception out
        of a signal handler may strike before ``__exit__`` begins, or in the middle.
        """
        flights = self._table.attachment.flights
        if flights.get(self._hash) is self:
            try:
                self._table.release(self._shard, self._hash)
            except Exception:
                flights.pop(self._hash, None)
                raise
            flights.pop(self._hash, None)

    def pauses(self) -> Iterator[float]:
        """Yield the seconds to wait, again and again.

        It ends when it is our turn to compute, or when ``value`` has been stored by
        another caller.

        Raises:
            ReentrantCall: This thread or task computes the key already.
            LockTimeout: The value did not come in time.
        """
        peek = self._table.peek
        started = time.monotonic()
        pause = _FIRST_PAUSE
        while True:
            holder = self._holder(started)
            if holder == 0:
                # Another caller may have stored it between our miss and our claim.
                self.value = peek(self._key, MISSING)
                return
            if self._timeout is not None:
                left = self._timeout - (time.monotonic() - started)
                if left <= 0:
                    raise LockTimeout(
                        f"the value of {shown(self._key)} did not come within"
                        f" {self._timeout} s; process"
                        f" {self._table.attachment.pid(holder)}"
                        " computes it: raise timeout, or look what keeps it"
                    )
                pause = min(pause, left)
            yield pause
            pause = min(pause * 1.6, _LONGEST_PAUSE)
            self.value = peek(self._key, MISSING)
            if self.value is not MISSING:
                return

    def _holder(self, started: float) -> int:
        # Return the token of the worker that computes, or CROWDED, or 0 if it is our
        # turn.
        table, shard = self._table, self._shard
        attachment = table.attachment
        first = attachment.flights.setdefault(self._hash, self)
        if first is not self:
            if first.who == self.who:
                raise ReentrantCall(
                    f"the factory of {shown(self._key)} asks for the same key again,"
                    " which would wait for itself; use another key inside"
                )
            return attachment.token
        dead = 0
        while True:
            holder = table.claim(shard, self._hash, dead)
            if holder == CROWDED:
                if self._make_room():
                    continue
                waited = time.monotonic() - started
                return 0 if self._may_go_unclaimed(waited) else CROWDED
            if holder == 0:
                return 0
            if holder != attachment.token and attachment.alive(holder):
                return holder
            # Its worker has died.  Or the pair is our own: a signal handler raised in
            # a former flight before the pair was removed.
            dead = holder

    def _make_room(self) -> bool:
        # Remove the pairs of dead workers, and return whether there were any.
        table = self._table
        alive = table.attachment.alive
        dead = [token for token in table.holders(self._shard) if not alive(token)]
        for token in dead:
            table.release_worker(self._shard, token)
        return bool(dead)

    def _may_go_unclaimed(self, waited: float) -> bool:
        # Return whether this caller may compute without a pair in the table, which may
        # do some work twice.  It must not wait for ever: the pairs may be our own, from
        # a deep recursion, or belong to callers that wait for us.
        others = list(self._table.attachment.flights.values())
        nested = any(other.who == self.who for other in others if other is not self)
        return nested or waited > _CROWD_PATIENCE
