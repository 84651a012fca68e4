"""Requests under way: from a correlation id to this worker's live span.

Problem: a span is an object of one process, and whoever keeps spans by request id
keeps those of requests that never end; another worker, asked about a request, knows
nothing of it.

Mechanism: a ``HandleMap`` whose handles are the spans.  What all may know of one -
trace id, span id, start, the caller's own fields - is the value of its shared entry,
so it is there exactly as long as the span is registered: there is no second table that
could disagree.  Another worker finds it by asking for the id under each worker's token,
O(workers), however many correlations there are.

Whoever takes a span out of the map ends it: ``finish``, or after an eviction, once,
the callback, which writes the cause into the span before.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shmcache._arguments import check_count, check_flag, ttl_to_ns
from shmcache._component import Component
from shmcache._format import layout as L
from shmcache.errors import ShmCacheError
from shmcache.handles import HandleMap, HandleStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._arguments import Ttl
    from shmcache._format.layout import Cause

# The attribute that an evicted span is given: the cause's name, such as "EXPIRED".
EVICTED = "shmcache.evicted"


@dataclass(frozen=True)
class CorrelationSettings:
    """Bounds of the correlations of a host; times in seconds.

    - ``max_correlations``: live spans of all workers together.
    - ``correlation_ttl``: how long a correlation may go unused.
    - ``cleanup_interval``: from sweep to sweep in each worker.
    - ``enable_metrics``: whether ``shmcache.report()`` includes it.  ``stats()``, and
      collectors given the map, always work.
    """

    max_correlations: int = 10_000
    correlation_ttl: float = 3600.0
    cleanup_interval: float = 300.0
    enable_metrics: bool = True

    def __post_init__(self) -> None:
        hint = "it is how many live spans all workers may have together"
        check_count(self.max_correlations, "max_correlations", 1, L.MAX_INDEX, hint)
        ttl_to_ns(self.correlation_ttl, "correlation_ttl")
        ttl_to_ns(self.cleanup_interval, "cleanup_interval")
        check_flag(self.enable_metrics, "enable_metrics")

    @classmethod
    def conservative(cls) -> CorrelationSettings:
        """For small hosts: 5,000 correlations, up to 30 min, looked at every 5 min."""
        return cls(5_000, 1800.0, 300.0)

    @classmethod
    def high_throughput(cls) -> CorrelationSettings:
        """For busy hosts: 50,000 correlations, up to 2 h, looked at every 2 min."""
        return cls(50_000, 7200.0, 120.0)


@dataclass(frozen=True)
class CorrelationStats:
    """Counts of a correlation map: the host's and this worker's."""

    spans: HandleStats

    @property
    def started(self) -> int:
        """Correlations since the start, over all workers, gone ones included."""
        return self.spans.host.handles_opened

    @property
    def ended(self) -> int:
        """Those whose span was finished, or ended after eviction, over all workers."""
        return self.spans.host.handles_closed


@dataclass(frozen=True)
class Correlation:
    """What every worker of the host may know of a request under way."""

    id: Any
    pid: int  # of the worker that has the span
    trace_id: str  # 32 hexadecimal digits, as in a traceparent header; "" without
    span_id: str  # 16 hexadecimal digits; "" without
    started: float  # seconds since 1970
    fields: dict[str, Any] = field(default_factory=dict)


class CorrelationMap(Component):
    """From request id to this worker's live span; its data is for all workers to read.

    - ``name``: of the shared map, the same in all workers.
    - ``settings``: a ``CorrelationSettings``, the same in all workers.
    - ``tracer``: starts the spans that ``start`` is given a name for; left out,
      OpenTelemetry's tracer "shmcache".
    - ``max_bytes``: room for the shared data; default: 512 bytes a correlation.
    - ``callback_threads``, ``lock_timeout``, ``clock``: as of ``HandleMap``.

    A span is any object with ``end()`` and ``set_attribute(name, value)``, such as
    OpenTelemetry's.  An id is any key of a ``Cache``.  An evicted span is given the
    attribute ``shmcache.evicted`` (EXPIRED, CAPACITY, REPLACED, CLEARED, CLOSED) and
    ended.  Raises what ``HandleMap`` raises.
    """

    def __init__(
        self,
        name: str = "correlations",
        *,
        settings: CorrelationSettings | None = None,
        tracer: Any = None,
        max_bytes: int | str | None = None,
        callback_threads: int = 2,
        lock_timeout: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        settings = CorrelationSettings() if settings is None else settings
        if not isinstance(settings, CorrelationSettings):
            raise TypeError(
                f"settings must be CorrelationSettings, not {settings!r}; for example"
                " CorrelationSettings.conservative()"
            )
        if tracer is not None and not callable(getattr(tracer, "start_span", None)):
            raise TypeError(
                f"tracer must have start_span(name), as OpenTelemetry's, not {tracer!r}"
            )
        made_by = functools.partial(
            CorrelationMap,
            name,
            settings=settings,
            tracer=tracer,
            max_bytes=max_bytes,
            callback_threads=callback_threads,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        super().__init__(name, settings.enable_metrics, made_by)
        self.settings = settings
        self._tracer = tracer
        self._registered = 0  # the PID of the process that ends its spans at exit
        self._map = HandleMap(
            name,
            max_entries=settings.max_correlations,
            ttl=settings.correlation_ttl,
            sliding=True,
            cleanup_interval=settings.cleanup_interval,
            max_bytes=max_bytes,
            on_evict=_end_evicted,
            callback_threads=callback_threads,
            lock_timeout=lock_timeout,
            clock=clock,
        )
        self._opened({"spans": self._map})

    def start(
        self,
        correlation_id: Any,
        span: Any,
        *,
        fields: Mapping[str, Any] | None = None,
        ttl: Ttl = ...,
    ) -> Any:
        """Register a live span, or a name to start one with; the span.

        ``fields``: what else all workers may read; values as a ``Cache`` takes them.
        ``ttl``: seconds; left out, the settings'.  A former span of the id in this
        worker is ended (REPLACED).  When this raises, nothing is registered; a span
        given is the caller's to end, one started here has been ended.
        """
        shown = _checked(fields)
        if not isinstance(span, str):
            return self._register(correlation_id, _require_span(span), shown, ttl)
        started = _require_span(self._tracer_or_default().start_span(span))
        try:
            return self._register(correlation_id, started, shown, ttl)
        except BaseException:
            started.end()
            raise

    def get(self, correlation_id: Any, default: Any = None) -> Any:
        """This worker's live span of an id, or ``default``.  A use.  O(1)."""
        return self._map.get(correlation_id, default)

    def lease(self, correlation_id: Any) -> AbstractContextManager[Any]:
        """This worker's span for a with block: it is not ended before the block is.

        KeyError when there is none.
        """
        return self._map.lease(correlation_id)

    def finish(
        self, correlation_id: Any, attributes: Mapping[str, Any] | None = None
    ) -> bool:
        """Give this worker's span its last attributes, and end it.

        False when there is none any more: it was evicted, and ended then.
        """
        last = _checked(attributes, "attributes")
        span = self._map.pop(correlation_id, None)
        if span is None:
            return False
        try:
            for name, value in last.items():
                span.set_attribute(name, value)
        finally:
            span.end()
        return True

    def find(self, correlation_id: Any) -> Correlation | None:
        """What is known of an id, whichever worker has its span; not a use.

        Of several workers' the one started last.  O(workers).
        """
        found = self.find_all(correlation_id)
        return max(found, key=lambda c: c.started, default=None)

    def find_all(self, correlation_id: Any) -> list[Correlation]:
        """What is known of an id in each worker that has a span of it.  O(workers)."""
        return [
            _correlation(correlation_id, pid, value)
            for pid, value in self._map.owners(correlation_id)
        ]

    def host(self) -> list[Correlation]:
        """All correlations of all workers, in no order; no use of them.  O(entries)."""
        return [_correlation(e.key, e.pid, e.value) for e in self._map.host()]

    def clear(self) -> int:
        """End all spans of all workers (CLEARED); how many."""
        return self._map.clear()

    def __contains__(self, correlation_id: Any) -> bool:
        """Whether this worker has a live span of an id; not a use."""
        return correlation_id in self._map

    def __len__(self) -> int:
        """How many live spans this worker has."""
        return len(self._map)

    def __bool__(self) -> bool:
        """True: without spans it is not nothing."""
        return True

    def stats(self) -> CorrelationStats:
        """Counts of the host and of this worker.  O(shards + workers + own spans)."""
        return CorrelationStats(spans=self._map.stats())

    def _register(
        self, correlation_id: Any, span: Any, fields: dict[str, Any], ttl: Ttl
    ) -> Any:
        if self._registered != os.getpid():
            self._registered = os.getpid()
            # Spans that a process leaves open, even by dropping the map, are ended
            # before its tracer provider shuts down: of what was registered, the last
            # goes first, and a provider is there before its first span.
            atexit.register(self._close_at_exit)
        trace_id = span_id = ""
        context = getattr(span, "get_span_context", None)
        if callable(context):
            known = context()
            trace_id = f"{known.trace_id:032x}"
            span_id = f"{known.span_id:016x}"
        ns = getattr(span, "start_time", None)
        started = ns / 1e9 if isinstance(ns, int) else time.time()
        value = (trace_id, span_id, started, fields)
        self._map.set(correlation_id, span, value=value, ttl=ttl)
        return span

    def close(self, timeout: float = 10.0) -> bool:
        """End this worker's spans (CLOSED), and leave the map.

        Waits for callbacks up to ``timeout`` seconds; whether all of them ended.  At
        the end of a process this is done by itself.
        """
        if self._registered == os.getpid():
            atexit.unregister(self._close_at_exit)
        return super().close(timeout)

    def _close_at_exit(self) -> None:
        # Not in a child that was forked, and inherits what is to be done at exit.
        if self._registered == os.getpid():
            self._registered = 0
            with suppress(ShmCacheError):  # what is left is closed with the segment
                self.close()

    def _tracer_or_default(self) -> Any:
        if self._tracer is not None:
            return self._tracer
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise ImportError(
                "to start a span by name takes OpenTelemetry, which is not installed:"
                " pip install 'shmcache[otel]', or give CorrelationMap a tracer, or"
                " start() a span"
            ) from error
        return trace.get_tracer("shmcache")


def _end_evicted(_: Any, span: Any, cause: Cause) -> None:
    try:
        span.set_attribute(EVICTED, cause.name)
    finally:
        span.end()


def _correlation(correlation_id: Any, pid: int, value: Any) -> Correlation:
    trace_id, span_id, started, fields = value
    return Correlation(correlation_id, pid, trace_id, span_id, started, fields)


def _require_span(span: Any) -> Any:
    for method in ("end", "set_attribute"):
        if not callable(getattr(span, method, None)):
            raise TypeError(
                f"a span must have end() and set_attribute(name, value), and {span!r}"
                f" has no {method}; give a span, or a name to start one with"
            )
    return span


def _checked(fields: Any, what: str = "fields") -> dict[str, Any]:
    if fields is None:
        return {}
    if not isinstance(fields, Mapping) or not all(isinstance(f, str) for f in fields):
        raise TypeError(f"{what} must be a mapping with str keys, not {fields!r}")
    return dict(fields)
