"""Loaded configurations, shared by all workers of a host; who watches; who is told.

Problem: each worker loads, parses and keeps every configuration for itself, starts a
watcher for each, and calls listeners that nobody removes; a change reaches one worker.

Mechanism: the configurations are in a ``Cache``; whoever misses one loads it, and the
others wait for the result.  An entry's version is the number of its write, which the
cache gives out: for one key they only ever grow, also over expiry and removal.

Watchers and listener groups are handles of their workers, in a ``HandleMap`` each.
Each worker that has listeners looks ``LOOK`` apart whether the cache was written to at
all, which costs O(shards), and only then for the versions of the keys it listens to.
So nobody has to be told, and nobody can miss being told: as long as a version is the
newest, each look finds it.  What came and went between two looks is left out.

Order: one group's callbacks run in one thread at a time, and a version is handed out
only if it is higher than the last.

Reload: whoever asks for one notes the time; a load that began after that has seen all
that the asker has, so of many who ask at once (a watcher in each worker) all but the
first one or two are content with another's.  A load that was overtaken by ``set`` or
by another load does not overwrite the newer one.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcache._arguments import check_callable, check_count, check_flag, ttl_to_ns
from shmcache._component import Component
from shmcache._engine import MISSING
from shmcache._format import layout as L
from shmcache._process.callbacks import Callbacks
from shmcache._process.sweeper import sweeper
from shmcache._process.uwsgi import threads_run
from shmcache._recipes.single_flight import Flight
from shmcache.cache import Cache
from shmcache.errors import CacheClosed
from shmcache.handles import IDLE, LOOK, HandleMap, HandleStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._arguments import Ttl
    from shmcache._format.layout import Cause
    from shmcache.stats import Stats

log = logging.getLogger("shmcache")

# Room for configurations, bytes each, when max_bytes is left out.
ROOM = 4096


@dataclass(frozen=True)
class ConfigSettings:
    """Bounds of the configurations of a host; times in seconds.

    - ``max_cached_configs``: configurations, one for all workers.
    - ``config_cache_ttl``: how long a configuration is used before it is loaded anew.
    - ``max_watchers``: watchers of all workers together.
    - ``watcher_ttl``: how long a watcher may go unused: its worker does not get the
      key, nor does the watcher report a change.
    - ``max_listeners``: listener groups (one for each key and worker) of all workers.
    - ``listener_ttl``: how long a group may go unused: its worker does not get
      the key, nor subscribe to it, nor is it told of a change.
    - ``cleanup_interval``: from sweep to sweep in each worker.
    - ``enable_metrics``: whether ``shmcache.report()`` includes it.  ``stats()``, and
      collectors given the cache, always work.
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
        """For small hosts: 500 configurations for 30 min, 100 watchers and groups."""
        return cls(500, 1800.0, 100, 3600.0, 100, 3600.0, 600.0)

    @classmethod
    def high_throughput(cls) -> ConfigSettings:
        """For busy hosts: 5,000 configurations for 2 h, 1,000 watchers and groups."""
        return cls(5000, 7200.0, 1000, 14400.0, 1000, 14400.0, 300.0)


@dataclass(frozen=True)
class ConfigStats:
    """Counts of a config cache: of its parts, and of this worker."""

    configs: Stats
    watchers: HandleStats
    listeners: HandleStats
    loads: int  # that succeeded, in this worker
    load_failures: int  # in this worker
    told: int  # calls of listeners in this worker
    listener_failures: int  # those of them that raised


@dataclass(frozen=True)
class Version:
    """One stored state of a configuration; the higher number is the newer one."""

    number: int
    value: Any


class Subscription:
    """One callback of this worker that is told when a configuration changes.

    It ends by ``cancel()``, with the cache's ``close()``, or when its group is evicted,
    unused for too long or for want of room: ``active`` is False then, and after an
    eviction ``on_end(key)`` is called, if given.
    """

    def __init__(
        self, group: _Group, callback: Any, seen: Version | None, on_end: Any
    ) -> None:
        self._group = group
        self._callback = callback
        self._seen = seen
        self._on_end = on_end
        self.key = group.key
        self.active = True

    def cancel(self) -> bool:
        """Be told no more, but for a call that is under way; whether it was active."""
        return self._group.configs._cancel(self._group, self)

    def __repr__(self) -> str:
        state = "active" if self.active else "ended"
        return f"<shmcache.Subscription to {self.key!r} {state}>"


class _Group:
    """The subscriptions of one worker to one key: the handle of ``listeners``."""

    def __init__(self, configs: ConfigCache, key: Any) -> None:
        self.configs = configs
        self.key = key
        self.lock = threading.Lock()
        self.members: list[Subscription] = []
        self.told = 0  # the highest number that all members have been told
        self.ended = False
        self.running = False
        self.again = False

    def add(self, subscription: Subscription) -> bool:
        """Take a member in; False when the group has ended."""
        with self.lock:
            if not self.ended:
                self.members.append(subscription)
                self.told = 0
            return not self.ended

    def remove(self, subscription: Subscription) -> bool:
        """Let a member go; whether it was one."""
        with self.lock:
            was_active, subscription.active = subscription.active, False
            if was_active:
                self.members.remove(subscription)
            return was_active

    def end(self) -> list[Subscription]:
        """End all subscriptions; which there were."""
        with self.lock:
            self.ended = True
            members, self.members = self.members, []
            for member in members:
                member.active = False
            return members


class _Job:
    """One run through a group, as the callback threads take it."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.taken = False


class _Here:
    """What one process has of a config cache: begun anew after a fork."""

    def __init__(self, run: Callable[[Any], None]) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.calls = Callbacks(run, 2)
        self.moment: list[int] | None = None  # of the cache at the last look
        self.asked = 0  # how often a look was asked for, whatever the moment
        self.loads = self.load_failures = self.told = self.listener_failures = 0


class ConfigCache(Component):
    """Configurations that are loaded once per host; with watchers and listeners.

    - ``name``: what the names of the shared parts begin with, the same in all workers.
    - ``loader``: ``loader(key)`` loads a configuration: anything a ``Cache`` can store;
      ``get`` and ``reload`` may be given another one.
    - ``settings``: a ``ConfigSettings``, the same in all workers.
    - ``max_bytes``: room for the configurations; default: 4 KiB each, at least 1 MiB.
    - ``lock_timeout``, ``clock``: as of ``Cache``.

    Raises what ``Cache`` and ``HandleMap`` raise.
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
        self._here = _Here(self._run)
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
            self._watchers = parts["watchers"] = HandleMap(
                f"{name}.watchers",
                max_entries=settings.max_watchers,
                ttl=settings.watcher_ttl,
                on_evict=_stop,
                **common,
            )
            self._listeners = parts["listeners"] = HandleMap(
                f"{name}.listeners",
                max_entries=settings.max_listeners,
                ttl=settings.listener_ttl,
                on_evict=_end_group,
                **common,
            )
        except BaseException:
            for part in parts.values():
                part.close()
            raise
        self._opened(parts)

    # --- configurations -------------------------------------------------------------

    def get(
        self,
        key: Any,
        loader: Callable[[Any], Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """The configuration of a key, loaded by one caller of the host if absent.

        What the loader raises reaches its caller, and another one of those who wait
        loads then.  ``timeout``: seconds to wait for another's load, then LockTimeout.
        KeyError when it is absent and there is no loader.
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
        """The configuration of a key as it is from now on: loaded anew, once.

        A load that another began after this call serves as well.  When the loader
        raises, the former configuration stays.
        """
        self._used(key)
        return self._load(key, loader, time.monotonic_ns(), timeout)

    def set(self, key: Any, value: Any, ttl: Ttl = ...) -> None:
        """Store a configuration that was not loaded; listeners are told of it.

        ``ttl``: seconds; left out, the settings'.
        """
        _require_config(key, value, "a configuration")
        self._used(key)
        self._configs.set(key, (time.monotonic_ns(), value), ttl)
        self._look_here()

    def version(self, key: Any) -> Version | None:
        """The stored configuration of a key with its number; None when absent."""
        entry, number = self._configs.gets(key)
        return None if number is None else Version(number, entry[1])

    def invalidate(self, key: Any) -> bool:
        """Forget a configuration, so that the next ``get`` loads it.

        Listeners are told of what is loaded then, not of the removal.
        """
        return self._configs.delete(key)

    def clear(self) -> int:
        """Forget all configurations; how many.  Watchers and listeners stay."""
        return self._configs.clear()

    def __contains__(self, key: Any) -> bool:
        """Whether a configuration is stored; not a use."""
        return key in self._configs

    def __len__(self) -> int:
        """How many configurations are stored."""
        return len(self._configs)

    def __bool__(self) -> bool:
        """True: without configurations it is not nothing."""
        return True

    def _load(self, key: Any, loader: Any, asked: int, timeout: float | None) -> Any:
        check_callable(loader, "loader", "loader(key) loads a configuration")
        load = loader or self._loader
        if load is None:
            raise KeyError(key)
        # Under a key of its own, which is never stored: a configuration that is there
        # does not end the wait, as it may be too old for a reload.
        who = threading.get_ident()
        in_flight = self._configs.internals.in_flight
        with Flight(in_flight, ("\0load", key), who, timeout) as flight:
            for pause in flight.pauses():
                time.sleep(pause)
                entry = self._configs.peek(key, MISSING)
                if entry is not MISSING and entry[0] >= asked:
                    return entry[1]
            value = self._load_in_turn(key, load, asked)
        self._look_here()
        return value

    def _load_in_turn(self, key: Any, load: Callable[[Any], Any], asked: int) -> Any:
        entry, token = self._configs.gets(key)
        if token is not None and entry[0] >= asked:
            return entry[1]
        here = self._mine()
        began = time.monotonic_ns()
        try:
            value = load(key)
            _require_config(key, value, "the loader's result")
            while not self._configs.cas(key, (began, value), token):
                # set() came in between, or the old one expired or was evicted.
                entry, token = self._configs.gets(key)
                if token is not None and entry[0] >= began:
                    return entry[1]
        except BaseException:
            with here.lock:
                here.load_failures += 1
            raise
        with here.lock:
            here.loads += 1
        return value

    # --- watchers -------------------------------------------------------------------

    def watch(
        self,
        key: Any,
        start: Callable[[Callable[[], None]], Any],
        loader: Callable[[Any], Any] | None = None,
    ) -> Any:
        """This worker's watcher of a key, started when there is none.

        ``start(changed)`` starts it, and returns an object with ``stop()``; the watcher
        calls ``changed()`` when the source has changed, from any thread, which reloads
        the configuration.  A load that fails is logged and counted, and the former
        configuration stays.  An evicted watcher is stopped.
        """
        if not callable(start):
            raise TypeError(
                f"start must be callable, not {start!r}: start(changed) returns a"
                " watcher"
            )
        check_callable(loader, "loader", "loader(key) loads a configuration")
        if loader is None and self._loader is None:
            raise TypeError(
                f"nothing could reload {key!r} when it changes: give ConfigCache, or"
                " this call, a loader"
            )
        changed = functools.partial(self._changed, key, loader)
        return self._watchers.get_or_create(
            key, functools.partial(_start, key, start, changed)
        )

    def unwatch(self, key: Any) -> bool:
        """Stop this worker's watcher of a key; whether there was one."""
        return self._watchers.discard(key)

    def _changed(self, key: Any, loader: Any) -> None:
        # In a watcher's thread, which is to go on watching whatever happens.
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

        Whichever worker changes or reloads it: within some 40 ms, in a thread, with the
        ``Version`` that this callback was told last (at first: the one there is now,
        None if there is none) and the newest.  Versions come in order; some may be left
        out when they follow fast, never the newest.  One that expired, was evicted or
        forgotten before it could be told is followed by the next one to be loaded.
        What a callback raises is logged and counted.

        The group of a worker's subscriptions to a key expires when the worker has not
        used it for ``listener_ttl``; ``on_end(key)`` is called then.  After a fork the
        child subscribes anew.
        """
        if not callable(callback):
            raise TypeError(
                f"callback must be callable, not {callback!r}: it is called as"
                " callback(key, old, new)"
            )
        check_callable(on_end, "on_end", "on_end(key) is called when it has ended")
        here = self._mine()
        seen = self.version(key)
        with here.lock:
            while True:
                group: _Group = self._listeners.get_or_create(
                    key, functools.partial(_Group, self, key)
                )
                subscription = Subscription(group, callback, seen, on_end)
                if group.add(subscription):
                    break
            here.asked += 1
        sweeper().watch(self, ConfigCache._tend, 0.0)
        return subscription

    def _cancel(self, group: _Group, subscription: Subscription) -> bool:
        if not group.remove(subscription):
            return False
        # Under this lock nobody of this process registers another group meanwhile.
        with self._mine().lock, suppress(CacheClosed):
            if not group.members and self._listeners.get(group.key) is group:
                self._listeners.discard(group.key)
        return True

    def _tend(self, _: float) -> float:
        """Do what the sweeper's thread does for a map; in how many seconds again."""
        if self._here.pid != os.getpid():
            return IDLE  # forked, and not yet used here
        self._look(self._here)
        return LOOK if self._listeners._process.handles else IDLE

    def _look_here(self) -> None:
        # Where no sweeper looks.
        if not threads_run():
            self._look(self._mine())

    def _look(self, here: _Here) -> None:
        moment = self._moment(here.asked)
        if moment is not None and moment == here.moment:
            return
        here.moment = None
        for key, group in self._listeners.items():
            _, number = self._configs.gets(key)
            if number is not None and number > group.told:
                self._schedule(here, group)
        here.moment = moment

    def _moment(self, asked: int) -> list[int] | None:
        # How often each shard of the cache has been written to; None while one is.
        counts = self._configs.internals.writes()
        return None if counts is None else [asked, *counts]

    def _schedule(self, here: _Here, group: _Group) -> None:
        with group.lock:
            group.again = True
            if group.running:
                return
            group.running = True
        here.calls.add(_Job(group))
        here.calls.start()

    def _run(self, job: _Job) -> None:
        # In a thread of the callbacks, one at a time for a group.
        group, here = job.group, self._here
        while True:
            with group.lock:
                if not group.again:
                    group.running = False
                    return
                group.again = False
                members = list(group.members)
            try:
                version = self.version(group.key)
                if members and version is not None:
                    self._listeners.get(group.key)  # a use
                    self._tell_all(here, group, members, version)
            except Exception:  # a stopped holder, perhaps, or we are being closed
                if not self._configs.closed and not self._listeners.closed:
                    log.exception(
                        "version of %r in %s not read",
                        group.key,
                        self.name,
                        extra={
                            "cache": self.name,
                            "event": "version not read",
                            "key": repr(group.key),
                        },
                    )
                    with here.lock:
                        here.asked += 1  # the next look tries again

    def _tell_all(
        self, here: _Here, group: _Group, members: list[Subscription], version: Version
    ) -> None:
        for member in members:
            old = member._seen
            if not member.active or (old and old.number >= version.number):
                continue
            member._seen = version
            failed = self._tell(member, old, version)
            with here.lock:
                here.told += 1
                here.listener_failures += failed
        with group.lock:
            if members == group.members:
                group.told = version.number

    def _tell(
        self, member: Subscription, old: Version | None, version: Version
    ) -> bool:
        try:
            member._callback(member.key, old, version)
        except BaseException:
            log.exception(
                "listener of %r in %s failed",
                member.key,
                self.name,
                extra={
                    "cache": self.name,
                    "event": "listener failed",
                    "key": repr(member.key),
                },
            )
            return True
        return False

    # --- both -----------------------------------------------------------------------

    def _used(self, key: Any) -> None:
        # A worker that gets a key uses its watcher of it, and its listeners.
        if self._watchers._process.handles:
            self._watchers.get(key)
        if self._listeners._process.handles:
            self._listeners.get(key)
        self._look_here()

    def _mine(self) -> _Here:
        here = self._here
        if here.pid != os.getpid():
            self._here = here = _Here(self._run)
        return here

    def stats(self) -> ConfigStats:
        """Counts of all parts, and of this worker.

        O(shards + workers + own handles).
        """
        here = self._mine()
        return ConfigStats(
            configs=self._configs.stats(),
            watchers=self._watchers.stats(),
            listeners=self._listeners.stats(),
            loads=here.loads,
            load_failures=here.load_failures,
            told=here.told,
            listener_failures=here.listener_failures,
        )

    def close(self, timeout: float = 10.0) -> bool:
        """Stop this worker's watchers, end its subscriptions, and leave.

        Waits for callbacks up to ``timeout`` seconds each; whether all of them ended.
        """
        sweeper().forget(self)
        done = self._watchers.close(timeout)
        done = self._listeners.close(timeout) and done
        done = self._mine().calls.wait(timeout) and done
        return super().close(timeout) and done


def _start(key: Any, start: Callable[[Any], Any], changed: Callable[[], None]) -> Any:
    watcher = start(changed)
    if not callable(getattr(watcher, "stop", None)):
        raise TypeError(
            f"start(changed) for {key!r} returned {watcher!r}, which has no stop(); it"
            " must return the watcher"
        )
    return watcher


def _stop(_: Any, watcher: Any, __: Cause) -> None:
    watcher.stop()


def _end_group(key: Any, group: _Group, cause: Cause) -> None:
    members = group.end()
    if not members or cause is L.Cause.CLOSED:
        return
    log.info(
        "listeners of %r in %s ended: %s",
        key,
        group.configs.name,
        cause.name,
        extra={
            "cache": group.configs.name,
            "event": "listeners ended",
            "key": repr(key),
            "cause": cause.name,
        },
    )
    for member in members:
        if member._on_end is not None:
            member._on_end(key)


def _require_config(key: Any, value: Any, what: str) -> None:
    if value is None:
        raise ValueError(
            f"{what} for {key!r} is None, which could not be told from none; store an"
            " empty dict, or raise KeyError"
        )
