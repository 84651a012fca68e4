"""Connection pools of all workers of a host, bounded together.

Problem: each worker keeps a pool object for each server that it has ever talked to.  So
4 workers and 1,000 servers make 4,000 pools with open sockets, and none is ever closed.

Mechanism: the pools are the handles of a ``HandleMap``, one for each server and worker.
The bound holds for the whole host, and the least recently used of all workers goes
first.  The worker that owns a pool closes it, with its connections.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcache._arguments import check_callable, check_count, check_flag, ttl_to_ns
from shmcache._component import Component
from shmcache._format import layout as L
from shmcache.handles import HandleMap, HandleStats, HostEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache._format.layout import Cause

# Pools have these methods for closing, the most thorough first: urllib3's PoolManager
# has only clear(), psycopg2's pools closeall(), redis's disconnect(), SQLAlchemy's
# dispose().
_ENDINGS = ("close", "closeall", "disconnect", "dispose", "clear")


@dataclass(frozen=True)
class PoolSettings:
    """Bounds of the connection pools of a host; times in seconds.

    Args:
        max_server_pools: The largest number of pools of all workers together.
        server_pool_ttl: How long a pool may go unused.
        pool_cleanup_interval: The time from sweep to sweep in each worker.  An unused
            pool is removed at the first sweep of any worker after its time.
        enable_pool_metrics: Whether ``shmcache.report()`` includes the pools.
            ``stats()``, and collectors given the pools, always work.
    """

    max_server_pools: int = 1000
    server_pool_ttl: float = 1800.0
    pool_cleanup_interval: float = 300.0
    enable_pool_metrics: bool = True

    def __post_init__(self) -> None:
        hint = "it is how many pools all workers may have together"
        check_count(self.max_server_pools, "max_server_pools", 1, L.MAX_INDEX, hint)
        ttl_to_ns(self.server_pool_ttl, "server_pool_ttl")
        ttl_to_ns(self.pool_cleanup_interval, "pool_cleanup_interval")
        check_flag(self.enable_pool_metrics, "enable_pool_metrics")

    @classmethod
    def conservative(cls) -> PoolSettings:
        """Return bounds for small hosts.

        500 pools may go unused for 1 h, and are swept every 10 min.
        """
        return cls(500, 3600.0, 600.0)

    @classmethod
    def high_throughput(cls) -> PoolSettings:
        """Return bounds for busy hosts.

        2,000 pools may go unused for 2 h, and are swept every 5 min.
        """
        return cls(2000, 7200.0, 300.0)


@dataclass(frozen=True)
class PoolStats:
    """Counts of connection pools, of the host and of this worker.

    Attributes:
        pools: The counts of the handle map with the pools.
    """

    pools: HandleStats

    @property
    def opened(self) -> int:
        """Return how many pools all workers have registered since the start."""
        return self.pools.host.handles_opened

    @property
    def closed(self) -> int:
        """Return how many pools all workers have closed since the start."""
        return self.pools.host.handles_closed


class ConnectionPools(Component):
    """One pool for each server and worker; the bound holds for the whole host.

    A server is named by any key of a ``Cache``: a URL, a DSN, ``(host, port)``.
    Pools of urllib3, requests (sessions), httpx and psycopg_pool need no ``close``.

    Args:
        name: The name of the shared map, the same in all workers.
        settings: The bounds, the same in all workers.
        factory: ``factory(server)`` makes a pool; ``get`` and ``lease`` may be given
            another one.
        close: ``close(pool)`` closes it.  If left out, this is the first of the pool's
            own ``close()``, ``closeall()``, ``disconnect()``, ``dispose()``,
            ``clear()``.
        callback_threads: How many pools may be closed at once in a worker.
        lock_timeout: As for ``Cache``.
        clock: As for ``Cache``.

    Raises:
        ShmCacheError: For the same reasons as ``HandleMap``.
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of bounds.
    """

    def __init__(
        self,
        name: str = "pools",
        *,
        settings: PoolSettings | None = None,
        factory: Callable[[Any], Any] | None = None,
        close: Callable[[Any], object] | None = None,
        callback_threads: int = 2,
        lock_timeout: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        settings = PoolSettings() if settings is None else settings
        if not isinstance(settings, PoolSettings):
            raise TypeError(
                f"settings must be PoolSettings, not {settings!r}; for example"
                " PoolSettings.conservative()"
            )
        check_callable(factory, "factory", "it makes the pool of a server")
        check_callable(close, "close", "it is called with the pool to close")
        made_by = functools.partial(
            ConnectionPools,
            name,
            settings=settings,
            factory=factory,
            close=close,
            callback_threads=callback_threads,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        super().__init__(name, settings.enable_pool_metrics, made_by)
        self.settings = settings
        self._factory = factory
        self._close = close
        self._map = HandleMap(
            name,
            max_entries=settings.max_server_pools,
            ttl=settings.server_pool_ttl,
            sliding=True,
            cleanup_interval=settings.pool_cleanup_interval,
            on_evict=self._end,
            callback_threads=callback_threads,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        self._opened({"pools": self._map})

    def get(self, server: Any, factory: Callable[[Any], Any] | None = None) -> Any:
        """Return this worker's pool of a server, made if there is none; a use.  O(1).

        If many threads ask at once, one makes the pool.  The pool may be closed at any
        time because another worker needs the room; a ``lease`` keeps it open.  If the
        factory raises, the caller gets the exception, and nothing is registered.

        Args:
            server: The server.
            factory: Makes the pool, in place of the map's factory.

        Raises:
            TypeError: There is no factory, or the pool cannot be closed.
            ValueError: The factory returned None.
        """
        pool = self._map.get(server)
        if pool is not None and factory is None:
            return pool
        return self._map.get_or_create(server, self._maker(server, factory))

    @contextmanager
    def lease(
        self, server: Any, factory: Callable[[Any], Any] | None = None
    ) -> Iterator[Any]:
        """Yield the pool that ``get`` returns; it stays open until the block ends.

        Args:
            server: The server.
            factory: Makes the pool, in place of the map's factory.
        """
        with self._map.lease(server, self._maker(server, factory)) as pool:
            yield pool

    def discard(self, server: Any) -> bool:
        """Close this worker's pool of a server; return whether there was one."""
        return self._map.discard(server)

    def clear(self) -> int:
        """Close all pools of all workers.

        Other workers close their pools by themselves, within about 40 ms.

        Returns:
            How many pools there were.
        """
        return self._map.clear()

    def host(self) -> list[HostEntry]:
        """Return the pools of all workers, in no order; not a use.  O(entries)."""
        return self._map.host()

    def __contains__(self, server: Any) -> bool:
        """Return whether this worker has a pool of a server; not a use."""
        return server in self._map

    def __len__(self) -> int:
        """Return the number of pools that this worker has."""
        return len(self._map)

    def __bool__(self) -> bool:
        """Return True, also without any pool."""
        return True

    def stats(self) -> PoolStats:
        """Return counts of the host and of this worker.

        O(shards + workers + own pools).
        """
        return PoolStats(pools=self._map.stats())

    def _maker(self, server: Any, factory: Any) -> Callable[[], Any]:
        check_callable(factory, "factory", "it makes the pool of a server")
        make = factory or self._factory
        if make is None:
            return functools.partial(_no_factory, server)
        return functools.partial(self._make, server, make)

    def _make(self, server: Any, factory: Callable[[Any], Any]) -> Any:
        pool = factory(server)
        if pool is None:
            raise ValueError(
                f"the factory returned None for server {server!r}; it must return the"
                " pool"
            )
        if self._close is None:
            _ending(pool)  # a pool that cannot be closed is refused now
        return pool

    def _end(self, _: Any, pool: Any, __: Cause) -> None:
        if self._close is not None:
            self._close(pool)
        else:
            _ending(pool)()


def _ending(pool: Any) -> Callable[[], object]:
    # Return the method that closes a pool when no ``close`` was given.
    for name in _ENDINGS:
        method: Callable[[], object] | None = getattr(pool, name, None)
        if callable(method) and not inspect.iscoroutinefunction(method):
            return method
    raise TypeError(
        f"a {type(pool).__qualname__} has none of {', '.join(_ENDINGS)} that could be"
        " called in a thread; say by close= how it is closed (an asynchronous one:"
        " run_coroutine_threadsafe(pool.aclose(), loop).result())"
    )


def _no_factory(server: Any) -> Any:
    raise TypeError(
        f"there is no pool of {server!r} yet, and nothing to make one: give"
        " ConnectionPools, or this call, a factory"
    )
