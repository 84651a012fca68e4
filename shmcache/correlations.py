"""Requests under way: from a correlation id to this worker's live span.

Problem: a span is an object of one process.  A worker that keeps spans by request id
also keeps those of requests that never end, and other workers know nothing about them.

Mechanism: the spans are the handles of a ``HandleMap``.  The data of a span that all
workers may read (trace id, span id, start, the caller's own fields) is the value of its
shared entry, so it is there exactly as long as the span is registered, and there is no
second table that could disagree.  Another worker finds it by asking for the id under
each worker's token, which is O(workers), however many correlations there are.

A span is ended once, by the call that takes it out of the map: by ``finish``, or after
an eviction by the callback, which first writes the cause into the span.
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

# This attribute of an evicted span has the name of the cause, such as "EXPIRED".
EVICTED = "shmcache.evicted"


@dataclass(frozen=True)
class CorrelationSettings:
    """Bounds of the correlations of a host; times in seconds.

    Args:
        max_correlations: The largest number of live spans of all workers together.
        correlation_ttl: How long a correlation may go unused.
        cleanup_interval: The time from sweep to sweep in each worker.
        enable_metrics: Whether ``shmcache.report()`` includes the map.  ``stats()``,
            and collectors given the map, always work.
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
        """Return bounds for small hosts.

        5,000 correlations may go unused for 30 min, and are swept every 5 min.
        """
        return cls(5_000, 1800.0, 300.0)

    @classmethod
    def high_throughput(cls) -> CorrelationSettings:
        """Return bounds for busy hosts.

        50,000 correlations may go unused for 2 h, and are swept every 2 min.
        """
        return cls(50_000, 7200.0, 120.0)


@dataclass(frozen=True)
class CorrelationStats:
    """Counts of a correlation map, of the host and of this worker.

    Attributes:
        spans: The counts of the handle map with the spans.
    """

    spans: HandleStats

    @property
    def started(self) -> int:
        """Return how many correlations all workers have started, also ended ones."""
        return self.spans.host.handles_opened

    @property
    def ended(self) -> int:
        """Return how many spans all workers have ended."""
        return self.spans.host.handles_closed


@dataclass(frozen=True)
class Correlation:
    """The data of a request under way that every worker of the host may read.

    Attributes:
        id: The correlation id.
        pid: The process id of the worker that has the span.
        trace_id: 32 hexadecimal digits, as in a traceparent header; "" if the span has
            no context.
        span_id: 16 hexadecimal digits; "" if the span has no context.
        started: The start of the span, in seconds since 1970.
        fields: The fields that the caller of ``start`` has published.
    """

    id: Any
    pid: int
    trace_id: str
    span_id: str
    started: float
    fields: dict[str, Any] = field(default_factory=dict)


class CorrelationMap(Component):
    """A map from request id to this worker's live span; all workers read its data.

    A span is any object with ``end()`` and ``set_attribute(name, value)``, such as
    OpenTelemetry's.  An id is any key of a ``Cache``.  An evicted span is given the
    attribute ``shmcache.evicted`` (EXPIRED, CAPACITY, REPLACED, CLEARED, CLOSED) and
    ended.

    Args:
        name: The name of the shared map, the same in all workers.
        settings: The bounds, the same in all workers.
        tracer: Starts a span if ``start`` is given a name.  If left out, it is
            OpenTelemetry's tracer "shmcache".
        max_bytes: Room for the shared data, in bytes or as a text such as "64 MiB".
            The default is 512 bytes a correlation.
        callback_threads: How many spans may be ended at once in a worker.
        lock_timeout: As for ``HandleMap``.
        clock: As for ``HandleMap``.

    Raises:
        ShmCacheError: For the same reasons as ``HandleMap``.
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of bounds.
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
        """Register a live span, or start one.

        A former span of the id in this worker is ended (REPLACED).  If this raises,
        nothing is registered; the caller ends a span that it gave, and a span that was
        started here has been ended.

        Args:
            correlation_id: Any key of a ``Cache``.
            span: The span, or the name of a span to start.
            fields: Further data that all workers may read; its values are any that a
                ``Cache`` can store.
            ttl: Seconds to live.  None means for ever; if left out, the settings apply.

        Returns:
            The span.

        Raises:
            TypeError: The span has no ``end()`` or ``set_attribute()``.
            ImportError: A name was given without a tracer, and OpenTelemetry is not
                installed.
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
        """Return this worker's live span of an id, or ``default``; a use.  O(1)."""
        return self._map.get(correlation_id, default)

    def lease(self, correlation_id: Any) -> AbstractContextManager[Any]:
        """Yield this worker's span of an id, which is not ended before the block ends.

        Raises:
            KeyError: This worker has no span of the id.
        """
        return self._map.lease(correlation_id)

    def finish(
        self, correlation_id: Any, attributes: Mapping[str, Any] | None = None
    ) -> bool:
        """Give this worker's span its last attributes, and end it.

        Args:
            correlation_id: The id.
            attributes: The last attributes, by name.

        Returns:
            False if there is no span any more because it was evicted and ended.
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
        """Return what is known of an id, whichever worker has its span; not a use.

        O(workers).  If several workers have a span of the id, the one that was started
        last is returned; if none has, None.
        """
        found = self.find_all(correlation_id)
        return max(found, key=lambda c: c.started, default=None)

    def find_all(self, correlation_id: Any) -> list[Correlation]:
        """Return what each worker that has a span of an id knows of it.  O(workers)."""
        return [
            _correlation(correlation_id, pid, value)
            for pid, value in self._map.owners(correlation_id)
        ]

    def host(self) -> list[Correlation]:
        """Return the correlations of all workers; not a use of them.  O(entries)."""
        return [_correlation(e.key, e.pid, e.value) for e in self._map.host()]

    def clear(self) -> int:
        """End all spans of all workers (CLEARED).

        Returns:
            How many spans there were.
        """
        return self._map.clear()

    def __contains__(self, correlation_id: Any) -> bool:
        """Return whether this worker has a live span of an id; not a use."""
        return correlation_id in self._map

    def __len__(self) -> int:
        """Return the number of live spans that this worker has."""
        return len(self._map)

    def __bool__(self) -> bool:
        """Return True, also without any span."""
        return True

    def stats(self) -> CorrelationStats:
        """Return counts of the host and of this worker.

        O(shards + workers + own spans).
        """
        return CorrelationStats(spans=self._map.stats())

    def _register(
        self, correlation_id: Any, span: Any, fields: dict[str, Any], ttl: Ttl
    ) -> Any:
        if self._registered != os.getpid():
            self._registered = os.getpid()
            # If a process leaves spans open, even by dropping the map, they must be
            # ended before its tracer provider shuts down.  atexit runs the function
            # that was registered last first, and a provider exists before its first
            # span.
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

        This also happens at the end of a process.

        Args:
            timeout: Seconds to wait for callbacks.

        Returns:
            Whether all callbacks have ended.
        """
        if self._registered == os.getpid():
            atexit.unregister(self._close_at_exit)
        return super().close(timeout)

    def _close_at_exit(self) -> None:
        # A forked child inherits the functions registered with atexit, and must skip
        # this one.
        if self._registered == os.getpid():
            self._registered = 0
            with suppress(ShmCacheError):  # the rest is closed with the segment
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
