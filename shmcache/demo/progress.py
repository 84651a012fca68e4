"""How far the demo is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[float, str], None]  # fraction done, note

_STEPS = 4  # lines in a log file


@contextmanager
def progress(label: str) -> Iterator[Show]:
    """Shows one phase on stderr: call what it gives with fraction and note."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
        except ImportError:
            pass
        else:
            bar = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            with bar:
                task = bar.add_task(label, total=1.0, note="")
                yield lambda done, note: bar.update(task, completed=done, note=note)
            return
    yield _Lines(label)


class _Lines:
    """A line at every quarter."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._step = 0

    def __call__(self, done: float, note: str) -> None:
        if done * _STEPS >= self._step:
            self._step = int(done * _STEPS) + 1
            line = f"{self._label:<28} {done:4.0%}  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)
