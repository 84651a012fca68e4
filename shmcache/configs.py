"""Loaded configurations, shared by all workers of a host, with watchers and listeners.

Problem: each worker loads, parses and keeps every configuration for itself, starts a
watcher for each, and calls listeners that nobody removes.  And only one worker sees a
change.

Mechanism: the configurations are in a ``Cache``.  A worker that misses one loads it,
and the others wait for the result.  The version of an entry is the number of its write,
which the cache assigns: the versions of one key always grow, even after expiry and
removal.  Watchers, and the groups of listeners (_listeners.py), are handles of their
workers, in a ``HandleMap`` each.

Reload: a caller that asks for a reload notes the time.  Any load that began after that
is new enough for it.  So if many ask at once (a watcher in each worker), only the first
one or two load, and the others use their result.  A load does not overwrite a
configuration that ``set`` or another load has stored meanwhile.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcache._arguments import (
    check_callable,
    check_count,
    check_flag,
    shown,
    ttl_to_ns,
)
from shmcache._component import Component
from shmcache._engine import MISSING
from shmcache._format import layout as L
from shmcache._listeners import (
    Listeners,
    Subscription,
    Version,
    WorkerHandles,
    end_group,
)
from shmcache._recipes.single_flight import Flight
from shmcache.cache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._arguments import Ttl
    from shmcache._format.layout import Cause
    from shmcache.handles import HandleMap, HandleStats
    from shmcache.stats import Stats

__all__ = ["ConfigCache", "ConfigSettings", "ConfigStats", "Subscription", "Version"]

log = logging.getLogger("shmcache")

# If max_bytes is left out, there is room for this many bytes a configuration.
ROOM = 4096


@dataclass(frozen=True)
class ConfigSettings:
    """Bounds of the configurations of a host; times in seconds.

    Args:
        max_cached_configs: The largest number of configurations, one for all workers.
        config_cache_ttl: How long a configuration is used before it is loaded again.
        max_watchers: The largest number of watchers of all workers together.
        watcher_ttl: How long a watcher may go unused.  Its worker uses it by getting
            the key, and the watcher itself by reporting a change.
        max_listeners: The largest number of listener groups (one for each key and
            worker) of all workers together.
        listener_ttl: How long a group may go unused.  Its worker uses it by getting the
            key, by subscribing to it, and by reporting a change to the listeners.
        cleanup_interval: The time from sweep to sweep in each worker.
        enable_metrics: Whether ``shmcache.report()`` includes the cache.  ``stats()``,
            and collectors given the cache, always work.
    """

    max_cached_configs: int = 1000
    config_cache_ttl: float = 3600.0
    max_watchers: int = 500
    watcher_ttl: float = 7200.0
    max_listeners: int = 500
    listener_ttl: float = 7200.0
    cleanup_interval: float = 900.0
    enable_metrics: bool = True

    def __post_init__(self) -> None:
        what = {
            "max_cached_configs": "configurations the host may keep",
            "max_watchers": "watchers all workers may have together",
            "max_listeners": "listener groups all workers may have together",
        }
        for name, meaning in what.items():
            hint = f"it is how many {meaning}"
            check_count(getattr(self, name), name, 1, L.MAX_INDEX, hint)
        for name in (
            *("config_cache_ttl", "watcher_ttl", "listener_ttl", "cleanup_interval"),
        ):
            ttl_to_ns(getattr(self, name), name)
        check_flag(self.enable_metrics, "enable_metrics")

    @classmethod
    def conservative(cls) -> ConfigSettings:
        """Return bounds for small hosts.

        500 configurations live for 30 min; there may be 100 watchers and groups.
        """
        return cls(500, 1800.0, 100, 3600.0, 100, 3600.0, 600.0)

    @classmethod
    def high_throughput(cls) -> ConfigSettings:
        """Return bounds for busy hosts.

        5,000 configurations live for 2 h; there may be 1,000 watchers and groups.
        """
        return cls(5000, 7200.0, 1000, 14400.0, 1000, 14400.0, 300.0)


@dataclass(frozen=True)
class ConfigStats:
    """Counts of a config cache: of its parts, and of this worker.

    Attributes:
        configs: The counts of the configurations, over all workers.
        watchers: The counts of the watchers.
        listeners: The counts of the listener groups.
        loads: Loads that succeeded in this worker.
        load_failures: Loads that raised in this worker.
        told: Calls of listeners in this worker.
        listener_failures: Calls of listeners that raised in this worker.
    """

    configs: Stats
    watchers: HandleStats
    listeners: HandleStats
    loads: int
    load_failures: int
    told: int
    listener_failures: int


class _ProcessState:
    """The counts of one process; a forked child begins with new ones."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.loads = self.load_failures = 0


class ConfigCache(Component):
    """Configurations, each loaded once per host, with watchers and listeners.

    Args:
        name: The beginning of the names of the shared parts, the same in all workers.
        loader: ``loader(key)`` loads a configuration: anything but None that a
            ``Cache`` can store.  ``get`` and ``reload`` may be given another one.
        settings: The bounds, the same in all workers.
        max_bytes: Room for the configurations, in bytes or as a text such as "64 MiB".
            The default is 4 KiB each, and at least 1 MiB.
        lock_timeout: As for ``Cache``.
        clock: As for ``Cache``.

    Raises:
        ShmCacheError: For the same reasons as ``Cache`` and ``HandleMap``.
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of bounds.
    """

    def __init__(
        self,
        name: str = "configs",
        loader: Callable[[Any], Any] | None = None,
        *,
        settings: ConfigSettings | None = None,
        max_bytes: int | str | None = None,
        lock_timeout: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        settings = ConfigSettings() if settings is None else settings
        if not isinstance(settings, ConfigSettings):
            raise TypeError(
                f"settings must be ConfigSettings, not {settings!r}; for example"
                " ConfigSettings.conservative()"
            )
        check_callable(loader, "loader", "loader(key) loads a configuration")
        made_by = functools.partial(
            ConfigCache,
            name,
            loader,
            settings=settings,
            max_bytes=max_bytes,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        super().__init__(name, settings.enable_metrics, made_by)
        self.settings = settings
        self._loader = loader
        self._process = _ProcessState()
        self._open(max_bytes, lock_timeout, clock)

    def _open(self, max_bytes: Any, lock_timeout: Any, clock: Any) -> None:
        settings, name = self.settings, self.name
        common: dict[str, Any] = {
            "cleanup_interval": settings.cleanup_interval,
            "lock_timeout": lock_timeout,
            "clock": clock,
        }
        parts: dict[str, Cache | HandleMap] = {}
        if max_bytes is None:
            max_bytes = max(1 << 20, settings.max_cached_configs * ROOM)
        try:
            self._configs = parts["configs"] = Cache(
                name,
                max_entries=settings.max_cached_configs,
                max_bytes=max_bytes,
                ttl=settings.config_cache_ttl,
                **common,
            )
            self._watchers = parts["watchers"] = WorkerHandles(
                f"{name}.watchers",
                max_entries=settings.max_watchers,
                ttl=settings.watcher_ttl,
                on_evict=_stop,
                **common,
            )
            self._groups = parts["listeners"] = WorkerHandles(
                f"{name}.listeners",
                max_entries=settings.max_listeners,
                ttl=settings.listener_ttl,
                on_evict=end_group,
                **common,
            )
        except BaseException:
            for part in parts.values():
                part.close()
            raise
        self._listeners = Listeners(name, self._configs, self._groups, self.version)
        self._opened(parts)

    # --- configurations -------------------------------------------------------------

    def get(
        self,
        key: Any,
        loader: Callable[[Any], Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Return the configuration of a key; if it is absent, one caller loads it.

        If the loader raises, its caller gets the exception, and one of the waiting
        callers loads next.

        Args:
            key: Any key of a ``Cache``.
            loader: Loads it, in place of the cache's loader.
            timeout: Seconds to wait for another caller's load; None means no limit.

        Raises:
            KeyError: The configuration is absent, and there is no loader.
            LockTimeout: Another caller's load did not end in time.
        """
        self._used(key)
        entry = self._configs.get(key, MISSING)
        if entry is not MISSING:
            return entry[1]
        return self._load(key, loader, 0, timeout)

    def reload(
        self,
        key: Any,
        loader: Callable[[Any], Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Load the configuration of a key anew, once for the host, and return it.

        A load that another caller began after this call serves as well.  If the loader
        raises, the former configuration stays.

        Args:
            key: Any key of a ``Cache``.
            loader: Loads it, in place of the cache's loader.
            timeout: As for ``get``.

        Raises:
            KeyError: There is no loader.
            LockTimeout: Another caller's load did not end in time.
        """
        self._used(key)
        return self._load(key, loader, time.monotonic_ns(), timeout)

    def set(self, key: Any, value: Any, ttl: Ttl = ...) -> None:
        """Store a configuration that was not loaded, and tell the listeners.

        Args:
            key: Any key of a ``Cache``.
            value: Anything but None that a ``Cache`` can store.
            ttl: Seconds to live.  None means for ever; if left out, the settings apply.
        """
        _require_config(key, value, "a configuration")
        self._used(key)
        self._configs.set(key, (time.monotonic_ns(), value), ttl)
        self._listeners.look_without_sweeper()

    def version(self, key: Any) -> Version | None:
        """Return the stored configuration of a key with its number, or None."""
        entry, number = self._configs.gets(key)
        return None if number is None else Version(number, entry[1])

    def invalidate(self, key: Any) -> bool:
        """Forget a configuration, so that the next ``get`` loads it.

        Listeners are told of the configuration that is loaded next, not of the removal.

        Returns:
            Whether a configuration was stored.
        """
        return self._configs.delete(key)

    def clear(self) -> int:
        """Forget all configurations; watchers and listeners stay.

        Returns:
            How many configurations were stored.
        """
        return self._configs.clear()

    def __contains__(self, key: Any) -> bool:
        """Return whether a configuration is stored; not a use."""
        return key in self._configs

    def __len__(self) -> int:
        """Return the number of configurations that are stored."""
        return len(self._configs)

    def __bool__(self) -> bool:
        """Return True, also without any configuration."""
        return True

    def _load(self, key: Any, loader: Any, asked: int, timeout: float | None) -> Any:
        check_callable(loader, "loader", "loader(key) loads a configuration")
        load = loader or self._loader
        if load is None:
            raise KeyError(key)
        # The flight has a key of its own, which is never stored: a configuration that
        # is stored already does not end the wait, because it may be too old for a
        # reload.
        who = threading.get_ident()
        in_flight = self._configs.internals.in_flight
        flight = Flight(in_flight, ("\0load", key), who, timeout)
        try:
            with flight:
                for pause in flight.pauses():
                    time.sleep(pause)
                    entry = self._configs.peek(key, MISSING)
                    if entry is not MISSING and entry[0] >= asked:
                        return entry[1]
                value = self._load_in_turn(key, load, asked)
        finally:
            flight.end()
        self._listeners.look_without_sweeper()
        return value

    def _load_in_turn(self, key: Any, load: Callable[[Any], Any], asked: int) -> Any:
        entry, token = self._configs.gets(key)
        if token is not None and entry[0] >= asked:
            return entry[1]
        state = self._state()
        began = time.monotonic_ns()
        try:
            value = load(key)
            _require_config(key, value, "the loader's result")
            while not self._configs.cas(key, (began, value), token):
                # A set() came in between, or the former one expired or was evicted.
                entry, token = self._configs.gets(key)
                if token is not None and entry[0] >= began:
                    return entry[1]
        except BaseException:
            with state.lock:
                state.load_failures += 1
            raise
        with state.lock:
            state.loads += 1
        return value

    # --- watchers -------------------------------------------------------------------

    def watch(
        self,
        key: Any,
        start: Callable[[Callable[[], None]], Any],
        loader: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Return this worker's watcher of a key, started if there is none.

        An evicted watcher is stopped.  A reload that fails is logged and counted, and
        the former configuration stays.

        Args:
            key: Any key of a ``Cache``.
            start: ``start(changed)`` starts a watcher, and returns an object with
                ``stop()``.  The watcher calls ``changed()`` from any thread when the
                source has changed, and that reloads the configuration.
            loader: Reloads it, in place of the cache's loader.

        Raises:
            TypeError: There is no loader, or the watcher has no ``stop()``.
        """
        if not callable(start):
            raise TypeError(
                f"start must be callable, not {start!r}: start(changed) returns a"
                " watcher"
            )
        check_callable(loader, "loader", "loader(key) loads a configuration")
        if loader is None and self._loader is None:
            raise TypeError(
                f"nothing could reload {shown(key)} when it changes: give ConfigCache,"
                " or this call, a loader"
            )
        changed = functools.partial(self._changed, key, loader)
        return self._watchers.get_or_create(
            key, functools.partial(_start, key, start, changed)
        )

    def unwatch(self, key: Any) -> bool:
        """Stop this worker's watcher of a key; return whether there was one."""
        return self._watchers.discard(key)

    def _changed(self, key: Any, loader: Any) -> None:
        # This runs in a watcher's thread, which must go on watching whatever happens.
        try:
            if not self.closed:
                self._watchers.get(key)  # a use
                self.reload(key, loader)
        except Exception as error:
            if self.closed:
                return
            log.exception(
                "configuration %r of %s changed and could not be reloaded",
                key,
                self.name,
                extra={
                    "cache": self.name,
                    "event": "reload failed",
                    "key": repr(key),
                    "error": repr(error),
                },
            )

    # --- listeners ------------------------------------------------------------------

    def subscribe(
        self,
        key: Any,
        callback: Callable[[Any, Version | None, Version], object],
        *,
        on_end: Callable[[Any], object] | None = None,
    ) -> Subscription:
        """Have ``callback(key, old, new)`` called in this worker when a key changes.

        It is called in a thread, within about 40 ms after any worker has changed or
        reloaded the configuration.  Versions come in order.  When they follow fast,
        some may be left out, but never the newest.  A version is left out, too, if it
        expires, is evicted or is forgotten before the callback was told of it.  If a
        callback raises, this is logged and counted.

        The group of a worker's subscriptions to a key expires when the worker has not
        used it for ``listener_ttl``.  A forked child has no subscriptions.

        Args:
            key: Any key of a ``Cache``.
            callback: Its ``old`` is the ``Version`` that it was told last; at first it
                is the one that is stored now, or None.  Its ``new`` is the newest one.
            on_end: ``on_end(key)`` is called if the group is evicted.
        """
        if not callable(callback):
            raise TypeError(
                f"callback must be callable, not {callback!r}: it is called as"
                " callback(key, old, new)"
            )
        check_callable(on_end, "on_end", "on_end(key) is called when it has ended")
        return self._listeners.subscribe(key, callback, on_end)

    # --- both -----------------------------------------------------------------------

    def _used(self, key: Any) -> None:
        # A worker that gets a key uses its watcher of the key, and its listeners.
        self._watchers.use(key)
        self._groups.use(key)
        self._listeners.look_without_sweeper()

    def _state(self) -> _ProcessState:
        state = self._process
        if state.pid != os.getpid():
            self._process = state = _ProcessState()
        return state

    def stats(self) -> ConfigStats:
        """Return the counts of all parts, and of this worker.

        O(shards + workers + own handles).
        """
        state = self._state()
        told, failures = self._listeners.counts()
        return ConfigStats(
            configs=self._configs.stats(),
            watchers=self._watchers.stats(),
            listeners=self._groups.stats(),
            loads=state.loads,
            load_failures=state.load_failures,
            told=told,
            listener_failures=failures,
        )

    def close(self, timeout: float = 10.0) -> bool:
        """Stop this worker's watchers, end its subscriptions, and leave.

        Args:
            timeout: Seconds to wait for the callbacks of each part.

        Returns:
            Whether all callbacks have ended.
        """
        self._listeners.forget()
        done = self._watchers.close(timeout)
        done = self._groups.close(timeout) and done
        done = self._listeners.wait(timeout) and done
        return super().close(timeout) and done


def _start(key: Any, start: Callable[[Any], Any], changed: Callable[[], None]) -> Any:
    watcher = start(changed)
    if not callable(getattr(watcher, "stop", None)):
        raise TypeError(
            f"start(changed) for {shown(key)} returned {watcher!r}, which has no"
            " stop(); it must return the watcher"
        )
    return watcher


def _stop(_: Any, watcher: Any, __: Cause) -> None:
    watcher.stop()


def _require_config(key: Any, value: Any, what: str) -> None:
    if value is None:
        raise ValueError(
            f"{what} for {shown(key)} is None, which could not be told from none;"
            " store an empty dict, or raise KeyError"
        )
