"""OpenTelemetry metrics of caches and handle maps, by one worker for the whole host.

Problem: each worker has its own SDK and exporter, and the counts are the host's: were
all to report them, a backend that sums over workers would show a multiple.

Mechanism: the workers elect a reporter by a kernel lock on a byte of the cache's lock
file (see _process/election.py).  The worker that has it reports the cache, and all
others observe nothing.  The kernel drops the lock when its holder dies, and the next
worker to collect gets it; so a takeover lasts one export interval at most.  The
election is held cache by cache.

Instruments follow the semantic conventions: namespaced names and attributes, units in
UCUM, no unit or "total" in a name.  What can be summed and may fall is an up-down
counter.  There is no observable histogram, so a distribution is three counters:
``.sum`` in seconds, ``.count``, and ``.bucket``, whose attribute ``le`` is an upper
bound, as in Prometheus: how many were not above it.

Reported are totals since the cache was created.  Exporters that ask for deltas get the
whole total as the first delta after a takeover: use cumulative temporality, which is
the default, for counters.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider

    from shmcache._observe.measures import Measured
    from shmcache.cache import Cache


def instrument(
    *caches: Measured, meter_provider: MeterProvider | None = None
) -> Instrumentation:
    """Report caches and maps through a meter provider; the global one by default.

    Call it in every worker: of those that did, one reports each cache, and another
    takes over when it ends.  ``shutdown()`` of what is returned ends it in this
    process; call that when the provider is shut down before the process ends, as this
    worker would stay elected otherwise.
    """
    found = registries(caches, "instrument")
    default = metrics.get_meter_provider()
    if meter_provider is None or meter_provider is default:
        reporter = _reporters.get(None)
        meter = metrics.get_meter("shmcache", _version())
    else:
        reporter = _reporters_of.get(meter_provider)
        meter = meter_provider.get_meter("shmcache", _version())
    if reporter is None:
        # A meter keeps the instruments, and the callbacks, that it was given first.
        reporter = _Reporter(meter)
        if meter_provider is None or meter_provider is default:
            _reporters[None] = reporter
        else:
            _reporters_of[meter_provider] = reporter
    instrumentation = Instrumentation(found, reporter)
    reporter.active.append(instrumentation)
    return instrumentation


def _version() -> str:
    from shmcache import __version__

    return __version__


class Instrumentation:
    """Caches that this process reports when it is elected, until ``shutdown()``."""

    def __init__(self, caches: dict[str, Cache], reporter: _Reporter) -> None:
        self._reader = Reader(caches, "an export")
        self._reporter = reporter

    def shutdown(self) -> None:
        """Report no more; another worker may take over.  Twice is fine."""
        if self not in self._reporter.active:
            return
        self._reporter.active.remove(self)
        for name, cache in self._reader.caches.items():
            if not any(name in other._reader.caches for other in _all_active()):
                _resign(cache)

    close = shutdown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _readings(self, taken: set[str]) -> Iterator[Reading]:
        # Of the caches that this process is to report, but those in ``taken``.
        for name, cache in self._reader.caches.items():
            if name in taken or not _elected(cache):
                continue
            if self not in self._reporter.active:
                _resign(cache)  # shut down meanwhile
                continue
            reading = self._reader.read(name)
            if reading is not None:
                taken.add(name)
                yield reading


def _elected(cache: Cache) -> bool:
    # Whether this process has the reporter's lock, now if not before.
    # A closed one is for the reader to complain of.
    return cache.closed or elected(cache._attachment, Office.REPORTER)


def _resign(cache: Cache) -> None:
    if not cache.closed:
        resign(cache._attachment, Office.REPORTER)


class _Round(threading.local):
    """One thread's collection: what it read, and for which instruments."""

    def __init__(self) -> None:
        self.served: set[str] = set()
        self.readings: list[Reading] = []


class _Reporter:
    """The instruments of one meter, which report whatever is active."""

    def __init__(self, meter: Meter) -> None:
        self.active: list[Instrumentation] = []
        self._round = _Round()
        self._create(meter)

    def _readings(self, name: str) -> list[Reading]:
        # All instruments of a collection tell of one moment; an instrument that asks
        # again begins the next one.
        current = self._round
        if not current.served or name in current.served:
            current.served = set()
            taken: set[str] = set()
            current.readings = [
                reading
                for instrumentation in list(self.active)
                for reading in instrumentation._readings(taken)
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


_reporters: dict[None, _Reporter] = {}  # of the global provider, set or yet to be set
_reporters_of: weakref.WeakKeyDictionary[MeterProvider, _Reporter] = (
    weakref.WeakKeyDictionary()
)


def _all_active() -> Iterator[Instrumentation]:
    for reporter in [*_reporters.values(), *_reporters_of.values()]:
        yield from reporter.active
