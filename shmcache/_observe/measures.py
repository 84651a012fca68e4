"""What there is to measure of a cache or handle map: one table for all exporters.

Problem: Prometheus, OpenTelemetry and the log shall tell the same quantities, under
names that each of them would choose, from counts that the whole host shares.

Mechanism: a ``Reading`` is taken of a cache at one moment; a ``Measure`` says under
which names a number of it goes, and how to get it.  A reading costs O(shards +
workers) and takes no lock, whatever lives in the cache and whoever has died.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from shmcache._format import layout as L
from shmcache.cache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache._component import Component
    from shmcache.handles import HandleMap
    from shmcache.stats import Stats

    Measured = Cache | HandleMap | Component

log = logging.getLogger("shmcache")


@dataclass(frozen=True)
class Reading:
    """The state of one cache, over all processes of the host."""

    name: str
    stats: Stats
    handles: bool  # whether it is a map of handles
    open_handles: int  # of living workers: registered, or not closed yet
    leases: int  # on them, in force
    facts: dict[str, str]  # what does not change: version, codec, geometry

    @classmethod
    def of(cls, registry: Cache) -> Reading:
        from shmcache import __version__

        stats = registry.stats()
        settings = registry._settings
        geometry = settings.geometry
        facts = {
            "version": __version__,
            "compiled": str(stats.compiled).lower(),
            "codec": settings.codec,
            "shards": str(settings.shards),
            "max_entries": str(settings.max_entries),
            "max_bytes": str(settings.max_bytes),
            "block_size": str(geometry.block_size),
            "blocks": str(geometry.blocks * geometry.shards),
            "ttl_seconds": f"{settings.ttl_ns / 1e9:g}",
            "sliding": str(settings.sliding).lower(),
            "persist": str(settings.persist).lower(),
        }
        handles = settings.codec == L.HANDLES
        held = registry._attachment.held() if handles else (0, 0)
        return cls(registry.name, stats, handles, *held, facts)


@dataclass(frozen=True)
class Measure:
    """A quantity: its names, and what it is of a reading.

    ``read`` returns a number, or one for each value of the label.
    """

    name: str  # to Prometheus, after the prefix and before _total
    # To OpenTelemetry, after "shmcache."; "": the sum of another's attributes tells it.
    otel: str
    kind: Literal["counter", "gauge"]
    unit: str  # in UCUM, as OpenTelemetry wants it
    text: str
    read: Callable[[Reading], float | dict[str, float]]
    label: str = ""
    of_handles: bool = False  # tells something of handle maps only
    additive: bool = True  # sums over caches make sense

    def values(self, reading: Reading) -> Iterator[tuple[str, float]]:
        """Each value of the label, "" without one, and its number."""
        if self.of_handles and not reading.handles:
            return
        found = self.read(reading)
        if isinstance(found, dict):
            yield from found.items()
        else:
            yield "", found


@dataclass(frozen=True)
class Histogram:
    """A distribution of seconds, as the segment keeps it."""

    name: str
    otel: str
    unit: str  # of what is counted
    text: str
    bounds: tuple[float, ...]
    read: Callable[[Stats], tuple[tuple[int, ...], float]]  # bucket counts, sum

    def cumulative(self, stats: Stats) -> tuple[list[tuple[str, int]], float]:
        """Upper bound and how many were not above it, up to +Inf; and the sum."""
        counts, total = self.read(stats)
        bounds = [*(f"{bound!r}" for bound in self.bounds), "+Inf"]
        return list(zip(bounds, accumulate(counts), strict=True)), total


def _by_cause(reading: Reading, *, evicted: bool) -> dict[str, float]:
    return {
        cause.name.lower(): reading.stats.removed[cause.name]
        for cause in L.Cause
        if cause.evicted is evicted
    }


def _handle_states(reading: Reading) -> dict[str, float]:
    registered = reading.stats.entries
    return {
        "registered": registered,
        # Gone from the map; the owner's callback, or a lease, has not ended yet.
        "closing": max(0, reading.open_handles - registered),
    }


MEASURES = (
    Measure(
        *("entries", "entries", "gauge", "{entry}"),
        "Entries in the cache, those expired but not yet removed included.",
        lambda r: r.stats.entries,
    ),
    Measure(
        *("max_entries", "entry_limit", "gauge", "{entry}"),
        "Most entries that the cache may hold; 0 if only bytes bound it.",
        lambda r: r.stats.max_entries,
    ),
    Measure(
        *("hits", "hits", "counter", "{hit}"),
        "Lookups that found a live entry.",
        lambda r: r.stats.hits,
    ),
    Measure(
        *("misses", "misses", "counter", "{miss}"),
        "Lookups that found none.",
        lambda r: r.stats.misses,
    ),
    Measure(
        *("sets", "sets", "counter", "{set}"),
        "Entries stored.",
        lambda r: r.stats.sets,
    ),
    Measure(
        *("evictions", "evictions", "counter", "{entry}"),
        "Entries that the cache gave up by itself: expired, or for want of room.",
        lambda r: _by_cause(r, evicted=True),
        label="cause",
    ),
    Measure(
        *("ttl_evictions", "", "counter", "{entry}"),
        "Entries removed because their time was over.",
        lambda r: r.stats.expired,
    ),
    Measure(
        *("lru_evictions", "", "counter", "{entry}"),
        "Least recently used entries removed for want of room.",
        lambda r: r.stats.evicted,
    ),
    Measure(
        *("unread_evictions", "evictions_unread", "counter", "{entry}"),
        "Entries evicted without ever having been read.",
        lambda r: r.stats.unread,
    ),
    Measure(
        *("removals", "removals", "counter", "{entry}"),
        "Entries removed at a caller's wish, or because their owner died or closed.",
        lambda r: _by_cause(r, evicted=False),
        label="cause",
    ),
    Measure(
        *("cleanup_runs", "cleanup.runs", "counter", "{run}"),
        "Sweeps for expired entries.",
        lambda r: r.stats.sweeps,
    ),
    Measure(
        *("used_bytes", "memory.used", "gauge", "By"),
        "Room that keys and values take up, in whole blocks.",
        lambda r: r.stats.bytes_used,
    ),
    Measure(
        *("capacity_bytes", "memory.capacity", "gauge", "By"),
        "Room for keys and values.",
        lambda r: r.stats.bytes_capacity,
    ),
    Measure(
        *("segment_bytes", "memory.segment", "gauge", "By"),
        "Shared memory reserved for the cache, bookkeeping included.",
        lambda r: r.stats.segment_bytes,
    ),
    Measure(
        *("too_large", "refusals", "counter", "{entry}"),
        "Entries refused because they could never fit.",
        lambda r: r.stats.too_large,
    ),
    Measure(
        *("lock_timeouts", "lock.timeouts", "counter", "{timeout}"),
        "Waits for a shard's lock that were given up.",
        lambda r: r.stats.lock_timeouts,
    ),
    Measure(
        *("recoveries", "recoveries", "counter", "{recovery}"),
        "Shards taken over from dead processes, or repaired.",
        lambda r: r.stats.recoveries,
    ),
    Measure(
        *("dropped_entries", "recovery.drops", "counter", "{entry}"),
        "Entries that repairs had to give up.",
        lambda r: r.stats.dropped,
    ),
    Measure(
        *("workers", "workers", "gauge", "{process}"),
        "Living processes that are attached.",
        lambda r: r.stats.workers,
    ),
    Measure(
        *("age_seconds", "age", "gauge", "s"),
        "Time since the segment was created; counters begin there.",
        lambda r: r.stats.age,
        additive=False,
    ),
    Measure(
        *("handles", "handles", "gauge", "{handle}"),
        "Handles of the host's living workers, by state.",
        _handle_states,
        label="state",
        of_handles=True,
    ),
    Measure(
        *("leases", "leases", "gauge", "{lease}"),
        "Leases in force, which keep handles open in living workers.",
        lambda r: r.leases,
        of_handles=True,
    ),
    Measure(
        *("handles_opened", "handle.opens", "counter", "{handle}"),
        "Handles registered.",
        lambda r: r.stats.handles_opened,
        of_handles=True,
    ),
    Measure(
        *("handles_closed", "handle.closes", "counter", "{handle}"),
        "Handles closed by their owners; those of the dead are never closed.",
        lambda r: r.stats.handles_closed,
        of_handles=True,
    ),
    Measure(
        *("callbacks", "callback.runs", "counter", "{call}"),
        "Callbacks of evicted handles that have ended.",
        lambda r: r.stats.callbacks,
        of_handles=True,
    ),
    Measure(
        *("callback_failures", "callback.failures", "counter", "{call}"),
        "Callbacks of evicted handles that raised.",
        lambda r: r.stats.callback_failures,
        of_handles=True,
    ),
)

HISTOGRAMS = (
    Histogram(
        *("cleanup_duration_seconds", "cleanup.duration", "{run}"),
        "How long sweeps for expired entries took.",
        L.SWEEP_BOUNDS,
        lambda s: (s.sweep_buckets, s.sweep_seconds),
    ),
    Histogram(
        *("lock_wait_seconds", "lock.wait", "{wait}"),
        "How long processes waited for a shard's lock that was taken.",
        L.LOCK_BOUNDS,
        lambda s: (s.lock_wait_buckets, s.lock_wait_seconds),
    ),
    Histogram(
        *("eviction_age_seconds", "eviction.age", "{entry}"),
        "How old entries were when they expired or were evicted.",
        L.AGE_BOUNDS,
        lambda s: (s.eviction_age_buckets, s.eviction_age_seconds),
    ),
)

FACTS_TEXT = "Version of the package, and how the cache was made."


def registries(caches: tuple[Measured, ...], what: str) -> dict[str, Cache]:
    """The caches by name, handle maps by the shared part; TypeError, ValueError.

    A ready-made map stands for its parts.
    """
    if not caches:
        raise TypeError(f"{what} needs a Cache or HandleMap at least: pass it one")
    found: dict[str, Cache] = {}
    parts = [
        part
        for each in caches
        for part in (each.parts().values() if hasattr(each, "parts") else (each,))
    ]
    for part in parts:
        registry: Any = getattr(part, "_registry", part)
        if not isinstance(registry, Cache):
            raise TypeError(
                f"{what} takes Cache and HandleMap objects, and the ready-made maps,"
                f" not {part!r}"
            )
        if found.setdefault(registry.name, registry) is not registry:
            raise ValueError(
                f"{what} was given two objects of cache {registry.name!r}, whose"
                " numbers are the same: pass one of them"
            )
    return found


class Reader:
    """Readings of several caches, of which none can spoil the others'."""

    def __init__(self, caches: dict[str, Cache], purpose: str) -> None:
        self.caches = caches
        self._purpose = purpose
        self._failed: set[str] = set()  # and was said to have

    def read(self, name: str) -> Reading | None:
        """The state of a cache; None, said once in the log, if it cannot be read."""
        cache = self.caches[name]
        try:
            # Not what stats() would do: a cache that was closed stays closed.
            reading = None if cache.closed else Reading.of(cache)
        except Exception as error:  # noqa: BLE001 - the other caches' are wanted, too
            self._say(name, f"it cannot be read: {error}")
            return None
        if reading is None:
            self._say(name, "it was closed in this process")
        else:
            self._failed.discard(name)
        return reading

    def _say(self, name: str, why: str) -> None:
        if name in self._failed:
            return
        self._failed.add(name)
        log.warning(
            "%s left out cache %s: %s",
            self._purpose,
            name,
            why,
            extra={"cache": name, "event": "not measured", "reason": why},
        )
