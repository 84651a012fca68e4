"""The life of a cache: opening, closing, locks, pickling, forks, garbage."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
from caches import (
    NO_USES,
    PATIENCE,
    USES,
    MakeCache,
    Upper,
    by_age,
    contents,
    files,
    python,
)

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt

if TYPE_CHECKING:
    from collections.abc import Callable


def test_names_in_shared_memory(make_cache: MakeCache, name: str) -> None:
    """The names contain the user and the cache; all of them go with the last close."""
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
    "memoized": lambda c: c.memoize()(files)("a"),
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


@pytest.mark.parametrize(
    "use",
    [
        *("look by len", "look by iteration", "look by items", "look by stats"),
        *("look by check", "look by sweep", "popitem", "clear", "unlink"),
    ],
)
def test_closed_by_another_thread_at_the_start_of_a_call(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """A call that has found the cache open raises CacheClosed if it is closed then."""
    cache = make_cache(ttl=60)
    cache["a"] = 1
    require_open = cache._require_open

    def require_open_then_close() -> None:
        require_open()
        monkeypatch.undo()
        cache.close()

    monkeypatch.setattr(cache, "_require_open", require_open_then_close)
    with pytest.raises(shmcache.CacheClosed):
        CLOSED[use](cache)


def test_iteration_over_a_closed_cache(make_cache: MakeCache) -> None:
    """An iterator raises CacheClosed when the cache is closed under it."""
    cache = make_cache(max_entries=2000)
    cache.set_many({i: i for i in range(1000)})
    keys = iter(cache)
    next(keys)
    cache.close()
    with pytest.raises(shmcache.CacheClosed):
        list(keys)


def hold(cache: Cache) -> None:
    """Take the lock of shard 0, as another thread of this process would that keeps it
    long."""
    semaphore = posix_ipc.Semaphore(f"/shmcache-{os.getuid()}-{cache.name}.0")
    semaphore.acquire()
    semaphore.close()
    cache._attachment.words[cache._words_of(0) + fmt.S_HOLDER] = cache._attachment.token


def let_go(cache: Cache) -> None:
    """Give the lock of shard 0 back."""
    cache._attachment.words[cache._words_of(0) + fmt.S_HOLDER] = 0
    semaphore = posix_ipc.Semaphore(f"/shmcache-{os.getuid()}-{cache.name}.0")
    semaphore.release()
    semaphore.close()


@pytest.mark.skipif(not shmcache.compiled, reason="interpreted, such a lock is freed")
def test_lock_timeout(make_cache: MakeCache) -> None:
    """A lock that cannot be had in time raises LockTimeout; compiled reads need no
    lock."""
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
    """A Cache to which no reference is left closes itself, and removes its files."""
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
    """Two objects of one name are one cache, which lives until the second one is
    closed."""
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
    """attach() to a name that no process has created says so, and leaves nothing."""
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
    """The message names each setting that differs, with its value and with the one
    asked for."""
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
    """The names go at once; attached processes go on, and the next one creates a new
    cache."""
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
    """The cache lives as long as any process has it, not only as long as its
    creator."""
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
