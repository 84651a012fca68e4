"""Time: TTLs, sliding expiry, what has expired, and who removes it."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import pytest
from caches import NO_USES, PATIENCE, TICK, USES, MakeCache, by_age

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Clock

    from shmcache import Cache


def test_ttl_of_the_cache_and_of_a_call(make_cache: MakeCache, clock: Clock) -> None:
    """Without ttl a call uses the cache's TTL; None means no expiry; a number means
    itself."""
    cache = make_cache(ttl=60, clock=clock)
    cache.set("default", 1)
    cache.set("own", 1, ttl=0.25)
    cache.set("never", 1, ttl=None)
    cache["item"] = 1
    cache.add("added", 1)
    assert cache.ttl("default") == 60
    assert cache.ttl("own") == 0.25
    assert cache.ttl("never") is None
    assert cache.ttl("item") == 60
    assert cache.ttl("added") == 60
    clock.advance(0.25)
    assert set(cache) == {"default", "never", "item", "added"}
    assert cache.ttl("default") == 59.75
    clock.advance(60)
    assert set(cache) == {"never"}


READS: dict[str, Callable[[Cache], object]] = {
    "get": lambda c: c.get("k"),
    "peek": lambda c: c.peek("k"),
    "in": lambda c: "k" in c or None,
    "get_many": lambda c: c.get_many(["k"]) or None,
    "gets": lambda c: c.gets("k")[1],
    "pop": lambda c: c.pop("k", None),
    "delete": lambda c: c.delete("k") or None,
    "touch": lambda c: c.touch("k") or None,
    "replace": lambda c: c.replace("k", 1) or None,
    "iteration": lambda c: list(c) or None,
    "items": lambda c: list(c.items()) or None,
    "len": lambda c: len(c) or None,
    "delete_many": lambda c: c.delete_many(["k"]) or None,
    "clear": lambda c: c.clear() or None,
    "popitem": lambda c: by_age(c) or None,
}


@pytest.mark.parametrize("read", READS)
def test_entry_lives_to_the_nanosecond(
    make_cache: MakeCache, clock: Clock, read: str
) -> None:
    """An entry is there one nanosecond before its expiry, and is not there at it."""
    cache = make_cache(clock=clock)
    for expired, ttl in enumerate([1e-9, 0.001, 0.5, 100.0, 1e6, 1e9]):
        cache.set("k", 1, ttl=ttl)
        clock.ns += round(ttl * 1e9) - 1
        assert READS[read](cache) is not None
        cache.clear()
        cache.set("k", 1, ttl=ttl)
        clock.ns += round(ttl * 1e9)
        assert READS[read](cache) is None
        assert (len(cache), cache.stats().expired) == (0, expired + 1)


def test_clock_in_seconds(make_cache: MakeCache) -> None:
    """A clock may return seconds as a float, such as time.monotonic does."""
    now = [1000.0]
    cache = make_cache(clock=lambda: now[0])
    cache.set("k", 1, ttl=1.5)
    now[0] += 1.25
    assert cache.ttl("k") == 0.25
    now[0] += 0.25
    assert "k" not in cache


CALLS: dict[str, Callable[[Cache], object]] = {**USES, **NO_USES}


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("operation", CALLS)
def test_clock_that_raises(
    make_cache: MakeCache, operation: str, sliding: bool
) -> None:
    """Whenever the clock raises, the caller gets what it raised, and no shard has to be
    rebuilt: the lock is not held while the clock is asked."""
    calls, bad_call = itertools.count(), -1

    def clock() -> int:
        if next(calls) == bad_call:
            raise ZeroDivisionError
        return 1_000_000_000_000

    cache = make_cache(ttl=60, sliding=sliding, clock=clock, cleanup_interval=3600)
    cache["a"] = 1
    failures = 0
    while True:
        calls, bad_call = itertools.count(), failures
        try:
            CALLS[operation](cache)
        except ZeroDivisionError:
            failures += 1
        else:
            break
    bad_call = -1
    assert cache.stats().recoveries == 0
    assert cache["a"] in {1, 2, 5}


def test_own_clock(make_cache: MakeCache) -> None:
    """Without a clock real time counts: an entry with a short TTL goes."""
    cache = make_cache()
    cache.set("brief", 1, ttl=0.001)
    cache.set("long", 1, ttl=3600)
    left = cache.ttl("long")
    assert left is not None
    assert 3500 < left <= 3600
    gone = threading.Event()
    while "brief" in cache:
        gone.wait(0.001)
    assert list(cache) == ["long"]


def test_touch_gives_new_time(make_cache: MakeCache, clock: Clock) -> None:
    """touch() sets the expiry anew, by the cache's TTL or a given one: longer, shorter,
    or never."""
    cache = make_cache(ttl=10, clock=clock)
    cache["k"] = 1
    clock.advance(9)
    assert cache.touch("k") is True
    assert cache.ttl("k") == 10
    assert cache.touch("k", ttl=0.5) is True
    assert cache.ttl("k") == 0.5
    assert cache.touch("k", ttl=None) is True
    assert cache.ttl("k") is None
    clock.advance(10**6)
    assert cache.touch("k", ttl=5) is True
    clock.advance(5)
    assert cache.touch("k", ttl=5) is False
    assert len(cache) == 0


RENEWALS: dict[str, Callable[[Cache], object]] = {
    name: USES[name]
    for name in ("get", "[]", "get_many", "gets", "setdefault", "get_or_set", "incr")
}


@pytest.mark.parametrize("use", RENEWALS)
def test_sliding(make_cache: MakeCache, clock: Clock, use: str) -> None:
    """In a sliding cache a hit renews the entry's own TTL, whatever it was."""
    cache = make_cache(ttl=10, sliding=True, clock=clock)
    cache["a"] = 1
    for _ in range(5):
        clock.advance(9)
        RENEWALS[use](cache)
        assert cache.ttl("a") == 10
    clock.ns += 1
    RENEWALS[use](cache)
    assert cache.ttl("a") == 10
    cache.set("a", 1, ttl=3)
    clock.advance(2)
    RENEWALS[use](cache)
    assert cache.ttl("a") == 3
    clock.advance(3)
    assert "a" not in cache
    assert len(cache) == 0
    cache.set("a", 1, ttl=None)
    RENEWALS[use](cache)
    assert cache.ttl("a") is None


@pytest.mark.parametrize("use", NO_USES)
def test_looking_does_not_slide(make_cache: MakeCache, clock: Clock, use: str) -> None:
    """Calls that only look leave the expiry of a sliding entry as it was."""
    cache = make_cache(ttl=10, sliding=True, clock=clock)
    cache["a"] = 1
    clock.advance(4)
    NO_USES[use](cache)
    assert cache.ttl("a") == 6


@pytest.mark.parametrize("use", RENEWALS)
def test_without_sliding_time_runs_on(
    make_cache: MakeCache, clock: Clock, use: str
) -> None:
    """In a cache that does not slide, hits leave an entry's expiry as it was."""
    cache = make_cache(ttl=10, clock=clock)
    cache["a"] = 1
    clock.advance(4)
    RENEWALS[use](cache)
    assert cache.ttl("a") == 6


def test_sliding_in_the_wheel(make_cache: MakeCache, clock: Clock) -> None:
    """Entries that were renewed many times are swept at their last expiry, not
    before."""
    cache = make_cache(
        ttl=1, sliding=True, clock=clock, max_entries=300, cleanup_interval=3600
    )
    cache.set_many({i: i for i in range(300)})
    for step in range(40):
        clock.advance(0.75)
        for i in range(step, 300):
            assert i == cache.get(i)
        assert cache.sweep() == (1 if step > 1 else 0)
        assert len(cache) == 300 - max(0, step - 1)


@pytest.mark.parametrize("jitter", [0.1, 0.5, 0.999])
def test_jitter(make_cache: MakeCache, clock: Clock, jitter: float) -> None:
    """Each TTL is shortened by a random part of at most the jitter, and none becomes
    longer."""
    cache = make_cache(ttl=1000, jitter=jitter, clock=clock)
    cache.set_many({i: i for i in range(1000)})
    left = [cache.ttl(i) or 0.0 for i in range(1000)]
    least = 1000 * (1 - jitter)
    assert all(least - 0.01 <= ttl <= 1000 for ttl in left)
    assert len(set(left)) > 900
    width = 1000 * jitter / 10
    tenths = [
        sum(0 <= ttl - least - i * width < width for ttl in left) for i in range(10)
    ]
    assert all(50 < n < 150 for n in tenths), tenths


def test_jitter_of_single_calls(make_cache: MakeCache, clock: Clock) -> None:
    """Jitter applies to touch(), to incr() and to a TTL of one call; None stays
    None."""
    cache = make_cache(jitter=0.5, clock=clock)
    cache.set("never", 1, ttl=None)
    assert cache.ttl("never") is None
    ways: list[Callable[[], object]] = [
        lambda: cache.set("k", 1, ttl=8),
        lambda: cache.touch("k", ttl=8),
        lambda: cache.incr("k", ttl=8),
        lambda: cache.replace("k", 1, ttl=8),
    ]
    for way in ways:
        left = set()
        for _ in range(20):
            way()
            left.add(cache.ttl("k"))
        assert all(ttl is not None and 4 <= ttl <= 8 for ttl in left)
        assert len(left) > 10


def test_sweep_removes_what_has_expired(make_cache: MakeCache, clock: Clock) -> None:
    """sweep() removes all that has expired, and only that, and returns how many."""
    cache = make_cache(clock=clock, max_entries=4000, shards=2)
    for i in range(1000):
        cache.set(i, i, ttl=1 + i % 10)
        cache.set(str(i), i)
    clock.advance(5)
    assert cache.sweep() == 500
    assert cache.sweep() == 0
    assert cache.stats().entries == 1500
    clock.advance(5)
    assert cache.sweep() == 500
    assert cache.stats().expired == 1000
    assert sorted(cache) == sorted(str(i) for i in range(1000))


def test_sweep_within_a_tick(make_cache: MakeCache, clock: Clock) -> None:
    """sweep() ends although many entries of the wheel's current tick expire later."""
    clock.ns = 1000 * TICK
    cache = make_cache(clock=clock)
    cache.set("early", 0, ttl=10 * TICK / 1e9)
    clock.ns += 1000
    for i in range(200):
        cache.set(i, i, ttl=10 * TICK / 1e9)
    clock.ns += 10 * TICK - 1000
    assert cache.sweep() == 1
    assert len(cache) == 200
    clock.ns += 1000
    assert len(cache) == 0


def test_sweep_on_a_budget(make_cache: MakeCache, clock: Clock) -> None:
    """With a budget of no time sweep() does one bounded step, and the next call goes
    on."""
    cache = make_cache(clock=clock, max_entries=5000)
    cache.set_many({i: i for i in range(5000)}, ttl=1)
    clock.advance(1)
    first = cache.sweep(budget=0)
    assert 0 < first < 1000
    assert cache.stats().entries == 5000 - first
    assert cache.sweep(budget=60) == 5000 - first
    assert cache.stats().entries == 0


def test_writes_pay_for_sweeping(make_cache: MakeCache, clock: Clock) -> None:
    """Without any sweep, inserts remove what has expired."""
    cache = make_cache(clock=clock, max_entries=1000)
    cache.set_many({i: i for i in range(500)}, ttl=1)
    clock.advance(1)
    for i in range(200):
        cache[f"new {i}"] = i
    assert cache.stats().entries == 200
    assert cache.stats().expired == 500


def test_thread_sweeps_by_itself(make_cache: MakeCache) -> None:
    """The sweeper removes expired entries without any further call."""
    cache = make_cache(cleanup_interval=0.01)
    cache.set("k", 1, ttl=0.001)
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if cache.stats().entries == 0:
            break
        waiting.wait(0.01)
    stats = cache.stats()
    assert (stats.entries, stats.expired) == (0, 1)
    assert stats.sweeps > 0


def test_ages_of_what_was_stored_after_the_clock_was_read(
    make_cache: MakeCache, clock: Clock
) -> None:
    """Who waits for a lock may evict what was stored after it had read the clock; such
    an entry has age 0."""
    cache = make_cache(max_entries=2, clock=clock, cleanup_interval=3600)
    clock.advance(10)
    cache.set_many({"a": 1, "b": 1})
    clock.advance(-5)
    cache["c"] = 1
    clock.advance(1000)
    cache["d"] = 1
    stats = cache.stats()
    assert stats.evicted == 2
    assert stats.eviction_age_seconds == pytest.approx(995, abs=0.2)
    assert sum(stats.eviction_age_buckets) == 2
