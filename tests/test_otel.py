from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TextIO

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    Gauge,
    InMemoryMetricReader,
    MetricsData,
    Sum,
)

from shmcache import Cache, HandleMap
from shmcache._observe.measures import HISTOGRAMS, MEASURES
from shmcache.otel import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Clock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm")

Points = dict[tuple[str, frozenset[tuple[str, Any]]], float]


@dataclass(frozen=True)
class Collected:
    """What one collection found: instruments by name, and all points."""

    instruments: dict[str, Any]
    points: Points

    def one(self, name: str, **attributes: str) -> float:
        """The value of the one point with this name and these attributes' values."""
        found = [
            value
            for (metric, has), value in self.points.items()
            if metric == f"shmcache.{name}"
            and set(attributes.values()) <= {value for _, value in has}
        ]
        assert len(found) == 1, f"{name} {attributes}: {found}"
        return found[0]


class Backend:
    """A meter provider of the SDK, with a reader that keeps what it collects."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.provider.shutdown()

    def collect(self) -> Collected:
        """What is reported now."""
        data = self.reader.get_metrics_data()
        instruments = {}
        points: Points = {}
        for metric in metrics(data):
            instruments[metric.name] = metric
            for point in metric.data.data_points:
                which = metric.name, frozenset(dict(point.attributes).items())
                assert which not in points
                points[which] = point.value
        return Collected(instruments, points)


def metrics(data: MetricsData | None) -> Iterator[Any]:
    """All metrics in what a reader has got."""
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            assert scope.scope.name == "shmcache"
            yield from scope.metrics


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A provider of this test's own."""
    with Backend() as found:
        yield found


# --- what is reported -----------------------------------------------------------


def test_values(
    make_cache: Callable[..., Cache], clock: Clock, backend: Backend
) -> None:
    """Each number is what happened."""
    cache = make_cache(max_entries=2, ttl=100, clock=clock)
    for key in "abc":
        cache[key] = key
        clock.advance(3)
    assert [cache.get(key) for key in "abc"] == [None, "b", "c"]
    clock.advance(200)
    assert cache.sweep() == 2
    with instrument(cache, meter_provider=backend.provider):
        found = backend.collect()
    expected = {
        "entries": 0,
        "entry_limit": 2,
        "hits": 2,
        "misses": 1,
        "sets": 3,
        "evictions_unread": 1,
        "cleanup.runs": 1,
        "cleanup.duration.count": 1,
        "memory.used": 0,
        "memory.capacity": cache.stats().bytes_capacity,
        "memory.segment": cache.stats().segment_bytes,
        "workers": 1,
        "eviction.age.count": 3,
        "lock.timeouts": 0,
        "recoveries": 0,
    }
    assert expected == {name: found.one(name) for name in expected}
    assert found.one("evictions", cause="expired") == 2
    assert found.one("evictions", cause="capacity") == 1
    ages = [("1.0", 0), ("10.0", 1), ("60.0", 1), ("600.0", 3), ("+Inf", 3)]
    assert ages == [(le, found.one("eviction.age.bucket", le=le)) for le, _ in ages]
    assert abs(found.one("eviction.age.sum") - (6 + 206 + 203)) < 1
    assert found.one("info", codec="msgpack") == 1


def test_conventions(
    make_cache: Callable[..., Cache], name: str, backend: Backend
) -> None:
    """Names are namespaced and say neither unit nor "total"; units are UCUM's; what
    may fall is no counter.
    """
    with HandleMap(name, max_entries=4) as handles:
        cache = make_cache()
        with instrument(cache, handles, meter_provider=backend.provider):
            found = backend.collect()
    named = re.compile(r"shmcache(\.[a-z][a-z0-9_]*)+")
    units = re.compile(r"1|s|By|\{[a-z]+\}")
    for metric in found.instruments.values():
        assert named.fullmatch(metric.name)
        assert not re.search(r"seconds|bytes|total", metric.name)
        assert units.fullmatch(metric.unit)
        assert metric.description
    for _, attributes in found.points:
        assert {key for key, _ in attributes if not named.fullmatch(key)} <= {"le"}

    def kind(name: str) -> str:
        data = found.instruments[f"shmcache.{name}"].data
        if isinstance(data, Gauge):
            return "gauge"
        assert isinstance(data, Sum)
        return "counter" if data.is_monotonic else "up-down counter"

    assert kind("hits") == kind("lock.wait.bucket") == "counter"
    assert (
        kind("entries") == kind("memory.used") == kind("handles") == ("up-down counter")
    )
    assert kind("age") == kind("info") == "gauge"
    units_of = {
        each: found.instruments[f"shmcache.{each}"].unit
        for each in ("entries", "memory.used", "lock.wait.sum", "age", "hits")
    }
    assert units_of == {
        "entries": "{entry}",
        "memory.used": "By",
        "lock.wait.sum": "s",
        "age": "s",
        "hits": "{hit}",
    }


def test_same_quantities_as_prometheus(
    make_cache: Callable[..., Cache], name: str, backend: Backend
) -> None:
    """Whatever a scrape tells is reported, too; evictions by cause in one counter."""
    with HandleMap(name, max_entries=4) as handles:
        cache = make_cache()
        with instrument(cache, handles, meter_provider=backend.provider):
            found = set(backend.collect().instruments)
    told = {measure.otel for measure in MEASURES}
    parts = ("sum", "count", "bucket")
    told |= {f"{each.otel}.{part}" for each in HISTOGRAMS for part in parts}
    assert found == {f"shmcache.{each}" for each in told | {"info"} if each}
    unnamed = {measure.name for measure in MEASURES if not measure.otel}
    assert unnamed == {"ttl_evictions", "lru_evictions"}


def test_handles(name: str, backend: Backend) -> None:
    """A map's handles are reported by state."""
    with (
        HandleMap(name, max_entries=4) as handles,
        instrument(handles, meter_provider=backend.provider),
    ):
        handles["a"] = object()
        found = backend.collect()
        assert found.one("handles", state="registered") == 1
        assert found.one("handles", state="closing") == 0
        assert found.one("handle.opens") == 1


def test_one_reading_a_collection(
    make_cache: Callable[..., Cache], backend: Backend
) -> None:
    """However many instruments there are, a collection reads a cache once, and the
    next collection reads it anew.
    """
    cache = make_cache()
    reads = 0

    def count(frame: Any, event: str, _: object) -> None:
        nonlocal reads
        reads += event == "call" and frame.f_code is Cache.stats.__code__

    with instrument(cache, meter_provider=backend.provider):
        sys.setprofile(count)
        try:
            first = backend.collect()
            cache["a"] = 1
            second = backend.collect()
        finally:
            sys.setprofile(None)
    assert [first.one("sets"), second.one("sets")] == [0, 1]
    assert reads == 2


def test_second_instrumentation(
    make_cache: Callable[..., Cache], backend: Backend
) -> None:
    """A cache that is instrumented twice counts once; another one is added; and what
    is shut down is reported no more.
    """
    cache, other = make_cache(), make_cache()
    cache["a"] = other["a"] = other["b"] = 1
    first = instrument(cache, meter_provider=backend.provider)
    second = instrument(cache, other, meter_provider=backend.provider)
    for _ in range(2):
        found = backend.collect()
        assert found.one("sets", cache=cache.name) == 1
        assert found.one("sets", cache=other.name) == 2
    second.shutdown()
    found = backend.collect()
    assert found.one("sets") == 1  # the first cache's alone
    first.shutdown()
    first.shutdown()
    assert backend.collect().points == {}


def test_two_providers(make_cache: Callable[..., Cache], backend: Backend) -> None:
    """Two backends of one process are both told."""
    cache = make_cache()
    cache["a"] = 1
    with (
        Backend() as other,
        instrument(cache, meter_provider=backend.provider),
        instrument(cache, meter_provider=other.provider) as last,
    ):
        assert backend.collect().one("sets") == 1
        assert other.collect().one("sets") == 1
        last.shutdown()
        assert backend.collect().one("sets") == 1
        assert other.collect().points == {}


def test_closed_cache_is_left_out(
    make_cache: Callable[..., Cache],
    backend: Backend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A closed cache does not keep the others from being reported."""
    closed, cache = make_cache(), make_cache()
    with instrument(closed, cache, meter_provider=backend.provider):
        closed.close()
        for _ in range(2):
            assert backend.collect().one("entries", cache=cache.name) == 0
    said = [getattr(record, "event", None) for record in caplog.records]
    assert said.count("not measured") == 1


def test_arguments_are_checked() -> None:
    """No cache, and what is none, are refused."""
    with pytest.raises(TypeError, match="at least"):
        instrument()
    with pytest.raises(TypeError, match="not 'a cache'"):
        instrument("a cache")  # type: ignore[arg-type]


GLOBAL = """
import sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from shmcache import Cache
from shmcache.otel import instrument

def entries():
    data = reader.get_metrics_data()
    found = [m for m in data.resource_metrics[0].scope_metrics[0].metrics
             if m.name == "shmcache.entries"]
    return [point.value for metric in found for point in metric.data.data_points]

first, second = Cache(sys.argv[1]), Cache(sys.argv[2])
first["a"] = second["a"] = second["b"] = 1
instrument(first)
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
instrument(second)
print(entries())
"""


@pytest.mark.once
def test_global_provider(new_name: Callable[[], str]) -> None:
    """The global provider is used by default, also when it is set only later."""
    run = subprocess.run(
        [sys.executable, "-c", GLOBAL, new_name(), new_name()],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == [1, 2]


@pytest.mark.once
def test_without_opentelemetry() -> None:
    """Where OpenTelemetry is not installed the error says what to install, and the
    rest of the package works.
    """
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import shmcache.prometheus, shmcache._observe.stats_log\n"
        "try:\n    import shmcache.otel\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "pip install 'shmcache[otel]'" in run.stdout


# --- several workers ------------------------------------------------------------


class Worker:
    """A forked process with an SDK of its own, which does what it is told."""

    def __init__(self, cache: Cache, *, backend: Backend | None = None) -> None:
        there, self._ask = os.pipe()
        answers, back = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._ask)
                self._serve(cache, backend, os.fdopen(there), os.fdopen(back, "w"))
            finally:
                os._exit(1)
        os.close(there)
        os.close(back)
        self._answers = os.fdopen(answers)

    def _serve(
        self, cache: Cache, backend: Backend | None, asked: TextIO, answers: TextIO
    ) -> None:
        if backend is None:
            backend = Backend()
            instrumentation = instrument(cache, meter_provider=backend.provider)
        for command in asked:
            answer: list[float] = []
            match command.strip():
                case "collect":
                    points = backend.collect().points.items()
                    answer = [n for (which, _), n in points if which == "shmcache.hits"]
                case "get":
                    cache.get("a")
                case "shutdown":
                    instrumentation.shutdown()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    def tell(self, command: str) -> list[float]:
        """What the process answers: the hits that it reports, if it was to collect."""
        os.write(self._ask, command.encode() + b"\n")
        found = json.loads(self._answers.readline())
        assert isinstance(found, list)
        return found

    def kill(self) -> None:
        """Kills it, unless it has gone."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._ask)
            self._answers.close()
            self.pid = 0


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    """A list for workers, which are killed at the end."""
    made: list[Worker] = []
    yield made
    for worker in made:
        worker.kill()


def test_one_worker_reports_for_all(
    make_cache: Callable[..., Cache], workers: list[Worker]
) -> None:
    """Of four workers one reports, and that the totals of all; when it is killed
    another does, with no count lost; until the last one.
    """
    cache = make_cache()
    cache["a"] = 1
    workers.extend(Worker(cache) for _ in range(4))
    for worker in workers:
        worker.tell("get")
    alive = list(workers)
    while alive:
        for _ in range(3):  # it stays the same one
            found = [worker.tell("collect") for worker in alive]
            reports = [hits for each in found for hits in each]
            assert reports == [4]
            assert found[0] == [4]
        alive.pop(0).kill()
        alive.reverse()
        found = [worker.tell("collect") for worker in alive]
        assert found == [[4]] * bool(alive) + [[]] * (len(alive) - 1)


def test_shutdown_hands_over(
    make_cache: Callable[..., Cache], workers: list[Worker]
) -> None:
    """A worker that shuts its instrumentation down lets another report at once."""
    cache = make_cache()
    cache["a"] = 1
    workers.extend(Worker(cache) for _ in range(2))
    first, second = workers
    assert [first.tell("collect"), second.tell("collect")] == [[0], []]
    first.tell("shutdown")
    assert [second.tell("collect"), first.tell("collect")] == [[0], []]


def test_closing_hands_over(
    make_cache: Callable[..., Cache], workers: list[Worker], backend: Backend
) -> None:
    """A worker that closes its cache lets another report."""
    cache = make_cache()
    cache["a"] = 1
    workers.append(Worker(cache))
    mine = instrument(cache, meter_provider=backend.provider)
    assert backend.collect().one("hits") == 0
    assert workers[0].tell("get") == []
    assert workers[0].tell("collect") == []
    cache.close()
    assert workers[0].tell("collect") == [1]
    mine.shutdown()
    make_cache(cache.name)  # somebody must remove it after the worker is killed


def test_instrumented_before_fork(
    make_cache: Callable[..., Cache], workers: list[Worker], backend: Backend
) -> None:
    """With the instrumentation inherited through fork, parent and children report
    once, and a child takes over.
    """
    cache = make_cache()
    cache["a"] = 1
    instrumentation = instrument(cache, meter_provider=backend.provider)
    assert backend.collect().one("hits") == 0
    workers.extend(Worker(cache, backend=backend) for _ in range(2))
    for worker in workers:
        worker.tell("get")
    first, second = workers
    assert [first.tell("collect"), second.tell("collect")] == [[], []]
    assert backend.collect().one("hits") == 2
    instrumentation.shutdown()
    assert [first.tell("collect"), second.tell("collect")] == [[2], []]
    first.kill()
    assert second.tell("collect") == [2]


def test_each_cache_has_its_reporter(
    make_cache: Callable[..., Cache], workers: list[Worker], backend: Backend
) -> None:
    """The election is held cache by cache: nobody reports for a worker that does not
    know the cache.
    """
    cache, other = make_cache(), make_cache()
    cache["a"] = other["b"] = 1
    workers.append(Worker(cache))
    assert workers[0].tell("collect") == [0]
    with instrument(cache, other, meter_provider=backend.provider):
        assert backend.collect().one("entries") == 1  # of the other alone
        assert backend.collect().one("entries", cache=other.name) == 1
