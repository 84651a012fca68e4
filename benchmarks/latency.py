"""How long one operation takes, as a ratio to the floor measured in the same run.

The floor is what a dict of packed values in one process costs: a lookup and
``msgpack.unpackb``, or ``msgpack.packb`` and a store.  There are 100,000 entries, which
are chosen at random.  A key has 20 bytes; a value is a dict that packs into 82 bytes.

Rounds alternate between the floor and each operation.  Before each measurement the same
operation runs without being timed, so that it finds its own data in the CPU's caches,
and not those of the other operations.  The median over the rounds of the ratio within a
round is reported, so that other users of the machine slow both sides alike.

    python benchmarks/latency.py [--entries N] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
from _bench import heading, table, verdict

from shmcache import Cache, compiled

VALUE = {
    "id": 12345678,
    "name": "user-123",
    "email": "user12345@example.com",
    "active": True,
    "score": 3.14159,
    "tags": [1, 2],
}
CHUNK = 10_000
Run = Callable[[Sequence[str]], object]


def each(call: Callable[..., Any], *arguments: Any) -> Run:
    """Return a run that makes one call for each key."""

    def run(keys: Sequence[str]) -> None:
        for key in keys:
            call(key, *arguments)

    return run


class Operations:
    """The operations to time, on caches and a dict.

    Args:
        entries: How many entries each of them has.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.keys = [f"user:{i:015d}" for i in range(entries)]
        self._dice = random.Random(1)
        raw = os.urandom(100)
        plain = {
            key: msgpack.packb({**VALUE, "id": i}) for i, key in enumerate(self.keys)
        }
        unpack, pack = msgpack.unpackb, msgpack.packb
        # There is room for a tenth more entries, so that no shard is full.
        room = entries + entries // 10
        self._caches = [
            Cache(f"latency-{os.getpid()}-{i}", max_entries=n)
            for i, n in enumerate((room, room, room, room, entries // 2))
        ]
        dicts, raws, numbers, self._passing, full = self._caches
        for key in self.keys:
            dicts.set(key, VALUE)
            raws.set(key, raw)
            numbers.set(key, 1)
            full.set(key, VALUE)

        def floor_get(chosen: Sequence[str]) -> None:
            for key in chosen:
                unpack(plain[key])

        def lookup(chosen: Sequence[str]) -> None:
            for key in chosen:
                plain[key]

        def floor_set(chosen: Sequence[str]) -> None:
            for key in chosen:
                plain[key] = pack(VALUE)

        def get_many(chosen: Sequence[str]) -> None:
            for i in range(0, len(chosen), 100):
                dicts.get_many(chosen[i : i + 100])

        self.floors: dict[str, Run] = {"floor: get": floor_get, "floor: set": floor_set}
        # The table has each run, its floor, and how many times as long as the floor it
        # may take.
        self.runs: dict[str, tuple[Run, str, float | None]] = {
            "get, hit": (each(dicts.get), "floor: get", 1.4),
            "get_many(100), per key": (get_many, "floor: get", 1.3),
            "set, overwrite": (each(dicts.set, VALUE), "floor: set", 1.5),
            "set, insert and evict": (each(full.set, VALUE), "floor: set", 1.5),
            "get, 100 raw bytes": (each(raws.get), "floor: get", 0.42),
            "get, miss": (each(dicts.get), "floor: get", 0.25),
            "delete": (each(self._passing.delete), "floor: get", 0.5),
            "incr": (each(numbers.incr), "floor: get", 0.5),
            "set, 100 raw bytes": (each(raws.set, raw), "floor: set", None),
            "in": (each(dicts.__contains__), "floor: get", None),
            "a dict's lookup alone": (lookup, "floor: get", None),
        }

    def names(self) -> list[str]:
        """Return what can be measured."""
        return [*self.floors, *self.runs]

    def time(self, name: str) -> float:
        """Return the mean time (ns) of an operation, over one chunk of random keys."""
        keys, dice, entries = self.keys, self._dice, self.entries
        chosen = [keys[dice.randrange(entries)] for _ in range(CHUNK)]
        if name == "get, miss":
            chosen = [key[:-1] + "x" for key in chosen]
        elif name == "delete":
            chosen = list(set(chosen))
            for key in chosen:
                self._passing.set(key, 1)
            dice.shuffle(chosen)
        run = self.floors[name] if name in self.floors else self.runs[name][0]
        if name != "delete":
            run([keys[dice.randrange(entries)] for _ in range(2 * CHUNK)])
        started = time.perf_counter_ns()
        run(chosen)
        return (time.perf_counter_ns() - started) / len(chosen)

    def close(self) -> None:
        """Remove the caches."""
        for cache in self._caches:
            cache.close()


def latency(entries: int, rounds: int) -> None:
    """Print the table of single operations."""
    operations = Operations(entries)
    times: dict[str, list[float]] = {name: [] for name in operations.names()}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(operations.time(name))
    operations.close()

    rows: list[list[object]] = [
        [name, f"{statistics.median(times[name]):.0f}", "1.00", "", ""]
        for name in operations.floors
    ]
    for name, (_, floor, target) in operations.runs.items():
        ratio = statistics.median(
            ours / theirs
            for ours, theirs in zip(times[name], times[floor], strict=True)
        )
        rows.append(
            [
                f"{name} / {floor[7:]}",
                f"{statistics.median(times[name]):.0f}",
                f"{ratio:.2f}",
                "" if target is None else f"<= {target}",
                verdict(ratio, target),
            ]
        )
    heading(f"Latency, {entries:,} entries at random")
    table(["operation / its floor", "ns", "ratio", "target", ""], rows)


def sweeping(rounds: int) -> None:
    """Measure a sweep of 1,000 expired entries, in a small and in a large cache."""

    class Clock:
        now = 10**12

        def __call__(self) -> int:
            return self.now

    def prepare(entries: int, clock: Clock) -> Cache:
        name = f"sweep-{os.getpid()}-{entries}"
        cache = Cache(
            name,
            max_entries=entries + entries // 10 + 1000,
            max_bytes=256 * entries,
            shards=4,
            clock=clock,
        )
        for i in range(entries - 1000):
            cache.set(i, b"x", ttl=10_000_000)
        return cache

    clock = Clock()
    small, large = prepare(10_000, clock), prepare(1_000_000, clock)
    times: dict[Cache, list[int]] = {small: [], large: []}
    for _ in range(rounds):
        for cache, taken in times.items():
            for i in range(1000):
                cache.set(f"t{i}", b"x", ttl=1)
            clock.now += 2 * 10**9
            started = time.perf_counter_ns()
            removed = cache.sweep()
            taken.append(time.perf_counter_ns() - started)
            if removed < 900:  # inserts have removed the others already
                raise AssertionError(removed)
    ratio = statistics.median(
        b / a for a, b in zip(times[small], times[large], strict=True)
    )
    heading("Sweep of 1,000 expired entries")
    table(
        ["entries in the cache", "us", "ratio", "target", ""],
        [
            ["10,000", f"{statistics.median(times[small]) / 1e3:.0f}", "1.00", "", ""],
            [
                "1,000,000",
                f"{statistics.median(times[large]) / 1e3:.0f}",
                f"{ratio:.2f}",
                "<= 1.5",
                verdict(ratio, 1.5),
            ],
        ],
    )
    small.close()
    large.close()


def large_values(rounds: int) -> None:
    """Measure values that take many blocks."""
    rows = []
    for size in (1 << 10, 1 << 14, 1 << 16, 1 << 20):
        name = f"large-{os.getpid()}"
        with Cache(name, max_entries=256, max_bytes=max(1 << 22, 64 * size)) as cache:
            value = os.urandom(size)
            for i in range(32):
                cache.set(i, value)
            taken: dict[str, list[float]] = {"get": [], "set": []}
            for _ in range(rounds):
                for what, call in (("get", cache.get), ("set", cache.set)):
                    extra = () if what == "get" else (value,)
                    started = time.perf_counter_ns()
                    for i in range(32):
                        call(i, *extra)
                    taken[what].append((time.perf_counter_ns() - started) / 32e3)
            rows.append(
                [f"{size >> 10} KiB"]
                + [f"{statistics.median(taken[what]):.1f}" for what in taken]
            )
    heading("Large values (bytes)")
    table(["size", "get, us", "set, us"], rows)


def footprint() -> None:
    """Measure the import time without Python's own, and the memory of an entry."""
    script = "import time; t = time.perf_counter(); import shmcache;"
    script += "print(time.perf_counter() - t)"
    imports = []
    for _ in range(11):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        imports.append(float(done.stdout) * 1e3)
    with Cache(f"footprint-{os.getpid()}", max_entries=100_000) as cache:
        geometry = cache.internals.attachment.header.geometry
    per_entry = (
        geometry.arena_at - geometry.buckets_at - 4 * (geometry.blocks + 1)
    ) / (geometry.slots - 1)
    heading("Footprint")
    table(
        ["what", "figure", "target", ""],
        [
            [
                "import shmcache, ms",
                f"{statistics.median(imports):.0f}",
                "< 40",
                verdict(statistics.median(imports), 40),
            ],
            ["record and bucket, bytes an entry", f"{per_entry:.1f}", "", ""],
            ["link, bytes a block", "4", "", ""],
            [
                "bytes an entry of one block",
                f"{per_entry + 4:.1f}",
                "<= 72",
                verdict(round(per_entry + 4, 1), 72.1),
            ],
        ],
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=30 if compiled else 2)
    options = parser.parse_args()
    footprint()  # first, while the CPU's caches have no data of other measurements
    latency(options.entries, options.rounds)
    if compiled:
        sweeping(min(options.rounds, 20))
    large_values(min(options.rounds, 20))


if __name__ == "__main__":
    main()
