"""What is measured: processes by /proc, names in /dev/shm, a cache's own counts.

Shared memory is left out of the figures of a process.  It exists once, however many
processes have touched it, and a page that only one process has touched so far would
count as private memory of that process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from shmcache._segment.names import SHM_DIR

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shmcache import Cache
    from shmcache.soak import ledger

# Above this number of samples every second one is dropped, and the interval doubles.
LIMIT = 8000


@dataclass(frozen=True)
class Process:
    """One process at one moment.  Memory is in bytes, without shared segments."""

    pid: int
    started: float  # by the wall clock, in s; with the PID it identifies a process
    age: float  # s
    uss: int
    pss: int
    rss: int
    shared: int  # bytes of segments in /dev/shm that it has touched
    descriptors: int
    threads: int
    handles: int  # open handles
    waiting: int  # open handles that are no longer in the map


@dataclass(frozen=True)
class CacheSample:
    """One cache at one moment.  Counts are since its creation."""

    entries: int
    bytes_used: int
    bytes_capacity: int
    hits: int
    misses: int
    sets: int
    expired: int
    evicted: int
    removed: dict[str, int]
    recoveries: int
    lock_timeouts: int
    opened: int
    closed: int
    bytes_free: int
    bytes_lost: int
    slots_used: int
    slots_free: int
    slots_lost: int


@dataclass(frozen=True)
class Sample:
    """All processes and caches at one moment."""

    t: float  # s since the beginning of the run
    master: Process | None
    workers: list[Process]
    shm: dict[str, int]  # names in /dev/shm, with their bytes
    caches: dict[str, CacheSample] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """How many lookups and stores there were so far."""
        return sum(c.hits + c.misses + c.sets for c in self.caches.values())


def measure(
    process: psutil.Process,
    now: float,
    rows: dict[int, ledger.Row],
    entries: dict[int, int],
) -> Process | None:
    """Measure one process.

    Args:
        process: The process.
        now: The time by the wall clock, in s.
        rows: The rows of the workers, by PID.
        entries: How many entries each worker has in the map, by token.

    Returns:
        The figures; None if the process has just ended.
    """
    row = rows.get(process.pid)
    try:
        with process.oneshot():
            started = process.create_time()
            descriptors = process.num_fds()
            threads = process.num_threads()
        maps = process.memory_maps(grouped=True)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    uss = pss = rss = shared = 0
    for mapping in maps:
        if mapping.path.startswith(f"{SHM_DIR}/"):
            shared += mapping.rss
            continue
        uss += mapping.private_clean + mapping.private_dirty
        pss += mapping.pss
        rss += mapping.rss
    if not rss:  # it is about to end and has given back its memory
        return None
    return Process(
        pid=process.pid,
        started=started,
        age=now - started,
        uss=uss,
        pss=pss,
        rss=rss,
        shared=shared,
        descriptors=descriptors,
        threads=threads,
        handles=row.open if row else 0,
        waiting=row.open - entries.get(row.token, 0) if row else 0,
    )


def mapped_names(processes: Iterable[psutil.Process]) -> dict[str, int]:
    """The files of /dev/shm that processes have mapped, with their bytes."""
    found: dict[str, int] = {}
    for process in processes:
        with suppress(psutil.Error):
            for mapping in process.memory_maps(grouped=True):
                folder, _, name = mapping.path.rpartition("/")
                if folder == SHM_DIR and name not in found:
                    found[name] = _size(name)
    return found


def names_of(run: str) -> dict[str, int]:
    """The names in /dev/shm of the caches of a run, with their bytes."""
    ours = (f"shmcache-{os.geteuid()}-{run}-", f"sem.shmcache-{os.geteuid()}-{run}-")
    return {
        name: _size(name)
        for name in sorted(os.listdir(SHM_DIR))
        if name.startswith(ours)
    }


def _size(name: str) -> int:
    with suppress(OSError):
        return os.stat(f"{SHM_DIR}/{name}").st_size
    return 0


def look(cache: Cache, books: ledger.Books) -> CacheSample:
    """A cache's counts, together with its balances."""
    stats = cache.stats()
    return CacheSample(
        entries=stats.entries,
        bytes_used=stats.bytes_used,
        bytes_capacity=stats.bytes_capacity,
        hits=stats.hits,
        misses=stats.misses,
        sets=stats.sets,
        expired=stats.expired,
        evicted=stats.evicted,
        removed=stats.removed,
        recoveries=stats.recoveries,
        lock_timeouts=stats.lock_timeouts,
        opened=stats.handles_opened,
        closed=stats.handles_closed,
        bytes_free=books.bytes.free,
        bytes_lost=books.bytes.lost,
        slots_used=books.slots.used,
        slots_free=books.slots.free,
        slots_lost=books.slots.lost,
    )


def thin(samples: Sequence[Sample]) -> list[Sample]:
    """Every second sample, so that the samples of a month fit into memory."""
    return list(samples[::2])
