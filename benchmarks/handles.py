"""What a ``HandleMap`` costs: calls, and reading the eviction mailbox.

- get, lease and set of a handle, as ratios to a dict's lookup under a lock;
- the time from another process's ``clear()`` to the callback in an idle owner;
- the CPU time that an idle owner of 1,000 handles spends on reading the mailbox.

    python benchmarks/handles.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from _bench import heading, table

from shmcache import Cause, HandleMap

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

CALLS = 20_000
IDLE_SECONDS = 5.0


def each(call: Callable[[int], object]) -> float:
    """Return how many nanoseconds a call takes."""
    started = time.perf_counter_ns()
    for n in range(CALLS):
        call(n % 1000)
    return (time.perf_counter_ns() - started) / CALLS


def calls(rounds: int) -> None:
    """Print the table of single operations."""
    handles = HandleMap(f"handles-{os.getpid()}", max_entries=2000)
    plain: dict[int, object] = {}
    lock = threading.Lock()
    for n in range(1000):
        handles[n] = plain[n] = object()

    def locked(key: int) -> object:
        with lock:
            return plain[key]

    def lease(key: int) -> None:
        with handles.lease(key):
            pass

    other = object()
    runs: dict[str, Callable[[int], object]] = {
        "a dict's lookup under a lock": locked,
        "get": handles.get,
        "lease": lease,
        "set": lambda key: handles.set(key, other),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(each(run))
    handles.close()
    heading("Handles, 1,000 of one worker")
    floor = times["a dict's lookup under a lock"]
    rows: list[list[str]] = []
    for name, taken in times.items():
        ratios = (a / b for a, b in zip(taken, floor, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(taken):.0f}",
                f"{statistics.median(ratios):.1f}",
            ]
        )
    table(["call", "ns", "ratio"], rows)


def own(name: str, handles: int, link: Connection) -> None:
    """Run an owner that only waits, and that reports when its handles are closed."""

    def closed(_key: Any, _handle: Any, _cause: Cause) -> None:
        link.send(time.monotonic())

    mine = HandleMap(name, max_entries=2000, on_evict=closed)
    while (word := link.recv()) != "end":
        if word == "open":
            mine["k"] = object()
        elif word == "fill":
            for n in range(handles):
                mine.set(n, n, on_evict=lambda *_: None)
        link.send(time.process_time())
    mine.close()


def mailbox(rounds: int) -> None:
    """Measure how soon an idle owner learns of an eviction, and what reading costs."""
    name = f"mailbox-{os.getpid()}"
    here, there = get_context("fork").Pipe()
    owner = get_context("fork").Process(target=own, args=(name, 1000, there))
    owner.start()
    taken: list[float] = []
    with HandleMap(name, max_entries=2000) as other:
        for _ in range(5 * rounds):
            here.send("open")
            here.recv()
            time.sleep(
                0.003 * (len(taken) % 13)
            )  # at a random phase of the owner's interval
            started = time.monotonic()
            other.clear()
            taken.append((here.recv() - started) * 1e3)
        here.send("fill")
        here.recv()
        here.send("time")
        before = here.recv()
        time.sleep(IDLE_SECONDS)
        here.send("time")
        share = (here.recv() - before) / IDLE_SECONDS
        here.send("end")
        owner.join()
    taken.sort()
    heading("Eviction mailbox")
    table(
        ["what", "figure", "target"],
        [
            ["clear() to callback, median, ms", f"{taken[len(taken) // 2]:.0f}", "100"],
            ["clear() to callback, longest, ms", f"{taken[-1]:.0f}", "1000"],
            ["CPU of an idle owner of 1,000 handles, %", f"{100 * share:.2f}", ""],
        ],
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    calls(options.rounds)
    mailbox(options.rounds)


if __name__ == "__main__":
    main()
