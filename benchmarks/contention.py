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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds of one measurement"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    plans: list[tuple[str, Work, int, float | None]] = [
        ("get, 2 processes", reading, 2, 1.8),
        ("get, 4 processes", reading, 4, None),
        ("set, 2 processes", writing, 2, None),
        ("set, 4 processes", writing, 4, 0.7),
        ("set, 8 processes", writing, 8, None),
        ("incr of one key, 4 processes", counting, 4, None),
        ("9 get : 1 set, 4 processes", mixed, 4, None),
    ]
    keys = [f"user:{i:015d}" for i in range(ENTRIES)]
    name = f"contention-{os.getpid()}"
    with Cache(name, max_entries=ENTRIES + ENTRIES // 10) as cache:
        for key in keys:
            cache.set(key, VALUE)
        rows = []
        for title, work, n, target in plans:
            ones, many = [], []
            for _ in range(options.rounds):
                ones.append(throughput(cache, keys, work, 1, options.seconds))
                many.append(throughput(cache, keys, work, n, options.seconds))
            ratio = statistics.median(b / a for a, b in zip(ones, many, strict=True))
            rows.append(
                [
                    title,
                    f"{statistics.median(ones) / 1e3:.0f}",
                    f"{statistics.median(many) / 1e3:.0f}",
                    f"{ratio:.2f}",
                    "" if target is None else f">= {target}",
                    verdict(ratio, target, at_least=True),
                ]
            )
        heading(f"Contention, {ENTRIES:,} entries, {cache.stats().shards} shards")
        table(["what", "1 process, k/s", "all, k/s", "ratio", "target", ""], rows)


if __name__ == "__main__":
    main()
