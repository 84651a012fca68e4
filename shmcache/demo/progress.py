"""How far the demo is: a bar on a terminal, some lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called with the part that is done, 0 to 1, and a note.
Show = Callable[[float, str], None]

_STEPS = 4  # how many lines there are in a log file


@contextmanager
def progress(label: str) -> Iterator[Show]:
    """Show the progress of one phase on standard error.

    Args:
        label: What the phase is called.

    Yields:
        A function to be called with the part that is done, 0 to 1, and a note.
    """
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
    """Prints a line at each quarter."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._step = 0

    def __call__(self, done: float, note: str) -> None:
        if done * _STEPS >= self._step:
            self._step = int(done * _STEPS) + 1
            line = f"{self._label:<28} {done:4.0%}  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)
