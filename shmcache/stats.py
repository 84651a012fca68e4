"""``Stats``: what a cache did since its segment was created."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from shmcache._engine import is_compiled
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shmcache._segment.header import Header


@dataclass(frozen=True)
class Stats:
    """What a cache did since its segment was created, over all processes.

    Times are in seconds, sizes in bytes.  A histogram has one number for each bucket,
    of values up to the bounds ``*_BOUNDS`` of _format/layout.py, and a last number for
    what is above all bounds.

    Attributes:
        name: The cache.
        entries: Entries in the cache, including expired ones that were not removed yet.
        max_entries: The largest number of entries; 0 if only bytes are bounded.
        bytes_used: Bytes in blocks that entries occupy.
        bytes_capacity: Bytes in all blocks.
        segment_bytes: All of the shared memory, bookkeeping included.
        hits: Lookups that found an entry.
        misses: Lookups that found none.
        sets: Entries written.
        removed: How many entries were removed, by the name of the cause.
        expired: Entries that were removed because their time was over.
        evicted: Entries that were removed to make room for others.
        unread: Entries that expired or were evicted and that nobody had ever read.
        sweeps: Calls of ``sweep()``, those of the sweeper threads included.
        sweep_seconds: Time spent in them.
        too_large: Writes refused with EntryTooLarge.
        lock_waits: How often a process had to wait for a shard's lock.
        lock_wait_seconds: Time spent waiting.
        lock_timeouts: Waits that ended in LockTimeout.
        recoveries: Takeovers from processes that died, or were stopped just as they
            took or gave back the lock, and rebuilds of damaged shards.
        dropped: Entries that a rebuild had to give up.
        recovered: Entries found when a persistent cache was last taken into use again.
        handles_opened: Handles registered; this and the next three are 0 for a Cache.
        handles_closed: Handles that were removed and whose callback has ended; handles
            of dead processes are not counted.
        callbacks: Callbacks that were run.
        callback_failures: Callbacks that raised.
        sweep_buckets: A histogram of the seconds that sweeps took.
        lock_wait_buckets: A histogram of the seconds that waits took.
        eviction_age_buckets: A histogram of the ages of expired and evicted entries.
        eviction_age_seconds: The sum of these ages.
        shards: How many shards there are.
        workers: How many processes are attached.
        age: Seconds since the segment was created.
        compiled: Whether this process runs the compiled engine.
        unstable_shards: Shards whose counts are not of one moment, because a writer was
            inside for the whole time (perhaps it was stopped).
    """

    name: str
    entries: int
    max_entries: int
    bytes_used: int
    bytes_capacity: int
    segment_bytes: int
    hits: int
    misses: int
    sets: int
    removed: dict[str, int] = field(repr=False)
    expired: int
    evicted: int
    unread: int
    sweeps: int
    sweep_seconds: float
    too_large: int
    lock_waits: int
    lock_wait_seconds: float
    lock_timeouts: int
    recoveries: int
    dropped: int
    recovered: int
    handles_opened: int
    handles_closed: int
    callbacks: int
    callback_failures: int
    sweep_buckets: tuple[int, ...] = field(repr=False)
    lock_wait_buckets: tuple[int, ...] = field(repr=False)
    eviction_age_buckets: tuple[int, ...] = field(repr=False)
    eviction_age_seconds: float
    shards: int
    workers: int
    age: float
    compiled: bool
    unstable_shards: int = 0

    @classmethod
    def of(
        cls,
        header: Header,
        shards: Iterable[Sequence[int]],
        counters: list[int],
        *,
        recovered: int,
        workers: int,
        unstable_shards: int,
    ) -> Self:
        """Make the statistics from counters that were read from a segment.

        Args:
            header: The segment's header.
            shards: The words of each shard, from its start to the counters' end.
            counters: The sums of the workers' counters, from word R_COUNTERS of a row.
            recovered: The number in the header's word H_RECOVERED.
            workers: How many processes are attached.
            unstable_shards: How many shards' words are not of one moment.
        """
        geometry, settings = header.geometry, header.settings
        sums = _sums(shards)
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
            unstable_shards=unstable_shards,
        )

    @property
    def hit_ratio(self) -> float:
        """Hits divided by lookups; 0.0 before the first lookup."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0


def _sums(shards: Iterable[Sequence[int]]) -> list[int]:
    sums = [0] * L.S_COUNTERS_END
    for words in shards:
        for i, word in enumerate(words):
            sums[i] += word
    return sums


def _buckets(
    words: list[int], first: int, bounds: tuple[float, ...], total: int
) -> tuple[int, ...]:
    # The segment does not count the last bucket, for values over all bounds: it is the
    # rest.
    counts = words[first : first + len(bounds)]
    return (*counts, max(0, total - sum(counts)))
