"""The plots of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from shmcache.soak.plot import Line, Plot, Points

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcache.soak.record import Record
    from shmcache.soak.sampling import CacheSample, Process, Sample

KIB, MIB = 1 << 10, 1 << 20
STRETCH = 5  # samples from one point of a rate to the next


def charts(record: Record) -> dict[str, Plot]:
    """The plots of a run, each under a short name."""
    made = _Charts(record)
    found = {
        "memory": made.memory(),
        "sum": made.sums(),
        "counts": made.counts(),
        "shm": made.shm(),
    }
    for name in record.samples[0].caches if record.samples else ():
        found[f"{name}-segment"] = made.segment(name)
        found[f"{name}-slots"] = made.slots(name)
        found[f"{name}-rates"] = made.operations(name)
        found[f"{name}-gone"] = made.gone(name)
    return found


class _Charts:
    def __init__(self, record: Record) -> None:
        self._samples = record.samples
        last = record.samples[-1].t if record.samples else 0.0
        self._end = max(record.seconds, last)
        self._marks = [mark for mark in record.marks if mark[1] != "check"]
        self._warm_up = record.options.warm_up

    def _plot(self, title: str, unit: str, *lines: Line) -> Plot:
        return Plot(title, unit, list(lines), self._end, self._marks, self._warm_up)

    # --- processes ------------------------------------------------------------------

    def _sum(self, label: str, colour: int, of: Callable[[Process], float]) -> Line:
        points = [(s.t, sum(of(w) for w in s.workers)) for s in self._samples]
        return Line(label, [points], colour)

    def memory(self) -> Plot:
        title = "Memory of each worker, USS"
        return self._plot(title, "MiB", *lanes(self._samples))

    def sums(self) -> Plot:
        return self._plot(
            "Memory of all workers together",
            "MiB",
            self._sum("RSS", 1, lambda w: w.rss / MIB),
            self._sum("PSS", 2, lambda w: w.pss / MIB),
            self._sum("USS", 0, lambda w: w.uss / MIB),
        )

    def counts(self) -> Plot:
        lines = [
            self._sum("descriptors", 0, lambda w: w.descriptors),
            self._sum("threads", 1, lambda w: w.threads),
        ]
        if any(w.handles for s in self._samples for w in s.workers):
            lines.append(self._sum("open handles", 2, lambda w: w.handles))
        return self._plot("Descriptors and threads of all workers", "", *lines)

    def shm(self) -> Plot:
        points = [(s.t, sum(s.shm.values()) / MIB) for s in self._samples]
        line = Line("bytes in /dev/shm", [points])
        return self._plot("Shared memory", "MiB", line)

    # --- a cache --------------------------------------------------------------------

    def _points(self, name: str, of: Callable[[CacheSample], float]) -> Points:
        return [(s.t, of(s.caches[name])) for s in self._samples if name in s.caches]

    def segment(self, name: str) -> Plot:
        def line(label: str, colour: int, of: Callable[[CacheSample], float]) -> Line:
            points = self._points(name, lambda c: of(c) / KIB)
            return Line(label, [points], colour, area=label == "used")

        return self._plot(
            f"Segment of {name}",
            "KiB",
            line("capacity", 7, lambda c: c.bytes_capacity),
            line("used", 0, lambda c: c.bytes_used),
            line("free", 2, lambda c: c.bytes_free),
            line("lost", 4, lambda c: c.bytes_lost),
        )

    def slots(self, name: str) -> Plot:
        used = self._points(name, lambda c: c.slots_used)
        free = self._points(name, lambda c: c.slots_free)
        lost = self._points(name, lambda c: c.slots_lost)
        return self._plot(
            f"Entries of {name}",
            "",
            Line("used slots", [used], 0, area=True),
            Line("free slots", [free], 2),
            Line("lost slots", [lost], 4),
        )

    def _rate(
        self, name: str, label: str, colour: int, of: Callable[[CacheSample], float]
    ) -> Line:
        return Line(label, [rates(self._points(name, of))], colour)

    def operations(self, name: str) -> Plot:
        return self._plot(
            f"Operations on {name}",
            "1/s",
            self._rate(name, "hits", 2, lambda c: c.hits),
            self._rate(name, "misses", 1, lambda c: c.misses),
            self._rate(name, "stored", 0, lambda c: c.sets),
        )

    def gone(self, name: str) -> Plot:
        removed = self._samples[-1].caches[name].removed
        lines = [
            self._rate(name, cause.lower().replace("_", " "), n, _removed(cause))
            for n, cause in enumerate(cause for cause in removed if removed[cause])
        ]
        return self._plot(f"Entries removed from {name}, by cause", "1/s", *lines)


def _removed(cause: str) -> Callable[[CacheSample], float]:
    return lambda c: c.removed[cause]


def rates(points: Points) -> Points:
    """The growth of a counter per second, taken over STRETCH samples each."""
    spread = points[::STRETCH]
    return [(t, (v - v0) / (t - t0)) for (t0, v0), (t, v) in pairwise(spread) if t > t0]


def lanes(samples: Sequence[Sample]) -> list[Line]:
    """Lines of the workers' memory, one for each place of a worker.

    A worker that replaces a dead one takes over its place, and so its colour.
    """
    place: dict[tuple[int, float], int] = {}
    pieces: dict[int, dict[tuple[int, float], Points]] = {}
    for sample in samples:
        here = {(w.pid, w.started): w for w in sample.workers}
        for gone in [key for key in place if key not in here]:
            del place[gone]
        for key, worker in sorted(here.items(), key=lambda item: item[1].started):
            if key not in place:
                taken = set(place.values())
                place[key] = next(n for n in range(len(taken) + 1) if n not in taken)
            lane = pieces.setdefault(place[key], {})
            lane.setdefault(key, []).append((sample.t, worker.uss / MIB))
    return [
        Line(f"worker {n + 1}", list(lane.values()), n)
        for n, lane in sorted(pieces.items())
    ]
