"""Flat or not: slopes that neither a spike, nor a step, nor a death can bend.

Workers come and go, so the sum of their memory is a sawtooth.  What is asked is:

- Does a worker grow as it gets older?  Theil-Sen over the pairs of samples *of the same
  worker*, after its warm-up, of all workers together: the median of the slopes.
- Do later workers begin larger than earlier ones, or does the master grow and hand it
  down?  The same slope through the smallest mean of each of some windows.

Memory counts as grown when USS and RSS both grow.  After a fork USS alone rises as the
pages that are shared with others become fewer, here or there; RSS alone, as code and
files are read in.  What is really taken is in both.

A quantity leaks if its slope, over the window that could be looked at, comes to more
than its tolerance; if it is a trend: of the pairs, those that rise outnumber those that
fall by half of all (Kendall's tau of 0.5 or more); and if it has not come to an end:
the slope in the later halves alone makes a quarter of the tolerance.  A step, or a
warm-up that took longer than it was given, is none of that.
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

Series = list[tuple[float, float]]  # of time in s and value

POINTS = 160  # to which a series is thinned out: pairs are as its square
FEWEST = 6  # points that make a series
TREND = 0.5
LATE = 0.25  # of the tolerance
WINDOWS = 8
KIB = 1024


@dataclass(frozen=True)
class Judgement:
    """What came out for one quantity."""

    quantity: str
    unit: str
    level: float  # the median value
    slope: float  # units an hour
    window: float  # s, the longest stretch looked at
    growth: float  # over that window
    late: float  # over its later half, by the slope of that half alone
    tolerance: float  # of growth
    trend: float  # Kendall's tau, -1 to 1
    series: int
    points: int
    confirmed: bool = True  # or it is memory of which the other figure does not grow

    @property
    def grows(self) -> bool:
        """Whether it grows, by its own figures."""
        return (
            self.growth > self.tolerance
            and self.trend >= TREND
            and self.late > self.tolerance * LATE
        )

    @property
    def leak(self) -> bool:
        """Whether it grows, and the other figure of the same memory, too."""
        return self.grows and self.confirmed

    @property
    def judged(self) -> bool:
        """Whether there was enough to look at."""
        return self.points > 0

    @property
    def word(self) -> str:
        """The verdict."""
        if not self.judged:
            return "not judged"
        if self.grows:
            return "LEAK" if self.confirmed else "unconfirmed"
        return "flat"

    def line(self) -> str:
        """For people."""
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
    """Median slope and Kendall's tau over the pairs within each of the series."""
    slopes = []
    for points in series:
        for i, (t0, v0) in enumerate(points):
            slopes += [(v - v0) / (t - t0) for t, v in points[i + 1 :] if t > t0]
    if not slopes:
        return 0.0, 0.0
    rising = sum(s > 0 for s in slopes) - sum(s < 0 for s in slopes)
    return median(slopes), rising / len(slopes)


def thinned(points: Series) -> Series:
    """At most POINTS points, each the median of its stretch."""
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
    """The verdict on one quantity."""
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
    """The verdict on everything that was sampled."""
    warm = [s for s in samples if s.t >= options.warm_up]
    ours = options.pid is None
    few = 4.0 if ours else 16.0  # a service has connections

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
    """USS and RSS of the same memory, each confirming the other."""
    first = judge(f"{whose} USS", "KiB", uss, tolerance)
    second = judge(f"{whose} RSS", "KiB", rss, tolerance)
    return [
        replace(first, confirmed=second.grows),
        replace(second, confirmed=first.grows),
    ]


def by_worker(
    samples: Sequence[Sample], warm_up: float, of: Callable[[Process], float]
) -> list[Series]:
    """A series for each worker, from the end of its own warm-up on."""
    series: dict[tuple[int, float], Series] = {}
    for sample in samples:
        for worker in sample.workers:
            if worker.age >= warm_up:
                key = worker.pid, worker.started
                series.setdefault(key, []).append((sample.t, of(worker)))
    return list(series.values())


def least_means(samples: Sequence[Sample], figure: str) -> Series:
    """The smallest mean (KiB) over the workers in each of some windows."""
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
