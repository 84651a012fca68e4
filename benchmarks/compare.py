"""Two states of shmcache, compared operation by operation in one run.

A build is given as the Python interpreter that has it installed.  The builds run the
operations of ``latency.py``, or the plans of ``contention.py``, in processes of their
own, in turn, so that other users of the machine slow both alike.

One and the same source can be a fifth slower or faster, depending on where the compiler
puts its branches.  So give several builds of each state, which differ in that alone:
``CFLAGS=-falign-functions=64 pip install .``, and 32, and ``-falign-jumps=16``, say.  A
process, too, is slower or faster for all its life, depending on where its memory lies.
So there are many pairs of processes, and the builds of each state take turns.  The
table has the mean over the pairs of the median ratio of their rounds, and its standard
error.

    python benchmarks/compare.py BEFORE,BEFORE,... AFTER,AFTER,... [--entries N]
                                 [--pairs N] [--rounds N] [--contention]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _bench import heading, table
from contention import Contention
from latency import Operations

SECONDS = 0.5  # how long processes contend in one measurement
Figures = tuple[float, float, float]  # medians: before (ns), after (ns), their ratio


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


def compare(builds: list[Build], rounds: int, pair: int) -> dict[str, Figures]:
    """Return the figures of each operation, given two builds."""
    for build in builds:
        names = build.names()  # answers after the caches have been filled
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for n in range(rounds):
        order = builds if (pair + n) % 2 else builds[::-1]
        for name, taken in times.items():
            took = {build: build.time(name) for build in order}
            taken.append((took[builds[0]], took[builds[1]]))
    return {
        name: (
            statistics.median(before for before, _ in taken),
            statistics.median(after for _, after in taken),
            statistics.median(after / before for before, after in taken),
        )
        for name, taken in times.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("state", nargs="*", help="interpreters, with commas between")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=8, help="of each pair")
    parser.add_argument("--contention", action="store_true", help="several processes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.entries, options.contention)
        return
    if len(options.state) != 2:
        parser.error("name the interpreters of two states")
    measured: dict[str, list[Figures]] = {}
    for pair in range(options.pairs):
        builds = [
            Build(pythons[pair % len(pythons)], options.entries, options.contention)
            for pythons in (state.split(",") for state in options.state)
        ]
        for name, figures in compare(builds, options.rounds, pair).items():
            measured.setdefault(name, []).append(figures)
        for build in builds:
            build.close()
    rows = []
    for name, pairs in measured.items():
        befores, afters, ratios = zip(*pairs, strict=True)
        rows.append(
            [
                name,
                f"{statistics.median(befores):.0f}",
                f"{statistics.median(afters):.0f}",
                f"{statistics.mean(ratios):.3f}",
                f"{statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}",
            ]
        )
    heading(f"Before and after, {options.entries:,} entries at random")
    table(["operation", "before, ns", "after, ns", "ratio", "+-"], rows)


if __name__ == "__main__":
    main()
