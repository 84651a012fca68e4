"""The part of a handle map in one process: registering, making and leasing handles.

A process registers a handle in its own table and in the shared map.  The table comes
first: as soon as the entry is stored another process may remove it, and then the
message must find the number.  If storing the entry fails, the table is put back.

Among the threads of a process that want a handle of one key at once, one makes it; the
others wait until its turn has ended.  A lease is a count in the handle's record; a
handle that has gone is handed over for closing when the count is 0.
"""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcache._arguments import check_callable, shown
from shmcache._format import layout as L
from shmcache._format.layout import Cause
from shmcache._handles.delivery import Delivery, Record, Table
from shmcache.errors import ReentrantCall, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._handles.registry import Registry

ON_EVICT = "it is called as on_evict(key, handle, cause)"

# Numbers are unique in a process, because two maps of one name are one worker.
_numbering = itertools.count(1)


class _Turn(NamedTuple):
    """The thread that makes the handle of a key; the others wait for the event."""

    thread: int
    done: threading.Event


class ProcessState(Table):
    """The handles of one process, beginning with none; a forked child gets a new state.

    Args:
        registry: The shared part of the map.
        token: The token of this process; 0 as long as it has not used the map.
        on_evict: The callback of handles that have no callback of their own, or None.
        threads: How many callbacks may run at once.
        watch: Called when the first handle is registered.
    """

    def __init__(
        self,
        registry: Registry,
        token: int,
        on_evict: Any,
        threads: int,
        watch: Callable[[], None],
    ) -> None:
        super().__init__()
        self.token = token
        self.delivery = Delivery(registry, token, self, on_evict, threads)
        self.freed = -1  # rows freed when the entries of the dead were last removed
        self.reaped_at = 0.0
        self._registry = registry
        # The shared keys of str keys begin with this; it is made once, as each call
        # needs it.
        self._prefix = registry.owned_key(token, "")
        self._watch = watch
        self._pid = os.getpid()
        self._turns: dict[bytes, _Turn] = {}  # by shared key

    @property
    def is_own(self) -> bool:
        """Return whether this process has used the map; False for a parent's state."""
        return self.token != 0 and self._pid == os.getpid()

    def shared_key(self, key: Any) -> bytes:
        """Return the key of this process's entry in the shared map.

        Raises:
            UnsupportedKey: The user's key cannot be a key of a ``Cache``.
        """
        if type(key) is str:
            try:
                return self._prefix + key.encode()
            except UnicodeEncodeError:
                pass  # owned_key raises, and its message says what to do
        return self._registry.owned_key(self.token, key)

    def reap(self) -> None:
        """Remove the entries of owners that have died."""
        _, self.freed = self._registry.reap_handles(self.freed)

    # --- registering ------------------------------------------------------------------

    def register(
        self,
        key: Any,
        handle: Any,
        value: Any = None,
        ttl: Any = ...,
        on_evict: Any = None,
        leases: int = 0,
    ) -> Record:
        """Register a handle, or the same handle once more.

        Args:
            key: The user's key.
            handle: The object; not None.
            value: The value for all workers.
            ttl: Seconds to live.  None means for ever; if left out, the map's default
                applies.
            on_evict: The handle's own callback, or None.
            leases: How many leases begin on it.
        """
        registry = self._registry
        shared = self.shared_key(key)
        first = not self.numbers
        with self.lock:
            before = self.handles.get(shared)
            number = next(_numbering)
            if before is not None and before.handle is handle:
                record = before  # it keeps its leases
            else:
                record = Record(key, shared, handle, number, on_evict)
                self.handles[shared] = record
            self.numbers[number] = record
            try:
                registry.set(shared, (self.token, number, value), ttl)
            except BaseException:
                self._unregister(shared, number, before)
                raise
            if record is before:
                # The message about the replaced entry must not find the former number.
                self.numbers.pop(record.number, None)
                record.number = number
                record.on_evict = on_evict or record.on_evict
            else:
                registry.count(L.R_OPENED)
            record.leases += leases
        if first:
            self._watch()
        return record

    def _unregister(self, shared: bytes, number: int, before: Record | None) -> None:
        # Undo a registration that raised.
        self.numbers.pop(number, None)
        if before is None:
            self.handles.pop(shared, None)
        else:
            self.handles[shared] = before
        # If a signal handler raised, the entry may have been stored.
        with suppress(ShmCacheError):
            self._registry.discard(shared, number, Cause.CLOSED)

    def take_back(self, shared: bytes) -> Record | None:
        """Remove a handle from the map without closing it; None if it has gone."""
        with self.lock:
            record = self.handles.get(shared)
            if record is None or not self._registry.discard(
                shared, record.number, Cause.DELETED
            ):
                return None
            # The message about it will find no number, so nothing is closed.
            self.numbers.pop(record.number, None)
            self.handles.pop(shared, None)
            self._registry.count(L.R_CLOSED)
            return record

    # --- making -----------------------------------------------------------------------

    def create(
        self,
        key: Any,
        factory: Any,
        value: Any,
        ttl: Any,
        on_evict: Any,
        leases: int,
    ) -> Record:
        """Return the record of a key; if there is none, ``factory()`` makes the handle.

        Args:
            key: The user's key.
            factory: Makes the handle, in one thread at a time.
            value: As for ``register``.
            ttl: As for ``register``.
            on_evict: As for ``register``.
            leases: 1 if the caller wants a lease on it, else 0.

        Raises:
            ReentrantCall: The factory asks for the handle that it makes.
            ValueError: The factory returned None.
        """
        if not callable(factory):
            raise TypeError(f"factory must be callable, not {factory!r}")
        check_callable(on_evict, "on_evict", ON_EVICT)
        shared = self.shared_key(key)
        turn = _Turn(threading.get_ident(), threading.Event())
        try:
            record = self._await_turn(key, shared, turn, leases)
            if record is not None:
                return record
            handle = factory()
            if handle is None:
                raise ValueError(
                    f"the factory of {shown(key)} returned None; it must return the"
                    " handle"
                )
            try:
                record = self.register(key, handle, value, ttl, on_evict, leases)
            except BaseException:
                unregistered = Record(key, shared, handle, 0, on_evict)
                self.delivery.close_unregistered(unregistered)
                raise
        finally:
            if self._turns.get(shared) is turn:
                self._turns.pop(shared, None)
            turn.done.set()
        self.delivery.deliver()
        return record

    def _await_turn(
        self, key: Any, shared: bytes, turn: _Turn, leases: int
    ) -> Record | None:
        # Return the record that another thread has made, or None if it is our turn.
        while True:
            first = self._turns.setdefault(shared, turn)
            if first is turn:
                # Another thread may have made it between our look and our turn.
                return self._find(shared, leases)
            if first.thread == turn.thread:
                raise ReentrantCall(
                    f"the factory of {shown(key)} asks for the same key again, which"
                    " would wait for itself; use another key inside"
                )
            first.done.wait()
            record = self._find(shared, leases)
            if record is not None:
                return record

    def _find(self, shared: bytes, leases: int) -> Record | None:
        if leases:
            return self.hold(shared)
        record = self.handles.get(shared)
        if record is not None and self._registry.renew(shared):
            return record
        return None

    # --- leasing ----------------------------------------------------------------------

    def hold(self, shared: bytes) -> Record | None:
        """Begin a lease on a handle; None if there is none, or it has just gone."""
        with self.lock:
            record = self.handles.get(shared)
            if record is None:
                return None
            # The lease begins before the entry is looked up, so that the handle cannot
            # be closed in between.
            record.leases += 1
        if self._registry.renew(shared) and record.cause is None:
            return record
        self.delivery.deliver()
        self.let_go(record)
        return None

    def let_go(self, record: Record) -> None:
        """End a lease.  The last one has the handle closed if its entry has gone."""
        with self.lock:
            record.leases -= 1
            last = record.leases == 0 and record.cause is not None
        if last:
            self.delivery.hand_over(record)
