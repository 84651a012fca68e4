"""What the demo measured: as a table and as one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache.demo.load import Outcome

# With fewer requests it is chance whether a page is requested twice.
MIN_REQUESTS = 100
# Two measurements that differ by less than this factor are called the same.
SAME = 1.1


@dataclass(frozen=True)
class Phase:
    """The figures of one server under the load."""

    requests: int
    errors: int
    seconds: float
    rendered: int
    own_hits: int
    cross_hits: int  # answered with a page that another worker had rendered
    requests_per_second: float
    median_ms: float
    p99_ms: float
    workers_pss_bytes: int | None
    segment_bytes: int

    @classmethod
    def of(cls, outcome: Outcome, workers_pss: int | None, segment: int) -> Phase:
        """The figures of a load.

        Args:
            outcome: What the clients saw; it must have at least one answer.
            workers_pss: Memory of the workers in bytes; None if unknown.
            segment: Bytes of the shared segment; 0 if there is none.
        """
        return cls(
            requests=outcome.requests,
            errors=len(outcome.errors),
            seconds=round(outcome.seconds, 3),
            rendered=outcome.count("rendered"),
            own_hits=outcome.count("own"),
            cross_hits=outcome.count("other"),
            requests_per_second=round(outcome.requests / outcome.seconds, 1),
            median_ms=round(outcome.latency(0.5) * 1e3, 3),
            p99_ms=round(outcome.latency(0.99) * 1e3, 3),
            workers_pss_bytes=workers_pss,
            segment_bytes=segment,
        )

    @property
    def memory(self) -> int | None:
        """Bytes of workers and segment together; None if unknown."""
        if self.workers_pss_bytes is None:
            return None
        return self.workers_pss_bytes + self.segment_bytes


_ROWS: tuple[tuple[str, Callable[[Phase], str]], ...] = (
    ("requests, the same for both", lambda p: f"{p.requests:,}"),
    ("answered within", lambda p: f"{p.seconds:.1f} s"),
    ("pages rendered", lambda p: f"{p.rendered:,}"),
    ("hits on a page of the same worker", lambda p: f"{p.own_hits:,}"),
    ("hits on a page ANOTHER worker rendered", lambda p: f"{p.cross_hits:,}"),
    ("requests per second", lambda p: f"{p.requests_per_second:,.0f}"),
    ("response time, median", lambda p: f"{p.median_ms:.1f} ms"),
    ("response time, 99 % within (p99)", lambda p: f"{p.p99_ms:.0f} ms"),
    ("memory of the workers (PSS)", lambda p: _mib(p.workers_pss_bytes)),
    ("memory of the shared segment", lambda p: _mib(p.segment_bytes)),
    ("memory together", lambda p: _mib(p.memory)),
)

_PSS = (
    "PSS: memory that n processes share counts as 1/n in each of them, so the sum is\n"
    "what they really take. The segment has its full size at once and never grows."
)


def table(separate: Phase, shared: Phase) -> str:
    """Both phases side by side, with an explanation of PSS."""
    heads = ("dict in each worker", "one shared cache")
    first = max(len(label) for label, _ in _ROWS)
    widths = [len(head) for head in heads]
    lines = [" " * first + "".join(f"   {head}" for head in heads)]
    lines.append("-" * len(lines[0]))
    for label, cell in _ROWS:
        pair = zip((separate, shared), widths, strict=True)
        cells = "".join(f"   {cell(phase):>{width}}" for phase, width in pair)
        lines.append(f"{label:<{first}}{cells}")
    return "\n".join([*lines, "", _PSS])


def conclusion(separate: Phase, shared: Phase) -> str:
    """The result in one sentence, which claims only what the figures support."""
    if failed := separate.errors + shared.errors:
        return f"{failed} requests failed: the figures allow no conclusion."
    if shared.requests < MIN_REQUESTS:
        return (
            f"{shared.requests} requests are too few for a conclusion: "
            "give it more --seconds."
        )
    if not shared.cross_hits:
        return "No worker was served a page of another: sharing gained nothing here."
    claims = [
        _compared(separate.rendered, shared.rendered, "fewer", "renderings"),
        _compared(separate.seconds, shared.seconds, "less", "time"),
    ]
    if separate.memory and shared.memory:
        claims.append(_compared(separate.memory, shared.memory, "less", "memory"))
    return (
        f"With one shared cache {shared.cross_hits:,} of {shared.requests:,} requests "
        "were served from another worker's page; the same requests took "
        f"{', '.join(claims[:-1])} and {claims[-1]}."
    )


def _compared(separate: float, shared: float, less: str, what: str) -> str:
    """How the second figure differs from the first, in words."""
    if shared * SAME <= separate:
        return f"{1 - shared / separate:.0%} {less} {what}"
    if separate * SAME <= shared:
        return f"{shared / separate - 1:.0%} more {what}"
    return f"about the same {what}"


def _mib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / (1 << 20):.1f} MiB" if size else "-"
