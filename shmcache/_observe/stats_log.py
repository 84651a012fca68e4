"""Statistics in the log, from time to time, by one process of the host.

Problem: all workers would log the same numbers, as the counts are the host's.

Mechanism: the process that has the office of the logger logs (see
_process/election.py); when it dies another process has it.  Each process that asked has
a daemon thread for it, which is not the sweeper's: a slow log handler must not keep the
sweeper from its work.

Fork: a child has no such thread and need not, as its parent goes on; and it is not
born while the thread is inside a log handler, whose lock it would find taken.
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

# A handler that hangs must not keep a process from forking for ever.
FORK_PATIENCE = 5.0


def log_stats(
    interval: float, *caches: Measured, level: int = logging.INFO
) -> StatsLog:
    """Log the statistics of caches and maps every so many seconds, to "shmcache".

    Of all processes that ask for it, one logs each cache; another takes over when it
    ends.  The record's ``stats`` are the fields of ``Stats``, and ``recent`` is what
    was counted since the last one.  ``stop()`` of what is returned ends it.
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
    """Periodic statistics of some caches, until ``stop()`` or the process's end."""

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

    def stop(self) -> None:
        """Log no more; another process may go on.  Twice is fine."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if self in _running:
            _running.discard(self)
            for name, cache in self._reader.caches.items():
                others = (other._reader.caches for other in list(_running))
                if not cache.closed and not any(name in each for each in others):
                    resign(cache._attachment, Office.LOGGER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        caches = self._reader.caches.values()
        while not self._stop.wait(self.interval):
            if all(cache.closed for cache in caches):
                return
            with _writing:
                self.write()

    def write(self) -> None:
        """Log now, what this process is elected for."""
        if not log.isEnabledFor(self.level):
            return
        for name, cache in self._reader.caches.items():
            if cache.closed:
                continue
            if elected(cache._attachment, Office.LOGGER):
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
_writing = threading.RLock()  # a handler may fork
_held = False


def _before_fork() -> None:
    global _held  # noqa: PLW0603 - one lock a process
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
