"""The public API of one cache: every method, default, refusal and promise of it.

One long file, as it is read beside the API table: settings, reading and writing, room
and recency, time, numbers, versions, many keys, iteration, clearing, counts, life,
codecs.  Everything here is one process, or two that take turns.
"""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from itertools import count
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
import xxhash

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt

if TYPE_CHECKING:
    from conftest import Clock

MakeCache = Callable[..., Cache]

PATIENCE = 60.0
TICK = 1 << fmt.WHEEL_TICK_BITS  # ns of the timer wheel's finest list


def files(name: str) -> list[str]:
    """What /dev/shm has of one cache."""
    return sorted(entry for entry in os.listdir("/dev/shm") if name in entry)


def contents(cache: Cache) -> dict[Any, Any]:
    """All live entries, without using them."""
    return dict(cache.items())


def by_age(cache: Cache) -> list[Any]:
    """The keys from the least to the most recently used; empties the cache."""
    keys = []
    with suppress(KeyError):
        while True:
            keys.append(cache.popitem()[0])
    return keys


def python(code: str, *args: str) -> str:
    """What a Python process of its own, with the same engine, prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE,
    ).stdout.strip()


# --- settings -------------------------------------------------------------------


def test_defaults(make_cache: MakeCache) -> None:
    """Left out: 10,000 entries of 512 bytes in one shard, no expiry, nothing fancy."""
    cache = make_cache()
    stats = cache.stats()
    assert (
        stats.max_entries,
        stats.bytes_capacity,
        stats.shards,
    ) == (10_000, 5_120_000, 1)
    cache["key"] = {"a": (1, 2)}
    assert cache.ttl("key") is None
    assert cache["key"] == {"a": (1, 2)}
    assert cache.cleanup_interval == 300


@pytest.mark.parametrize(
    ("entries", "capacity"), [(1, 1 << 20), (2048, 1 << 20), (4096, 2 << 20)]
)
def test_default_of_max_bytes(
    make_cache: MakeCache, entries: int, capacity: int
) -> None:
    """Room follows from max_entries: 512 bytes an entry, at least 1 MiB."""
    assert capacity == make_cache(max_entries=entries).stats().bytes_capacity


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64 KiB", 64 << 10),
        ("64K", 64 << 10),
        ("2MiB", 2 << 20),
        ("0.5 MiB", 512 << 10),
        ("128 kB", 128_000),
        (" 65536 ", 65536),
        ("65536 B", 65536),
    ],
)
def test_size_as_text(make_cache: MakeCache, text: str, size: int) -> None:
    """A size in words is the same as the number that it means."""
    made = make_cache(max_entries=0, max_bytes=text)
    assert size // 256 * 256 == made.stats().bytes_capacity


@pytest.mark.parametrize(
    ("ttl", "interval"),
    [(None, 300.0), (0.5, 1.0), (4, 1.0), (40, 10.0), (1200, 300.0), (10**6, 300.0)],
)
def test_cleanup_interval_follows_ttl(
    make_cache: MakeCache, ttl: float | None, interval: float
) -> None:
    """It is a quarter of the TTL, from one second to five minutes."""
    assert interval == make_cache(ttl=ttl).cleanup_interval


def test_cleanup_interval_can_be_given(make_cache: MakeCache) -> None:
    """A given interval is taken as it is."""
    assert make_cache(ttl=100, cleanup_interval=0.25).cleanup_interval == 0.25


@pytest.mark.parametrize(
    ("entries", "shards"), [(1, 1), (16_384, 1), (16_385, 2), (65_536, 8)]
)
def test_default_of_shards(make_cache: MakeCache, entries: int, shards: int) -> None:
    """One shard, so exact LRU, up to 16,384 entries; more of them above."""
    assert shards == make_cache(max_entries=entries).stats().shards


NONSENSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_entries": -1}, ValueError, "0 bounds by bytes alone"),
    ({"max_entries": 1.5}, TypeError, "must be an int"),
    ({"max_entries": True}, TypeError, "must be an int"),
    ({"max_entries": "10"}, TypeError, "must be an int"),
    ({"max_entries": 1 << 40}, ValueError, "must be from 0 to"),
    ({"max_entries": 0}, ValueError, "give max_bytes"),
    ({"max_bytes": 0}, ValueError, "leave it out"),
    ({"max_bytes": -1}, ValueError, "leave it out"),
    ({"max_bytes": "0 MiB"}, ValueError, "leave it out"),
    ({"max_bytes": "lots"}, ValueError, '"64 MiB"'),
    ({"max_bytes": "-5 MiB"}, ValueError, '"64 MiB"'),
    ({"max_bytes": "5 XB"}, ValueError, '"64 MiB"'),
    ({"max_bytes": "9" * 25}, ValueError, "shards"),
    ({"max_bytes": "9" * 400}, ValueError, '"64 MiB"'),
    ({"max_bytes": "64 i"}, ValueError, '"64 MiB"'),
    ({"max_bytes": 1e6}, TypeError, '"64 MiB"'),
    ({"max_bytes": True}, TypeError, '"64 MiB"'),
    ({"max_bytes": 10}, ValueError, "raise max_bytes"),
    ({"max_bytes": 1 << 62}, ValueError, "raise shards"),
    ({"ttl": 0}, ValueError, "None means that entries never expire"),
    ({"ttl": -1}, ValueError, "None means that entries never expire"),
    ({"ttl": math.nan}, ValueError, "None means that entries never expire"),
    ({"ttl": math.inf}, ValueError, "None means that entries never expire"),
    ({"ttl": 1e18}, ValueError, "None means that entries never expire"),
    ({"ttl": "60"}, TypeError, "number of seconds"),
    ({"ttl": True}, TypeError, "number of seconds"),
    ({"ttl": Fraction(1, 2)}, TypeError, "number of seconds"),
    ({"sliding": 60}, TypeError, "True or False"),
    ({"sliding": "yes"}, TypeError, "True or False"),
    ({"persist": "no"}, TypeError, "True or False"),
    ({"jitter": 1}, ValueError, "0.1 for 10 %"),
    ({"jitter": -0.1}, ValueError, "0.1 for 10 %"),
    ({"jitter": 10}, ValueError, "0.1 for 10 %"),
    ({"jitter": math.nan}, ValueError, "0.1 for 10 %"),
    ({"jitter": "10%"}, TypeError, "0.1 for 10 %"),
    ({"jitter": True}, TypeError, "0.1 for 10 %"),
    ({"cleanup_interval": 0}, ValueError, "leave it out"),
    ({"cleanup_interval": -1}, ValueError, "leave it out"),
    ({"cleanup_interval": math.inf}, ValueError, "leave it out"),
    ({"cleanup_interval": "1"}, TypeError, "leave it out"),
    ({"shards": 0}, ValueError, "leave it out"),
    ({"shards": 257}, ValueError, "leave it out"),
    ({"shards": 2.0}, TypeError, "leave it out"),
    ({"shards": 8, "max_entries": 7}, ValueError, "leave it out"),
    ({"shards": 256, "max_bytes": 4096}, ValueError, "lower shards"),
    ({"lock_timeout": 0}, ValueError, "leave it out"),
    ({"lock_timeout": -1}, ValueError, "leave it out"),
    ({"lock_timeout": None}, TypeError, "leave it out"),
    ({"lock_timeout": math.inf}, ValueError, "leave it out"),
    ({"codec": "json"}, ValueError, "msgpack"),
    ({"codec": None}, ValueError, "msgpack"),
    ({"codec": object()}, ValueError, "dumps and loads"),
    ({"clock": 5}, TypeError, "time.monotonic_ns"),
    ({"clock": lambda: "noon"}, TypeError, "nanoseconds as an int"),
    ({"clock": lambda: None}, TypeError, "nanoseconds as an int"),
    ({"clock": lambda: True}, TypeError, "nanoseconds as an int"),
    ({"clock": lambda: -1}, ValueError, "time.monotonic_ns"),
    ({"clock": lambda: math.nan}, ValueError, "time.monotonic_ns"),
    ({"max_entries": fmt.MAX_INDEX}, shmcache.OutOfSharedMemory, "lower max_bytes"),
]


@pytest.mark.parametrize(("settings", "error", "remedy"), NONSENSE)
def test_nonsense_settings_are_refused(
    name: str, settings: dict[str, Any], error: type[Exception], remedy: str
) -> None:
    """Each is refused by its name, with what to do, and leaves nothing behind."""
    with pytest.raises(error, match=re.escape(remedy)) as caught:
        Cache(name, **settings)
    assert any(setting in str(caught.value) for setting in (*settings, "shared"))
    assert files(name) == []


@pytest.mark.parametrize(
    "nonsense",
    ["", "a/b", "ä", "a b", "a\n", "a" * 101, "x.lease", b"bytes", 5, None],
)
def test_nonsense_names_are_refused(nonsense: Any) -> None:
    """A name that is not letters, digits, '.', '_', '-' is refused with the rule."""
    with pytest.raises(ValueError, match="choose"):
        Cache(nonsense)
    with pytest.raises(ValueError, match="choose"):
        Cache.attach(nonsense)


def test_names_of_all_allowed_characters(make_cache: MakeCache, name: str) -> None:
    """Names that differ in one character only are different caches."""
    names = [name + end for end in ("", ".", "_", "-", ".0", ".A", ".a", ".lease.1")]
    caches = [make_cache(each, max_entries=2) for each in names]
    for cache in caches:
        cache["me"] = cache.name
    assert names == [cache["me"] for cache in caches]


def test_memory_is_reserved_at_creation(make_cache: MakeCache, name: str) -> None:
    """Every page of the segment is there from the start: no SIGBUS later."""
    cache = make_cache(name, max_entries=1000)
    found = os.stat(f"/dev/shm/shmcache-{os.getuid()}-{name}")
    assert cache.stats().segment_bytes == found.st_size
    assert found.st_blocks * 512 >= found.st_size
    assert found.st_mode & 0o777 == 0o600


def test_memory_does_not_grow(make_cache: MakeCache, name: str) -> None:
    """The file in /dev/shm is as large when the cache is full as when it was empty."""
    cache = make_cache(name, max_entries=100)
    path = f"/dev/shm/shmcache-{os.getuid()}-{name}"
    before = os.stat(path).st_size, os.stat(path).st_blocks
    for i in range(1000):
        cache[i] = b"x" * (i * 37 % 3000)
    assert before == (os.stat(path).st_size, os.stat(path).st_blocks)


@pytest.mark.parametrize("block_size", [64, 128, 512, 4096])
def test_overhead_of_an_entry(block_size: int) -> None:
    """An entry of one block costs 72 bytes beyond it, each further block 4 more."""
    few, many = 1000, 11_000
    for blocks in (1, 4):
        small = fmt.plan(1, few + 1, few * blocks, block_size)
        large = fmt.plan(1, many + 1, many * blocks, block_size)
        grown = large.size - small.size - (many - few) * blocks * block_size
        per_entry = grown / (many - few)
        assert abs(per_entry - (68 + 4 * blocks)) < 0.5  # page rounding


# --- reading and writing --------------------------------------------------------

KEYS: list[Any] = [
    *("", "key", "ключ", "\0", "k" * 65_535, b"", b"key", b"\0\xff", b"k" * 65_535),
    *(0, 1, -1, 255, 256, -(1 << 63), 1 << 200),
    *((), ("",), ("a", 1), (("a",), 1), ("a", (1, b"")), (1, "1", b"1"), ((),)),
    *("1", b"1", (1,), ("1",), (b"1",)),
]


def test_keys_come_back(make_cache: MakeCache) -> None:
    """Keys of all kinds are kept apart, found again, and listed as they were."""
    cache = make_cache(max_bytes="4 MiB")
    for i, key in enumerate(KEYS):
        cache[key] = i
    assert list(range(len(KEYS))) == [cache[key] for key in KEYS]
    assert {(type(key), key) for key in KEYS} == {(type(key), key) for key in cache}
    assert len(KEYS) == len(cache)


VALUES: list[Any] = [
    *(None, True, False, 0, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, 0.0, -0.0, 1e300),
    *(math.inf, "", "text", "текст", b"", b"bytes", bytearray(b"array")),
    *([], {}, (), set(), [1, [2, (3,)]], {"a": {1: (2.5, None)}}, {b"k": {"s"}}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(make_cache: MakeCache, value: Any) -> None:
    """A value comes back equal and of the same type, by every way of reading."""
    cache = make_cache(max_entries=4)
    cache["k"] = value
    read = [
        cache["k"],
        cache.get("k"),
        cache.peek("k"),
        cache.gets("k")[0],
        cache.get_many(["k"])["k"],
        *cache.values(),
        cache.setdefault("k", "other"),
        cache.get_or_set("k", lambda: "other"),
        cache.pop("k"),
    ]
    assert [repr(value)] * len(read) == [repr(each) for each in read]


def test_value_is_a_copy(make_cache: MakeCache) -> None:
    """Changing what was stored, or what was read, changes nothing in the cache."""
    cache = make_cache()
    value = {"a": [1]}
    cache["k"] = value
    value["a"].append(2)
    cache["k"]["a"].append(3)
    assert cache["k"] == {"a": [1]}


def test_absent_key(make_cache: MakeCache) -> None:
    """Where nothing is, each method says so in its own way, and None is a value."""
    cache = make_cache()
    assert cache.get("k") is None
    assert cache.get("k", 5) == 5
    assert cache.get("k", default=5) == 5
    assert cache.peek("k", 5) == 5
    assert cache.pop("k", 5) == 5
    assert cache.pop("k", None) is None
    assert cache.delete("k") is False
    assert cache.replace("k", 1) is False
    assert cache.touch("k") is False
    assert cache.gets("k") == (None, None)
    assert "k" not in cache
    missing: list[Callable[[], object]] = [
        lambda: cache["k"],
        lambda: cache.pop("k"),
        lambda: cache.ttl("k"),
        lambda: cache.incr("k"),
        lambda: cache.decr("k"),
        lambda: cache.__delitem__("k"),
    ]
    for call in missing:
        with pytest.raises(KeyError, match="'k'"):
            call()
    cache["k"] = None
    assert cache.get("k", 5) is None
    assert cache.peek("k", 5) is None
    assert cache["k"] is None
    assert "k" in cache
    assert cache.pop("k", 5) is None


def test_add_stores_only_what_is_absent(make_cache: MakeCache, clock: Clock) -> None:
    """Add stores under an absent or expired key, and leaves a present one alone."""
    cache = make_cache(clock=clock)
    assert cache.add("k", 1, ttl=10) is True
    assert cache.add("k", 2, ttl=99) is False
    assert (cache["k"], cache.ttl("k")) == (1, 10.0)
    clock.advance(10)
    assert cache.add("k", 3) is True
    assert cache["k"] == 3


def test_replace_stores_only_over_what_is_there(
    make_cache: MakeCache, clock: Clock
) -> None:
    """Replace stores over a present key, not under an absent or expired one."""
    cache = make_cache(clock=clock)
    cache.set("k", 1, ttl=10)
    assert cache.replace("k", 2, ttl=20) is True
    assert (cache["k"], cache.ttl("k")) == (2, 20.0)
    clock.advance(20)
    assert cache.replace("k", 3) is False
    assert "k" not in cache


def test_delete_and_pop(make_cache: MakeCache) -> None:
    """What was deleted or popped is gone, once, and can be stored again."""
    cache = make_cache()
    cache.update(a=1, b=2, c=3)
    assert cache.delete("a") is True
    assert cache.delete("a") is False
    assert cache.pop("b") == 2
    assert cache.pop("b", None) is None
    del cache["c"]
    assert contents(cache) == {}
    cache["a"] = 4
    assert contents(cache) == {"a": 4}


def test_setdefault(make_cache: MakeCache, clock: Clock) -> None:
    """Setdefault stores and returns its value only where there is none."""
    cache = make_cache(clock=clock)
    assert cache.setdefault("a", 1) == 1
    assert cache.setdefault("a", 2) == 1
    assert cache.setdefault("b") is None
    assert cache.setdefault("b", 2) is None
    assert cache.setdefault("c", 3, ttl=5) == 3
    assert cache.ttl("c") == 5


def test_update(make_cache: MakeCache) -> None:
    """Update takes a mapping, pairs, another cache, and keyword arguments."""
    cache, other = make_cache(), make_cache()
    other["o"] = 1
    cache.update({"a": 1, 5: 2})
    cache.update([("b", 3)], c=4)
    cache.update(other)
    cache.update(self=5, other=6)
    cache.update()
    expected = {"a": 1, 5: 2, "b": 3, "c": 4, "o": 1, "self": 5, "other": 6}
    assert expected == contents(cache)


def test_popitem_gives_the_least_recently_used(make_cache: MakeCache) -> None:
    """It takes entries out in the order of their last use; KeyError at the end."""
    cache = make_cache()
    cache.update(a=1, b=2, c=3)
    cache.get("a")
    assert [cache.popitem() for _ in range(3)] == [("b", 2), ("c", 3), ("a", 1)]
    with pytest.raises(KeyError, match="the cache is empty"):
        cache.popitem()


def test_popitem_empties_all_shards(make_cache: MakeCache) -> None:
    """With several shards each entry is popped once."""
    cache = make_cache(shards=8, max_entries=1000)
    stored = {i: str(i) for i in range(100)}
    cache.set_many(stored)
    assert stored == dict(cache.popitem() for _ in range(100))
    assert len(cache) == 0


def test_length_and_truth(make_cache: MakeCache, clock: Clock) -> None:
    """A cache is true although it is empty, and len counts live entries only."""
    cache = make_cache(clock=clock)
    assert bool(cache) is True
    assert len(cache) == 0
    cache["a"] = 1
    cache.set("b", 2, ttl=1)
    assert len(cache) == 2
    clock.advance(1)
    assert len(cache) == 1


def test_equal_keys_are_one(make_cache: MakeCache) -> None:
    """Subclasses of key types count as the plain key that they equal."""

    class Text(str):
        __slots__ = ()

    class Number(int):
        pass

    cache = make_cache()
    cache[Text("k")] = 1
    cache[Number(5)] = 2
    assert [cache["k"], cache[5]] == [1, 2]
    assert {str, int} == {type(key) for key in cache}


CALLS: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda c: c.get(None), shmcache.UnsupportedKey, "str()"),
    (lambda c: c.get(1.5), shmcache.UnsupportedKey, "str()"),
    (lambda c: c.set(["a"], 1), shmcache.UnsupportedKey, "str()"),
    (lambda c: c.set(True, 1), shmcache.UnsupportedKey, "use 1"),
    (lambda c: c.set(("a", None), 1), shmcache.UnsupportedKey, "key[1]"),
    (lambda c: c.set("\ud800", 1), shmcache.UnsupportedKey, "surrogateescape"),
    (lambda c: c.set("n", object()), shmcache.UnsupportedValue, "convert it"),
    (lambda c: c.set("n", {"a": [object()]}), shmcache.UnsupportedValue, '$["a"][0]'),
    (lambda c: c.add("new", object()), shmcache.UnsupportedValue, "convert it"),
    (lambda c: c.set_many({"n": object()}), shmcache.UnsupportedValue, "convert it"),
    (lambda c: c.set_many([("n", 1)]), TypeError, "dict"),
    (lambda c: c.set("n", 0, ttl=0), ValueError, "None means"),
    (lambda c: c.set("n", 0, ttl=-5), ValueError, "None means"),
    (lambda c: c.set("n", 0, ttl="5"), TypeError, "number of seconds"),
    (lambda c: c.add("new", 0, ttl=0), ValueError, "None means"),
    (lambda c: c.replace("n", 0, ttl=0), ValueError, "None means"),
    (lambda c: c.set_many({"n": 0}, ttl=0), ValueError, "None means"),
    (lambda c: c.set_many({}, ttl=0), ValueError, "None means"),
    (lambda c: c.setdefault("new", 0, ttl=0), ValueError, "None means"),
    (lambda c: c.touch("n", ttl=0), ValueError, "None means"),
    (lambda c: c.touch("n", ttl=math.nan), ValueError, "None means"),
    (lambda c: c.get_or_set("new", int, ttl=0), ValueError, "None means"),
    (lambda c: c.get_or_set("new", 5), TypeError, "callable"),
    (lambda c: c.get_or_set("new", int, timeout="1"), TypeError, "seconds"),
    (lambda c: c.get_or_set("new", int, timeout=-1), ValueError, "seconds"),
    (lambda c: c.memoize(ttl=0), ValueError, "None means"),
    (lambda c: c.memoize(len), TypeError, "@cache.memoize()"),
    (lambda c: c.memoize(key="k"), TypeError, "callable"),
    (lambda c: c.memoize()(5), TypeError, "function"),
    (lambda c: c.cas("n", 0, "token"), TypeError, "gets()"),
    (lambda c: c.cas("n", 0, 1.5), TypeError, "gets()"),
    (lambda c: c.cas("n", 0, True), TypeError, "gets()"),
    (lambda c: c.incr("n", "1"), TypeError, "int or float"),
    (lambda c: c.incr("n", True), TypeError, "int or float"),
    (lambda c: c.incr("n", None), TypeError, "int or float"),
    (lambda c: c.decr("n", "1"), TypeError, "int or float"),
    (lambda c: c.incr("new", initial="0"), TypeError, "int or float"),
    (lambda c: c.incr("n", ttl=0), ValueError, "None means"),
    (lambda c: c.incr("s"), TypeError, "set() a number"),
    (lambda c: c.incr("t"), TypeError, "set() a number"),
    (lambda c: c.incr("n", 1 << 63), OverflowError, "smaller"),
    (lambda c: c.incr("new", 1, initial=(1 << 63) - 1), OverflowError, "smaller"),
    (lambda c: c.incr("f", 10**400), OverflowError, "smaller"),
    (lambda c: c.incr("new", 0.5, initial=10**400), OverflowError, "smaller"),
    (lambda c: c.clear(5), shmcache.UnsupportedKey, "delete()"),
    (lambda c: c.clear(1.5), shmcache.UnsupportedKey, "str"),
    (lambda c: c.sweep(budget=-1), ValueError, "seconds"),
    (lambda c: c.sweep(budget=math.nan), ValueError, "seconds"),
    (lambda c: c.sweep(budget="1"), TypeError, "seconds"),
]


@pytest.mark.parametrize(("call", "error", "remedy"), CALLS)
def test_nonsense_in_a_call_is_refused(
    make_cache: MakeCache,
    clock: Clock,
    call: Callable[[Cache], object],
    error: type[Exception],
    remedy: str,
) -> None:
    """Each is refused with what to do, and nothing at all has changed."""
    cache = make_cache(clock=clock)
    cache.set("n", 1, ttl=50)
    cache.update(s="text", t=True, f=1.5)

    def state() -> object:
        stats = cache.stats()
        counted = stats.sets, stats.removed, stats.recoveries, stats.entries
        return contents(cache), cache.ttl("n"), counted

    before = state()
    with pytest.raises(error, match=re.escape(remedy)):
        call(cache)
    assert before == state()
    assert by_age(cache) == ["n", "s", "t", "f"]


# --- room and recency -----------------------------------------------------------

USES: dict[str, Callable[[Cache], object]] = {
    "get": lambda c: c.get("a"),
    "[]": lambda c: c["a"],
    "get_many": lambda c: c.get_many(["a"]),
    "gets": lambda c: c.gets("a"),
    "touch": lambda c: c.touch("a"),
    "setdefault": lambda c: c.setdefault("a", 5),
    "get_or_set": lambda c: c.get_or_set("a", lambda: 5),
    "set": lambda c: c.set("a", 5),
    "[]=": lambda c: c.__setitem__("a", 5),
    "set_many": lambda c: c.set_many({"a": 5}),
    "update": lambda c: c.update(a=5),
    "replace": lambda c: c.replace("a", 5),
    "cas": lambda c: c.cas("a", 5, c.gets("a")[1]),
    "incr": lambda c: c.incr("a"),
}
NO_USES: dict[str, Callable[[Cache], object]] = {
    "peek": lambda c: c.peek("a"),
    "in": lambda c: "a" in c,
    "ttl": lambda c: c.ttl("a"),
    "len": len,
    "iteration": list,
    "keys": lambda c: list(c.keys()),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "in keys": lambda c: "a" in c.keys(),  # noqa: SIM118
    "in items": lambda c: ("a", 1) in c.items(),
    "add": lambda c: c.add("a", 5),
    "failed cas": lambda c: c.cas("a", 5, 1),
    "stats": lambda c: c.stats(),
    "check": lambda c: c.check(),
    "sweep": lambda c: c.sweep(),
}


@pytest.mark.parametrize("use", USES)
def test_use_renews_recency(make_cache: MakeCache, use: str) -> None:
    """Of a full cache the entry just used stays, and the next older one goes."""
    cache = make_cache(max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    USES[use](cache)
    cache["d"] = 4
    assert by_age(cache) == ["c", "a", "d"]


@pytest.mark.parametrize("use", NO_USES)
def test_looking_does_not_renew_recency(make_cache: MakeCache, use: str) -> None:
    """What only looks leaves order, hits and misses as they were."""
    cache = make_cache(max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    before = cache.stats()
    NO_USES[use](cache)
    after = cache.stats()
    assert (before.hits, before.misses) == (after.hits, after.misses)
    cache["d"] = 4
    assert by_age(cache) == ["b", "c", "d"]


def test_lru_is_exact_over_many_hits(make_cache: MakeCache) -> None:
    """The order of thousands of hits is kept, far more than a touch buffer holds."""
    cache = make_cache(max_entries=500)
    cache.set_many({i: i for i in range(500)})
    order = random.Random(1).choices(range(500), k=3000)
    for key in order:
        assert key == cache[key]
    last_use = {key: at for at, key in enumerate([*range(500), *order])}
    assert sorted(range(500), key=last_use.__getitem__) == by_age(cache)


def test_lru_is_exact_over_two_objects_of_one_process(
    make_cache: MakeCache, name: str
) -> None:
    """Hits through one Cache object count for evictions through another."""
    one, two = make_cache(name, max_entries=3), make_cache(name, max_entries=3)
    one.set_many({"a": 1, "b": 2, "c": 3})
    assert one.get("a") == 1
    two["d"] = 4
    assert two.get("c") == 3
    make_cache(name, max_entries=3).get("a")
    one["e"] = 5
    assert by_age(one) == ["c", "a", "e"]


def test_hits_of_another_process_count(make_cache: MakeCache, name: str) -> None:
    """The uses of a process that has closed are applied: what it read stays."""
    cache = make_cache(name, max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    code = (
        "import shmcache, sys\n"
        "with shmcache.Cache.attach(sys.argv[1]) as cache: print(cache['a'])"
    )
    assert python(code, name) == "1"
    cache["d"] = 4
    assert by_age(cache) == ["c", "a", "d"]


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_entries_are_bounded(make_cache: MakeCache, shards: int) -> None:
    """There are never more than max_entries, and as many fit."""
    cache = make_cache(max_entries=20, shards=shards)
    for i in range(1000):
        cache[i] = i
        assert len(cache) <= 20
    assert len(cache) == 20
    assert cache.stats().evicted == 980


def test_bytes_are_bounded(make_cache: MakeCache) -> None:
    """With max_entries=0 room alone decides: 256 blocks of 256 bytes, no more."""
    cache = make_cache(max_entries=0, max_bytes="64 KiB")
    for i in range(1000):
        cache[i] = b"x" * 200
    assert len(cache) == 256
    for i in range(1000):
        cache[i] = b"x" * 1000  # four blocks with the key
    stats = cache.stats()
    assert (
        stats.entries,
        stats.bytes_used,
        stats.bytes_capacity,
    ) == (64, 65536, 65536)
    assert sorted(cache) == list(range(1000 - 64, 1000))


def test_room_is_made_by_age(make_cache: MakeCache) -> None:
    """A large entry displaces as many of the least recently used as it needs."""
    cache = make_cache(max_entries=0, max_bytes=10 * 256)
    for key in "abcdefghij":
        cache[key] = b""
    cache.get("a")
    cache["big"] = b"x" * 700  # three blocks
    assert by_age(cache) == ["e", "f", "g", "h", "i", "j", "a", "big"]


def test_overwrite_keeps_the_others(make_cache: MakeCache) -> None:
    """Storing over a key of a cache full of entries displaces no other entry."""
    cache = make_cache(max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    for i in range(10):
        cache["b"] = i
        cache["c"] = "x" * i
    assert contents(cache) == {"a": 1, "b": 9, "c": "x" * 9}


def test_overwrite_of_what_fills_the_room(make_cache: MakeCache) -> None:
    """When old and new cannot both fit, the old one goes first and others stay."""
    cache = make_cache(max_entries=0, max_bytes=10 * 256)
    cache["big"] = b"1" * (6 * 256 - 3)
    cache.update(a=1, b=2, c=3, d=4)
    cache["big"] = b"2" * (6 * 256 - 3)
    assert set("abcd") | {"big"} == set(cache)
    assert cache["big"] == b"2" * (6 * 256 - 3)
    cache["big"] = b"3" * (8 * 256 - 3)
    assert by_age(cache) == ["c", "d", "big"]


def test_expired_go_before_the_least_recently_used(
    make_cache: MakeCache, clock: Clock
) -> None:
    """A full cache gives up what has expired, however recently it was used."""
    cache = make_cache(max_entries=3, clock=clock)
    cache.update(a=1, b=2)
    cache.set("c", 3, ttl=5)
    clock.advance(5)
    cache["d"] = 4
    assert by_age(cache) == ["a", "b", "d"]


def test_expired_go_first_out_of_thousands(make_cache: MakeCache, clock: Clock) -> None:
    """It is found among many that expire a moment later."""
    cache = make_cache(max_entries=3000, clock=clock)
    cache.set("early", 0, ttl=10)
    clock.advance(0.000_002)
    for i in range(2999):
        cache.set(i, i, ttl=10)
    cache.get("early")
    clock.advance(10 - 0.000_002)
    cache["new"] = 1
    assert "early" not in cache
    assert cache.peek(0) == 0
    assert (cache.stats().expired, cache.stats().evicted) == (1, 0)


def test_expired_go_first_within_a_tick(make_cache: MakeCache, clock: Clock) -> None:
    """It is found among many that expire later in the same tick of the wheel."""
    clock.ns = 1000 * TICK
    cache = make_cache(max_entries=200, clock=clock)
    cache.set("early", 0, ttl=10 * TICK / 1e9)
    clock.ns += 1000
    for i in range(199):
        cache.set(i, i, ttl=10 * TICK / 1e9)
    clock.ns += 10 * TICK - 1000
    cache["new"] = 1
    assert "early" not in cache
    assert cache.peek(0) == 0
    assert len(cache) == 200


def too_large(cache: Cache) -> list[Callable[[], object]]:
    """Ways of storing what can never fit into 2,560 bytes."""
    return [
        lambda: cache.set("new", b"x" * 2558),
        lambda: cache.set("a", b"x" * 2560),
        lambda: cache.set("k" * 2561, b""),
        lambda: cache.add("new", b"x" * 3000),
        lambda: cache.replace("a", b"x" * 3000),
        lambda: cache.cas("a", b"x" * 3000, cache.gets("a")[1]),
        lambda: cache.set_many({"new": b"x" * 3000}),
        lambda: cache.setdefault("new", "x" * 3000),
        lambda: cache.incr("k" * 2553, initial=0),
        lambda: cache.get_or_set("new", lambda: b"x" * 3000),
    ]


@pytest.mark.parametrize("way", range(10))
def test_what_can_never_fit_is_refused(make_cache: MakeCache, way: int) -> None:
    """EntryTooLarge comes at once, with the sizes, and nothing else is lost for it."""
    cache = make_cache(max_entries=0, max_bytes=10 * 256)
    for key in "jihgfedcba":
        cache[key] = 1
    with pytest.raises(shmcache.EntryTooLarge, match="2,560 bytes; raise max_bytes"):
        too_large(cache)[way]()
    assert contents(cache) == dict.fromkeys("abcdefghij", 1)
    assert cache.stats().too_large == 1
    assert cache.stats().recoveries == 0


def test_sizes_are_in_the_message(make_cache: MakeCache) -> None:
    """The refusal names the bytes of key and value, and shards as a way out."""
    cache = make_cache(max_entries=100, max_bytes="1 MiB", shards=4)
    with pytest.raises(shmcache.EntryTooLarge) as caught:
        cache["key"] = b"x" * 500_000
    for part in ("3 bytes", "500,000 bytes", "262,144 bytes", "lower shards"):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["k" * 65_536, b"k" * 65_536, "ä" * 32_768])
def test_long_keys_are_refused(make_cache: MakeCache, key: Any) -> None:
    """A key over 65,535 bytes is refused by all that store, and is never there."""
    cache = make_cache()
    for call in (
        lambda: cache.set(key, 1),
        lambda: cache.add(key, 1),
        lambda: cache.incr(key, initial=0),
        lambda: cache.get_or_set(key, int),
    ):
        with pytest.raises(shmcache.EntryTooLarge, match="65,535"):
            call()
    assert cache.get(key) is None
    assert key not in cache
    assert cache.delete(key) is False
    assert len(cache) == 0


def test_values_of_every_length_around_a_block(make_cache: MakeCache) -> None:
    """No byte is lost or added where an entry ends at, before or after a block."""
    cache = make_cache(max_entries=0, max_bytes="1 MiB")
    lengths = [n + d for n in (0, 256, 512, 4096, 65_536) for d in range(-5, 3)]
    values = {n: random.Random(n).randbytes(n) for n in lengths if n >= 0}
    cache.set_many(values)
    assert values == {n: cache[n] for n in values}


def test_value_that_fills_the_arena(make_cache: MakeCache) -> None:
    """The largest possible entry fits, displacing everything, and comes back whole."""
    cache = make_cache(max_entries=0, max_bytes="1 MiB")
    rng = random.Random(2)
    for i in range(3000):  # leaves the free list in no order at all
        cache[i] = b"x" * rng.randrange(2000)
        cache.delete(rng.randrange(3000))
    whole = rng.randbytes((1 << 20) - 3)
    cache["big"] = whole
    assert whole == cache["big"]
    assert list(cache) == ["big"]
    with pytest.raises(shmcache.EntryTooLarge):
        cache["big"] = whole + b"x"
    assert whole == cache["big"]
    cache["big"] = whole[::-1]
    assert whole[::-1] == cache["big"]
    cache["small"] = 1
    assert list(cache) == ["small"]


# --- time -----------------------------------------------------------------------


def test_ttl_of_the_cache_and_of_a_call(make_cache: MakeCache, clock: Clock) -> None:
    """Left out means the cache's TTL, None means never, a number means itself."""
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
    """One nanosecond before its time an entry is there, and at its time it is not."""
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


def test_own_clock(make_cache: MakeCache) -> None:
    """Without a clock real time counts: what was written for a moment goes."""
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
    """Touch renews by the cache's TTL or a given one, longer, shorter, or for ever."""
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
    """In a sliding cache a hit renews the entry's own time, whatever it was."""
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
    """What only looks leaves the time of a sliding entry as it was."""
    cache = make_cache(ttl=10, sliding=True, clock=clock)
    cache["a"] = 1
    clock.advance(4)
    NO_USES[use](cache)
    assert cache.ttl("a") == 6


@pytest.mark.parametrize("use", RENEWALS)
def test_without_sliding_time_runs_on(
    make_cache: MakeCache, clock: Clock, use: str
) -> None:
    """In a cache that does not slide, hits leave an entry's time as it was."""
    cache = make_cache(ttl=10, clock=clock)
    cache["a"] = 1
    clock.advance(4)
    RENEWALS[use](cache)
    assert cache.ttl("a") == 6


def test_sliding_in_the_wheel(make_cache: MakeCache, clock: Clock) -> None:
    """Entries renewed for a long time are swept at their last time, not before."""
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
    """Each TTL is shortened by a random part, up to this much, and none is longer."""
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
    """Touch, incr and a TTL of a call's own are shortened too; None stays for ever."""
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
    """Sweep takes all that has expired, only that, and says how many."""
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
    """It ends although many entries of the wheel's current tick expire later."""
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
    """With no time to spend it does a bounded step, and the next call goes on."""
    cache = make_cache(clock=clock, max_entries=5000)
    cache.set_many({i: i for i in range(5000)}, ttl=1)
    clock.advance(1)
    first = cache.sweep(budget=0)
    assert 0 < first < 1000
    assert cache.stats().entries == 5000 - first
    assert cache.sweep(budget=60) == 5000 - first
    assert cache.stats().entries == 0


def test_writes_pay_for_sweeping(make_cache: MakeCache, clock: Clock) -> None:
    """Without any sweep, inserts alone remove what has expired."""
    cache = make_cache(clock=clock, max_entries=1000)
    cache.set_many({i: i for i in range(500)}, ttl=1)
    clock.advance(1)
    for i in range(200):
        cache[f"new {i}"] = i
    assert cache.stats().entries == 200
    assert cache.stats().expired == 500


def test_thread_sweeps_by_itself(make_cache: MakeCache) -> None:
    """Expired entries go without any further call."""
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


# --- numbers and versions -------------------------------------------------------


def test_hash_is_that_of_the_package(make_cache: MakeCache) -> None:
    """The engine's own XXH3 of short keys is what the interpreted engine calls."""
    cache = make_cache()
    dice = random.Random(1)
    seed = cache._attachment.header.seed
    for length in (*range(300), 1000, 65_535):
        for _ in range(4):
            key = dice.randbytes(length)
            kind, data, key_hash, _ = cache._key_hash(key)
            assert (kind, data) == (fmt.Kind.BYTES, key)
            expected = xxhash.xxh3_64_intdigest(key, (seed + kind) & fmt.MASK64)
            assert key_hash == expected


def test_incr_and_decr(make_cache: MakeCache) -> None:
    """They add to what is there, or to ``initial`` if nothing is."""
    cache = make_cache()
    assert cache.incr("n", initial=0) == 1
    assert cache.incr("n") == 2
    assert cache.incr("n", 40) == 42
    assert cache.decr("n") == 41
    assert cache.decr("n", 50) == -9
    assert cache.incr("n", -1) == -10
    assert cache["n"] == -10
    assert cache.incr("m", 5, initial=100) == 105
    assert cache.decr("d", 5, initial=100) == 95
    assert cache.incr("n", 0.5) == -9.5
    assert type(cache["n"]) is float
    cache["f"] = 1.5
    assert cache.incr("f") == 2.5
    assert cache.incr("f", initial=1000) == 3.5


def test_incr_of_a_damaged_value_is_no_matter_of_types(make_cache: MakeCache) -> None:
    """What is no number by damage only is damage, not the caller's mistake."""
    cache = make_cache()
    cache["n"] = 1
    words = cache._attachment.block.view.cast("I")
    header = cache._attachment.header
    record = (header.geometry.shards_at + header.geometry.records_at + fmt.RECORD) // 4
    assert words[record + fmt.F_META] >> fmt.META_TAG_SHIFT == fmt.Tag.INT
    words[record + fmt.F_META] ^= (fmt.Tag.INT ^ fmt.Tag.BYTES) << fmt.META_TAG_SHIFT
    words.release()

    with pytest.raises(shmcache.SegmentCorrupt):
        cache.incr("n")
    assert cache.incr("n", initial=5) == 6
    assert cache.check() == []


def test_incr_in_place_or_anew(make_cache: MakeCache, clock: Clock) -> None:
    """Versions, times of writing, order of use and values are as of any overwrite."""
    cache = make_cache(max_entries=4, max_bytes=4096, clock=clock)
    long = "k" * 250  # a value behind it lies in two blocks of 256 bytes
    assert cache._attachment.header.geometry.block_size == 256
    for key in ("a", long, "b"):
        cache[key] = 7
    value, token = cache.gets("a")
    assert cache.incr("a", 2**40) == value + 2**40
    assert not cache.cas("a", 0, token)
    assert cache.incr(long, -9) == -2
    assert cache.incr("b", 0.5) == 7.5  # of another type
    assert cache.incr("b", 0.25, ttl=5) == 7.75
    clock.advance(5)
    assert "b" not in cache
    assert cache.incr(long) == -1

    assert cache.stats().removed["REPLACED"] == 5
    assert cache.check() == []
    assert by_age(cache) == ["a", long]


def test_incr_to_the_bounds_of_64_bits(make_cache: MakeCache) -> None:
    """Exact up to the largest and smallest int of 64 bits; refused beyond."""
    cache = make_cache()
    cache["n"] = (1 << 63) - 2
    assert cache.incr("n") == (1 << 63) - 1
    with pytest.raises(OverflowError, match="64 bits"):
        cache.incr("n")
    assert cache["n"] == (1 << 63) - 1
    assert cache.decr("n", (1 << 64) - 1) == -(1 << 63)
    with pytest.raises(OverflowError, match="64 bits"):
        cache.decr("n")
    assert cache["n"] == -(1 << 63)


def test_incr_keeps_or_renews_time(make_cache: MakeCache, clock: Clock) -> None:
    """Left out, ttl keeps an entry's expiry; given, it is the new one."""
    cache = make_cache(ttl=60, clock=clock)
    cache.incr("n", initial=0)
    assert cache.ttl("n") == 60
    clock.advance(10)
    cache.incr("n")
    assert cache.ttl("n") == 50
    cache.incr("n", ttl=5)
    assert cache.ttl("n") == 5
    cache.incr("n", ttl=None)
    assert cache.ttl("n") is None
    cache.incr("n")
    assert cache.ttl("n") is None
    cache.incr("n", ttl=5)
    clock.advance(5)
    assert cache.incr("n", initial=0) == 1
    assert cache.ttl("n") == 60


@pytest.mark.parametrize("sliding", [False, True])
def test_incr_counts_as_a_set_only(make_cache: MakeCache, sliding: bool) -> None:
    """It counts as neither hit nor miss, in a sliding cache as in any other."""
    cache = make_cache(ttl=60, sliding=sliding)
    cache.incr("n", initial=0)
    cache.incr("n")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (0, 0, 2)


@pytest.mark.parametrize("codec", ["msgpack", "msgspec", "pickle"])
def test_incr_of_a_number_that_was_set(make_cache: MakeCache, codec: str) -> None:
    """Numbers that set() stored can be added to, whatever the codec."""
    cache = make_cache(codec=codec)
    cache.update(n=41, f=0.5)
    assert [cache.incr("n"), cache.incr("f")] == [42, 1.5]
    assert [cache["n"], cache["f"]] == [42, 1.5]
    assert [cache.incr("n"), cache.incr("f")] == [43, 2.5]


def test_incr_in_a_raw_cache(make_cache: MakeCache) -> None:
    """A cache of bytes has no numbers, and says so."""
    cache = make_cache(codec="raw")
    cache["n"] = b"1"
    with pytest.raises(shmcache.UnsupportedValue, match="another codec"):
        cache.incr("n")
    assert cache["n"] == b"1"


def test_cas_stores_over_what_was_read(make_cache: MakeCache) -> None:
    """Cas succeeds with the token of the present version, once."""
    cache = make_cache()
    cache["k"] = 1
    value, token = cache.gets("k")
    assert value == 1
    assert cache.gets("k") == (1, token)
    assert cache.cas("k", 2, token) is True
    assert cache.cas("k", 3, token) is False
    assert cache["k"] == 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "set of the same": lambda c: c.set("k", 1),
    "replace": lambda c: c.replace("k", 1),
    "incr": lambda c: c.incr("k", 0),
    "delete": lambda c: c.delete("k"),
    "delete and set": lambda c: (c.delete("k"), c.set("k", 1)),
    "pop and add": lambda c: (c.pop("k"), c.add("k", 1)),
    "clear and set": lambda c: (c.clear(), c.set("k", 1)),
    "eviction and set": lambda c: (c.update(a=1, b=2, c=3), c.set("k", 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cas_fails_after_any_change(make_cache: MakeCache, change: str) -> None:
    """A token names one version: not an equal one, nor one in the same place."""
    cache = make_cache(max_entries=3)
    cache["k"] = 1
    token = cache.gets("k")[1]
    CHANGES[change](cache)
    assert cache.cas("k", 5, token) is False
    assert cache.get("k") in (None, 1)


def test_cas_holds_through_use_and_touch(make_cache: MakeCache) -> None:
    """Reading an entry, or giving it time, does not change its version."""
    cache = make_cache(max_entries=3)
    cache["k"] = 1
    token = cache.gets("k")[1]
    cache.get("k")
    cache.touch("k", ttl=100)
    cache["other"] = 1
    assert cache.cas("k", 2, token, ttl=50) is True
    assert cache["k"] == 2


def test_cas_without_token_stores_only_if_absent(
    make_cache: MakeCache, clock: Clock
) -> None:
    """With the token of an absent key, None, cas is add."""
    cache = make_cache(clock=clock)
    assert cache.cas("k", 1, cache.gets("k")[1], ttl=5) is True
    assert cache.cas("k", 2, None) is False
    assert (cache["k"], cache.ttl("k")) == (1, 5.0)
    token = cache.gets("k")[1]
    clock.advance(5)
    assert cache.cas("k", 3, token) is False
    assert cache.cas("k", 4, None) is True
    assert cache["k"] == 4


def test_tokens_are_of_one_key(make_cache: MakeCache) -> None:
    """The token of one entry does not open another."""
    cache = make_cache()
    cache.update(a=1, b=2)
    assert cache.cas("b", 3, cache.gets("a")[1]) is False
    assert cache["b"] == 2


@pytest.mark.parametrize("token", [0, -1, 1, 1 << 64, 1 << 200])
def test_tokens_that_nobody_got(make_cache: MakeCache, token: int) -> None:
    """A number that is no token of this entry stores nothing."""
    cache = make_cache()
    cache["k"] = 1
    assert cache.cas("k", 2, token) is False
    assert cache["k"] == 1


# --- many keys ------------------------------------------------------------------


def test_many(make_cache: MakeCache, clock: Clock) -> None:
    """Get_many returns what was found; set_many and delete_many do each key."""
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
    """Of a mapping with one bad value the entries before it are stored."""
    cache = make_cache()
    with pytest.raises(shmcache.UnsupportedValue):
        cache.set_many({"a": 1, "b": object(), "c": 3})
    assert contents(cache) == {"a": 1}


# --- iteration and views --------------------------------------------------------


def test_views(make_cache: MakeCache) -> None:
    """Keys, values and items are views as those of a dict, and are live."""
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
    """Asking for a pair that cannot be there is answered, as by a dict's items."""
    cache = make_cache()
    cache["a"] = 1
    pairs: list[Any] = ["a", 5, ("a",), ("a", 1, 2), (None, 1)]
    assert [pair in cache.items() for pair in pairs] == [False] * 5


def test_iteration_meets_all_once(make_cache: MakeCache) -> None:
    """Each of thousands of entries is met once, over several shards."""
    cache = make_cache(max_entries=5000, shards=4)
    stored = {i: str(i) for i in range(4000)}
    cache.set_many(stored)
    assert sorted(stored) == sorted(cache)
    assert sorted(stored.items()) == sorted(cache.items())
    assert sorted(stored.values()) == sorted(cache.values())


def test_iteration_while_this_thread_writes(make_cache: MakeCache) -> None:
    """What lives throughout is met once, though all changes from step to step."""
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
    """What lives throughout is met once, while another process changes everything."""
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
    """What lives throughout is met once, while another thread changes everything."""
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
    """All entries go, how many lived is told, and the cache is as good as new."""
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
    """Those go whose key begins so, of the same kind only; of tuples by elements."""
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
    """Every count is what happened."""
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


def test_stats_add_up(make_cache: MakeCache) -> None:
    """Whatever happened: sets less all that went is what is there."""
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
    """Hits and misses of a process that has ended remain in the sums."""
    cache = make_cache(name)
    cache["a"] = 1
    code = (
        "import shmcache, sys; c = shmcache.Cache.attach(sys.argv[1]);"
        "[c.get(k) for k in 'aax']; print(c.stats().workers)"
    )
    assert [python(code, name) for _ in range(3)] == ["2"] * 3
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.workers) == (6, 3, 1)


# --- life -----------------------------------------------------------------------


def test_names_in_shared_memory(make_cache: MakeCache, name: str) -> None:
    """The names contain the user and the cache; all go with the last close."""
    cache = make_cache(name, max_entries=100, shards=2)
    base = f"shmcache-{os.getuid()}-{name}"
    assert files(name) == sorted(
        [base, f"{base}.lease", f"sem.{base}.0", f"sem.{base}.1"]
    )
    cache.close()
    assert files(name) == []


def test_close_twice(make_cache: MakeCache) -> None:
    """Closing again is fine, and so is leaving a with block after closing."""
    cache = make_cache()
    with cache as same:
        assert same is cache
        cache.close()
    cache.close()
    assert cache.closed is True
    assert "closed" in repr(cache)


CLOSED: dict[str, Callable[[Cache], object]] = {
    **{f"use by {name}": call for name, call in USES.items()},
    **{f"look by {name}": call for name, call in NO_USES.items()},
    "delete": lambda c: c.delete("a"),
    "del": lambda c: c.__delitem__("a"),
    "pop": lambda c: c.pop("a", None),
    "popitem": lambda c: c.popitem(),
    "delete_many": lambda c: c.delete_many(["a"]),
    "get_many of nothing": lambda c: c.get_many([]),
    "decr": lambda c: c.decr("a"),
    "clear": lambda c: c.clear(),
    "clear prefix": lambda c: c.clear("a"),
    "memoized": lambda c: c.memoize()(test_defaults)("a"),
    "unlink": lambda c: c.unlink(),
}


@pytest.mark.parametrize("use", CLOSED)
def test_use_after_close(make_cache: MakeCache, use: str) -> None:
    """Each call says that the cache was closed, and what to do."""
    cache = make_cache()
    cache["a"] = 1
    cache.close()
    with pytest.raises(shmcache.CacheClosed, match="make a new Cache object"):
        CLOSED[use](cache)


def test_iteration_over_a_closed_cache(make_cache: MakeCache) -> None:
    """Iteration that was begun says so, too, when the cache is closed."""
    cache = make_cache(max_entries=2000)
    cache.set_many({i: i for i in range(1000)})
    keys = iter(cache)
    next(keys)
    cache.close()
    with pytest.raises(shmcache.CacheClosed):
        list(keys)


def hold(cache: Cache) -> None:
    """Take shard 0's lock as another thread of this process that is inside for long."""
    semaphore = posix_ipc.Semaphore(f"/shmcache-{os.getuid()}-{cache.name}.0")
    semaphore.acquire()
    semaphore.close()
    cache._attachment.words[cache._words_of(0) + fmt.S_HOLDER] = cache._attachment.token


def let_go(cache: Cache) -> None:
    """Give it back."""
    cache._attachment.words[cache._words_of(0) + fmt.S_HOLDER] = 0
    semaphore = posix_ipc.Semaphore(f"/shmcache-{os.getuid()}-{cache.name}.0")
    semaphore.release()
    semaphore.close()


@pytest.mark.skipif(not shmcache.compiled, reason="interpreted, such a lock is freed")
def test_lock_timeout(make_cache: MakeCache) -> None:
    """A lock that cannot be had in time is LockTimeout; compiled reads need none."""
    cache = make_cache(lock_timeout=0.05)
    cache["a"] = 1
    hold(cache)
    for call in (
        lambda: cache.set("b", 1),
        lambda: cache.delete("a"),
        lambda: cache.incr("a"),
        lambda: list(cache),
    ):
        with pytest.raises(shmcache.LockTimeout, match="raise lock_timeout"):
            call()
    assert cache["a"] == 1
    assert cache.get("x") is None
    let_go(cache)
    cache["b"] = 2
    assert contents(cache) == {"a": 1, "b": 2}
    assert cache.stats().lock_timeouts == 4


def test_dropped_without_close(name: str) -> None:
    """A Cache that nobody refers to any more leaves, and takes everything along."""
    cache = Cache(name, cleanup_interval=0.01)
    cache["a"] = 1
    del cache
    gc.collect()
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if not files(name):
            break
        gc.collect()
        waiting.wait(0.01)
    assert files(name) == []
    with open("/proc/self/maps") as maps:
        assert [line for line in maps if name in line] == []


def test_two_objects_of_one_process(make_cache: MakeCache, name: str) -> None:
    """They are one cache, and it lives until the second one is closed."""
    one, two = make_cache(name, ttl=5), make_cache(name, ttl=5)
    one["a"] = 1
    assert two["a"] == 1
    assert one.stats().workers == 1
    one.close()
    two["a"] += 1
    assert contents(two) == {"a": 2}
    three = make_cache(name, ttl=5)
    two.close()
    assert contents(three) == {"a": 2}
    three.close()
    assert files(name) == []
    assert contents(make_cache(name)) == {}


def test_attach(make_cache: MakeCache, name: str) -> None:
    """Attach takes the segment's own settings, whatever they are."""
    cache = make_cache(name, max_entries=50, ttl=7, sliding=True, shards=2, codec="raw")
    cache["k"] = b"v"
    with Cache.attach(name) as same:
        assert same["k"] == b"v"
        same["l"] = b"w"
        left = same.ttl("l")
        assert left is not None
        assert 6 < left <= 7
        with pytest.raises(shmcache.UnsupportedValue):
            same["m"] = 1
        assert (same.stats().max_entries, same.stats().shards) == (50, 2)
    assert cache["l"] == b"w"


def test_attach_to_nothing(name: str) -> None:
    """Attach to a name that nobody created says so, and leaves nothing."""
    with pytest.raises(shmcache.SegmentNotFound, match="create it with Cache"):
        Cache.attach(name)
    assert files(name) == []


OTHER: dict[str, Any] = {
    "max_entries": 20,
    "max_bytes": "2 MiB",
    "ttl": 5,
    "sliding": True,
    "jitter": 0.25,
    "cleanup_interval": 9,
    "shards": 2,
    "persist": True,
    "codec": "pickle",
}


@pytest.mark.parametrize("setting", OTHER)
def test_mismatch(make_cache: MakeCache, name: str, setting: str) -> None:
    """A setting that differs is refused by name, and the cache goes on."""
    cache = make_cache(name, max_entries=10)
    cache["a"] = 1
    with pytest.raises(shmcache.ConfigMismatch) as caught:
        Cache(name, **{"max_entries": 10, setting: OTHER[setting]})
    assert f"{setting} is " in str(caught.value)
    assert "attach()" in str(caught.value)
    unnamed = set(OTHER) - {setting, "cleanup_interval"}
    assert not any(f"{other} is " in str(caught.value) for other in unnamed)
    assert contents(cache) == {"a": 1}


def test_mismatch_names_every_difference(make_cache: MakeCache, name: str) -> None:
    """The message has each setting with what there is and what was asked for."""
    make_cache(name, max_entries=10)
    with pytest.raises(shmcache.ConfigMismatch) as caught:
        Cache(name, **OTHER)
    for text in (
        "max_entries is 10 but asked for 20",
        "max_bytes is 1048576 but asked for 2097152",
        "ttl is None but asked for 5 s",
        "sliding is False but asked for True",
        "jitter is 0.0 but asked for 0.25",
        "cleanup_interval is 300 s but asked for 9 s",
        "shards is 1 but asked for 2",
        "persist is False but asked for True",
        "codec is 'msgpack' but asked for 'pickle'",
    ):
        assert text in str(caught.value)


def test_mismatch_with_another_process(make_cache: MakeCache, name: str) -> None:
    """Another process is refused in the same way, and takes nothing with it."""
    cache = make_cache(name, max_entries=10)
    cache["a"] = 1
    code = (
        "import shmcache, sys\n"
        "try: shmcache.Cache(sys.argv[1], max_entries=11)\n"
        "except shmcache.ConfigMismatch as error: print(error)"
    )
    assert "max_entries is 10 but asked for 11" in python(code, name)
    assert contents(cache) == {"a": 1}
    assert len(files(name)) == 3


def test_persist(make_cache: MakeCache, name: str) -> None:
    """A cache that persists is found again, with entries, order, times and counts."""
    settings: dict[str, Any] = {"max_entries": 3, "ttl": 1000, "persist": True}
    cache = make_cache(name, **settings)
    cache.update(a=1, b=2, c=3)
    cache.get("a")
    token = cache.gets("a")[1]
    cache.close()
    assert len(files(name)) == 3
    again = make_cache(name, **settings)
    assert contents(again) == {"a": 1, "b": 2, "c": 3}
    left = again.ttl("a")
    assert left is not None
    assert 900 < left <= 1000
    assert again.cas("a", 5, token) is True
    assert again.stats().hits == 2
    again["d"] = 4
    assert by_age(again) == ["c", "a", "d"]
    again.close()
    code = "import shmcache, sys; print(len(shmcache.Cache.attach(sys.argv[1])))"
    assert python(code, name) == "0"
    last = make_cache(name, **settings)
    last.unlink()
    assert files(name) == []


def test_without_persist_nothing_is_found_again(
    make_cache: MakeCache, name: str
) -> None:
    """The next cache of the name is empty, and may have other settings."""
    make_cache(name, max_entries=5).update(a=1)
    make_cache(name, max_entries=5).close()
    python("import shmcache, sys; shmcache.Cache(sys.argv[1] + 'x')['a'] = 1", name)
    assert files(f"{name}x") == []
    assert contents(make_cache(f"{name}x", max_entries=7)) == {}


def test_unlink(make_cache: MakeCache, name: str) -> None:
    """The names go at once; who is attached goes on, and the next one is new."""
    old = make_cache(name, max_entries=5)
    old["a"] = "old"
    old.unlink()
    assert files(name) == []
    old["b"] = "old"
    old.unlink()
    new = make_cache(name, max_entries=9)
    assert contents(new) == {}
    new["a"] = "new"
    assert contents(old) == {"a": "old", "b": "old"}
    old.close()
    assert contents(new) == {"a": "new"}
    assert len(files(name)) == 3


def test_last_one_out(make_cache: MakeCache, name: str) -> None:
    """The cache lives as long as one process has it, not as long as its creator."""
    cache = make_cache(name)
    cache["a"] = 1
    with subprocess.Popen(
        [
            *(sys.executable, "-c"),
            (
                "import shmcache, sys; c = shmcache.Cache.attach(sys.argv[1]);"
                "print(c['a'], flush=True); sys.stdin.read(); print(c['a'], flush=True)"
            ),
            name,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        cache.close()
        assert len(files(name)) == 3
        other.stdin.close()
        assert other.stdout.read() == "1\n"
    assert files(name) == []


def test_end_of_a_process_that_did_not_close(name: str) -> None:
    """A process that ends without close() leaves nothing."""
    code = (
        "import shmcache, sys; c = shmcache.Cache(sys.argv[1], max_entries=9);"
        "c['a'] = 1; d = shmcache.Cache.attach(sys.argv[1]); print(d['a'])"
    )
    assert python(code, name) == "1"
    assert files(name) == []


def answer(cache: Cache, key: str) -> None:
    """What a spawned process does with the cache that it was given."""
    cache[f"{key} back"] = cache[key]


def test_pickling(make_cache: MakeCache, name: str) -> None:
    """A pickled cache is the same cache here and in a spawned process."""
    cache = make_cache(name, ttl=100, lock_timeout=7)
    cache["a"] = 1
    with pickle.loads(pickle.dumps(cache)) as same:
        assert same["a"] == 1
    child = get_context("spawn").Process(target=answer, args=(cache, "a"))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    child.close()
    assert contents(cache) == {"a": 1, "a back": 1}


class Upper:
    """A codec of a user's own."""

    def dumps(self, value: str) -> bytes:
        """Shouted."""
        return value.upper().encode()

    def loads(self, data: bytes) -> str:
        """Still shouted."""
        return data.decode()


def test_pickling_with_a_codec_of_ones_own(make_cache: MakeCache) -> None:
    """The codec goes along, so that the other end can read."""
    cache = make_cache(codec=Upper())
    cache["a"] = "text"
    with pickle.loads(pickle.dumps(cache)) as same:
        assert same["a"] == "TEXT"


def test_pickling_a_subclass(make_cache: MakeCache, name: str) -> None:
    """A subclass comes back as itself."""
    make_cache(name)
    with Sub(name) as cache, pickle.loads(pickle.dumps(cache)) as same:
        assert type(same) is Sub


class Sub(Cache):
    """A cache with a name of its own."""


# --- codecs ---------------------------------------------------------------------


class Point:
    """Something that only pickle can store."""

    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


CODECS: list[tuple[Any, Any, Any]] = [
    ("msgpack", {"a": (1, {2})}, object()),
    ("msgspec", {"a": [1, "x"]}, object()),
    ("pickle", Point(3), lambda: 1),
    ("raw", b"bytes", "text"),
    (json, {"a": [1, None]}, b"bytes"),
    (Upper(), "SHOUT", 5),
]


@pytest.mark.parametrize(("codec", "value", "bad"), CODECS)
def test_codecs(make_cache: MakeCache, codec: Any, value: Any, bad: Any) -> None:
    """Each codec brings its values back, and refuses what it cannot store."""
    if codec is json:
        codec = Json()
    cache = make_cache(codec=codec)
    cache["k"] = value
    assert value == cache["k"]
    assert type(value) is type(cache["k"])
    assert value == cache.pop("k")
    with pytest.raises(shmcache.UnsupportedValue):
        cache["k"] = bad
    assert len(cache) == 0


class Json:
    """JSON as bytes."""

    name = "json"

    def dumps(self, value: Any) -> bytes:
        """As json.dumps, encoded."""
        return json.dumps(value).encode()

    def loads(self, data: bytes) -> Any:
        """As json.loads."""
        return json.loads(data)


def test_codec_with_a_type(make_cache: MakeCache, name: str) -> None:
    """With a type msgspec brings tuples back; the type is part of the agreement."""
    cache = make_cache(name, codec=shmcache.MsgspecCodec(tuple[int, str]))
    cache["k"] = (1, "x")
    assert cache["k"] == (1, "x")
    with pytest.raises(shmcache.ConfigMismatch, match="codec"):
        Cache(name, codec="msgspec")


@pytest.mark.parametrize("other", ["pickle", "raw", "msgspec", Json()])
def test_codec_mismatch(make_cache: MakeCache, name: str, other: Any) -> None:
    """Another codec is refused on creation and on attachment, by both names."""
    cache = make_cache(name)
    for attach in (Cache, Cache.attach):
        with pytest.raises(shmcache.ConfigMismatch, match="codec is 'msgpack' but"):
            attach(name, codec=other)
    cache["a"] = 1
    assert contents(cache) == {"a": 1}


def test_attach_with_a_codec_of_ones_own(make_cache: MakeCache, name: str) -> None:
    """A codec that has no name here must be given; with it the values come back."""
    make_cache(name, codec=Json())["k"] = [1]
    with pytest.raises(ValueError, match="json"):
        Cache.attach(name)
    with Cache.attach(name, codec=Json()) as same:
        assert same["k"] == [1]


def test_value_that_cannot_be_decoded(make_cache: MakeCache) -> None:
    """A codec that fails on reading is an error of ours, and delete() still works."""

    class Broken(Json):
        def loads(self, data: bytes) -> Any:
            raise RuntimeError(data)

    cache = make_cache(codec=Broken())
    cache["k"] = 1
    with pytest.raises(shmcache.SegmentCorrupt, match=r"delete\(\)"):
        cache.get("k")
    assert "k" in cache
    assert cache.delete("k") is True
