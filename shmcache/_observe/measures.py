"""The measures of a cache or handle map: one table for all exporters.

Problem: Prometheus, OpenTelemetry and the log report the same quantities of the whole
host, each under the names that its own conventions require.

Mechanism: a ``Reading`` holds the numbers of one cache at one moment.  Each ``Measure``
of the table knows the names of one quantity, and how to get it from a reading.  A
reading costs O(shards + workers) and takes no lock, so neither the number of entries
nor a dead lock holder can delay it.

Death in the middle: a reading changes nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from shmcache._format import layout as L
from shmcache._version import __version__
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
    handles: bool  # whether the cache is a map of handles
    open_handles: int  # handles that living workers have not closed yet
    leases: int  # leases in force on these handles
    facts: dict[str, str]  # constant texts: version, codec, geometry

    @classmethod
    def of(cls, registry: Cache) -> Reading:
        """Read a cache.

        Raises:
            CacheClosed: The cache was closed in this process.
            ShmCacheError: The segment cannot be read.
        """
        stats = registry.stats()
        internals = registry.internals
        settings = internals.settings
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
        held = internals.attachment.held() if handles else (0, 0)
        return cls(registry.name, stats, handles, *held, facts)


@dataclass(frozen=True)
class Measure:
    """One quantity: its names, and how to get it from a reading."""

    # The name for Prometheus, after the prefix and before "_total".
    name: str
    # The name for OpenTelemetry, after "shmcache."; empty if the quantity is a sum over
    # the attributes of another one, so that it is not reported twice.
    otel: str
    kind: Literal["counter", "gauge"]
    unit: str  # in UCUM, as OpenTelemetry requires it
    text: str  # the help text
    # Returns one number, or a number for each value of the label.
    read: Callable[[Reading], float | dict[str, float]]
    label: str = ""
    of_handles: bool = False  # only maps of handles have this quantity
    additive: bool = True  # a sum over several caches makes sense

    def values(self, reading: Reading) -> Iterator[tuple[str, float]]:
        """Yield each value of the label with its number; without a label it is ""."""
        if self.of_handles and not reading.handles:
            return
        found = self.read(reading)
        if isinstance(found, dict):
            yield from found.items()
        else:
            yield "", found


@dataclass(frozen=True)
class Histogram:
    """A distribution of durations, as the segment keeps it."""

    name: str  # for Prometheus, after the prefix
    otel: str  # for OpenTelemetry, after "shmcache."
    unit: str  # of what is counted, in UCUM
    text: str  # the help text
    bounds: tuple[float, ...]  # upper bounds of the buckets, in seconds
    # Returns the count of each bucket, and the sum of all durations in seconds.
    read: Callable[[Stats], tuple[tuple[int, ...], float]]

    def cumulative(self, stats: Stats) -> tuple[list[tuple[str, int]], float]:
        """Return the distribution in the form that Prometheus requires.

        Returns:
            For each upper bound, up to "+Inf", how many durations were not above it;
            and the sum of all durations in seconds.
        """
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
        # These have left the map, but their owner has not closed them yet: a callback
        # or a lease has not ended.
        "closing": max(0, reading.open_handles - registered),
    }


MEASURES = (
    Measure(
        *("entries", "entries", "gauge", "{entry}"),
        "Entries in the cache, including those expired but not yet removed.",
        lambda r: r.stats.entries,
    ),
    Measure(
        *("max_entries", "entry_limit", "gauge", "{entry}"),
        "How many entries the cache may hold at most; 0 if only bytes bound it.",
        lambda r: r.stats.max_entries,
    ),
    Measure(
        *("hits", "hits", "counter", "{hit}"),
        "Lookups that found a live entry.",
        lambda r: r.stats.hits,
    ),
    Measure(
        *("misses", "misses", "counter", "{miss}"),
        "Lookups that found no live entry.",
        lambda r: r.stats.misses,
    ),
    Measure(
        *("sets", "sets", "counter", "{set}"),
        "Entries stored.",
        lambda r: r.stats.sets,
    ),
    Measure(
        *("evictions", "evictions", "counter", "{entry}"),
        "Entries that the cache removed by itself: expired, or to make room.",
        lambda r: _by_cause(r, evicted=True),
        label="cause",
    ),
    Measure(
        *("ttl_evictions", "", "counter", "{entry}"),
        "Entries removed because they had expired.",
        lambda r: r.stats.expired,
    ),
    Measure(
        *("lru_evictions", "", "counter", "{entry}"),
        "Least recently used entries removed to make room.",
        lambda r: r.stats.evicted,
    ),
    Measure(
        *("unread_evictions", "evictions_unread", "counter", "{entry}"),
        "Entries evicted without ever having been read.",
        lambda r: r.stats.unread,
    ),
    Measure(
        *("removals", "removals", "counter", "{entry}"),
        "Entries removed by a caller, or because their owner died or closed them.",
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
        "Memory that keys and values take up, in whole blocks.",
        lambda r: r.stats.bytes_used,
    ),
    Measure(
        *("capacity_bytes", "memory.capacity", "gauge", "By"),
        "Memory for keys and values.",
        lambda r: r.stats.bytes_capacity,
    ),
    Measure(
        *("segment_bytes", "memory.segment", "gauge", "By"),
        "Shared memory reserved for the cache, including its bookkeeping.",
        lambda r: r.stats.segment_bytes,
    ),
    Measure(
        *("too_large", "refusals", "counter", "{entry}"),
        "Entries refused because they could never fit.",
        lambda r: r.stats.too_large,
    ),
    Measure(
        *("lock_timeouts", "lock.timeouts", "counter", "{timeout}"),
        "Waits for a shard's lock that timed out.",
        lambda r: r.stats.lock_timeouts,
    ),
    Measure(
        *("recoveries", "recoveries", "counter", "{recovery}"),
        "Shards taken over from dead or stopped processes, or rebuilt after damage.",
        lambda r: r.stats.recoveries,
    ),
    Measure(
        *("dropped_entries", "recovery.drops", "counter", "{entry}"),
        "Entries dropped when shards were rebuilt.",
        lambda r: r.stats.dropped,
    ),
    Measure(
        *("workers", "workers", "gauge", "{process}"),
        "Living processes that are attached to the cache.",
        lambda r: r.stats.workers,
    ),
    Measure(
        *("age_seconds", "age", "gauge", "s"),
        "Time since the segment was created, when all counters were 0.",
        lambda r: r.stats.age,
        additive=False,
    ),
    Measure(
        *("handles", "handles", "gauge", "{handle}"),
        "Handles of the living workers of this host, by state.",
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
        "Handles closed by their owners; handles of dead owners are never closed.",
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
        "How long processes waited for a shard's lock that another one held.",
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

FACTS_TEXT = "Version of the package, and settings of the cache."


def registries(caches: tuple[Measured, ...], what: str) -> dict[str, Cache]:
    """Return the caches behind the objects that a user wants measured, by name.

    Args:
        caches: Caches and handle maps.  A ready-made map stands for its parts, and a
            handle map for the cache that keeps its entries.
        what: The function that was called, for error messages.

    Raises:
        TypeError: No object was given, or one that cannot be measured.
        ValueError: Two objects of the same cache were given.
    """
    if not caches:
        raise TypeError(f"{what} needs at least one Cache or HandleMap: pass it one")
    found: dict[str, Cache] = {}
    parts = [
        part
        for each in caches
        for part in (each.parts().values() if hasattr(each, "parts") else (each,))
    ]
    for part in parts:
        registry: Any = _cache_of(part)
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


def _cache_of(part: Cache | HandleMap) -> Any:
    # Return the cache that keeps the entries of a handle map; return any other object
    # itself.
    return getattr(part, "_registry", part)


class Reader:
    """Readings of several caches; one that fails does not affect the others.

    Args:
        caches: The caches by name.
        purpose: Who reads, as the subject of the sentence that is logged on a failure.
    """

    def __init__(self, caches: dict[str, Cache], purpose: str) -> None:
        self.caches = caches
        self._purpose = purpose
        self._failed: set[str] = set()  # caches whose failure was logged already

    def read(self, name: str) -> Reading | None:
        """Read a cache.

        Returns:
            Its state; None if the cache is closed or cannot be read.  That is logged
            once, until the cache can be read again.
        """
        cache = self.caches[name]
        try:
            # A closed cache is not asked, because stats() would raise.
            reading = None if cache.closed else Reading.of(cache)
        except Exception as error:  # noqa: BLE001 - the other caches are still read
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
