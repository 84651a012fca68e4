"""``log_stats()``: statistics in the log, by one process of the host.

Problem: the counts are those of the whole host, so if every worker logged them, the log
would have each line once for each worker.

Mechanism: the process that is elected logs the cache: it holds the kernel lock on one
byte of the lock file (see _process/election.py).  The others ask for it each time.
Each process that called ``log_stats()`` has a daemon thread for it.  That is not the
sweeper's thread, because a slow log handler must not delay the sweeper.

Death in the middle: the kernel drops the lock of a dead process, and the next process
that asks gets it.

Fork: a child has no such thread, and needs none, as its parent goes on.  A fork waits
until the thread is outside of the log handlers; otherwise the child would inherit a
handler's lock that nobody unlocks there.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from shmcache._observe.measures import Reader, Reading, registries
from shmcache._process.election import Office, elected, resign
from shmcache._process.uwsgi import threads_run

if TYPE_CHECKING:
    from shmcache._observe.measures import Measured
    from shmcache.cache import Cache
    from shmcache.stats import Stats

log = logging.getLogger("shmcache")

# A fork waits for a log handler for at most this many seconds, because a handler that
# hangs must not block forks for ever.
FORK_PATIENCE = 5.0


def log_stats(
    interval: float, *caches: Measured, level: int = logging.INFO
) -> StatsLog:
    """Log the statistics of caches and maps periodically, to the logger "shmcache".

    Call it in every worker.  One of the processes that called it logs each cache, and
    another one takes over when that process ends.  The record has ``stats``, the fields
    of ``Stats``, and ``recent``, the counts since the record before.

    Args:
        interval: Seconds between two records of a cache.
        *caches: Caches, handle maps and ready-made maps.
        level: The level of the records.

    Returns:
        An object whose ``stop()`` ends the logging in this process.

    Raises:
        TypeError: An argument is of the wrong type, or no cache was given.
        ValueError: ``interval`` is not a finite number over 0, or two objects of the
            same cache were given.
    """
    number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
    if not number or not 0 < interval < math.inf:
        raise (ValueError if number else TypeError)(
            f"interval must be a number of seconds over 0, not {interval!r}"
        )
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level must be an int such as logging.INFO, not {level!r}")
    return StatsLog(float(interval), registries(caches, "log_stats"), level)


class StatsLog:
    """Periodic statistics of some caches, until ``stop()`` or the process's end.

    Args:
        interval: Seconds between two records of a cache.
        caches: The caches by name.
        level: The level of the records.
    """

    def __init__(self, interval: float, caches: dict[str, Cache], level: int) -> None:
        self.interval = interval
        self.level = level
        self._reader = Reader(caches, "the statistics log")
        self._before: dict[str, Stats] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="shmcache-stats", daemon=True
        )
        if threads_run():
            self._thread.start()
            _running.add(self)
        else:
            log.warning(
                "statistics are not logged: no threads run in this process; call"
                " log_stats() in uWSGI's workers, with --enable-threads",
                extra={"cache": ", ".join(caches), "event": "no statistics"},
            )

    @property
    def caches(self) -> dict[str, Cache]:
        """Return the caches by name."""
        return self._reader.caches

    def stop(self) -> None:
        """Stop logging in this process; another one may take over.

        A second call does nothing.
        """
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if self in _running:
            _running.discard(self)
            # Another StatsLog of this process that logs the same cache keeps the lock.
            still = {name for other in list(_running) for name in other.caches}
            for name, cache in self.caches.items():
                if not cache.closed and name not in still:
                    resign(cache.internals.attachment, Office.LOGGER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        caches = self.caches.values()
        while not self._stop.wait(self.interval):
            if all(cache.closed for cache in caches):
                return
            with _writing:
                self.write()

    def write(self) -> None:
        """Log now each cache for which this process is elected."""
        if not log.isEnabledFor(self.level):
            return
        for name, cache in self.caches.items():
            if cache.closed:
                continue
            if elected(cache.internals.attachment, Office.LOGGER):
                reading = self._reader.read(name)
                if reading is not None:
                    self._write(reading)

    def _write(self, reading: Reading) -> None:
        stats = reading.stats
        before = self._before.get(reading.name)
        recent = {
            each: getattr(stats, each) - (getattr(before, each) if before else 0)
            for each in ("hits", "misses", "sets", "expired", "evicted")
        }
        self._before[reading.name] = stats
        lookups = recent["hits"] + recent["misses"]
        fields: dict[str, Any] = {
            "cache": reading.name,
            "event": "stats",
            "stats": {**asdict(stats), "hit_ratio": stats.hit_ratio},
            "recent": recent,
        }
        if reading.handles:
            fields["open_handles"] = reading.open_handles
            fields["leases"] = reading.leases
        log.log(
            self.level,
            "cache %s: %d entries, %d of %d bytes, %.1f %% of %d lookups hit,"
            " %d expired, %d evicted, %d workers",
            reading.name,
            stats.entries,
            stats.bytes_used,
            stats.bytes_capacity,
            100 * recent["hits"] / lookups if lookups else 0.0,
            lookups,
            recent["expired"],
            recent["evicted"],
            stats.workers,
            extra=fields,
        )


_running: weakref.WeakSet[StatsLog] = weakref.WeakSet()
# This lock is held while records are written.  It is reentrant because a log handler
# may fork.
_writing = threading.RLock()
_held = False


def _before_fork() -> None:
    global _held  # noqa: PLW0603 - there is one lock in a process
    _held = bool(_running) and _writing.acquire(timeout=FORK_PATIENCE)


def _after_fork_in_parent() -> None:
    if _held:
        _writing.release()


def _after_fork_in_child() -> None:
    global _writing  # noqa: PLW0603 - as above
    _writing = threading.RLock()
    _running.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
