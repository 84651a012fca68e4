"""Correlations: every span is ended once, and its data is there for all workers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from worker_app import Worker, until

from shmcache import HandleMap, UnsupportedValue
from shmcache.correlations import Correlation, CorrelationMap, CorrelationSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Span:
    """The least that a span has to be."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.ends = 0

    def set_attribute(self, name: str, value: Any) -> None:
        """Keep it."""
        self.attributes[name] = value

    def end(self) -> None:
        """Count."""
        self.ends += 1


@pytest.fixture
def make_map(new_name: Callable[[], str]) -> Iterator[Callable[..., CorrelationMap]]:
    """A factory of CorrelationMaps that are closed after the test."""
    made: list[CorrelationMap] = []

    def make(**more: Any) -> CorrelationMap:
        made.append(CorrelationMap(new_name(), **more))
        return made[-1]

    yield make
    for correlations in made:
        assert correlations.close()


# --- settings -----------------------------------------------------------------------


def test_settings_are_those_promised() -> None:
    """Defaults and presets have the values that users know."""
    assert (10_000, 3600.0, 300.0, True) == astuple(CorrelationSettings())
    conservative = CorrelationSettings.conservative()
    assert (5_000, 1800.0, 300.0, True) == astuple(conservative)
    high = CorrelationSettings.high_throughput()
    assert (50_000, 7200.0, 120.0, True) == astuple(high)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("max_correlations", 0, ValueError),
        ("max_correlations", 2.0, TypeError),
        ("correlation_ttl", 0.0, ValueError),
        ("correlation_ttl", None, TypeError),
        ("cleanup_interval", -5, ValueError),
        ("cleanup_interval", "5", TypeError),
        ("enable_metrics", None, TypeError),
    ],
)
def test_settings_are_validated(field: str, value: Any, error: type[Exception]) -> None:
    """A setting that makes no sense is refused by its name."""
    with pytest.raises(error, match=field):
        CorrelationSettings(**{field: value})


# --- one process --------------------------------------------------------------------


def test_start_get_finish(make_map: Callable[..., CorrelationMap]) -> None:
    """A span is found by its id until it is finished, and then ended once."""
    correlations = make_map()
    span = Span()
    assert correlations.start("r1", span, fields={"user": "u7"}) is span
    assert correlations.get("r1") is span
    assert "r1" in correlations
    assert correlations.finish("r1", {"status": 200})
    assert ({"status": 200}, 1) == (span.attributes, span.ends)
    assert correlations.get("r1") is None
    assert correlations.find("r1") is None
    assert not correlations.finish("r1")
    counts = correlations.stats()
    assert (1, 1) == (counts.started, counts.ended)


def test_what_is_known_of_a_request(make_map: Callable[..., CorrelationMap]) -> None:
    """``find`` and ``host`` give trace id, span id, start and the caller's fields."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    correlations = make_map()
    before = time.time()
    span = sdk.TracerProvider().get_tracer("test").start_span("request")
    fields = {"path": "/orders", "items": [1, 2], "user": None}
    correlations.start(("tenant", 7), span, fields=fields)
    context = span.get_span_context()
    expected = Correlation(
        id=("tenant", 7),
        pid=os.getpid(),
        trace_id=format(context.trace_id, "032x"),
        span_id=format(context.span_id, "016x"),
        started=span.start_time / 1e9,
        fields=fields,
    )
    assert expected == correlations.find(("tenant", 7))
    assert [expected] == correlations.host()
    assert before <= expected.started <= time.time()
    correlations.finish(("tenant", 7))


def test_a_span_by_name_takes_opentelemetry(
    make_map: Callable[..., CorrelationMap],
) -> None:
    """A name in place of a span has OpenTelemetry start one."""
    pytest.importorskip("opentelemetry.trace")
    correlations = make_map()
    span = correlations.start("r1", "GET /orders")
    assert correlations.get("r1") is span
    assert correlations.finish("r1")


def test_without_opentelemetry(
    make_map: Callable[..., CorrelationMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package a name is refused with a remedy, and any span will do."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    correlations = make_map()
    with pytest.raises(ImportError, match=r"shmcache\[otel\]"):
        correlations.start("r1", "GET /orders")
    correlations.start("r1", Span())
    assert correlations.finish("r1")


@pytest.mark.parametrize(
    ("cause", "act"),
    [
        ("CAPACITY", lambda c, _: [c.start(n, Span()) for n in range(3)]),
        ("EXPIRED", lambda c, clock: (clock.advance(3601), c.sweep())),
        ("CLEARED", lambda c, _: c.clear()),
        ("REPLACED", lambda c, _: c.start("r1", Span())),
        ("CLOSED", lambda c, _: c.close()),
    ],
)
def test_evicted_span_says_why(
    make_map: Callable[..., CorrelationMap], clock: Any, cause: str, act: Any
) -> None:
    """An evicted span is given the cause as an attribute, and ended once."""
    settings = CorrelationSettings(max_correlations=3)
    correlations = make_map(settings=settings, clock=clock)
    span = Span()
    correlations.start("r1", span)
    act(correlations, clock)
    until("ended", lambda: span.ends)
    assert ({"shmcache.evicted": cause}, 1) == (span.attributes, span.ends)
    assert correlations.close()
    assert 1 == span.ends


def test_leased_span_is_not_ended(make_map: Callable[..., CorrelationMap]) -> None:
    """A span evicted inside its lease is ended when the lease is."""
    correlations = make_map()
    span = Span()
    correlations.start("r1", span)
    with correlations.lease("r1") as leased:
        assert leased is span
        correlations.clear()
        other = Span()
        correlations.start("r2", other)
        correlations.clear()
        until("the other is ended", lambda: other.ends)
        assert 0 == span.ends
    until("ended", lambda: span.ends)
    assert 1 == span.ends


class _Broken(Span):
    def set_attribute(self, name: str, value: Any) -> None:
        """Fail, as a backend may."""
        raise OSError("no backend")


def test_span_is_ended_whatever_its_attributes_raise(
    make_map: Callable[..., CorrelationMap],
) -> None:
    """A span that takes no attribute is ended all the same, once."""
    correlations = make_map()
    evicted, finished = _Broken(), _Broken()
    correlations.start("a", evicted)
    correlations.start("b", finished)
    with pytest.raises(OSError, match="no backend"):
        correlations.finish("b", {"status": 200})
    correlations.clear()
    until("both are ended", lambda: evicted.ends and finished.ends)
    assert (1, 1) == (evicted.ends, finished.ends)


def test_bad_input_changes_nothing(
    make_map: Callable[..., CorrelationMap], name: str
) -> None:
    """Wrong arguments are refused; the span is the caller's, and others stay."""
    correlations = make_map()
    kept, refused = Span(), Span()
    correlations.start("kept", kept)
    for bad in (None, object(), 5):
        with pytest.raises(TypeError, match="a span must have"):
            correlations.start("a", bad)
    with pytest.raises(TypeError, match="fields must be a mapping"):
        correlations.start("a", refused, fields=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fields must be a mapping"):
        correlations.start("a", refused, fields={1: 2})  # type: ignore[dict-item]
    with pytest.raises(UnsupportedValue):
        correlations.start("kept", refused, fields={"x": object()})
    with pytest.raises(TypeError, match="key"):
        correlations.start(["a"], refused)
    with pytest.raises(TypeError, match="attributes must be a mapping"):
        correlations.finish("kept", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tracer"):
        CorrelationMap(name, tracer=5)
    with pytest.raises(TypeError, match="CorrelationSettings"):
        CorrelationMap(name, settings=5)  # type: ignore[arg-type]
    with pytest.raises(KeyError), correlations.lease("a"):
        pass
    assert 0 == refused.ends
    assert ["kept"] == [c.id for c in correlations.host()]
    assert correlations.get("kept") is kept
    assert 0 == kept.ends


def test_a_span_started_for_nothing_is_ended(
    make_map: Callable[..., CorrelationMap],
) -> None:
    """When a span that ``start`` made cannot be registered, it does not stay open."""
    made: list[Span] = []

    class Tracer:
        def start_span(self, _: str) -> Span:
            """Keep it."""
            made.append(Span())
            return made[-1]

    correlations = make_map(tracer=Tracer())
    with pytest.raises(UnsupportedValue):
        correlations.start("a", "request", fields={"x": object()})
    assert [1] == [span.ends for span in made]
    assert correlations.host() == []


def test_parts_and_pickle(make_map: Callable[..., CorrelationMap]) -> None:
    """``parts()`` names the shared map, and a pickled copy is on the same one."""
    correlations = make_map()
    parts = correlations.parts()
    assert ["spans"] == list(parts)
    assert isinstance(parts["spans"], HandleMap)
    correlations.start("a", Span(), fields={"x": 1})
    with pickle.loads(pickle.dumps(correlations)) as copy:
        assert copy.find("a") == correlations.find("a")


# --- several processes, OpenTelemetry's SDK -----------------------------------------


@contextmanager
def workers(name: str, count: int, bound: int) -> Iterator[list[Worker]]:
    """So many processes with one map and an exporter each."""
    pytest.importorskip("opentelemetry.sdk.trace")
    import correlations_app as app

    with ExitStack() as stack:
        found = [stack.enter_context(Worker()) for _ in range(count)]
        for worker in found:
            settings = CorrelationSettings(max_correlations=bound)
            worker.call(app.open_map, name, settings)
        yield found


def test_every_worker_can_read_a_request(name: str) -> None:
    """What one worker starts, another finds, with its fields, until it is finished;
    the live span is its own worker's only."""
    with workers(name, 2, 100) as (one, two):
        import correlations_app as app

        fields = {"user": "u7", "path": "/orders"}
        trace_id, span_id = one.call(app.start, "r1", fields)
        found = two.call(app.find, "r1")
        assert (one.pid, trace_id, span_id, fields) == (
            *(found.pid, found.trace_id, found.span_id, found.fields),
        )
        assert not two.call(app.has, "r1")
        assert not two.call(app.finish, "r1")
        assert one.call(app.finish, "r1")
        assert two.call(app.find, "r1") is None
        # The same id in both: of each its own, and the later one is found.
        one.call(app.start, "r2", {"in": 1})
        two.call(app.start, "r2", {"in": 2})
        assert {"in": 2} == one.call(app.find, "r2").fields
        assert two.call(app.finish, "r2")
        assert {"in": 1} == two.call(app.find, "r2").fields


def test_requests_of_a_killed_worker_are_found_no_more(name: str) -> None:
    """A killed worker's requests are not taken for live ones, at once."""
    with workers(name, 2, 100) as (one, two):
        import correlations_app as app

        one.call(app.start, "r1", {})
        assert one.pid == two.call(app.find, "r1").pid
        one.kill()
        assert two.call(app.find, "r1") is None


def test_another_worker_evicts(name: str) -> None:
    """The oldest span of the host makes room for another worker's, ends in its own,
    and says CAPACITY; so with CLEARED."""
    with workers(name, 2, 3) as (one, two):
        import correlations_app as app

        spans = [one.call(app.start, f"a{n}", {})[1] for n in range(3)]
        two.call(app.start, "b", {})
        until("ended", lambda: one.call(app.ended))
        assert {spans[0]: ["CAPACITY"]} == one.call(app.ended)
        assert 3 == two.call(app.clear)
        until("all ended", lambda: len(one.call(app.ended)) == 3)
        assert {
            spans[0]: ["CAPACITY"],
            spans[1]: ["CLEARED"],
            spans[2]: ["CLEARED"],
        } == one.call(app.ended)


def test_every_span_is_ended_once(name: str) -> None:
    """After a storm of starts, evictions, clears, forks and a kill, each span of each
    living worker was exported once: finished, or with the cause of its eviction."""
    with workers(name, 3, 60) as (*living, doomed):
        import correlations_app as app

        for seed, worker in enumerate([*living, doomed]):
            worker.send(app.storm, seed, 1_000_000 if worker is doomed else 400)
        for worker in living:
            worker.receive()
        doomed.kill()
        for worker in living:
            started, ended = worker.call(app.close)
            assert len(started) >= 400
            assert dict.fromkeys(started, 1) == {
                span: len(causes) for span, causes in ended.items()
            }
            causes = {cause for (cause,) in ended.values()}
            assert {None, "CAPACITY"} <= causes


@pytest.mark.once
def test_spans_are_exported_at_exit(name: str) -> None:
    """Spans under way when a process exits, the map having been dropped, are ended
    before the tracer provider is shut down, so none is lost."""
    pytest.importorskip("opentelemetry.sdk.trace")
    script = Path(__file__).with_name("apps") / "correlations_app.py"
    done = subprocess.run(
        [sys.executable, str(script), name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert [
        [f"request {n}", {"shmcache.evicted": "CLOSED"}] for n in range(3)
    ] == sorted(json.loads(line) for line in done.stdout.splitlines())
