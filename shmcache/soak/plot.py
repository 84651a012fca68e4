"""Line plots as inline SVG: lines, areas and marks.

Colours are CSS variables, so that a page follows the reader's dark mode.  A plot in a
file of its own contains the definitions of these variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from html import escape

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 760, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 44, 30
MOST = 400  # points of a line; more cannot be seen in 684 pixels

STYLE = """
svg{--ink:#1f2933;--faint:#7b8794;--grid:#e4e7eb;--paper:#fff;--c0:#2563eb;
--c1:#d97706;--c2:#059669;--c3:#9333ea;--c4:#db2777;--c5:#0891b2;--c6:#65a30d;
--c7:#78716c;--bad:#dc2626}
@media(prefers-color-scheme:dark){svg{--ink:#e4e7eb;--faint:#9aa5b1;--grid:#323f4b;
--paper:#1b222b;--c0:#60a5fa;--c1:#fbbf24;--c2:#34d399;--c3:#c084fc;--c4:#f472b6;
--c5:#22d3ee;--c6:#a3e635;--c7:#a8a29e;--bad:#f87171}}
svg text{font:12px system-ui,sans-serif;fill:var(--faint)}
svg .title{font-weight:600;font-size:14px;fill:var(--ink)}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg .area{opacity:.18}
svg .grid{stroke:var(--grid)}
svg .kill{stroke:var(--bad);stroke-width:1.2}
svg .recycle{stroke:var(--faint);stroke-width:1.2;stroke-dasharray:2 2}
svg .through{opacity:.3;stroke-width:.8}
"""


@dataclass(frozen=True)
class Line:
    """One quantity: a line in one colour, which may have gaps."""

    label: str
    pieces: list[Points]
    colour: int = 0
    area: bool = False

    def points(self) -> Points:
        """The points of all pieces."""
        return [point for piece in self.pieces for point in piece]


@dataclass(frozen=True)
class Plot:
    """Several lines over one time axis."""

    title: str
    unit: str
    lines: list[Line]
    end: float  # s
    marks: list[tuple[float, str]] = field(default_factory=list)
    warm_up: float = 0.0

    def svg(self, *, alone: bool = False) -> str:
        """The plot as SVG; with ``alone`` it can be a file of its own."""
        box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        label = f'aria-label="{escape(self.title)}"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box} {label}>']
        if alone:
            parts.append(f"<style>{STYLE}</style>")
            parts.append('<rect width="100%" height="100%" style="fill:var(--paper)"/>')
        parts += self._frame()
        parts += self._mark_lines()
        for line in self.lines:
            parts += self._line(line)
        return "\n".join([*parts, self._legend(), "</svg>"])

    @cached_property
    def _scale(self) -> tuple[float, float]:
        # The upper end of the axis, and the step from grid line to grid line.
        return scale(
            max((v for line in self.lines for _, v in line.points()), default=1)
        )

    def _x(self, t: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * t / max(self.end, 1e-9)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self._scale[0]

    def _frame(self) -> list[str]:
        top, step = self._scale
        unit = f" ({self.unit})" if self.unit else ""
        parts = [f'<text class="title" x="4" y="16">{escape(self.title + unit)}</text>']
        if self.warm_up:
            width = self._x(min(self.warm_up, self.end)) - LEFT
            parts.append(
                f'<rect x="{LEFT}" y="{TOP}" width="{width:.1f}"'
                f' height="{HEIGHT - TOP - BOTTOM}" style="fill:var(--grid)"'
                ' opacity=".45"><title>warm-up, not judged</title></rect>'
            )
        for i in range(round(top / step) + 1):
            y = self._y(i * step)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}"'
                f' y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}"'
                f' text-anchor="end">{short(i * step)}</text>'
            )
        _, every = scale(self.end, times=True)
        return parts + [
            f'<text x="{self._x(i * every):.1f}" y="{HEIGHT - 10}"'
            f' text-anchor="middle">{clock(i * every)}</text>'
            for i in range(int(self.end / every) + 1)
        ]

    def _mark_lines(self) -> list[str]:
        parts = []
        for t, kind in self.marks:
            style = "recycle" if kind == "recycle" else "kill"
            x = f'x1="{self._x(t):.1f}" x2="{self._x(t):.1f}"'
            parts.append(
                f'<line class="{style} through" {x} y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<line class="{style}" {x} y1="{TOP - 6}" y2="{TOP}">'
                f"<title>{escape(kind)} at {clock(t)}</title></line>"
            )
        return parts

    def _line(self, line: Line) -> list[str]:
        parts = []
        budget = MOST / max(1, len(line.points()))
        for piece in line.pieces:
            kept = reduced(piece, max(2, round(len(piece) * budget)))
            path = " ".join(f"{self._x(t):.1f},{self._y(v):.1f}" for t, v in kept)
            colour = f"var(--c{line.colour % 8})"
            if line.area and kept:
                low, first, last = self._y(0), self._x(kept[0][0]), self._x(kept[-1][0])
                around = f"{first:.1f},{low:.1f} {path} {last:.1f},{low:.1f}"
                parts.append(
                    f'<polygon class="area" points="{around}" style="fill:{colour}"/>'
                )
            if len(kept) == 1:  # a worker that is in one sample only
                x, y = path.split(",")
                parts.append(
                    f'<circle cx="{x}" cy="{y}" r="1.6" style="fill:{colour}"/>'
                )
                continue
            parts.append(
                f'<polyline class="line" points="{path}" style="stroke:{colour}">'
                f"<title>{escape(line.label)}</title></polyline>"
            )
        return parts

    def _legend(self) -> str:
        parts, x = [], LEFT
        for line in self.lines:
            parts.append(
                f'<rect x="{x}" y="24" width="10" height="10" rx="2"'
                f' style="fill:var(--c{line.colour % 8})"/>'
                f'<text x="{x + 14}" y="33">{escape(line.label)}</text>'
            )
            x += 26 + 7 * len(line.label)
        for kind, cls in (("kill", "kill"), ("recycle", "recycle")):
            if any(kind == known for _, known in self.marks):
                parts.append(
                    f'<line class="{cls}" x1="{x + 5}" x2="{x + 5}" y1="24" y2="34"/>'
                    f'<text x="{x + 14}" y="33">{kind}</text>'
                )
                x += 26 + 7 * len(kind)
        return "".join(parts)


def scale(most: float, *, times: bool = False) -> tuple[float, float]:
    """The scale of an axis.

    Args:
        most: The largest value.
        times: Whether the values are seconds.

    Returns:
        The upper end of the axis, which is not below ``most``; and the step from grid
        line to grid line.
    """
    if times:
        steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
        step = next((float(s) for s in steps if most / s <= 9), most / 8 or 1.0)
        return most, step
    if most <= 0:
        return 1.0, 1.0
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return step * math.ceil(most / step * 0.999), step


def short(value: float) -> str:
    """A number as an axis shows it: 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def clock(seconds: float) -> str:
    """A time as an axis shows it: 45 s, 12:30, 3 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds else "0"
    if seconds < 3600:
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"
    return f"{seconds / 3600:.3g} h"


def reduced(points: Points, most: int) -> Points:
    """At most ``most`` points; the lowest and highest of each piece are kept."""
    if len(points) <= most:
        return points
    step = -(-len(points) // max(1, most // 2))
    kept: Points = []
    for i in range(0, len(points), step):
        piece = points[i : i + step]
        low = min(piece, key=lambda p: p[1])
        high = max(piece, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept
