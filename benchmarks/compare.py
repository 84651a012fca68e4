"""Two builds of shmcache, compared operation by operation in one run.

A build is given as the Python interpreter that has it installed.  The builds run the
operations of ``latency.py``, or the plans of ``contention.py``, in processes of their
own, in turn, so that other users of the machine slow both alike.  The processes are
replaced several times, because a process can be a tenth slower or faster for all its
life, depending on where its memory lies.  The table has the median over all rounds of
the ratio within a round, and the range of the middle half of the ratios.

    python benchmarks/compare.py BEFORE/bin/python AFTER/bin/python
                                 [--entries N] [--rounds N] [--contention]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _bench import heading, table
from contention import Contention
from latency import Operations

PAIRS = 8  # how many pairs of processes there are, one after the other
SECONDS = 0.5  # how long processes contend in one measurement


class Build:
    """A process of one build, which measures operations."""

    def __init__(self, python: str, entries: int, contention: bool) -> None:
        arguments = ["--serve", "--entries", str(entries)]
        self._process = subprocess.Popen(
            [python, __file__, *arguments, *["--contention"] * contention],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, operation: str) -> float:
        """Return how many nanoseconds one operation took."""
        return float(self._ask(operation))

    def names(self) -> list[str]:
        """Return the operations that can be measured."""
        return self._ask("names").split("|")

    def _ask(self, line: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError
        stdin.write(line + "\n")
        stdin.flush()
        return stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(entries: int, contention: bool) -> None:
    """Answer each line of standard input, which names an operation, with its time."""
    operations = Contention(SECONDS, entries) if contention else Operations(entries)
    for line in sys.stdin:
        if line.strip() == "names":
            print("|".join(operations.names()), flush=True)
        else:
            print(operations.time(line.strip()), flush=True)
    operations.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", nargs="*", help="BEFORE and AFTER")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--contention", action="store_true", help="several processes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.entries, options.contention)
        return
    if len(options.python) != 2:
        parser.error("name the interpreters of two builds")
    times: dict[str, list[tuple[float, ...]]] = {}
    for pair in range(PAIRS):
        builds = [
            Build(python, options.entries, options.contention)
            for python in options.python
        ]
        for build in builds:
            names = build.names()  # answers after the caches have been filled
        for round_ in range(-(-options.rounds // PAIRS)):
            order = builds if (pair + round_) % 2 else builds[::-1]
            for name in names:
                taken = {build: build.time(name) for build in order}
                times.setdefault(name, []).append(tuple(taken[b] for b in builds))
        for build in builds:
            build.close()
    rows = []
    for name, pairs in times.items():
        before, after = zip(*pairs, strict=True)
        ratios = sorted(b / a for a, b in pairs)
        quarter = len(ratios) // 4
        rows.append(
            [
                name,
                f"{statistics.median(before):.0f}",
                f"{statistics.median(after):.0f}",
                f"{statistics.median(ratios):.3f}",
                f"{ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}",
            ]
        )
    heading(f"Before and after, {options.entries:,} entries at random")
    table(["operation", "before, ns", "after, ns", "ratio", "middle half"], rows)


if __name__ == "__main__":
    main()
