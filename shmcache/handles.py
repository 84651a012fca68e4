"""Handles: a host-wide bound on resources that each belong to one process.

Problem: a connection, a span or a watcher cannot live in shared memory.  But the number
that all workers of a host hold together must be bounded, the least recently used of all
must be removed first, and each must be closed by the process that opened it, once and
only once, whatever the cause.

Mechanism (the parts are in _handles/): the object stays in its process, in a table.
The shared map has an entry for it, and that entry is subject to bound, LRU order and
TTL like any other.  The process that removes an entry leaves a message for its owner.
Each owner looks for messages every ``LOOK`` seconds, takes the handle out of its table,
and runs the callback that closes it.  At the same time it applies its recency buffer,
so that its uses count for the others.  benchmarks/handles.py shows what looking costs.
A semaphore or pipe for each worker, to wake it, was rejected: its name would have to be
removed after every death, and it would not work between containers.

Death in the middle: the handles of a dead owner died with it.  Any process that sees
that a worker row was freed removes the owner's entries, with the cause OWNER_DIED.  A
forked child keeps its parent's objects for ever, so that not even their destructors run
there.
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from shmcache._arguments import Ttl, check_callable, check_count, shown
from shmcache._engine import MISSING, HandleCodec
from shmcache._format import layout as L
from shmcache._format.layout import Cause
from shmcache._handles.process_state import ON_EVICT, ProcessState
from shmcache._handles.registry import Registry
from shmcache._process.exit import before_leaving
from shmcache._process.lockfile import mutex
from shmcache._process.sweeper import sweeper
from shmcache._process.uwsgi import threads_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache.stats import Stats

log = logging.getLogger("shmcache")

# This many seconds pass between two looks at the eviction mailboxes: LOOK while this
# process has open handles, IDLE while it has none.
LOOK, IDLE = 0.04, 1.0
# This many seconds pass between two looks for workers that have died.
REAP = 1.0


@dataclass(frozen=True)
class HostEntry:
    """A handle of any worker of the host, as every worker can see it.

    Attributes:
        key: The key under which its owner registered it.
        pid: The process id of its owner.
        age: Seconds since it was registered.
        ttl: Seconds until it expires; None if it never does.
        value: The value that was registered with it.
    """

    key: Any
    pid: int
    age: float
    ttl: float | None
    value: Any


@dataclass(frozen=True)
class HandleStats:
    """Counts of a handle map: ``host`` over all workers, the others of this process.

    Attributes:
        host: The counts of the shared map.
        open: Handles that this process has registered.
        leased: Handles of this process that are leased now.
        closing: Callbacks that wait or run, and evicted handles that stay open until
            their last lease ends.
    """

    host: Stats
    open: int
    leased: int
    closing: int

    @property
    def entries(self) -> int:
        """Return how many handles all workers have registered."""
        return self.host.entries


# An open map has open handles even if nobody refers to it, so it lives until close().
_maps: set[HandleMap] = set()
# These are states of processes that forked this one.  They are kept for ever, because a
# destructor may close what the parent still uses.
_inherited: list[ProcessState] = []


class HandleMap:
    """A bounded map of this process's handles; the bound holds for the whole host.

    Handles are objects that cannot be shared: connections, spans, watchers.  The map
    keeps them, and shared memory only records that they exist.  When a handle has been
    removed from the map, its owner calls

        on_evict(key, handle, cause)

    in a thread, once, within some 40 ms.  The cause is EXPIRED, CAPACITY, DELETED,
    REPLACED, CLEARED or CLOSED (``shmcache.Cause``).  What it raises is logged and
    counted.

    A key is any key of a ``Cache`` and belongs to the worker: the same key in two
    workers means two handles.

    Args:
        name: The name of the map, the same in all workers.
        max_entries: The largest number of registered handles of all workers together.
            The least recently used of all is evicted first.
        ttl: Seconds until an unused handle is evicted, or any handle if ``sliding`` is
            False; None: never.
        sliding: Whether a use of a handle renews its time.
        cleanup_interval: As for ``Cache``.
        on_evict: The callback that closes a handle; ``set`` may name another one for
            its handle.
        callback_threads: How many callbacks may run at once in a process.
        max_bytes: As for ``Cache``.
        jitter: As for ``Cache``.
        shards: As for ``Cache``.
        lock_timeout: As for ``Cache``.
        clock: As for ``Cache``.

    Raises:
        ShmCacheError: For the same reasons as ``Cache``.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        name: str,
        *,
        max_entries: int,
        ttl: float | None = None,
        sliding: bool = True,
        cleanup_interval: float | None = None,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
        callback_threads: int = 2,
        max_bytes: int | str | None = None,
        jitter: float = 0.0,
        shards: int | None = None,
        lock_timeout: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        hint = "it is the number of handles that all workers may hold together"
        check_count(max_entries, "max_entries", 1, L.MAX_INDEX, hint)
        self._prepare(on_evict, callback_threads)
        shared: dict[str, Any] = {
            "max_entries": max_entries,
            "ttl": ttl,
            "sliding": sliding,
            "cleanup_interval": cleanup_interval,
            "max_bytes": max_bytes,
            "jitter": jitter,
            "shards": shards,
            "lock_timeout": lock_timeout,
            "clock": clock,
        }
        self._made_by: functools.partial[Any] = functools.partial(
            HandleMap,
            name,
            on_evict=on_evict,
            callback_threads=callback_threads,
            **shared,
        )
        self._open(Registry(name, codec=HandleCodec(), **shared))

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
        callback_threads: int = 2,
        lock_timeout: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> Self:
        """Attach to an existing map, with the settings that it was created with.

        Args:
            name: The name of the map.
            on_evict: As for the constructor.
            callback_threads: As for the constructor.
            lock_timeout: As for ``Cache``.
            clock: As for ``Cache``.

        Raises:
            SegmentNotFound: There is no map of this name.
        """
        self = cls.__new__(cls)
        self._prepare(on_evict, callback_threads)
        self._made_by = functools.partial(
            cls.attach,
            name,
            on_evict=on_evict,
            callback_threads=callback_threads,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        self._open(
            Registry.attach(
                name, lock_timeout=lock_timeout, codec=HandleCodec(), clock=clock
            )
        )
        return self

    def _prepare(self, on_evict: Any, callback_threads: Any) -> None:
        check_callable(on_evict, "on_evict", ON_EVICT)
        hint = "it is how many callbacks may run at once"
        check_count(callback_threads, "callback_threads", 1, 1000, hint)
        self._on_evict = on_evict
        self._callback_threads = callback_threads

    def _open(self, registry: Registry) -> None:
        self._registry = registry
        self.name = registry.name
        self._process = self._begin(0)
        _maps.add(self)

    # --- this process's part ----------------------------------------------------------

    def _begin(self, token: int) -> ProcessState:
        return ProcessState(
            self._registry,
            token,
            self._on_evict,
            self._callback_threads,
            lambda: sweeper().watch(self, HandleMap._tend, 0.0),
        )

    def _state(self) -> ProcessState:
        # Return the state of this process, which joins the map if it has not yet.
        token = self._registry.join()
        state = self._process
        if state.token == token:
            if not threads_run():
                state.delivery.deliver()
            return state
        with mutex():
            if self._process.token != token:
                if self._process.token:
                    _inherited.append(self._process)
                self._process = self._begin(token)
            return self._process

    @property
    def registry(self) -> Registry:
        """Return the shared part, for modules of this package; it is not public."""
        return self._registry

    @property
    def closed(self) -> bool:
        """Return whether ``close`` was called in this process."""
        closed: bool = self._registry.closed
        return closed

    def _tend(self, _: float) -> float:
        # The sweeper's thread calls this again and again.
        state = self._process
        if state.token != self._registry.attached_token:
            return IDLE  # this process was forked, and has not used the map yet
        now = time.monotonic()
        if now - state.reaped_at >= REAP:
            state.reap()
            state.reaped_at = now
        self._registry.apply_uses()
        state.delivery.deliver()
        return LOOK if state.numbers or state.gone else IDLE

    # --- handles ----------------------------------------------------------------------

    def get(self, key: Any, default: Any = None) -> Any:
        """Return this worker's handle of a key; this counts as a use.  O(1).

        The use renews its LRU rank.  Another worker may evict the handle at any time,
        and it is closed about 40 ms later.  A caller that uses it for longer takes a
        ``lease``.

        Args:
            key: Any key of a ``Cache``.
            default: The result if this worker has no handle of the key.
        """
        state = self._state()
        shared = state.shared_key(key)
        record = state.handles.get(shared)
        if self._registry.renew(shared) and record is not None:
            return record.handle
        if record is not None:
            state.delivery.deliver()
        return default

    def __getitem__(self, key: Any) -> Any:
        """Return this worker's handle, as ``get`` does, or raise KeyError."""
        handle = self.get(key, MISSING)
        if handle is MISSING:
            raise KeyError(key)
        return handle

    def set(
        self,
        key: Any,
        handle: Any,
        *,
        value: Any = None,
        ttl: Ttl = ...,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
    ) -> None:
        """Register a handle; the former one of the key, if any, is closed (REPLACED).

        If the former handle is this very object, it stays open, and its value and time
        are renewed.  If this raises, the handle is not registered, and the caller
        closes it.

        Args:
            key: Any key of a ``Cache``.
            handle: The object to keep; not None.
            value: A small value that other workers may read, for example in ``host()``.
            ttl: Seconds to live.  None means for ever; if left out, the map's default
                applies.
            on_evict: A callback for this handle, in place of the map's.

        Raises:
            TypeError: The handle is None, or ``on_evict`` is not callable.
            ShmCacheError: For the same reasons as ``Cache.set``.
        """
        if handle is None:
            raise TypeError(
                f"the handle of {shown(key)} is None, which could not be told from no"
                " handle; register an object"
            )
        check_callable(on_evict, "on_evict", ON_EVICT)
        state = self._state()
        state.register(key, handle, value, ttl, on_evict)
        state.delivery.deliver()

    def __setitem__(self, key: Any, handle: Any) -> None:
        """Register a handle, as ``set`` does, with the map's TTL and callback."""
        self.set(key, handle)

    def get_or_create(
        self,
        key: Any,
        factory: Callable[[], Any],
        *,
        value: Any = None,
        ttl: Ttl = ...,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
    ) -> Any:
        """Return this worker's handle of a key; ``factory()`` makes an absent one.

        If many threads ask at once, one makes the handle and the others wait.  If the
        factory raises, its caller gets the exception, and one of the waiting threads
        tries next.

        Args:
            key: Any key of a ``Cache``.
            factory: Makes the handle, and must not return None.
            value: As for ``set``.
            ttl: As for ``set``.
            on_evict: As for ``set``.

        Raises:
            ReentrantCall: The factory asks for the handle that it makes.
            ShmCacheError: The handle could not be registered; then ``on_evict`` closes
                it (CLOSED).
        """
        handle = self.get(key, MISSING)
        if handle is not MISSING:
            return handle
        record = self._state().create(key, factory, value, ttl, on_evict, 0)
        return record.handle

    @contextmanager
    def lease(
        self,
        key: Any,
        factory: Callable[[], Any] | None = None,
        *,
        value: Any = None,
        ttl: Ttl = ...,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
    ) -> Iterator[Any]:
        """Yield a handle that stays open until the block ends, even if it is evicted.

        Args:
            key: Any key of a ``Cache``.
            factory: Makes the handle if there is none, as for ``get_or_create``.
            value: As for ``set``.
            ttl: As for ``set``.
            on_evict: As for ``set``.

        Raises:
            KeyError: There is no handle of the key, and no factory.
        """
        state = self._state()
        record = state.hold(state.shared_key(key))
        if record is None:
            if factory is None:
                raise KeyError(key)
            record = state.create(key, factory, value, ttl, on_evict, 1)
        try:
            self._registry.count_if_joined(L.R_LEASES)
            yield record.handle
        finally:
            # If this process was forked meanwhile, the lease belongs to its parent.
            if state is self._process and state.is_own:
                state.let_go(record)
                self._registry.count_if_joined(L.R_RETURNED)

    def discard(self, key: Any) -> bool:
        """Close this worker's handle of a key (DELETED); return whether it was open."""
        state = self._state()
        shared = state.shared_key(key)
        found = self._registry.discard(shared, 0, Cause.DELETED)
        state.delivery.deliver()
        return found

    def __delitem__(self, key: Any) -> None:
        """Close this worker's handle, as ``discard`` does, or raise KeyError."""
        if not self.discard(key):
            raise KeyError(key)

    def pop(self, key: Any, default: Any = MISSING) -> Any:
        """Remove a handle from the map and return it; the caller closes it.  O(1).

        Args:
            key: Any key of a ``Cache``.
            default: The result if this worker has no handle of the key.

        Raises:
            KeyError: There is no handle of the key, and no default was given.
        """
        state = self._state()
        shared = state.shared_key(key)
        record = state.take_back(shared)
        if record is not None:
            return record.handle
        state.delivery.deliver()
        if default is MISSING:
            raise KeyError(key)
        return default

    def __contains__(self, key: Any) -> bool:
        """Return whether this worker has a handle of a key; not a use.  O(1)."""
        state = self._state()
        shared = state.shared_key(key)
        return shared in state.handles and shared in self._registry

    def __len__(self) -> int:
        """Return the number of handles that this worker has registered."""
        state = self._state()
        state.delivery.deliver()
        return len(state.handles)

    def __bool__(self) -> bool:
        """Return True, also for an empty map."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this worker's keys, as they are now; not a use."""
        return iter([key for key, _ in self.items()])

    def keys(self) -> list[Any]:
        """Return this worker's keys; this does not count as a use."""
        return list(self)

    def values(self) -> list[Any]:
        """Return this worker's handles; this does not count as a use."""
        return [handle for _, handle in self.items()]

    def items(self) -> list[tuple[Any, Any]]:
        """Return this worker's keys and handles; this does not count as a use."""
        state = self._state()
        state.delivery.deliver()
        return [(record.key, record.handle) for record in list(state.handles.values())]

    # --- the host ---------------------------------------------------------------------

    def host(self) -> list[HostEntry]:
        """Return the registered handles of all workers, in no order; not a use.

        They come in no order.  O(entries), in short holds of one lock.
        """
        return [HostEntry(*entry) for entry in self._registry.host_entries()]

    def owners(self, key: Any) -> list[tuple[int, Any]]:
        """Return the workers that have a handle of a key; not a use.  O(workers).

        Returns:
            The PID of each, and the value that it registered with its handle.
        """
        return self._registry.owners_of(key)

    def clear(self) -> int:
        """Close all handles of all workers (CLEARED).

        Other workers close their handles by themselves, within about 40 ms.

        Returns:
            How many entries were removed.
        """
        state = self._state()
        removed = self._registry.clear()
        state.delivery.deliver()
        return removed

    def sweep(self, budget: float | None = None) -> int:
        """Remove what has expired, of any worker.

        Args:
            budget: Seconds after which to stop; None means to stop when nothing is
                left.

        Returns:
            How many entries were removed.
        """
        state = self._state()
        self._registry.apply_uses()
        removed = self._registry.sweep(budget)
        state.reap()
        state.delivery.deliver()
        return removed

    def stats(self) -> HandleStats:
        """Return counts of the host and of this worker.

        O(shards + workers + own handles).
        """
        state = self._state()
        state.delivery.deliver()
        with state.lock:
            records = list(state.numbers.values())
            waiting = list(state.gone.values())
        return HandleStats(
            host=self._registry.stats(),
            open=len(records),
            leased=sum(record.leases > 0 for record in (*records, *waiting)),
            closing=state.delivery.callbacks.pending + len(waiting),
        )

    def check(self) -> list[str]:
        """Return what is wrong with the segment or this worker's table.  O(size).

        Returns:
            A sentence for each finding; an empty list when all is well.
        """
        state = self._state()
        findings = self._registry.check()
        state.delivery.deliver()
        return findings + state.delivery.findings()

    # --- the end ----------------------------------------------------------------------

    def close(self, timeout: float = 10.0) -> bool:
        """Close all handles of this worker (CLOSED), and leave the map.

        A leased handle is closed when its lease ends.  A second call does nothing.

        Args:
            timeout: Seconds to wait for callbacks.

        Returns:
            Whether all callbacks have ended.
        """
        registry = self._registry
        if registry.closed:
            return True
        done = True
        state = self._process
        if state.is_own:
            state.delivery.close_all()
            callbacks = state.delivery.callbacks
            done = callbacks.wait(timeout)
            if not done:
                log.warning(
                    "map %s was closed with %d callbacks still at work",
                    self.name,
                    callbacks.pending,
                    extra={"cache": self.name, "event": "callbacks late"},
                )
        elif state.token:
            _inherited.append(state)
        registry.close()
        sweeper().forget(self)
        _maps.discard(self)
        return done

    def unlink(self) -> None:
        """Remove the map's names now, as ``Cache.unlink`` does."""
        self._registry.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """Pickle the map as its settings; the other process begins without handles."""
        return self._made_by, ()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._process.numbers)} open here"
        return f"<shmcache.HandleMap {self.name!r} {state}>"


def _close_maps() -> None:
    # This runs at the end of the process, while the segments are still there.
    for open_map in list(_maps):
        if not open_map.closed:
            open_map.close()


before_leaving(_close_maps)
