"""Handles: a host-wide bound on resources that each belong to one process.

Problem: a connection, a span, a watcher cannot live in shared memory; but how many of
them all workers of a host hold together must be bounded, the least recently used of
*all* must go first, and each must be closed by the process that opened it: once and
only once, whoever caused it to go.

Mechanism: the object stays in its process, in a table of this module.  In the shared
map stands an entry for it, under token of the worker and key, with a number that the
worker never uses twice, and a small value for all to read.  That entry is subject to
bound, LRU order and TTL like any other.  Whoever retires it, in any process, writes a
notice (token, number, cause) into the shard's ring before it leaves the lock.  Each
owner reads the rings on from where it was, ``LOOK`` apart, so being told costs
O(evictions), whatever it holds; and then, too, its uses count for the others.
(benchmarks/handles.py shows what looking costs.  A bell for each worker would be a name
to clean up after every death, and would not ring from one container to the next.)

Once: whoever moves the number out of the table runs the callback; a notice of a number
that is not there says nothing new.  And not never: a ring that went round since the
owner's last look, or a death between retiring an entry and its notice (repair turns the
ring by more than a whole turn), makes the owner compare its table with the map.

Callbacks run in a few threads of their own, under no lock, so they may use the map;
what they raise is logged and counted.

Death in the middle: a dead owner's handles died with it; its entries are found by
whoever sees that a worker row was freed, and go with the cause OWNER_DIED.  A forked
child keeps its parent's objects, untouched, for ever: not even their destructors run.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from shmcache._arguments import Ttl, check_callable, check_count
from shmcache._engine import MISSING, HandleCodec, decode_key, encode_key
from shmcache._format import layout as L
from shmcache._format.layout import Cause
from shmcache._process import attachment as _workers
from shmcache._process.callbacks import Callbacks
from shmcache._process.sweeper import sweeper
from shmcache._process.uwsgi import threads_run
from shmcache.cache import Cache
from shmcache.errors import ReentrantCall, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache.stats import Stats

log = logging.getLogger("shmcache")

# Seconds between two looks at the notice rings, with handles open, and without.
LOOK, IDLE = 0.04, 1.0
ON_EVICT = "it is called as on_evict(key, handle, cause)"
# Seconds between two looks whether workers have died.
BURY = 1.0


class _Handle:
    """One registered object of this process."""

    __slots__ = (
        *("cause", "handle", "key", "leases", "number", "on_evict", "shared", "taken"),
    )

    def __init__(
        self, key: Any, shared: bytes, handle: Any, number: int, on_evict: Any
    ) -> None:
        self.key = key
        self.shared = shared
        self.handle = handle
        self.number = number
        self.on_evict = on_evict
        self.leases = 0
        self.cause: Cause | None = None  # why it has gone; None: it has not
        self.taken = False  # by the one who runs the callback


# Of one process, as two maps of one name there are one worker.
_numbering = itertools.count(1)


class _Local:
    """What one process has of a map: begun anew after a fork."""

    def __init__(self, token: int, shards: int) -> None:
        self.token = token
        self.lock = threading.RLock()
        self.handles: dict[bytes, _Handle] = {}  # by shared key
        self.numbers: dict[int, _Handle] = {}
        self.doomed: dict[int, _Handle] = {}  # gone, and not yet queued for a callback
        self.read = [0] * shards  # of each shard's notices
        self.creating: dict[bytes, tuple[int, threading.Event]] = {}
        self.freed = -1  # H_FREED when dead owners were last looked for
        self.buried = 0.0


@dataclass(frozen=True)
class HostEntry:
    """A handle of any worker of the host, as all can see it."""

    key: Any
    pid: int  # of its owner
    age: float  # seconds since it was registered
    ttl: float | None  # seconds left; None: for ever
    value: Any


@dataclass(frozen=True)
class HandleStats:
    """Counts of a handle map: ``host`` over all workers, the others of this process."""

    host: Stats
    open: int  # registered
    leased: int
    closing: int  # callbacks that wait or run, and handles that wait for a lease's end

    @property
    def entries(self) -> int:
        """Registered handles of all workers."""
        return self.host.entries


class _Registry(Cache):
    """The shared part of a map.  Its values are (token, number, value for all)."""

    def bury(self, local: _Local) -> int:
        """Remove the entries of owners that have died; how many.

        O(workers), and O(entries) when a worker has gone since the last call.
        """
        attachment = self._attachment
        gone = any(not attachment.alive(token) for token in attachment.tokens())
        attachment.reap()
        freed = attachment.words[L.H_FREED]
        if not gone and freed == local.freed:
            return 0
        removed = 0
        dead: dict[int, bool] = {}
        for kind, key, *_ in self._entries(values=False):
            owner = int.from_bytes(key[:8], "big")
            if owner not in dead:
                dead[owner] = not attachment.alive(owner)
            if dead[owner] and kind == L.Kind.BYTES:
                removed += self._discard(key, owner, 0, Cause.OWNER_DIED)
        local.freed = freed
        if removed:
            log.info(
                "removed %d handles of dead workers from map %s",
                removed,
                self.name,
                extra={"cache": self.name, "event": "buried", "count": removed},
            )
        return removed


# A map that nobody refers to has open handles all the same: it lives until close().
_maps: set[HandleMap] = set()
# Of processes that forked us: kept, as a destructor may close what the parent uses.
_graveyard: list[tuple[_Local, Callbacks[_Handle]]] = []


class HandleMap:
    """A bounded map of this process's handles; the bound holds for the whole host.

    Handles are objects that cannot be shared: connections, spans, watchers.  The map
    keeps them; in shared memory it only says that they exist.  ``max_entries`` is the
    largest number of registered handles of all workers together, and the least
    recently used of all goes first; its owner then calls

        on_evict(key, handle, cause)

    in a thread, once, within some 40 ms, with a cause EXPIRED, CAPACITY, DELETED,
    REPLACED, CLEARED or CLOSED (``shmcache.Cause``).

    - ``ttl``: seconds until an unused handle goes (``sliding=False``: any handle);
      None, never.
    - ``on_evict``: what closes a handle; ``set`` may name another one for its handle.
    - ``callback_threads``: how many callbacks may run at once in a process.
    - ``max_bytes``, ``jitter``, ``cleanup_interval``, ``shards``, ``lock_timeout``,
      ``clock``: as of ``Cache``.

    Keys are those of ``Cache`` and belong to the worker: the same key in two workers
    means two handles.  Raises what ``Cache`` raises.
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
        self._made_by: functools.partial[Any] = functools.partial(
            HandleMap,
            name,
            max_entries=max_entries,
            ttl=ttl,
            sliding=sliding,
            cleanup_interval=cleanup_interval,
            on_evict=on_evict,
            callback_threads=callback_threads,
            max_bytes=max_bytes,
            jitter=jitter,
            shards=shards,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        self._open(
            _Registry(
                name,
                max_entries=max_entries,
                max_bytes=max_bytes,
                ttl=ttl,
                sliding=sliding,
                jitter=jitter,
                cleanup_interval=cleanup_interval,
                shards=shards,
                lock_timeout=lock_timeout,
                codec=HandleCodec(),
                clock=clock,
            )
        )

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
        """An existing map, with its own settings; SegmentNotFound otherwise."""
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
            _Registry.attach(
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

    def _open(self, registry: _Registry) -> None:
        self._registry = registry
        self.name = registry.name
        self._local = _Local(0, 0)
        self._callbacks = Callbacks(self._run, self._callback_threads)
        _maps.add(self)

    # --- this process's part --------------------------------------------------------

    def _mine(self) -> _Local:
        registry = self._registry
        registry._require_open()
        local = self._local
        token = registry._attachment.token
        if local.token == token:
            if not threads_run():
                self._deliver(local)
            return local
        with _workers.mutex():
            if self._local.token == token:
                return self._local
            _graveyard.append((self._local, self._callbacks))
            self._callbacks = Callbacks(self._run, self._callback_threads)
            local = _Local(token, registry._settings.shards)
            for shard in range(registry._settings.shards):
                local.read[shard], _ = registry._read_mailbox(shard, 0)
            self._local = local
        return local

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called in this process."""
        closed: bool = self._registry.closed
        return closed

    def _shared(self, local: _Local, key: Any) -> bytes:
        # Of the bytes kind, whose encoding costs nothing.
        if type(key) is str:
            try:
                return local.token.to_bytes(8, "big") + b"\1" + key.encode()
            except UnicodeEncodeError:
                pass  # encode_key says what to do
        kind, data = encode_key(key)
        return local.token.to_bytes(8, "big") + bytes((kind,)) + data

    def _tend(self, _: float) -> float:
        # What the sweeper's thread does, again and again.
        if self._local.token != self._registry._attachment.token:
            return IDLE  # forked, and not yet used here
        local = self._local
        now = time.monotonic()
        if now - local.buried >= BURY:
            self._registry.bury(local)
            local.buried = now
        self._registry._flush_recency()  # recency is the host's, too
        self._deliver(local)
        return LOOK if local.numbers or local.doomed else IDLE

    def _deliver(self, local: _Local) -> None:
        # Read what has come since the last look, and hand over what has gone.  Every
        # step may be repeated, as an exception out of a signal handler may strike at
        # any point: a number leaves the table after its record is in ``doomed``, and
        # that after the record is in the queue; the queue runs a record once.
        registry = self._registry
        words = registry._attachment.words
        read = local.read
        lost = False
        for shard in range(len(read)):
            if words[registry._words_of(shard) + L.S_MAILBOX_HEAD] == read[shard]:
                continue
            with local.lock:
                head, notices = registry._read_mailbox(shard, read[shard])
                for i in range(0, len(notices or ()), 3):
                    owner, number, cause = notices[i : i + 3]
                    if owner == local.token and number in local.numbers:
                        self._doom(local, local.numbers[number], _cause(cause))
                if notices is None:
                    lost = True
                else:
                    read[shard] = head
        if lost:
            self._compare(local)
        for record in list(local.doomed.values()):
            if record.leases == 0:
                self._queue(local, record)

    def _compare(self, local: _Local) -> None:
        # Some notices are lost: look for each of our handles whether it is still there.
        # Of what has gone nobody knows the cause any more; most often it is the bound.
        registry = self._registry
        with local.lock:
            heads = [
                registry._read_mailbox(shard, 0)[0] for shard in range(len(local.read))
            ]
            for record in list(local.numbers.values()):
                entry = registry.peek(record.shared, MISSING)
                if entry is MISSING or entry[1] != record.number:
                    self._doom(local, record, Cause.CAPACITY)
            local.read[:] = heads

    def _doom(self, local: _Local, record: _Handle, cause: Cause) -> None:
        with local.lock:
            record.cause = cause
            local.doomed[record.number] = record
            if local.handles.get(record.shared) is record:
                del local.handles[record.shared]
            local.numbers.pop(record.number, None)

    def _run(self, record: _Handle) -> None:
        # Once for each record, in a thread of the callbacks.
        on_evict = record.on_evict or self._on_evict
        cause = record.cause
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "map %s evicted %r (%s)",
                self.name,
                record.key,
                cause.name if cause is not None else "",
                extra={
                    "cache": self.name,
                    "event": "evicted",
                    "key": repr(record.key),
                    "cause": cause.name if cause is not None else "",
                },
            )
        try:
            if on_evict is not None:
                on_evict(record.key, record.handle, cause)
        except BaseException:
            self._count(L.R_CALLBACK_FAILURES)
            log.exception(
                "on_evict of map %s failed for key %r (%s)",
                self.name,
                record.key,
                cause.name if cause is not None else "",
                extra={
                    "cache": self.name,
                    "event": "callback failed",
                    "key": repr(record.key),
                    "cause": cause.name if cause is not None else "",
                },
            )
        finally:
            record.handle = None
            if on_evict is not None:
                self._count(L.R_CALLBACKS)
            self._count(L.R_CLOSED)

    def _count(self, word: int) -> None:
        # In a callback that outlived the map there is nothing left to count in.
        attachment = self._registry._attachment
        try:
            if attachment.entered():
                attachment.count(word)
        except ShmCacheError:
            pass

    # --- handles --------------------------------------------------------------------

    def get(self, key: Any, default: Any = None) -> Any:
        """This worker's handle of a key, or ``default``.  A use: it renews LRU rank.

        O(1).  The handle stays open at least until the end of what is done at once;
        who uses it longer while others may evict it takes a ``lease``.
        """
        local = self._mine()
        shared = self._shared(local, key)
        record = local.handles.get(shared)
        if self._registry._renew(shared) and record is not None:
            return record.handle
        if record is not None:
            self._deliver(local)
        return default

    def __getitem__(self, key: Any) -> Any:
        """As ``get``; KeyError when absent."""
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
        """Register a handle; the key's former one, if any, is closed (REPLACED).

        ``value``: what other workers may read of it, in ``host()``.  ``ttl``: seconds;
        left out, the map's default; None, never.  The former handle being this very
        one, it stays open, and value and time are renewed.  When this raises, the
        handle is not registered, and the caller's to close.
        """
        if handle is None:
            raise TypeError(
                f"the handle of {key!r} is None, which could not be told from no"
                " handle; register an object"
            )
        check_callable(on_evict, "on_evict", ON_EVICT)
        local = self._mine()
        self._register(local, key, handle, value, ttl, on_evict, 0)
        self._deliver(local)

    def __setitem__(self, key: Any, handle: Any) -> None:
        """As ``set`` with the map's TTL and callback."""
        self.set(key, handle)

    def _register(
        self,
        local: _Local,
        key: Any,
        handle: Any,
        value: Any,
        ttl: Any,
        on_evict: Any,
        leases: int,
    ) -> _Handle:
        registry = self._registry
        shared = self._shared(local, key)
        first = not local.numbers
        with local.lock:
            before = local.handles.get(shared)
            number = next(_numbering)
            if before is not None and before.handle is handle:
                record = before  # the same object once more, with its leases
            else:
                record = _Handle(key, shared, handle, number, on_evict)
                local.handles[shared] = record
            local.numbers[number] = record
            try:
                registry.set(shared, (local.token, number, value), ttl)
            except BaseException:
                local.numbers.pop(number, None)
                if before is None:
                    local.handles.pop(shared, None)
                else:
                    local.handles[shared] = before
                # Thrown out by a signal handler it may have been stored.
                with suppress(ShmCacheError):
                    registry._discard(shared, local.token, number, Cause.CLOSED)
                raise
            if record is before:
                # Under its former number it is not known any more.
                local.numbers.pop(record.number, None)
                record.number = number
                record.on_evict = on_evict or record.on_evict
            else:
                registry._attachment.count(L.R_OPENED)
            record.leases += leases
        if first:
            sweeper().watch(self, 0.0)
        return record

    def get_or_create(
        self,
        key: Any,
        factory: Callable[[], Any],
        *,
        value: Any = None,
        ttl: Ttl = ...,
        on_evict: Callable[[Any, Any, Cause], object] | None = None,
    ) -> Any:
        """This worker's handle of a key, made by ``factory()`` when there is none.

        Of many threads that ask at once, one makes it, and the others wait.  What the
        factory raises reaches its caller; another one of those who wait tries then.
        Should the handle not be registered after all, on_evict closes it (CLOSED).
        """
        handle = self.get(key, MISSING)
        if handle is not MISSING:
            return handle
        return self._create(key, factory, value, ttl, on_evict, 0).handle

    def _create(
        self,
        key: Any,
        factory: Any,
        value: Any,
        ttl: Any,
        on_evict: Any,
        leases: int,
    ) -> _Handle:
        if not callable(factory):
            raise TypeError(f"factory must be callable, not {factory!r}")
        check_callable(on_evict, "on_evict", ON_EVICT)
        local = self._mine()
        shared = self._shared(local, key)
        me = threading.get_ident()
        mine = threading.Event()
        while True:
            who, done = local.creating.setdefault(shared, (me, mine))
            if done is mine:
                break
            if who == me:
                raise ReentrantCall(
                    f"the factory of {key!r} asks for {key!r} again, which would wait"
                    " for itself; use another key inside"
                )
            done.wait()
            record = self._hold(local, shared) if leases else self._found(local, shared)
            if record is not None:
                return record
        try:
            # Another may have been done between our look and our turn.
            record = self._hold(local, shared) if leases else self._found(local, shared)
            if record is not None:
                return record
            handle = factory()
            if handle is None:
                raise ValueError(
                    f"the factory of {key!r} returned None; it must return the handle"
                )
            try:
                record = self._register(
                    local, key, handle, value, ttl, on_evict, leases
                )
            except BaseException:
                lost = _Handle(key, shared, handle, 0, on_evict)
                lost.cause = Cause.CLOSED
                registry = self._registry
                registry._attachment.count(L.R_OPENED)
                self._callbacks.add(lost)
                self._callbacks.start()
                raise
        finally:
            local.creating.pop(shared, None)
            mine.set()
        self._deliver(local)
        return record

    def _found(self, local: _Local, shared: bytes) -> _Handle | None:
        record = local.handles.get(shared)
        if record is not None and self._registry._renew(shared):
            return record
        return None

    def _hold(self, local: _Local, shared: bytes) -> _Handle | None:
        # A lease on the key's record, unless it has none, or loses it just now.
        with local.lock:
            record = local.handles.get(shared)
            if record is None:
                return None
            record.leases += 1
        if self._registry._renew(shared) and record.cause is None:
            return record
        self._deliver(local)
        self._let_go(local, record)
        return None

    def _let_go(self, local: _Local, record: _Handle) -> None:
        if local is not self._local:
            return  # of the process that forked us, and its business
        with local.lock:
            record.leases -= 1
            last = record.leases == 0 and record.cause is not None
        if last:
            self._queue(local, record)

    def _queue(self, local: _Local, record: _Handle) -> None:
        with local.lock:
            if record.leases == 0 and record.number in local.doomed:
                self._callbacks.add(record)
                local.doomed.pop(record.number, None)
        self._callbacks.start()

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
        """A handle that stays open until the block ends, even when evicted meanwhile.

        Without a handle of the key, ``factory`` makes one, as in ``get_or_create``;
        KeyError without a factory.
        """
        local = self._mine()
        record = self._hold(local, self._shared(local, key))
        if record is None:
            if factory is None:
                raise KeyError(key)
            record = self._create(key, factory, value, ttl, on_evict, 1)
        try:
            self._count(L.R_LEASES)
            yield record.handle
        finally:
            self._let_go(local, record)
            if local is self._local:  # else forked meanwhile, and the parent's to count
                self._count(L.R_RETURNED)

    def discard(self, key: Any) -> bool:
        """Close this worker's handle of a key (DELETED); whether there was one."""
        local = self._mine()
        shared = self._shared(local, key)
        found = self._registry._discard(shared, local.token, 0, Cause.DELETED)
        self._deliver(local)
        return found

    def __delitem__(self, key: Any) -> None:
        """As ``discard``; KeyError when absent."""
        if not self.discard(key):
            raise KeyError(key)

    def pop(self, key: Any, default: Any = MISSING) -> Any:
        """Take a handle back out of the map: it is not closed, but the caller's again.

        ``default``, or KeyError, when absent.  O(1).
        """
        local = self._mine()
        shared = self._shared(local, key)
        with local.lock:
            record = local.handles.get(shared)
            if record is not None and self._registry._discard(
                shared, local.token, record.number, Cause.DELETED
            ):
                local.numbers.pop(record.number, None)
                local.handles.pop(shared, None)
                self._registry._attachment.count(L.R_CLOSED)
                return record.handle
        self._deliver(local)
        if default is MISSING:
            raise KeyError(key)
        return default

    def __contains__(self, key: Any) -> bool:
        """Whether this worker has a handle of a key; not a use.  O(1)."""
        local = self._mine()
        shared = self._shared(local, key)
        return shared in local.handles and shared in self._registry

    def __len__(self) -> int:
        """How many handles this worker has registered."""
        local = self._mine()
        self._deliver(local)
        return len(local.handles)

    def __bool__(self) -> bool:
        """True: a map is not nothing because it is empty."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """This worker's keys, as they are now; no use of the handles."""
        local = self._mine()
        self._deliver(local)
        return iter([record.key for record in list(local.handles.values())])

    def keys(self) -> list[Any]:
        """This worker's keys."""
        return list(self)

    def values(self) -> list[Any]:
        """This worker's handles; no use of them."""
        return [handle for _, handle in self.items()]

    def items(self) -> list[tuple[Any, Any]]:
        """This worker's keys and handles; no use of them."""
        local = self._mine()
        self._deliver(local)
        return [(record.key, record.handle) for record in list(local.handles.values())]

    # --- the host -------------------------------------------------------------------

    def host(self) -> list[HostEntry]:
        """The registered handles of all workers, in no order; no use of them.

        O(entries) in short holds of one lock.
        """
        registry = self._registry
        registry._require_open()
        attachment = registry._attachment
        now = (registry._clock or time.monotonic_ns)()
        epoch = attachment.header.created_at_ns
        entries = []
        for _, shared, _, data, expires, stamp in registry._entries(values=True):
            pid = attachment.pid(int.from_bytes(shared[:8], "big"))
            if pid == 0:
                continue  # of a dead worker whose row is another's already
            _, _, value = registry._codec.decode(data)
            written = epoch + (stamp << L.STAMP_SHIFT)
            entries.append(
                HostEntry(
                    key=decode_key(shared[8], shared[9:]),
                    pid=pid,
                    age=max(0.0, (now - written) / 1e9),
                    ttl=None if expires == L.NEVER else (expires - now) / 1e9,
                    value=value,
                )
            )
        return entries

    def owners(self, key: Any) -> list[tuple[int, Any]]:
        """The workers that have a handle of a key: PID, and the value given with it.

        No use of the handles.  O(workers).
        """
        registry = self._registry
        registry._require_open()
        attachment = registry._attachment
        kind, data = encode_key(key)
        found = []
        for token in attachment.tokens():
            shared = token.to_bytes(8, "big") + bytes((kind,)) + data
            entry = registry.peek(shared, MISSING)
            if entry is not MISSING and attachment.alive(token):
                found.append((attachment.pid(token), entry[2]))
        return found

    def clear(self) -> int:
        """Close all handles of all workers (CLEARED); how many.

        The other workers' within some 40 ms, by themselves.
        """
        local = self._mine()
        removed = self._registry.clear()
        self._deliver(local)
        return removed

    def sweep(self, budget: float | None = None) -> int:
        """Remove what has expired, of any worker; how many.  As ``Cache.sweep``."""
        local = self._mine()
        self._registry._flush_recency()
        removed = self._registry.sweep(budget)
        self._registry.bury(local)
        self._deliver(local)
        return removed

    def stats(self) -> HandleStats:
        """Counts of the host and of this worker.  O(shards + workers + own handles)."""
        local = self._mine()
        self._deliver(local)
        with local.lock:
            records = list(local.numbers.values())
            waiting = list(local.doomed.values())
        return HandleStats(
            host=self._registry.stats(),
            open=len(records),
            leased=sum(record.leases > 0 for record in (*records, *waiting)),
            closing=self._callbacks.pending + len(waiting),
        )

    def check(self) -> list[str]:
        """What is wrong with segment or table, a sentence each; empty when sound."""
        local = self._mine()
        findings = self._registry.check()
        self._deliver(local)
        with local.lock:
            self._compare_quietly(local, findings)
        return findings

    def _compare_quietly(self, local: _Local, findings: list[str]) -> None:
        heads = list(local.read)
        for record in local.numbers.values():
            entry = self._registry.peek(record.shared, MISSING)
            if entry is not MISSING and entry[1] == record.number:
                continue
            told = [
                self._registry._read_mailbox(s, at)[0] for s, at in enumerate(heads)
            ]
            if told == heads and (entry is not MISSING or not self._expires(record)):
                findings.append(
                    f"handle {record.key!r} is open, and its entry has gone without"
                    " a notice"
                )

    def _expires(self, record: _Handle) -> bool:
        # Expired entries are not found, and leave, with a notice, at the next sweep.
        return bool(self._registry._settings.ttl_ns) or record.cause is not None

    # --- the end --------------------------------------------------------------------

    def close(self, timeout: float = 10.0) -> bool:
        """Close all handles of this worker (CLOSED), and leave the map.

        Waits for callbacks up to ``timeout`` seconds; whether all of them ended.  A
        leased handle is closed at its lease's end.  Calling it twice is fine.
        """
        registry = self._registry
        if registry.closed:
            return True
        done = True
        local = self._local
        if local.token and local.token == registry._attachment.token:
            self._close_all(local)
            done = self._callbacks.wait(timeout)
            if not done:
                log.warning(
                    "map %s was closed with %d callbacks still at work",
                    self.name,
                    self._callbacks.pending,
                    extra={"cache": self.name, "event": "callbacks late"},
                )
        registry.close()
        sweeper().forget(self)
        _maps.discard(self)
        return done

    def _close_all(self, local: _Local) -> None:
        for record in list(local.numbers.values()):
            try:
                self._registry._discard(
                    record.shared, local.token, record.number, Cause.CLOSED
                )
            except ShmCacheError as error:
                # A stopped holder, perhaps.  Others bury the entry: our row is freed.
                log.debug(
                    "entry of %r stays behind: %s",
                    record.key,
                    error,
                    extra={
                        "cache": self.name,
                        "event": "entry left behind",
                        "key": repr(record.key),
                    },
                )
        try:
            self._deliver(local)
        except ShmCacheError as error:
            log.debug(
                "notices of map %s not read: %s",
                self.name,
                error,
                extra={"cache": self.name, "event": "notices not read"},
            )
        for record in list(local.numbers.values()):
            self._doom(local, record, Cause.CLOSED)
        for record in list(local.doomed.values()):
            if record.leases == 0:
                self._queue(local, record)

    def unlink(self) -> None:
        """Remove the map's names now, as ``Cache.unlink``."""
        self._registry.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """Pickles as its settings: the other process opens the same map, empty."""
        return self._made_by, ()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._local.numbers)} open here"
        return f"<shmcache.HandleMap {self.name!r} {state}>"


def _cause(number: int) -> Cause:
    # Of a damaged notice nobody knows; most often it is the bound.
    return Cause(number) if number < len(Cause) else Cause.CAPACITY


def _close_maps() -> None:
    # At the end of the process, while the segments are still there.
    for open_map in list(_maps):
        if not open_map.closed:
            open_map.close()


_workers.before_leaving.append(_close_maps)
