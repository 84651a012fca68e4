"""``Stats``: what a cache did since its segment was created."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from shmcache._engine import is_compiled
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shmcache._segment.create import Header


@dataclass(frozen=True)
class Stats:
    """What a cache did since its segment was created, over all processes.

    Times are in seconds, sizes in bytes.
    """

    name: str
    entries: int  # with those expired but not yet removed
    max_entries: int  # 0: bounded by bytes alone
    bytes_used: int  # in blocks, as bytes_capacity is
    bytes_capacity: int
    segment_bytes: int  # all of the shared memory
    hits: int
    misses: int
    sets: int
    removed: dict[str, int] = field(repr=False)  # by cause
    expired: int
    evicted: int  # for want of room
    unread: int  # expired or evicted without ever having been read
    sweeps: int
    sweep_seconds: float
    too_large: int
    lock_waits: int
    lock_wait_seconds: float
    lock_timeouts: int
    recoveries: int  # shards taken over from the dead, or repaired
    dropped: int  # entries that a repair had to give up
    recovered: int  # entries there when a persistent cache was last taken up again
    handles_opened: int  # of a HandleMap, as are the next three; else 0
    handles_closed: int  # gone, with their callbacks done; the dead close none
    callbacks: int
    callback_failures: int
    # Histograms: how many in each bucket of _layout's *_BOUNDS, and over the last one.
    sweep_buckets: tuple[int, ...] = field(repr=False)
    lock_wait_buckets: tuple[int, ...] = field(repr=False)
    eviction_age_buckets: tuple[int, ...] = field(repr=False)
    eviction_age_seconds: float  # the sum of the ages of all that were evicted
    shards: int
    workers: int
    age: float
    compiled: bool

    @classmethod
    def of(
        cls,
        header: Header,
        shards: Iterable[Sequence[int]],
        counters: list[int],
        *,
        recovered: int,
        workers: int,
    ) -> Self:
        """From each shard's words up to the counters' end, and the rows' counters."""
        geometry, settings = header.geometry, header.settings
        sums = [0] * L.S_COUNTERS_END
        for words in shards:
            for i, word in enumerate(words):
                sums[i] += word
        rows = [0] * L.R_COUNTERS + counters
        removed = {cause.name: sums[L.S_GONE + cause] for cause in L.Cause}
        return cls(
            name=header.name,
            entries=sums[L.S_ENTRIES],
            max_entries=settings.max_entries,
            bytes_used=sums[L.S_BLOCKS_USED] * geometry.block_size,
            bytes_capacity=geometry.blocks * geometry.shards * geometry.block_size,
            segment_bytes=geometry.size,
            hits=sums[L.S_HITS] + rows[L.R_HITS],
            misses=sums[L.S_MISSES] + rows[L.R_MISSES],
            sets=sums[L.S_SETS],
            removed=removed,
            expired=removed["EXPIRED"],
            evicted=removed["CAPACITY"],
            unread=sums[L.S_UNREAD],
            sweeps=rows[L.R_SWEEPS],
            sweep_seconds=rows[L.R_SWEEP_NS] / 1e9,
            too_large=sums[L.S_TOO_LARGE],
            lock_waits=sums[L.S_LOCK_WAITS],
            lock_wait_seconds=sums[L.S_LOCK_WAIT_NS] / 1e9,
            lock_timeouts=sums[L.S_LOCK_TIMEOUTS],
            recoveries=sums[L.S_RECOVERIES],
            dropped=sums[L.S_DROPPED],
            recovered=recovered,
            handles_opened=rows[L.R_OPENED],
            handles_closed=rows[L.R_CLOSED],
            callbacks=rows[L.R_CALLBACKS],
            callback_failures=rows[L.R_CALLBACK_FAILURES],
            sweep_buckets=_buckets(
                rows, L.R_SWEEP_BUCKETS, L.SWEEP_BOUNDS, rows[L.R_SWEEPS]
            ),
            lock_wait_buckets=_buckets(
                sums, L.S_LOCK_BUCKETS, L.LOCK_BOUNDS, sums[L.S_LOCK_WAITS]
            ),
            eviction_age_buckets=_buckets(
                sums,
                L.S_AGE_BUCKETS,
                L.AGE_BOUNDS,
                removed["EXPIRED"] + removed["CAPACITY"],
            ),
            eviction_age_seconds=(sums[L.S_AGES] << L.STAMP_SHIFT) / 1e9,
            shards=settings.shards,
            workers=workers,
            age=(time.time_ns() - header.created_wall_ns) / 1e9,
            compiled=is_compiled,
        )

    @property
    def hit_ratio(self) -> float:
        """Hits by lookups; 0.0 before the first lookup."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0


def _buckets(
    words: list[int], first: int, bounds: tuple[float, ...], total: int
) -> tuple[int, ...]:
    # With the one that is not counted: what is over the last bound.
    counts = words[first : first + len(bounds)]
    return (*counts, max(0, total - sum(counts)))
