"""Room and recency: what is evicted when, and what counts as a use."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from caches import NO_USES, TICK, USES, MakeCache, by_age, contents, python
from caught import shard_word
from peers import Peer

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from conftest import Clock


@pytest.mark.parametrize("use", USES)
def test_use_renews_recency(make_cache: MakeCache, use: str) -> None:
    """In a full cache the entry that was just used stays, and the next older one is
    evicted."""
    cache = make_cache(max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    USES[use](cache)
    cache["d"] = 4
    assert by_age(cache) == ["c", "a", "d"]


@pytest.mark.parametrize("use", NO_USES)
def test_looking_does_not_renew_recency(make_cache: MakeCache, use: str) -> None:
    """Calls that only look change neither the order of use nor hits and misses."""
    cache = make_cache(max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    before = cache.stats()
    NO_USES[use](cache)
    after = cache.stats()
    assert (before.hits, before.misses) == (after.hits, after.misses)
    cache["d"] = 4
    assert by_age(cache) == ["b", "c", "d"]


def test_lru_is_exact_over_many_hits(make_cache: MakeCache) -> None:
    """The order of thousands of hits is kept, far more than a recency buffer holds."""
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
    """The uses by a process that has closed are applied: what it read stays."""
    cache = make_cache(name, max_entries=3)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    code = (
        "import shmcache, sys\n"
        "with shmcache.Cache.attach(sys.argv[1]) as cache: print(cache['a'])"
    )
    assert python(code, name) == "1"
    cache["d"] = 4
    assert by_age(cache) == ["c", "a", "d"]


@pytest.mark.parametrize("hot", [1, 2, 3])
def test_hits_of_few_keys_reach_other_processes(
    make_cache: MakeCache, hot: int
) -> None:
    """A key that one process only reads stays while another process stores: 64 hits
    later, at the latest, the others know, however few keys the hits are of."""
    cache = make_cache(max_entries=20, cleanup_interval=3600)
    keys = [f"hot {n}" for n in range(hot)]
    cache.set_many(dict.fromkeys(keys, 1))

    def read(link: Connection) -> None:
        with Cache.attach(cache.name) as mine:
            while link.recv():
                hits = (mine.get(keys[n % hot]) for n in range(65))
                link.send(all(hits))

    reader = Peer(read)
    for turn in range(1, 30):
        reader.say(turn)
        assert reader.hear(), f"a key that is read all the time went in turn {turn}"
        for n in range(20 - hot):
            cache[turn, n] = "page"
    reader.say(0)
    reader.end()


def test_hits_of_one_key_take_no_lock_if_nobody_writes(make_cache: MakeCache) -> None:
    """Reading the most recently used entry again and again is reading only."""
    if not shmcache.compiled:
        pytest.skip("the interpreted engine reads under the lock")
    cache = make_cache(max_entries=20, cleanup_interval=3600)
    cache["hot"] = 1
    cache.get_many(["hot"] * 64)
    cache._flush_recency()
    before = shard_word(cache, fmt.S_ACQUISITIONS)
    for _ in range(1000):
        cache.get("hot")
    assert shard_word(cache, fmt.S_ACQUISITIONS) == before


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
    """With max_entries=0 only the room counts: 256 blocks of 256 bytes, and no more."""
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
    """When old and new value do not both fit, the old one goes first, and others
    stay."""
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
    """A full cache first gives up what has expired, however recently it was used."""
    cache = make_cache(max_entries=3, clock=clock)
    cache.update(a=1, b=2)
    cache.set("c", 3, ttl=5)
    clock.advance(5)
    cache["d"] = 4
    assert by_age(cache) == ["a", "b", "d"]


def test_expired_go_first_out_of_thousands(make_cache: MakeCache, clock: Clock) -> None:
    """An expired entry is found among thousands that expire a moment later."""
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
    """An expired entry is found among many that expire later in the same tick of the
    wheel."""
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
    """EntryTooLarge is raised at once, and no other entry is evicted for it."""
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
    """A key over 65,535 bytes is refused by all calls that store, and is absent to all
    others."""
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
    """The largest possible entry fits, evicts all others, and comes back whole."""
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
