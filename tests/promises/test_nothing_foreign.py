"""Between taking a lock and giving it back, no Python code runs but the engine's own.

A profile function is told of every Python function that is called, whoever calls it,
and then looks whether this process holds a lock.  Compiled, no function may be called
then; interpreted, none of a user.  With the garbage collector's threshold at 1,
finalizers would be called, too, wherever the engine made an object that is tracked.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from caught import ROOMY, Writer, shard_word, stop_inside
from peers import PATIENCE

import shmcache
from shmcache import Cache, CacheClosed, SegmentCorrupt
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class Point(NamedTuple):
    """A key, or a part of one."""

    x: int
    y: int


LARGE = 200_000  # bytes: hashing so much lets other threads run


class Codec:
    """A codec in Python, which is user's code."""

    name = "in Python"

    def dumps(self, value: object) -> bytes:
        """Any value as bytes."""
        return repr(value).encode()

    def loads(self, data: bytes) -> object:
        """The value again, if it is a number."""
        text = data.decode()
        return int(text) if text.isdigit() else text


class Seconds(float):
    """A TTL with methods of its own."""

    def __mul__(self, other: Any) -> Any:
        """The product, by Python code."""
        return float(self) * other


class Key(str):
    """A key with methods of its own."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        """Bytes, by Python code."""
        return b"not asked"

    def __hash__(self) -> int:
        """The hash of the plain str, by Python code."""
        return hash(str(self))


class Knot:
    """Garbage with a finalizer in Python, which only the collector finds."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        """Does nothing, in Python."""


class Watch:
    """Notes which Python functions are called while this process holds a lock."""

    def __init__(self, cache: Cache) -> None:
        self.seen: list[str] = []
        self.calls = 0
        attachment = cache._attachment
        self._words = attachment.words
        self._token = attachment.token
        self._holders = [
            cache._words_of(shard) + L.S_HOLDER
            for shard in range(cache._settings.shards)
        ]

    def __call__(self, frame: FrameType, event: str, _arg: object) -> None:
        """What sys.setprofile wants."""
        if event != "call":
            return
        self.calls += 1
        if any(self._words[at] == self._token for at in self._holders):
            module = frame.f_globals.get("__name__", "")
            if shmcache.compiled or not module.startswith(("shmcache.", "contextlib")):
                self.seen.append(f"{module}.{frame.f_code.co_qualname}")

    def end(self) -> None:
        """Lets go of the segment."""
        self._words = memoryview(b"")


def test_the_watch_notices_what_runs_under_a_lock(
    make_cache: Callable[..., Cache],
) -> None:
    """A function that is called while this process holds a lock is noticed."""
    cache = make_cache(codec=Codec())
    cache["k"] = 1
    watch = Watch(cache)
    holder = cache._words_of(0) + L.S_HOLDER
    words = cache._attachment.words
    words[holder] = cache._attachment.token
    sys.setprofile(watch)
    try:
        Codec().dumps(1)
    finally:
        sys.setprofile(None)
        words[holder] = 0
        watch.end()
    assert watch.seen == [f"{__name__}.Codec.dumps"]


@pytest.fixture
def watched(make_cache: Callable[..., Cache]) -> Iterator[Callable[..., Cache]]:
    """Makes caches, and fails if anything foreign ran under one of their locks."""
    watches: list[Watch] = []  # one at most
    threshold = gc.get_threshold()

    def make(*, collects: bool = True, **settings: Any) -> Cache:
        cache = make_cache(cleanup_interval=3600, **settings)
        cache.set("first", 1)
        watches.append(Watch(cache))
        gc.callbacks.append(collected)
        if shmcache.compiled and collects:
            gc.freeze()  # what is there already need not be looked at each time
            gc.set_threshold(1)
        sys.setprofile(watches[-1])
        return cache

    def collected(*_: object) -> None:
        """A Python function that each collection calls."""

    try:
        yield make
    finally:
        sys.setprofile(None)
        gc.set_threshold(*threshold)
        gc.unfreeze()
        while collected in gc.callbacks:
            gc.callbacks.remove(collected)
    for watch in watches:
        watch.end()
        assert watch.calls
        assert watch.seen == []


def use_everything(cache: Cache) -> None:
    """Each operation, with arguments that run Python code wherever that can be."""
    for n in range(9):
        Knot()
        key = (Key("key"), Point(n, n))
        cache.set(key, n, ttl=Seconds(30))
        cache.get(key)
        cache.gets(key)
        cache.incr(("n", n % 3), initial=0, ttl=Seconds(9))
        cache.incr(("n", n % 3), initial=0)
        cache.touch(key, Seconds(20))
        cache.add(key, n)
        cache.replace(key, n + 1)
        cache.cas(key, n, cache.gets(key)[1])
        cache.get_many([key, Key("absent")])
        cache.set_many({Key("a"): 1, Key("b"): "x" * LARGE}, ttl=Seconds(5))
        cache.get(Key("b"))
        cache.gets(Key("b"))
        _ = key in cache
        cache.peek(key)
        with suppress(KeyError):
            cache.ttl(key)
        cache.get_or_set(("computed", n % 5), lambda: 5)
        cache.setdefault(Key("c"), 7)
        list(cache.items())
        cache.sweep()
        len(cache)
        cache.check()
        cache.stats()
        cache.pop(key, None)
        cache.pop(Key("b"), None)
        cache.delete(Key("a"))
        cache.set(("more", n), n)
    with suppress(KeyError):
        cache.popitem()
    cache.clear(prefix=(Key("more"),))
    cache.clear()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a codec": {"codec": Codec()},
    "sliding": {"sliding": True, "ttl": 60.0},
    "one entry": {"max_entries": 1, "max_bytes": 1 << 20},
    "shards": {"shards": 4, "max_bytes": 4 << 20},
}


@pytest.mark.parametrize("how", SETTINGS)
def test_nothing_foreign_runs_under_a_lock(
    watched: Callable[..., Cache], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No clock, codec, key, TTL, log handler or finalizer is called under a lock."""
    caplog.set_level(logging.DEBUG, "shmcache")
    now = 1_000_000_000_000

    def clock() -> float:
        nonlocal now
        now += 500_000_000
        return now / 1e9

    settings = {"max_entries": 20, "max_bytes": 2 << 20, "clock": clock}
    use_everything(watched(**{**settings, **SETTINGS[how]}))


def test_nothing_foreign_runs_while_a_shard_is_rebuilt(
    watched: Callable[..., Cache],
) -> None:
    """A rebuild calls no clock, and runs no finalizer."""
    cache = watched(max_entries=20, max_bytes=1 << 20, clock=lambda: 1e6)
    for n in range(20):
        Knot()
        cache.set(n, "x" * n, ttl=50)
    cache._rebuild_shard(0)
    assert len(cache) == 20


@pytest.mark.parametrize("word", [L.S_FREE_SLOT, L.S_BLOCKS_USED])
def test_nothing_foreign_runs_when_damage_is_met(
    watched: Callable[..., Cache], word: int
) -> None:
    """An operation that meets damage calls nothing before it gives the lock back.

    (The exception is an object that is tracked, so before Python 3.12, which collects
    only between bytecodes, the collector may run.)
    """
    cache = watched(
        collects=sys.version_info >= (3, 12),
        max_entries=20,
        max_bytes=1 << 20,
        clock=lambda: 1e6,
    )
    for n in range(20):
        Knot()
        cache.set(n, "x" * n, ttl=50)
    del cache[3]
    cache._attachment.words[cache._words_of(0) + word] = 1 << 40
    Knot()
    with suppress(SegmentCorrupt):
        cache.set("new", 1, ttl=50)
    assert cache.stats().recoveries == 1


# --- what Python code can do before the lock is taken ---------------------------

USES: dict[str, Callable[[Cache], object]] = {
    "get": lambda c: c.get("k"),
    "[]": lambda c: c["k"],
    "gets": lambda c: c.gets("k"),
    "ttl": lambda c: c.ttl("k"),
    "set": lambda c: c.set("k", 2),
    "set_many": lambda c: c.set_many({"k": 2, "l": 3}),
    "add": lambda c: c.add("new", 2),
    "replace": lambda c: c.replace("k", 2),
    "touch": lambda c: c.touch("k"),
    "incr": lambda c: c.incr("k"),
    "delete": lambda c: c.delete("k"),
    "delete_many": lambda c: c.delete_many(["k", "l"]),
    "pop": lambda c: c.pop("k"),
    "popitem": lambda c: c.popitem(),
    "clear": lambda c: c.clear(),
    "sweep": lambda c: c.sweep(),
    "items": lambda c: list(c.items()),
}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_a_clock_that_closes_the_cache(
    make_cache: Callable[..., Cache], name: str, use: str, call: int
) -> None:
    """An operation whose clock closes the cache says CacheClosed, and takes no lock
    along: the process's other object of the cache goes on."""
    closes = -1

    def clock() -> int:
        nonlocal closes
        closes -= 1
        if closes == 0:
            one.close()
        return 1_000_000_000_000

    settings: dict[str, Any] = {"max_entries": 9, "ttl": 50, "clock": clock}
    one, two = (make_cache(name, **settings, cleanup_interval=3600) for _ in range(2))
    one.set_many({"k": 1, "l": 1})
    closes = call
    with suppress(CacheClosed):
        USES[use](one)
    assert shard_word(two, L.S_HOLDER) == 0
    two["after"] = 1
    assert two.stats().lock_waits == 0


def closing(cache: Cache, keys: list[str]) -> Iterator[str]:
    """Keys, after the first of which the cache is closed."""
    yield keys[0]
    cache.close()
    yield from keys[1:]


class Pairs:
    """A mapping whose pairs close the cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def items(self) -> Iterator[tuple[str, int]]:
        """The pairs."""
        return ((key, 1) for key in closing(self._cache, ["a", "b"]))


class ClosingCodec(Codec):
    """A codec that closes a cache in the midst of a call."""

    cache: Cache | None = None

    def dumps(self, value: object) -> bytes:
        """Closes the cache."""
        if self.cache:
            self.cache.close()
        return super().dumps(value)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("how", ["delete_many", "get_many", "set_many", "dumps"])
def test_closed_in_the_midst_of_a_call(
    make_cache: Callable[..., Cache], name: str, how: str, alone: bool
) -> None:
    """A call during which the cache is closed, by its own keys, pairs or codec, says
    CacheClosed."""
    codec = ClosingCodec()
    cache = make_cache(name, max_entries=9, codec=codec)
    cache.set_many({"a": 1, "b": 1})
    other = None if alone else make_cache(name, max_entries=9, codec=codec)
    uses: dict[str, Callable[[], object]] = {
        "delete_many": lambda: cache.delete_many(closing(cache, ["a", "b"])),
        "get_many": lambda: cache.get_many(closing(cache, ["a", "b"])),
        "set_many": lambda: cache.set_many(Pairs(cache)),
        "dumps": lambda: cache.set("c", 1),
    }
    codec.cache = cache if how == "dumps" else None
    with pytest.raises(CacheClosed):
        uses[how]()
    if other is not None:
        codec.cache = None
        other["after"] = 1
        assert (other.stats().lock_waits, other.stats().recoveries) == (0, 0)


def test_close_beside_threads_that_are_inside(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """close() by one thread leaves no lock taken, whatever other threads do: they
    finish what they are in, or say CacheClosed."""
    settings: dict[str, Any] = {"max_entries": 9, "max_bytes": 4 << 20}
    other = make_cache(name, **settings)
    text = b"x" * LARGE

    def hammer(cache: Cache, begun: threading.Event) -> None:
        try:
            for n in range(10_000):
                cache.set(n % 3, text)
                cache.gets(n % 3)
                cache.pop(n % 3, None)
                begun.set()
        except CacheClosed:
            ended.append(1)

    for round_ in range(30):
        ended: list[int] = []
        cache = make_cache(name, **settings)
        begun = [threading.Event() for _ in range(2)]
        threads = [threading.Thread(target=hammer, args=(cache, one)) for one in begun]
        for thread in threads:
            thread.start()
        for one in begun:
            one.wait()
        cache.close()
        for thread in threads:
            thread.join()
        assert len(ended) == 2
        assert shard_word(other, L.S_HOLDER) == 0
        other["round"] = round_
    assert other.stats().recoveries == 0


@pytest.mark.damaged  # else close() would be checked first, which waits for the lock
@pytest.mark.parametrize("operation", ["set", "get", "incr", "pop"])
def test_a_signal_handler_closes_the_cache_during_a_wait(
    make_cache: Callable[..., Cache], name: str, operation: str
) -> None:
    """An operation that waits for a lock says CacheClosed if a handler closes the
    cache meanwhile."""
    cache = make_cache(name, **ROOMY, lock_timeout=PATIENCE)
    other = make_cache(name, **ROOMY)
    operations: dict[str, Callable[[], object]] = {
        "set": lambda: cache.set("k", 1),
        "get": lambda: cache.gets("k"),
        "incr": lambda: cache.incr("k", initial=0),
        "pop": lambda: cache.pop("k", None),
    }
    writer = Writer(other)
    stop_inside(other, writer.pid, writer.token)
    former = signal.signal(signal.SIGALRM, lambda *_: cache.close())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(CacheClosed):
            operations[operation]()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        os.kill(writer.pid, signal.SIGCONT)
        writer.say("end")
        writer.end()
    other["after"] = 1
    assert other.stats().recoveries == 0
    assert other.check() == []


class ForkingCodec(Codec):
    """A codec that forks in ``dumps``; the child goes on with the call."""

    child = -1
    armed = False

    def dumps(self, value: object) -> bytes:
        """Forks once."""
        if self.armed:
            self.armed = False
            self.child = os.fork()
        return super().dumps(value)


def test_a_child_forked_in_the_midst_of_a_call_is_a_worker_of_its_own(
    make_cache: Callable[..., Cache],
) -> None:
    """The child that a codec forks takes the lock as itself, not as its parent."""
    codec = ForkingCodec()
    cache = make_cache(max_entries=9, codec=codec)
    cache["k"] = 1
    parent = cache._attachment.token
    codec.armed = True
    cache["k"] = 2
    if codec.child == 0:
        code = 1
        try:
            if cache._attachment.entered() and cache["k"] == 2:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(codec.child, 0)[1]) == 0
    assert cache._attachment.token == parent
