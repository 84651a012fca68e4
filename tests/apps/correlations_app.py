"""What worker processes do with correlations: spans of the OpenTelemetry SDK."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shmcache.correlations import Correlation, CorrelationMap, CorrelationSettings

_here: dict[str, Any] = {}


def open_map(name: str, settings: CorrelationSettings) -> None:
    """Open the map as a worker does when it starts, with an exporter of its own."""
    _here["exporter"] = exporter = InMemorySpanExporter()
    _here["provider"] = provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    _here["tracer"] = provider.get_tracer("test")
    _here["map"] = CorrelationMap(name, settings=settings, tracer=_here["tracer"])
    _here["started"] = []
    _here["finished"] = []


def start(correlation_id: Any, fields: dict[str, Any]) -> tuple[str, str]:
    """Start a request; its trace id and span id."""
    span = _here["map"].start(correlation_id, "request", fields=fields)
    _here["started"].append(format(span.get_span_context().span_id, "016x"))
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def finish(correlation_id: Any) -> bool:
    """Finish a request; whether this worker had it."""
    return bool(_here["map"].finish(correlation_id, {"status": 200}))


def find(correlation_id: Any) -> Correlation | None:
    """What this worker can tell of a request."""
    found: Correlation | None = _here["map"].find(correlation_id)
    return found


def clear() -> int:
    """End all spans of the host."""
    return int(_here["map"].clear())


def has(correlation_id: Any) -> bool:
    """Whether this worker has the live span."""
    return _here["map"].get(correlation_id) is not None


def ended() -> dict[str, list[str | None]]:
    """The exported spans: span id -> the causes with which it was ended."""
    result: dict[str, list[str | None]] = {}
    for span in _here["exporter"].get_finished_spans():
        cause = (span.attributes or {}).get("shmcache.evicted")
        if cause is None:
            assert (span.attributes or {}).get("status") == 200, span.to_json()
        result.setdefault(format(span.context.span_id, "016x"), []).append(cause)
    return result


def storm(seed: int, rounds: int) -> None:
    """Start and finish requests at random; some never end, some share an id."""
    rng = random.Random(seed)
    correlations = _here["map"]
    for n in range(rounds):
        start(f"{os.getpid()}-{rng.randrange(200)}", {"n": n})
        if rng.random() < 0.6:
            correlations.finish(f"{os.getpid()}-{rng.randrange(200)}", {"status": 200})
        if rng.random() < 0.01:
            correlations.clear()
        if n % 100 == 50:
            _fork(correlations, rng)


def _fork(correlations: CorrelationMap, rng: random.Random) -> None:
    # A child that inherits live spans; it ends its own, and none of its parent's.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            exporter = _here["exporter"]
            exporter.clear()
            own = [start(f"child-{n}", {})[1] for n in range(5)]
            if rng.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            correlations.close()
            ends = {span: len(causes) for span, causes in ended().items()}
            status = 0 if dict.fromkeys(own, 1) == ends else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in {0, -signal.SIGKILL}, status


def close() -> tuple[list[str], dict[str, list[str | None]]]:
    """Close the map; the spans started, and those exported with their causes."""
    assert _here["map"].close(60)
    return _here["started"], ended()


class _Printer(SpanExporter):
    """Prints spans, until it is shut down."""

    def export(self, spans: Any) -> SpanExportResult:
        """Print each as a line."""
        for span in spans:
            print(json.dumps([span.name, dict(span.attributes or {})]), flush=True)
        return SpanExportResult.SUCCESS


def leave_spans_open(name: str) -> None:
    """A worker that exits with spans under way, and closes nothing itself."""
    correlations = CorrelationMap(name)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_Printer()))
    tracer = provider.get_tracer("test")
    for n in range(3):
        correlations.start(n, tracer.start_span(f"request {n}"))


if __name__ == "__main__":
    leave_spans_open(sys.argv[1])
