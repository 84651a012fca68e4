"""Calls for many keys: get_many() and its like, iteration, clear(), counts."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from caches import PATIENCE, MakeCache, contents, python

import shmcache
from shmcache._format import layout as fmt

if TYPE_CHECKING:
    from conftest import Clock


# --- many keys ------------------------------------------------------------------


def test_many(make_cache: MakeCache, clock: Clock) -> None:
    """get_many() returns what was found; set_many() and delete_many() treat each
    key."""
    cache = make_cache(ttl=60, clock=clock)
    cache.set_many({"a": 1, "b": None, ("c", 1): 3}, ttl=5)
    cache.set_many({"d": 4})
    wanted = ["d", "x", ("c", 1), "b", "b"]
    assert cache.get_many(wanted) == {"d": 4, ("c", 1): 3, "b": None}
    assert list(cache.get_many(wanted)) == ["d", ("c", 1), "b"]
    assert (cache.ttl("a"), cache.ttl("d")) == (5, 60)
    assert cache.get_many([]) == {}
    assert cache.get_many(iter(["a"])) == {"a": 1}
    assert cache.delete_many(["a", "x", "d", "a"]) == 2
    assert cache.delete_many(key for key in ["b"]) == 1
    assert list(cache) == [("c", 1)]


def test_set_many_is_each_by_itself(make_cache: MakeCache) -> None:
    """If one value of a mapping is refused, the entries before it are stored."""
    cache = make_cache()
    with pytest.raises(shmcache.UnsupportedValue):
        cache.set_many({"a": 1, "b": object(), "c": 3})
    assert contents(cache) == {"a": 1}


# --- iteration and views --------------------------------------------------------


def test_views(make_cache: MakeCache) -> None:
    """keys(), values() and items() are live views, as those of a dict."""
    cache = make_cache()
    keys, values, items = cache.keys(), cache.values(), cache.items()
    cache.update({"a": 1, ("b",): 2, 3: None})
    expected = {"a": 1, ("b",): 2, 3: None}
    assert set(expected) == set(keys)
    assert set(expected.items()) == set(items)
    assert {1, 2, None} == set(values)
    assert [len(keys), len(values), len(items)] == [3, 3, 3]
    assert "a" in keys
    assert "x" not in keys
    assert ("a", 1) in items
    assert ("a", 2) not in items
    assert ("x", None) not in items
    assert 2 in values
    assert 5 not in values
    assert keys & {"a", "x"} == {"a"}
    assert items - {("a", 1)} == {(("b",), 2), (3, None)}
    assert dict(cache) == expected


def test_items_can_be_asked_for_anything(make_cache: MakeCache) -> None:
    """items() answers whether a pair is there also for pairs that cannot be, as a dict
    does."""
    cache = make_cache()
    cache["a"] = 1
    pairs: list[Any] = ["a", 5, ("a",), ("a", 1, 2), (None, 1)]
    assert [pair in cache.items() for pair in pairs] == [False] * 5


def test_iteration_meets_all_once(make_cache: MakeCache) -> None:
    """Iteration over several shards meets each of thousands of entries once."""
    cache = make_cache(max_entries=5000, shards=4)
    stored = {i: str(i) for i in range(4000)}
    cache.set_many(stored)
    assert sorted(stored) == sorted(cache)
    assert sorted(stored.items()) == sorted(cache.items())
    assert sorted(stored.values()) == sorted(cache.values())


def test_iteration_while_this_thread_writes(make_cache: MakeCache) -> None:
    """Entries that live throughout are met once, although all others change at each
    step."""
    cache = make_cache(max_entries=4000, max_bytes="8 MiB", shards=2)
    stay = range(500)
    cache.set_many(dict.fromkeys(stay, 0))
    rng, fresh = random.Random(3), count()
    coming = [f"early {i}" for i in range(500)]
    cache.set_many(dict.fromkeys(coming, 0))
    met = []
    for key in cache:
        met.append(key)
        cache[rng.choice(stay)] = b"x" * rng.randrange(1000)
        coming.append(f"late {next(fresh)}")
        cache[coming[-1]] = 1
        cache.delete(coming.pop(rng.randrange(len(coming))))
    assert sorted(k for k in met if isinstance(k, int)) == list(stay)
    assert len(met) == len(set(met))


WRITER = """
import sys, random, threading, shmcache
cache = shmcache.Cache.attach(sys.argv[1])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set())).start()
rng, rounds = random.Random(4), 0
while not stop.is_set():
    for _ in range(200):
        cache[rng.randrange(300)] = b"x" * rng.randrange(800)
        cache["late", rng.randrange(300)] = rng.random()
        cache.delete(("late", rng.randrange(300)))
    rounds += 1
    if rounds == 1:
        print("ready", flush=True)
print(rounds)
"""


def test_iteration_while_another_process_writes(
    make_cache: MakeCache, name: str
) -> None:
    """Entries that live throughout are met once while another process changes all
    others."""
    cache = make_cache(name, max_entries=2000, max_bytes="4 MiB")
    cache.set_many(dict.fromkeys(range(300), 0))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        for _ in range(20):
            met = [key for key in cache if isinstance(key, int)]
            assert sorted(met) == list(range(300))
            pairs = [value for key, value in cache.items() if isinstance(key, int)]
            assert len(pairs) == 300
        writer.stdin.close()
        assert int(writer.stdout.read()) > 0
    assert writer.returncode == 0


def test_iteration_while_a_thread_writes(make_cache: MakeCache) -> None:
    """Entries that live throughout are met once while another thread changes all
    others."""
    cache = make_cache(max_entries=2000, max_bytes="4 MiB")
    cache.set_many(dict.fromkeys(range(300), 0))
    stop, started = threading.Event(), threading.Event()

    def write() -> None:
        rng = random.Random(5)
        while not stop.is_set():
            cache[rng.randrange(300)] = b"x" * rng.randrange(800)
            cache["late", rng.randrange(300)] = rng.random()
            cache.delete(("late", rng.randrange(300)))
            started.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(PATIENCE)
        for _ in range(10):
            met = [key for key in cache if isinstance(key, int)]
            assert sorted(met) == list(range(300))
    finally:
        stop.set()
        writer.join()


# --- clearing -------------------------------------------------------------------


def test_clear(make_cache: MakeCache, clock: Clock) -> None:
    """clear() removes all entries and returns how many lived; then the cache is like a
    new one."""
    cache = make_cache(max_entries=3000, shards=2, clock=clock)
    cache.set_many({i: i for i in range(2000)})
    cache.set_many({str(i): i for i in range(10)}, ttl=1)
    clock.advance(1)
    assert cache.clear() == 2000
    assert (len(cache), list(cache)) == (0, [])
    assert cache.clear() == 0
    stats = cache.stats()
    assert (
        stats.removed["CLEARED"],
        stats.removed["EXPIRED"],
        stats.bytes_used,
    ) == (2000, 10, 0)
    cache.set_many({i: i for i in range(2000)})
    assert len(cache) == 2000


@pytest.mark.parametrize(
    ("prefix", "gone"),
    [
        ("user:", ["user:", "user:1", "user:12"]),
        ("user:1", ["user:1", "user:12"]),
        ("", ["user:", "user:1", "user:12", "use", "", "ä"]),
        ("ä", ["ä"]),
        ("nobody", []),
        (b"user:", [b"user:1"]),
        (b"", [b"user:1"]),
        (("user",), [("user",), ("user", 1), ("user", 1, "x"), ("user", 12)]),
        (("user", 1), [("user", 1), ("user", 1, "x")]),
        (("use",), []),
        ((), [(), ("user",), ("user", 1), ("user", 1, "x"), ("user", 12), (1,)]),
    ],
)
def test_clear_of_a_prefix(make_cache: MakeCache, prefix: Any, gone: list[Any]) -> None:
    """clear(prefix) removes the keys of its type that begin with it; tuples begin by
    elements."""
    keys: list[Any] = [
        *("user:", "user:1", "user:12", "use", "", "ä", b"user:1", 1, 12),
        *((), ("user",), ("user", 1), ("user", 1, "x"), ("user", 12), (1,)),
    ]
    cache = make_cache(shards=3)
    cache.set_many(dict.fromkeys(keys, 1))
    assert len(gone) == cache.clear(prefix)
    assert {k for k in keys if k not in gone} == set(cache)
    assert cache.clear(prefix=prefix) == 0


# --- counts ---------------------------------------------------------------------


def test_stats(make_cache: MakeCache, name: str, clock: Clock) -> None:
    """Each count of stats() is the number of times that its event happened."""
    cache = make_cache(name, max_entries=4, ttl=10, clock=clock, cleanup_interval=3600)
    cache.update(a=1, b=2, c=3, d=4)
    assert [cache.get(k) for k in "abx"] == [1, 2, None]
    cache["e"] = 5  # evicts c
    cache["e"] = 6
    cache.delete("d")
    clock.advance(10)
    cache.set("f", 1, ttl=50)
    cache.get_many(["f", "y"])
    with pytest.raises(shmcache.EntryTooLarge):
        cache["g"] = b"x" * (2 << 20)
    cache.sweep()
    cache.clear()
    stats = cache.stats()
    assert stats.removed == {
        "EXPIRED": 3,
        "CAPACITY": 1,
        "DELETED": 1,
        "REPLACED": 1,
        "CLEARED": 1,
        "OWNER_DIED": 0,
        "CLOSED": 0,
    }
    assert (stats.expired, stats.evicted) == (3, 1)
    assert (stats.hits, stats.misses, stats.sets) == (3, 2, 7)
    assert stats.hit_ratio == 0.6
    assert stats.unread == 2  # c and e; a and b had been read
    assert stats.too_large == 1
    assert (stats.entries, stats.bytes_used) == (0, 0)
    assert (stats.max_entries, stats.bytes_capacity) == (4, 1 << 20)
    assert (name, 1, 1) == (stats.name, stats.shards, stats.workers)
    assert (stats.recoveries, stats.dropped, stats.lock_timeouts) == (0, 0, 0)
    assert shmcache.compiled is stats.compiled
    assert stats.age > 0
    assert stats.sweeps == 1


def test_stats_say_when_they_are_of_no_moment(make_cache: MakeCache) -> None:
    """A shard whose writer stands still inside is counted as unstable, and as stable
    again when the writer has come out.
    """
    cache = make_cache(max_entries=100, shards=4)
    cache["a"] = 1
    attachment = cache.internals.attachment
    seq = attachment.header.geometry.shard_at(2) + fmt.S_SEQ
    assert cache.stats().unstable_shards == 0
    attachment.words[seq] += 1
    assert cache.stats().unstable_shards == 1
    attachment.words[seq] += 1
    assert cache.stats().unstable_shards == 0


def test_stats_add_up(make_cache: MakeCache) -> None:
    """After any history, the sets less all that went are the entries that are there."""
    cache = make_cache(max_entries=50, shards=3)
    rng = random.Random(6)
    lookups = 0
    for _ in range(5000):
        key = rng.randrange(100)
        if rng.random() < 0.5:
            cache.set(key, b"x" * rng.randrange(300), ttl=rng.choice([None, 1e-6, 9]))
        elif rng.random() < 0.5:
            cache.get(key)
            lookups += 1
        else:
            cache.delete(key)
    stats = cache.stats()
    assert stats.entries == stats.sets - sum(stats.removed.values())
    assert stats.hits + stats.misses == lookups
    assert cache.check() == []


def test_hit_ratio_of_nothing(make_cache: MakeCache) -> None:
    """Before the first lookup the ratio is 0.0, not an error."""
    assert make_cache().stats().hit_ratio == 0.0


def test_counts_of_the_gone_are_kept(make_cache: MakeCache, name: str) -> None:
    """The sums keep the hits and misses of a process that has ended."""
    cache = make_cache(name)
    cache["a"] = 1
    code = (
        "import shmcache, sys; c = shmcache.Cache.attach(sys.argv[1]);"
        "[c.get(k) for k in 'aax']; print(c.stats().workers)"
    )
    assert [python(code, name) for _ in range(3)] == ["2"] * 3
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.workers) == (6, 3, 1)
