"""Prometheus metrics of caches and handle maps: each worker exports the whole host.

::

    from prometheus_client import REGISTRY
    from shmcache.prometheus import CacheCollector

    REGISTRY.register(CacheCollector(cache))

Problem: a scrape reaches one worker, and the metrics are those of all workers.  The
usual answer, files in ``PROMETHEUS_MULTIPROC_DIR``, leaves files to clean up.

Mechanism: the counts live in the segment, so the ``/metrics`` of any worker exports the
totals of all workers, including those that have ended.  No counter falls when a worker
is replaced, and the cost of a scrape does not grow with the number of ended workers.

Death in the middle: a scrape changes nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shmcache._observe.measures import (
    FACTS_TEXT,
    HISTOGRAMS,
    MEASURES,
    Reader,
    Reading,
    registries,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmcache._observe.measures import Histogram, Measure, Measured

_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class CacheCollector(Collector):
    """A collector for a ``CollectorRegistry``, of one or more caches and maps.

    Registering the collector reads nothing.  A scrape takes no lock and costs
    O(shards + workers) for each cache.  A cache that is closed, or cannot be read, is
    left out of the scrape; that is logged once.

    Args:
        *caches: Caches, handle maps and ready-made maps.
        prefix: The beginning of the names of the metrics.  The label ``cache`` has the
            name of the cache.

    Raises:
        TypeError: No cache was given, or an object that is none.
        ValueError: The prefix cannot begin a metric's name, or two objects of the same
            cache were given.
    """

    def __init__(self, *caches: Measured, prefix: str = "shmcache") -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ValueError(
                f"prefix {prefix!r} cannot begin a metric's name; use letters, digits"
                " and '_', and no digit first"
            )
        self._prefix = prefix
        self._reader = Reader(registries(caches, "CacheCollector"), "a scrape")

    def describe(self) -> list[Metric]:
        """Return the metrics without their numbers."""
        return list(self._families([]))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all caches; those of one cache come from one reading."""
        found = map(self._reader.read, self._reader.caches)
        for family in self._families([reading for reading in found if reading]):
            if family.samples:
                yield family

    def _families(self, readings: list[Reading]) -> Iterator[Metric]:
        info = InfoMetricFamily(self._prefix, FACTS_TEXT, labels=["cache"])
        for reading in readings:
            info.add_metric([reading.name], reading.facts)
        yield info
        for measure in MEASURES:
            yield self._family(measure, readings)
        for histogram in HISTOGRAMS:
            yield self._distribution(histogram, readings)

    def _family(self, measure: Measure, readings: list[Reading]) -> Metric:
        kind = CounterMetricFamily if measure.kind == "counter" else GaugeMetricFamily
        labels = ["cache", measure.label] if measure.label else ["cache"]
        family = kind(f"{self._prefix}_{measure.name}", measure.text, labels=labels)
        for reading in readings:
            for value, number in measure.values(reading):
                which = [reading.name, value] if measure.label else [reading.name]
                family.add_metric(which, number)
        return family

    def _distribution(self, histogram: Histogram, readings: list[Reading]) -> Metric:
        family = HistogramMetricFamily(
            f"{self._prefix}_{histogram.name}", histogram.text, labels=["cache"]
        )
        for reading in readings:
            buckets, total = histogram.cumulative(reading.stats)
            family.add_metric([reading.name], buckets, total)
        return family
