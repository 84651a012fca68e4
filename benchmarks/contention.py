"""How throughput changes with the number of processes that share a cache.

Each figure is a ratio to the throughput of one process in the same run.  The processes
are forked, wait for each other, and work for the same time.  Rounds with one process
and rounds with several alternate, and the median ratio is reported.

    python benchmarks/contention.py [--seconds S] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import struct
import time
from collections.abc import Callable
from typing import ClassVar

from _bench import heading, table, verdict

from shmcache import Cache

ENTRIES = 100_000
VALUE = {"id": 12345678, "name": "user-123", "email": "user12345@example.com",
         "active": True, "score": 3.14159, "tags": [1, 2]}  # fmt: skip
Work = Callable[[Cache, list[str]], None]


def reading(cache: Cache, keys: list[str]) -> None:
    """Read random keys that are there."""
    get = cache.get
    for key in keys:
        get(key)


def writing(cache: Cache, keys: list[str]) -> None:
    """Overwrite random keys."""
    store = cache.set
    for key in keys:
        store(key, VALUE)


def counting(cache: Cache, keys: list[str]) -> None:
    """Increment one key in all processes: this is the worst case for a lock."""
    incr = cache.incr
    for _ in keys:
        incr("the one counter", initial=0)


def mixed(cache: Cache, keys: list[str]) -> None:
    """Mostly read, and sometimes write."""
    for i, key in enumerate(keys):
        if i % 10:
            cache.get(key)
        else:
            cache.set(key, VALUE)


def throughput(
    cache: Cache, keys: list[str], work: Work, n: int, seconds: float
) -> float:
    """Return the operations per second of ``n`` processes together."""
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    out_r, out_w = os.pipe()
    children = []
    for number in range(n):
        pid = os.fork()
        if pid == 0:
            dice = random.Random(number)
            batches = [[dice.choice(keys) for _ in range(500)] for _ in range(20)]
            work(cache, batches[0])
            os.write(ready_w, b"r")
            os.close(go_w)
            os.read(go_r, 1)  # returns when the parent closes its end
            started = time.perf_counter()
            done = 0
            while time.perf_counter() - started < seconds:
                work(cache, batches[done % 20])
                done += 1
            rate = done * 500 / (time.perf_counter() - started)
            os.write(out_w, struct.pack("d", rate))
            cache.close()
            os._exit(0)
        children.append(pid)
    for _ in range(n):
        os.read(ready_r, 1)
    os.close(go_w)
    total = sum(struct.unpack("d", os.read(out_r, 8))[0] for _ in range(n))
    for pid in children:
        os.waitpid(pid, 0)
    for fd in (ready_r, ready_w, go_r, out_r, out_w):
        os.close(fd)
    return float(total)


class Contention:
    """Throughput of several processes on one cache.

    Args:
        seconds: How long each measurement takes.
        entries: How many entries the cache has.
    """

    # Each row of the table: what the processes do, how many there are, and how many
    # times the throughput of one process they must reach together.
    plans: ClassVar[dict[str, tuple[Work, int, float | None]]] = {
        "get, 2 processes": (reading, 2, 1.8),
        "get, 4 processes": (reading, 4, None),
        "set, 2 processes": (writing, 2, None),
        "set, 4 processes": (writing, 4, 0.7),
        "set, 8 processes": (writing, 8, None),
        "incr of one key, 4 processes": (counting, 4, None),
        "9 get : 1 set, 4 processes": (mixed, 4, None),
    }

    def __init__(self, seconds: float, entries: int = ENTRIES) -> None:
        self._seconds = seconds
        self._keys = [f"user:{i:015d}" for i in range(entries)]
        self.cache = Cache(
            f"contention-{os.getpid()}", max_entries=entries + entries // 10
        )
        for key in self._keys:
            self.cache.set(key, VALUE)

    def names(self) -> list[str]:
        """Return what can be measured."""
        return list(self.plans)

    def rate(self, name: str, processes: int | None = None) -> float:
        """Return the operations per second of a plan, by default with its processes."""
        work, n, _ = self.plans[name]
        return throughput(self.cache, self._keys, work, processes or n, self._seconds)

    def time(self, name: str) -> float:
        """Return the nanoseconds of all processes together for one operation."""
        return 1e9 / self.rate(name)

    def close(self) -> None:
        """Remove the cache."""
        self.cache.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds of one measurement"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    contention = Contention(options.seconds)
    rows = []
    for name, (_, _, target) in contention.plans.items():
        ones, many = [], []
        for _ in range(options.rounds):
            ones.append(contention.rate(name, 1))
            many.append(contention.rate(name))
        ratio = statistics.median(b / a for a, b in zip(ones, many, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(ones) / 1e3:.0f}",
                f"{statistics.median(many) / 1e3:.0f}",
                f"{ratio:.2f}",
                "" if target is None else f">= {target}",
                verdict(ratio, target, at_least=True),
            ]
        )
    heading(
        f"Contention, {ENTRIES:,} entries, {contention.cache.stats().shards} shards"
    )
    table(["what", "1 process, k/s", "all, k/s", "ratio", "target", ""], rows)
    contention.close()


if __name__ == "__main__":
    main()
