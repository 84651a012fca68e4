"""Flat or not: slopes that neither a spike nor a step nor a death can distort.

Problem: workers come and go, so the sum of their memory goes up and down.

Mechanism: two questions are asked instead.

- Does a worker grow as it gets older?  The answer is a Theil-Sen slope: the median of
  the slopes of all pairs of samples of one worker, after its warm-up, over all workers.
- Do later workers begin larger than earlier ones, for example because the master grows
  and passes that on?  The run is divided into windows.  In each one the smallest mean
  over the workers is taken, and the same slope is computed for these.

Memory counts as grown if USS and RSS both grow.  After a fork USS alone rises when
pages that were shared with other processes become private; RSS alone rises when code
and files are read in.  Memory that is really taken is in both.

A quantity leaks if three things hold.  Its growth over the window that could be looked
at is more than its tolerance.  It is a trend: of the pairs, those that rise outnumber
those that fall by half of all (Kendall's tau is 0.5 or more).  And it has not come to
an end: in the later halves alone it grows by more than a quarter of the tolerance.  So
neither a step nor a warm-up that took longer than expected is a leak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shmcache.soak.options import Options
    from shmcache.soak.sampling import Process, Sample

Series = list[tuple[float, float]]  # pairs of time in s and value

# A series is reduced to this many points, as the number of pairs is its square.
POINTS = 160
FEWEST = 6  # points that a series must have
TREND = 0.5  # Kendall's tau from which on a quantity has a trend
LATE = 0.25  # part of the tolerance by which the later half of a leak grows
WINDOWS = 8
KIB = 1024


@dataclass(frozen=True)
class Judgement:
    """The verdict on one quantity."""

    quantity: str
    unit: str
    level: float  # the median value
    slope: float  # units per hour
    window: float  # s; the length of the longest series
    growth: float  # units over that window
    late: float  # units over its later half, by the slope of that half alone
    tolerance: float  # units of growth
    trend: float  # Kendall's tau, -1 to 1
    series: int  # how many
    points: int  # how many in all series together
    confirmed: bool = True  # False: of USS and RSS of this memory only this one grows

    @property
    def grows(self) -> bool:
        """Whether the quantity grows, by its own figures."""
        return (
            self.growth > self.tolerance
            and self.trend >= TREND
            and self.late > self.tolerance * LATE
        )

    @property
    def leak(self) -> bool:
        """Whether it grows, and the other figure of the same memory does, too."""
        return self.grows and self.confirmed

    @property
    def judged(self) -> bool:
        """Whether there were enough points for a verdict."""
        return self.points > 0

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if not self.judged:
            return "not judged"
        if self.grows:
            return "LEAK" if self.confirmed else "unconfirmed"
        return "flat"

    def line(self) -> str:
        """The verdict in a line, for people."""
        if not self.judged:
            return f"{self.word:11} {self.quantity}: nothing lived long enough"
        return (
            f"{self.word:11} {self.quantity}: {self.level:,.1f} {self.unit},"
            f" {self.slope:+,.1f} {self.unit}/h; over {self.window:.0f} s"
            f" {self.growth:+,.1f}, tolerance {self.tolerance:g}; later half"
            f" {self.late:+,.1f}; trend"
            f" {self.trend:+.2f} of {self.series} x {self.points // self.series}"
        )


def theil_sen(series: Iterable[Series]) -> tuple[float, float]:
    """Median slope (units per s) and Kendall's tau, over the pairs of each series.

    O(n * n) for a series of n points.
    """
    slopes = []
    for points in series:
        for i, (t0, v0) in enumerate(points):
            slopes += [(v - v0) / (t - t0) for t, v in points[i + 1 :] if t > t0]
    if not slopes:
        return 0.0, 0.0
    rising = sum(s > 0 for s in slopes) - sum(s < 0 for s in slopes)
    return median(slopes), rising / len(slopes)


def thinned(points: Series) -> Series:
    """At most POINTS points; each is the median of some consecutive points."""
    if len(points) <= POINTS:
        return points
    step = -(-len(points) // POINTS)
    pieces = [points[i : i + step] for i in range(0, len(points), step)]
    return [
        (median(t for t, _ in piece), median(v for _, v in piece)) for piece in pieces
    ]


def judge(
    quantity: str, unit: str, series: Sequence[Series], tolerance: float
) -> Judgement:
    """The verdict on one quantity.

    Args:
        quantity: What was measured, for people.
        unit: The unit of the values.
        series: The values over time, a series for each worker.
        tolerance: By how much the quantity may grow over the window.
    """
    usable = [thinned(points) for points in series if len(points) >= FEWEST]
    slope, trend = theil_sen(usable)
    late, _ = theil_sen(points[len(points) // 2 :] for points in usable)
    values = [v for points in usable for _, v in points]
    window = max((points[-1][0] - points[0][0] for points in usable), default=0.0)
    return Judgement(
        quantity=quantity,
        unit=unit,
        level=median(values) if values else 0.0,
        slope=slope * 3600,
        window=window,
        growth=slope * window,
        late=late * window / 2,
        tolerance=tolerance,
        trend=trend,
        series=len(usable),
        points=len(values),
    )


def judge_all(samples: Sequence[Sample], options: Options) -> list[Judgement]:
    """The verdicts on all quantities that were sampled."""
    warm = [s for s in samples if s.t >= options.warm_up]
    ours = options.pid is None
    few = 4.0 if ours else 16.0  # the workers of a service have connections

    def workers(of: Callable[[Process], float]) -> list[Series]:
        return by_worker(warm, options.warm_up, of)

    def master(of: Callable[[Process], float]) -> list[Series]:
        return [[(s.t, of(s.master)) for s in warm if s.master is not None]]

    def in_memory(whose: str, of: Callable[[str], list[Series]]) -> list[Judgement]:
        return both(whose, of("uss"), of("rss"), options.tolerance)

    found = [
        *in_memory("a worker's", lambda f: workers(lambda p: getattr(p, f) / KIB)),
        *in_memory("the master's", lambda f: master(lambda p: getattr(p, f) / KIB)),
        *in_memory("a window's least mean", lambda f: [least_means(warm, f)]),
        judge(
            "a worker's descriptors" + (", less its handles" if ours else ""),
            "",
            workers(lambda p: p.descriptors - p.handles),
            few,
        ),
        judge("the master's descriptors", "", master(lambda p: p.descriptors), few),
        judge("a worker's threads", "", workers(lambda p: p.threads), few / 2),
    ]
    if any("handles" in name for s in warm for name in s.caches):
        waiting = workers(lambda p: p.waiting)
        found.append(judge("a worker's handles, less its entries", "", waiting, 10.0))
    names = [[(s.t, float(len(s.shm))) for s in warm]]
    total = [[(s.t, sum(s.shm.values()) / KIB) for s in warm]]
    found.append(judge("names in /dev/shm", "", names, 0.5))
    found.append(judge("bytes in /dev/shm", "KiB", total, 0.5))
    return found


def both(
    whose: str, uss: Sequence[Series], rss: Sequence[Series], tolerance: float
) -> list[Judgement]:
    """The verdicts on USS and RSS of the same memory; each must confirm the other."""
    first = judge(f"{whose} USS", "KiB", uss, tolerance)
    second = judge(f"{whose} RSS", "KiB", rss, tolerance)
    return [
        replace(first, confirmed=second.grows),
        replace(second, confirmed=first.grows),
    ]


def by_worker(
    samples: Sequence[Sample], warm_up: float, of: Callable[[Process], float]
) -> list[Series]:
    """A series for each worker, which begins at the end of the worker's warm-up."""
    series: dict[tuple[int, float], Series] = {}
    for sample in samples:
        for worker in sample.workers:
            if worker.age >= warm_up:
                key = worker.pid, worker.started
                series.setdefault(key, []).append((sample.t, of(worker)))
    return list(series.values())


def least_means(samples: Sequence[Sample], figure: str) -> Series:
    """For each window, the smallest mean over the workers, in KiB.

    Args:
        samples: The samples of the run.
        figure: The field of ``Process`` that is meant.

    Returns:
        A point for each window; none if there are too few samples.
    """
    means = [
        (s.t, sum(getattr(w, figure) for w in s.workers) / len(s.workers) / KIB)
        for s in samples
        if s.workers
    ]
    if len(means) < 3 * WINDOWS:
        return []
    edges = [round(i * len(means) / WINDOWS) for i in range(WINDOWS + 1)]
    pieces = [means[a:b] for a, b in pairwise(edges)]
    return [
        (median(t for t, _ in piece), min(value for _, value in piece))
        for piece in pieces
    ]
