"""Shared parts of the benchmarks: a description of the machine, and tables."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import shmcache

if TYPE_CHECKING:
    from collections.abc import Iterable


def cpu() -> str:
    """Return the name of the CPU, and how many cores this process may use."""
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def heading(title: str) -> None:
    """Print a heading with engine, machine and versions, which each figure needs."""
    packages = []
    for package in ("msgpack", "xxhash", "posix-ipc", "cython"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    mode = "compiled" if shmcache.compiled else "interpreted"
    print(f"## {title}\n")
    print(f"shmcache {shmcache.__version__} {mode}; {cpu()}; ", end="")
    print(f"Python {platform.python_version()}; {', '.join(packages)}\n")


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table; the first column is text, the others are numbers."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        rest = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        return f"| {' | '.join([row[0].ljust(widths[0]), *rest])} |"

    print(line(cells[0]))
    print(
        f"| {'-' * widths[0]} | " + " | ".join("-" * (w - 1) + ":" for w in widths[1:]),
        end=" |\n",
    )
    for row in cells[1:]:
        print(line(row))
    print()
    sys.stdout.flush()


def verdict(ratio: float, target: float | None, *, at_least: bool = False) -> str:
    """Return whether a ratio meets its target, as a word for a table."""
    if target is None or not shmcache.compiled:
        return ""
    return "met" if (ratio >= target if at_least else ratio <= target) else "MISSED"
