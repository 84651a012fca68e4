"""``CorrelationMap`` with OpenTelemetry: one worker sees a request of another worker.

python examples/correlations_otel.py
"""

from __future__ import annotations

import multiprocessing

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from shmcache.correlations import CorrelationMap, CorrelationSettings


def ask(name: str) -> None:
    """Print what another worker of the host knows about a request."""
    correlations = CorrelationMap(name, settings=CorrelationSettings.conservative())
    found = correlations.find("req-1")
    if found is not None:
        print("other worker:", found.trace_id, found.fields, flush=True)


def main() -> None:
    """Start two requests, of which one is never finished."""
    provider = TracerProvider()
    provider.add_span_processor(
        SimpleSpanProcessor(
            ConsoleSpanExporter(
                formatter=lambda s: f"ended: {s.name} {dict(s.attributes or {})}\n"
            )
        )
    )
    trace.set_tracer_provider(provider)

    correlations = CorrelationMap(
        "example-correlations", settings=CorrelationSettings.conservative()
    )
    correlations.start("req-1", "GET /orders", fields={"user": "u7"})
    correlations.start("req-2", "GET /never-ends", fields={"user": "u8"})

    other = multiprocessing.get_context("spawn").Process(
        target=ask, args=(correlations.name,)
    )
    other.start()
    other.join()

    correlations.finish("req-1", {"http.status_code": 200})
    correlations.close()  # ends the request that is still open, and logs that


if __name__ == "__main__":
    main()
