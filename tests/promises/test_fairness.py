"""Promise 12: nobody starves."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import posix_ipc
import pytest
from amounts import FAIRNESS_SECONDS, SPARE_PERMITS
from caught import shard_word
from peers import PATIENCE, Peer

from shmcache import Cache
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


WRITERS = 8
LONGEST = 0.25  # s


def run_delay() -> int:
    """For how long the scheduler has kept this thread from running, in ns."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except OSError:
        return 0


def hammer(cache: Cache, number: int, seconds: float) -> tuple[int, float, int]:
    """Write without a pause.  Return the number of operations; and for the longest one
    its seconds without the scheduler's delay, and others' acquisitions meanwhile."""
    acquisitions = cache._words_of(0) + L.S_ACQUISITIONS
    words = cache._attachment.words
    done, longest, passed = 0, 0.0, 0
    end = time.monotonic() + seconds
    before, delayed, taken = time.monotonic(), run_delay(), words[acquisitions]
    while before < end:
        cache[done % 50] = number
        done += 1
        now = time.monotonic()
        if now - before > LONGEST / 4:
            waited = now - before - (run_delay() - delayed) / 1e9
            if waited > longest:
                longest, passed = waited, words[acquisitions] - taken
        if now - before > LONGEST / 4 or done % 64 == 0:
            delayed = run_delay()
            now = time.monotonic()
        before, taken = now, words[acquisitions]
    return done, longest, passed


@pytest.mark.counted
def test_12_spare_permits_let_nobody_in_twice(
    make_cache: Callable[..., Cache],
) -> None:
    """A semaphore that lets several processes in at once still leaves one holder, and
    exact counts."""
    cache = make_cache(max_entries=100, shards=1, lock_timeout=PATIENCE)
    name = cache.name

    def count(link: Connection) -> None:
        with Cache.attach(name, lock_timeout=PATIENCE) as mine:
            link.send("ready")
            link.recv()
            for _ in range(SPARE_PERMITS):
                mine.incr("n", initial=0)
            link.send("done")

    writers = [Peer(count) for _ in range(3)]
    for writer in writers:
        assert writer.hear() == "ready"
    semaphore = posix_ipc.Semaphore(cache._names.semaphore(0))
    for writer in writers:
        writer.say()
    spare = 0
    while not all(writer.link.poll(0) for writer in writers):
        # A process that finds another one inside drops its permit, so permits must be
        # added again.
        if semaphore.value < 2:
            semaphore.release()
            spare += 1
    semaphore.close()
    for writer in writers:
        assert writer.hear() == "done"
        writer.end()
    assert spare > 10
    assert cache["n"] == len(writers) * SPARE_PERMITS
    assert cache.stats().recoveries == 0
    assert cache.check() == []


@pytest.mark.slow
@pytest.mark.counted
def test_12_nobody_starves(make_cache: Callable[..., Cache]) -> None:
    """If eight processes hammer one shard, each gets its turns, and none waits for a
    quarter of a second while others get theirs.

    On a busy machine a process may stand still for longer: that time is known from
    the scheduler if it is the waiting process, and if it is the one that has the lock
    then no turns are taken meanwhile.  So a wait counts for the time that it took
    without the scheduler, but for no more than the turns that passed usually take.
    """
    cache = make_cache(max_entries=100, shards=1, lock_timeout=PATIENCE)
    name = cache.name

    def write(number: int, link: Connection) -> None:
        signal.alarm(PATIENCE + FAIRNESS_SECONDS)
        with Cache.attach(name, lock_timeout=PATIENCE) as mine:
            mine["in"] = 1
            link.send("ready")
            link.recv()
            link.send(hammer(mine, number, FAIRNESS_SECONDS))

    writers = [Peer(partial(write, number)) for number in range(WRITERS)]
    for writer in writers:
        assert writer.hear() == "ready"
    first, started = shard_word(cache, L.S_ACQUISITIONS), time.monotonic()
    for writer in writers:
        writer.say()
    results = []
    for writer in writers:
        assert writer.link.poll(PATIENCE + FAIRNESS_SECONDS)
        results.append(writer.hear())
    turn = (time.monotonic() - started) / (shard_word(cache, L.S_ACQUISITIONS) - first)
    for writer in writers:
        writer.end()
    assert all(done > 10 for done, _, _ in results), results
    worst = max(min(longest, passed * turn) for _, longest, passed in results)
    assert worst < LONGEST, results
