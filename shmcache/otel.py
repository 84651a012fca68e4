"""OpenTelemetry metrics of caches and handle maps: one worker reports the whole host.

Problem: each worker has its own SDK and exporter, and the counts are those of the host.
If all workers reported them, a backend that sums over workers would show a multiple.

Mechanism: the workers elect a reporter by a kernel lock on one byte of the cache's lock
file (see _process/election.py).  The process that holds the lock reports the cache,
and all others observe nothing.  Each cache has an election of its own.

Death in the middle: the kernel drops the lock of a dead reporter, and the next worker
that collects gets it.  So a change of reporters takes one export interval at most.

Instruments follow the semantic conventions: names and attributes have a namespace,
units are in UCUM, and no name contains a unit or "total".  A quantity that can be
summed and may fall is an up-down counter.  OpenTelemetry has no observable histogram,
so a distribution is three counters: ``.sum`` in seconds, ``.count``, and ``.bucket``.
The attribute ``le`` of a bucket is an upper bound, and the bucket counts what was not
above it, as in Prometheus.

The totals since the creation of the cache are reported.  An exporter that asks for
deltas gets the whole total as the first delta of each new reporter, so use cumulative
temporality for counters, which is the default.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

try:
    from opentelemetry import metrics
    from opentelemetry.metrics import Observation
except ImportError as missing:
    raise ImportError(
        "shmcache.otel needs OpenTelemetry: pip install 'shmcache[otel]'"
    ) from missing

from shmcache._observe.measures import (
    FACTS_TEXT,
    HISTOGRAMS,
    MEASURES,
    Histogram,
    Measure,
    Reader,
    Reading,
    registries,
)
from shmcache._process.election import Office, elected, resign
from shmcache._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider

    from shmcache._observe.measures import Measured
    from shmcache.cache import Cache


def instrument(
    *caches: Measured, meter_provider: MeterProvider | None = None
) -> Instrumentation:
    """Report caches and maps through a meter provider.

    Call it in every worker.  One of the workers that called it reports each cache, and
    another one takes over when that worker ends.

    Args:
        *caches: Caches, handle maps and ready-made maps.
        meter_provider: The provider; None for the global one.

    Returns:
        An object whose ``shutdown()`` ends the reporting in this process.  Call that if
        the provider is shut down before the process ends: otherwise this worker stays
        elected, and nobody reports.

    Raises:
        TypeError: No cache was given, or an object that is none.
        ValueError: Two objects of the same cache were given.
    """
    found = registries(caches, "instrument")
    default = metrics.get_meter_provider()
    if meter_provider is None or meter_provider is default:
        reporter = _reporters.get(None)
        meter = metrics.get_meter("shmcache", __version__)
    else:
        reporter = _reporters_of.get(meter_provider)
        meter = meter_provider.get_meter("shmcache", __version__)
    if reporter is None:
        # A meter keeps the first instrument of a name, with its callbacks.  So there is
        # one reporter for each provider, whose callbacks serve all instrumentations.
        reporter = _Reporter(meter)
        if meter_provider is None or meter_provider is default:
            _reporters[None] = reporter
        else:
            _reporters_of[meter_provider] = reporter
    instrumentation = Instrumentation(found, reporter)
    reporter.active.append(instrumentation)
    return instrumentation


class Instrumentation:
    """Caches that this process reports when it is elected, until ``shutdown()``."""

    def __init__(self, caches: dict[str, Cache], reporter: _Reporter) -> None:
        self._reader = Reader(caches, "an export")
        self._reporter = reporter

    @property
    def caches(self) -> dict[str, Cache]:
        """Return the caches by name."""
        return self._reader.caches

    def shutdown(self) -> None:
        """Stop reporting in this process; another worker may take over.

        A second call does nothing.
        """
        if self not in self._reporter.active:
            return
        self._reporter.active.remove(self)
        # Another instrumentation of this process may report the same cache.
        still = {name for other in _all_active() for name in other.caches}
        for name, cache in self.caches.items():
            if name not in still:
                _resign(cache)

    close = shutdown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def readings(self, taken: set[str]) -> Iterator[Reading]:
        """Read the caches for which this process is elected.

        Args:
            taken: Names of caches to be left out.  The names of the caches that are
                read are added to it.
        """
        for name, cache in self.caches.items():
            if name in taken or not _elected(cache):
                continue
            if self not in self._reporter.active:
                _resign(cache)  # another thread has just called shutdown()
                continue
            reading = self._reader.read(name)
            if reading is not None:
                taken.add(name)
                yield reading


def _elected(cache: Cache) -> bool:
    # Return whether this process holds the reporter's lock; take it if nobody does.
    # The answer for a closed cache is True, so that the reader logs why it is not
    # reported.
    return cache.closed or elected(cache.internals.attachment, Office.REPORTER)


def _resign(cache: Cache) -> None:
    if not cache.closed:
        resign(cache.internals.attachment, Office.REPORTER)


class _Round(threading.local):
    """A thread's collection: its readings, and the instruments that have used them."""

    def __init__(self) -> None:
        self.served: set[str] = set()
        self.readings: list[Reading] = []


class _Reporter:
    """The instruments of one meter; they report all active instrumentations."""

    def __init__(self, meter: Meter) -> None:
        self.active: list[Instrumentation] = []
        self._round = _Round()
        self._create(meter)

    def _readings(self, name: str) -> list[Reading]:
        # All instruments of one collection use the same readings.  If an instrument
        # asks a second time, the next collection has begun.
        current = self._round
        if not current.served or name in current.served:
            current.served = set()
            taken: set[str] = set()
            current.readings = [
                reading
                for instrumentation in list(self.active)
                for reading in instrumentation.readings(taken)
            ]
        current.served.add(name)
        return current.readings

    def _callbacks(self, name: str, observe: Any) -> list[Any]:
        def callback(_: CallbackOptions) -> list[Observation]:
            readings = self._readings(name)
            return [each for reading in readings for each in observe(reading)]

        return [callback]

    def _create(self, meter: Meter) -> None:
        info = self._callbacks("info", _facts)
        meter.create_observable_gauge("shmcache.info", info, "1", FACTS_TEXT)
        for measure in MEASURES:
            if not measure.otel:
                continue
            if measure.kind == "counter":
                create: Callable[..., object] = meter.create_observable_counter
            elif measure.additive:
                create = meter.create_observable_up_down_counter
            else:
                create = meter.create_observable_gauge
            callbacks = self._callbacks(measure.name, _numbers(measure))
            create(f"shmcache.{measure.otel}", callbacks, measure.unit, measure.text)
        for histogram in HISTOGRAMS:
            for part, unit, observe in _parts(histogram):
                name = f"shmcache.{histogram.otel}.{part}"
                meter.create_observable_counter(
                    name, self._callbacks(name, observe), unit, histogram.text
                )


def _facts(reading: Reading) -> list[Observation]:
    facts = {f"shmcache.{fact}": value for fact, value in reading.facts.items()}
    return [Observation(1, {"shmcache.cache": reading.name, **facts})]


def _numbers(measure: Measure) -> Callable[[Reading], list[Observation]]:
    def observe(reading: Reading) -> list[Observation]:
        cache = {"shmcache.cache": reading.name}
        return [
            Observation(
                number,
                {**cache, f"shmcache.{measure.label}": value} if value else cache,
            )
            for value, number in measure.values(reading)
        ]

    return observe


def _parts(
    histogram: Histogram,
) -> list[tuple[str, str, Callable[[Reading], list[Observation]]]]:
    def total(reading: Reading) -> list[Observation]:
        _, seconds = histogram.cumulative(reading.stats)
        return [Observation(seconds, {"shmcache.cache": reading.name})]

    def count(reading: Reading) -> list[Observation]:
        buckets, _ = histogram.cumulative(reading.stats)
        return [Observation(buckets[-1][1], {"shmcache.cache": reading.name})]

    def bucket(reading: Reading) -> list[Observation]:
        buckets, _ = histogram.cumulative(reading.stats)
        return [
            Observation(number, {"shmcache.cache": reading.name, "le": bound})
            for bound, number in buckets
        ]

    unit = histogram.unit
    return [("sum", "s", total), ("count", unit, count), ("bucket", unit, bucket)]


# This is the reporter of the global provider, whether that is set already or not.
_reporters: dict[None, _Reporter] = {}
_reporters_of: weakref.WeakKeyDictionary[MeterProvider, _Reporter] = (
    weakref.WeakKeyDictionary()
)


def _all_active() -> Iterator[Instrumentation]:
    for reporter in [*_reporters.values(), *_reporters_of.values()]:
        yield from reporter.active
