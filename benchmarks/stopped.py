"""What others notice of a process that is stopped, or killed, while it writes.

The first table has the time of lookups beside a writer that is stopped inside a shard.
The second one has the time that a rebuild takes after a writer was killed inside, and
what a reader of another process sees meanwhile: misses of keys that are there, and its
longest wait.

    python benchmarks/stopped.py [--entries N ...]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

from _bench import heading, table

from shmcache import Cache, LockTimeout

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

BIG = b"x" * (4 << 20)  # writing so much takes long enough to be caught at it
READ = 1_000  # keys that the reader asks for


class Rebuilds(logging.Handler):
    """Notes how long each rebuild took, which the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of the library's log."""
        facts = vars(record)
        if facts.get("rebuilt"):
            self.seconds.append(facts["seconds"])


def forked(body: Any, *arguments: Any) -> int:
    """Return the PID of a child that calls a function."""
    pid = os.fork()
    if pid == 0:
        try:
            body(*arguments)
        finally:
            os._exit(0)
    return pid


def overwrite(cache: Cache) -> None:
    """Overwrite one large value for ever."""
    while True:
        cache["big"] = BIG


def stop_inside(cache: Cache, pid: int) -> None:
    """Stop a writer at a moment at which it holds the lock."""
    while True:
        time.sleep(random.uniform(0.001, 0.003))
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        try:
            cache.touch("probe")
        except LockTimeout:
            return
        os.kill(pid, signal.SIGCONT)


def lookups_beside_a_stopped_writer() -> None:
    """Print how long lookups take while a writer is stopped inside."""
    with Cache(f"stopped-{os.getpid()}", max_bytes="64 MiB", lock_timeout=0.1) as cache:
        cache["there"] = 1
        pid = forked(overwrite, cache)
        stop_inside(cache, pid)
        rows = []
        reader = Cache.attach(cache.name, lock_timeout=5)
        for key in ("there", "absent"):
            times = []
            for _ in range(100):
                start = time.perf_counter()
                reader.get(key)
                times.append(time.perf_counter() - start)
            rest = sorted(times[1:])
            rows.append(
                [key, f"{times[0] * 1e3:.2f}", f"{rest[len(rest) // 2] * 1e3:.3f}"]
            )
        reader.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    heading("Lookups beside a stopped writer, ms")
    table(["key", "the first", "the others, median"], rows)


def insert(cache: Cache, entries: int) -> None:
    """Insert and delete entries for ever, beside those that are there."""
    for n in itertools.count():
        cache[entries + n % 1_000] = n


def read(cache: Cache, link: Connection) -> None:
    """Read keys that are there until told to stop; send misses and longest wait."""
    misses, gets, longest = 0, 0, 0.0
    while not link.poll(0):
        for key in range(READ):
            start = time.perf_counter()
            misses += cache.get(key) is None
            longest = max(longest, time.perf_counter() - start)
            gets += 1
    link.send((misses, gets, longest))


def rebuild(entries: int) -> list[str]:
    """Return a row: what a rebuild of a shard of so many entries looks like."""
    rebuilds = Rebuilds()
    logging.getLogger("shmcache").addHandler(rebuilds)
    cache = Cache(
        f"rebuild-{os.getpid()}",
        max_entries=entries + 2_000,
        max_bytes=(entries + 2_000) * 64,
        shards=1,
        lock_timeout=60,
    )
    with cache:
        cache.set_many(dict.fromkeys(range(entries), 1))
        here, there = multiprocessing.Pipe()
        reader = forked(read, cache, there)
        while not rebuilds.seconds:
            pid = forked(insert, cache, entries)
            time.sleep(random.uniform(0.01, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            cache["probe"] = 1  # takes over, if the writer was inside
        here.send("stop")
        misses, gets, longest = here.recv()
        os.waitpid(reader, 0)
    logging.getLogger("shmcache").removeHandler(rebuilds)
    [took] = rebuilds.seconds
    return [
        f"{entries:,}",
        f"{took * 1e3:.1f}",
        f"{took / entries * 1e9:.0f}",
        f"{misses} of {gets:,}",
        f"{longest * 1e3:.0f}",
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--entries",
        type=int,
        nargs="*",
        default=[10_000, 100_000, 1_000_000, 4_000_000],
    )
    options = parser.parse_args()
    lookups_beside_a_stopped_writer()
    rows = [rebuild(entries) for entries in options.entries]
    heading("A rebuild of one shard after a death inside")
    columns = [
        "entries",
        "rebuild, ms",
        "ns an entry",
        "false misses",
        "longest get, ms",
    ]
    table(columns, rows)


if __name__ == "__main__":
    main()
