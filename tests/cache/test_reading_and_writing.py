"""Reading and writing: every kind of key, every method, every refusal."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from caches import MakeCache, by_age, contents

import shmcache
from shmcache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Clock


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
    """A value comes back equal and with the same type, by every way of reading."""
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
    """Each method has its own answer for an absent key; None is a value like others."""
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
    """setdefault() stores and returns its value only where there is none."""
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
    """popitem() takes entries out in the order of their last use, and raises KeyError
    at the end."""
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
    """A cache is true even when it is empty, and len() counts live entries only."""
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

        def encode(self, *_: Any) -> bytes:
            return b"not asked"

    class Number(int):
        def __index__(self) -> int:
            return 0

        def to_bytes(self, *_: Any, **__: Any) -> bytes:
            return b"not asked"

    class Bytes(bytes):
        def __bytes__(self) -> bytes:
            return b"not asked"

    class Pair(tuple[str, str]):
        __slots__ = ()

        def __iter__(self) -> Iterator[str]:
            return iter(("not", "asked"))

        def __len__(self) -> int:
            return 1

        def __getitem__(self, _at: Any) -> Any:
            return "not asked"

    cache = make_cache()
    cache[Text("k")] = 1
    cache[Number(5)] = 2
    cache[Bytes(b"b")] = 3
    cache[Pair(("a", "b"))] = 4
    cache[Pair(), "in a tuple"] = 5
    keys: list[Any] = ["k", 5, b"b", ("a", "b"), ((), "in a tuple")]
    assert [cache[key] for key in keys] == [1, 2, 3, 4, 5]
    assert {str, int, bytes, tuple} == {type(key) for key in cache}


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
    """Each nonsensical call is refused with what to do, and changes nothing."""
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
