"""The live view: ``shmcache top``.

Each frame is made of two looks at a cache from outside (see _observe/snapshot.py).
Rates are the differences of their counters, divided by the time between them.  Each
look opens the cache again, because it may have been removed since the look before, or
replaced by another one of the same name.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shmcache._format import layout as L
from shmcache._observe.snapshot import Inside, Segment, Worker
from shmcache.cli import clean
from shmcache.cli.show import json_line, ratio_text, short, size_text, span_text
from shmcache.errors import SegmentNotFound, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from shmcache.stats import Stats

# Seconds from one glance at the most recently used keys to the next.
GLANCE = 0.1
# One glance reads the recent ends of this many shards, and this many slots of each.
SHARDS, SLOTS = 8, 8
# At each glance the score of a key from earlier glances is multiplied by this.
FADE = 0.97
# The largest keys are searched so seldom that this takes at most this part of a core.
EFFORT = 0.05
# At most this many workers are shown, because measuring one takes milliseconds.
WORKERS = 12
KEYS = 8

_RATES: dict[str, Callable[[Stats], int]] = {
    "hits": lambda s: s.hits,
    "misses": lambda s: s.misses,
    "sets": lambda s: s.sets,
    "evicted": lambda s: s.evicted,
    "expired": lambda s: s.expired,
    "replaced": lambda s: s.removed["REPLACED"],
    "deleted": lambda s: s.removed["DELETED"] + s.removed["CLEARED"],
    "owner died": lambda s: s.removed["OWNER_DIED"],
    "closed": lambda s: s.removed["CLOSED"],
    "too large": lambda s: s.too_large,
}
_HANDLES_ONLY = {"owner died", "closed"}
# Columns of the list of all caches; True: a narrow terminal shows the column as well.
_COLUMNS = (
    *(("STATE", False), ("ENTRIES", True), ("USED", False), ("HITS", True)),
    *(("GET/s", True), ("SET/s", True), ("EVICT/s", True), ("EXPIRE/s", False)),
    *(("WAIT/s", False), ("WORKERS", True)),
)
WIDE = 120  # characters of a terminal that shows all columns
NAME = 26  # characters of a name in a narrow terminal
TALL = 36  # lines of a terminal with room for empty lines between the parts


@dataclass(frozen=True)
class Look:
    """What was seen of a cache in one look."""

    at: float  # by the monotonic clock, in s
    stats: Stats
    unstable: tuple[int, ...]  # shards whose counts are not of one moment
    workers: list[Worker]
    inside: list[Inside]
    codec: str
    persist: bool
    created: int  # by the wall clock, in ns; it tells two caches of one name apart
    trouble: str

    @classmethod
    def at_segment(cls, segment: Segment) -> Look:
        """Look at a segment now."""
        read = segment.stats()
        return cls(
            at=time.monotonic(),
            stats=read.stats,
            unstable=read.unstable,
            workers=segment.workers(),
            inside=list(segment.inside()),
            codec=segment.codec,
            persist=segment.header.settings.persist,
            created=segment.header.created_wall_ns,
            trouble=segment.trouble,
        )


@dataclass(frozen=True)
class Interval:
    """Two looks at one cache; if both are the same look, all rates are 0."""

    before: Look
    after: Look

    @property
    def seconds(self) -> float:
        """The time from the first look to the second, in seconds."""
        return self.after.at - self.before.at

    def difference(self, count: Callable[[Stats], float]) -> float:
        """How much a counter grew between the looks."""
        return max(0, count(self.after.stats) - count(self.before.stats))

    def rate(self, count: Callable[[Stats], float]) -> float:
        """How much a counter grew per second."""
        return self.difference(count) / self.seconds if self.seconds else 0.0

    def worker_rates(self) -> list[tuple[Worker, float, float]]:
        """The workers with their hits and misses per second, the busiest first."""
        former = {worker.token: worker for worker in self.before.workers}
        rates = []
        for worker in self.after.workers:
            was = former.get(worker.token, worker._replace(hits=0, misses=0))
            seconds = self.seconds or 1.0
            hits = (worker.hits - was.hits) / seconds if self.seconds else 0.0
            misses = (worker.misses - was.misses) / seconds if self.seconds else 0.0
            rates.append((worker, hits, misses))
        return sorted(rates, key=lambda one: -one[1] - one[2])


class View(Protocol):
    """What ``top`` watches: all caches, or one."""

    def look(self) -> None:
        """Read the state of now; once for each frame."""

    def glance(self) -> None:
        """Read which keys were used most recently; several times for each frame."""

    def frame(self, console: Console) -> RenderableType:
        """What to show of the last two looks."""


def run(name: str | None, interval: float, *, once: bool) -> int:
    """Show frames until the user ends it.

    Args:
        name: The cache to watch; None for all caches.
        interval: Seconds from frame to frame.
        once: Show one frame and end.

    Returns:
        The exit code.
    """
    console = Console()
    view: View = _All() if name is None else _One(name)
    view.look()
    if once:
        _glances(view, interval)
        view.look()
        console.print(view.frame(console))
        return 0
    with (
        _ended_by_signal(),
        _keyboard() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                view.look()
                live.update(view.frame(console), refresh=True)
                due = time.monotonic() + interval
            view.glance()
            if pressed(min(GLANCE, max(0.0, due - time.monotonic()))) in {"q", "Q"}:
                return 0


def _glances(view: View, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        view.glance()
        time.sleep(min(GLANCE, left))


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    # Reads keys as they are pressed, without Enter; the terminal does not echo them.
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        if not ready:
            return ""
        data = os.read(fd, 1)
        return data.decode(errors="replace") if data else "q"  # the terminal is closed

    tty.setcbreak(fd)
    try:
        yield pressed
    finally:
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    # A signal raises SystemExit, so that the terminal is restored before the end.
    def end(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ENDING = (signal.SIGTERM, signal.SIGHUP)


# --- all caches -----------------------------------------------------------------


class _All:
    """The view of all caches of this user, one on a line."""

    def __init__(self) -> None:
        self._before: dict[str, Look] = {}
        self._after: dict[str, Look] = {}
        self._found: list[tuple[str, str, str]] = []

    def look(self) -> None:
        """Read the state of all caches."""
        self._before, self._after = self._after, {}
        self._found = []
        for found in clean.survey():
            trouble = found.trouble
            if not trouble:
                try:
                    with Segment(found.name) as segment:
                        self._after[found.name] = Look.at_segment(segment)
                except SegmentNotFound:
                    continue  # it was removed since, or only its other files are left
                except ShmCacheError as error:
                    trouble = str(error)
            unused = "persistent" if found.persist else "unused"
            state = "in use" if found.in_use else unused
            self._found.append((found.name, state, trouble))
        self._found.sort(key=lambda one: one[1] != "in use")

    def glance(self) -> None:
        """Do nothing: this view shows no keys."""

    def frame(self, console: Console) -> RenderableType:
        """A table with a line for each cache."""
        if not self._found:
            return Text("no caches of this user")
        wide = console.width >= WIDE
        table = _table("NAME", *(head for head, always in _COLUMNS if wide or always))
        table.columns[0].max_width = None if wide else NAME
        troubles = []
        for name, state, trouble in self._found:
            look = self._after.get(name)
            if look is None:
                table.add_row(Text(name), Text("trouble", style="red"))
                troubles.append(Text(f"{name}: {trouble}", style="red"))
                continue
            cells = self._cells(state, look, self._before.get(name))
            shown = zip(cells, _COLUMNS, strict=True)
            table.add_row(
                Text(name), *(cell for cell, (_, always) in shown if wide or always)
            )
        return Group(_title("all caches", console), table, *troubles)

    def _cells(
        self, state: str, look: Look, before: Look | None
    ) -> tuple[RenderableType, ...]:
        # One cell for each of _COLUMNS.
        span = Interval(_former(before, look), look)
        s = look.stats
        return (
            Text(state),
            f"{s.entries:,}",
            f"{100 * s.bytes_used / max(1, s.bytes_capacity):.0f} %",
            _ratio(span),
            _per_second(span.rate(lambda s: s.hits + s.misses)),
            _per_second(span.rate(lambda s: s.sets)),
            _per_second(span.rate(lambda s: s.evicted)),
            _per_second(span.rate(lambda s: s.expired)),
            _per_second(span.rate(lambda s: s.lock_waits)),
            f"{s.workers}",
        )


def _former(before: Look | None, after: Look) -> Look:
    # The look to compare with.  If the look before was at another segment of the same
    # name, there is none, and ``after`` is compared with itself.
    if before is None or before.created != after.created:
        return after
    return before


# --- one cache ------------------------------------------------------------------


@dataclass
class _Keys:
    """Which keys are used most recently, and which are the largest."""

    seen: dict[str, float] = field(default_factory=dict)  # scores
    largest: list[tuple[str, int]] = field(default_factory=list)  # with their bytes
    shard: int = 0  # the last one that was read
    due: float = 0.0  # when the largest keys are searched again

    def glance(self, segment: Segment) -> None:
        for key in self.seen:
            self.seen[key] *= FADE
        for _ in range(min(SHARDS, len(segment.shards))):
            self.shard = (self.shard + 1) % len(segment.shards)
            for rank, slot in enumerate(segment.newest(self.shard, SLOTS)):
                entry = segment.entry(self.shard, slot, values=False)
                if entry and not entry.damage:
                    key = json_line(segment.key(entry))
                    self.seen[key] = self.seen.get(key, 0.0) + 1 / (1 + rank)
        for key in sorted(self.seen, key=self.seen.__getitem__)[: -8 * KEYS]:
            del self.seen[key]

    def look(self, segment: Segment) -> None:
        started = time.monotonic()
        if started < self.due:
            return
        self.largest = [
            (json_line(segment.key(entry)), entry.key_len + entry.value_len)
            for entry in segment.largest(KEYS)
        ]
        ended = time.monotonic()
        self.due = ended + (ended - started) / EFFORT

    def hottest(self) -> list[str]:
        return sorted(self.seen, key=self.seen.__getitem__, reverse=True)[:KEYS]


class _One:
    """The view of one cache, in detail."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._span: Interval | None = None
        self._keys = _Keys()
        self._gone = ""

    def look(self) -> None:
        """Read the state of the cache.

        Raises:
            ShmCacheError: The cache cannot be read at the first look.  Later on the
                frame says so.
        """
        try:
            with Segment(self._name) as segment:
                after = Look.at_segment(segment)
                before = _former(self._span.after if self._span else None, after)
                if self._span and before is after:
                    self._keys = _Keys()
                self._span = Interval(before, after)
                self._keys.look(segment)
                self._gone = ""
        except ShmCacheError as error:
            if self._span is None:
                raise
            self._gone = str(error)

    def glance(self) -> None:
        """Read which keys were used most recently."""
        with suppress(ShmCacheError), Segment(self._name) as segment:
            self._keys.glance(segment)

    def frame(self, console: Console) -> RenderableType:
        """Rates and state, locks, workers, keys."""
        if self._span is None:
            raise SegmentNotFound(f"there is no cache named {self._name!r}")
        span, look = self._span, self._span.after
        title = f"{self._name}   codec {look.codec}, shards {look.stats.shards}"
        title += f", {'persistent, ' * look.persist}{span_text(look.stats.age)} old"
        parts: list[RenderableType] = [_title(title, console)]
        if self._gone or look.trouble:
            parts.append(Text(self._gone or look.trouble, style="bold red"))
        if look.unstable:
            shards = ", ".join(map(str, look.unstable))
            parts.append(Text(f"counts not of one moment: shards {shards}"))
        for part in (
            _side_by_side(_rates(span), _state(span)),
            _locks(look),
            _workers(span, console),
            self._frame_of_keys(console.width // 2),
        ):
            if console.height >= TALL:
                parts.append(Text())
            parts.append(part)
        return Group(*parts)

    def _frame_of_keys(self, width: int) -> Table:
        hottest = _table("MOST RECENTLY USED")
        for key in self._keys.hottest():
            hottest.add_row(Text(short(key, width - 4)))
        largest = _table("LARGEST", "SIZE")
        for key, size in self._keys.largest:
            largest.add_row(Text(short(key, width - 12)), size_text(size))
        return _side_by_side(hottest, largest)


def _side_by_side(left: Table, right: Table) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _rates(span: Interval) -> Table:
    table = _table("", "PER SECOND", "IN ALL")
    handles = span.after.codec == L.HANDLES
    for name, count in _RATES.items():
        if name not in _HANDLES_ONLY or handles:
            total = count(span.after.stats)
            table.add_row(name, _per_second(span.rate(count)), f"{total:,}")
    s = span.after.stats
    table.add_row("hit ratio", _ratio(span), ratio_text(s.hits, s.misses))
    return table


def _state(span: Interval) -> Table:
    s = span.after.stats
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    bound = f" of {s.max_entries:,}" if s.max_entries else ""
    table.add_row("entries", f"{s.entries:,}{bound}")
    if s.max_entries:
        table.add_row("", _bar(s.entries, s.max_entries))
    table.add_row(
        "bytes", f"{size_text(s.bytes_used)} of {size_text(s.bytes_capacity)}"
    )
    table.add_row("", _bar(s.bytes_used, s.bytes_capacity))
    gone = span.difference(lambda s: s.expired + s.evicted)
    ages = span.difference(lambda s: s.eviction_age_seconds)
    table.add_row("evicted at", span_text(ages / gone) + " of age" if gone else "-")
    waits = span.difference(lambda s: s.lock_waits)
    waited = span.difference(lambda s: s.lock_wait_seconds)
    mean = f", {1e6 * waited / waits:,.0f} µs each" if waits else ""
    rate = _per_second(span.rate(lambda s: s.lock_waits))
    table.add_row("lock waits", f"{rate} a second{mean}")
    table.add_row("timed out", _alarming(s.lock_timeouts))
    table.add_row("recoveries", f"{s.recoveries:,}, {s.dropped:,} entries dropped")
    if span.after.codec == L.HANDLES:
        opened = f"{s.handles_opened:,} opened, {s.handles_closed:,} closed"
        table.add_row("handles", opened)
        table.add_row("failed", _alarming(s.callback_failures))
    return table


def _locks(look: Look) -> Table:
    pids = {w.token: (w.pid or w.wrote, w.alive) for w in look.workers}
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    for one in look.inside[:6]:
        pid, alive = pids.get(one.token, (0, False))
        holder = f"process {pid}{'' if alive else ', dead'}" if one.token else "nobody"
        table.add_row("lock", f"shard {one.shard}: {holder}; waiting: {one.waiting}")
    if not look.inside:
        table.add_row("locks", "nobody holds one, nobody waits")
    return table


def _workers(span: Interval, console: Console) -> Table:
    table = _table("WORKER", "AGE", "HIT/s", "MISS/s", "PSS")
    table.add_column("COMMAND", no_wrap=True)
    rates = span.worker_rates()
    # A small terminal shows fewer workers, to leave room for the keys below them.
    shown = min(WORKERS, max(3, console.height - 24))
    for worker, hits, misses in rates[:shown]:
        pss, command = _process(worker.pid)
        state = "" if worker.alive else " dead"
        table.add_row(
            f"{worker.pid or worker.wrote}{state}",
            span_text(worker.age),
            _per_second(hits),
            _per_second(misses),
            pss,
            Text(short(command, max(10, console.width - 60))),
        )
    if len(rates) > shown:
        table.add_row(f"and {len(rates) - shown} more")
    return table


def _process(pid: int) -> tuple[str, str]:
    # Memory (PSS) and command line of a process, as far as this user may read them.
    pss, command = "-", ""
    if pid:
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            words = process.cmdline() or [process.name()]
            # The paths of interpreter and script are shortened to the file names.
            command = " ".join([*map(os.path.basename, words[:2]), *words[2:]])
            pss = size_text(process.memory_full_info().pss)
    return pss, command


# --- parts of a frame -----------------------------------------------------------


def _title(text: str, console: Console) -> Text:
    title = Text("shmcache top", style="bold", no_wrap=True)
    title.append("  q: quit" if console.is_terminal else "", style="dim")
    title.append(f"  {text}  ", style="bold cyan")
    return title.append(time.strftime("%H:%M:%S"), style="dim")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column(first, no_wrap=True)
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _bar(part: float, whole: float) -> ProgressBar:
    return ProgressBar(total=max(1, whole), completed=min(part, whole), width=28)


def _per_second(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 or not rate else f"{rate:.1f}"


def _ratio(span: Interval) -> str:
    hits = span.difference(lambda s: s.hits)
    return ratio_text(hits, span.difference(lambda s: s.misses))


def _alarming(count: int) -> Text:
    return Text(f"{count:,}", style="bold red" if count else "")
