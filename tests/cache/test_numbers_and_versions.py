"""Numbers and versions: incr(), gets() and cas()."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import xxhash
from caches import MakeCache, by_age
from peers import Peer

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt
from shmcache._observe.snapshot import Segment

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from conftest import Clock


def test_hash_is_that_of_the_package(make_cache: MakeCache) -> None:
    """The engine's own XXH3 of short keys equals that of the xxhash package, which the
    interpreted engine calls."""
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
    """incr() and decr() add to the number that is there, or to ``initial`` if none
    is."""
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


@pytest.mark.parametrize(
    ("number", "delta"), [(-0.0, 0), (-0.0, 0.0), (0, -0.0), (0.5, 1), (1, 0.5)]
)
def test_incr_of_floats_and_ints(
    make_cache: MakeCache, number: float, delta: float
) -> None:
    """The sum of a float and an int is what Python makes of it, to the last bit."""
    cache = make_cache()
    cache["n"] = number
    expected = number + delta
    assert cache.incr("n", delta).hex() == float(expected).hex()
    assert cache["n"].hex() == expected.hex()


def test_incr_names_any_key(make_cache: MakeCache) -> None:
    """The message about a value that is no number shows a key that is too long to be
    printed, or to be read."""
    cache = make_cache()
    for key in (10**5000, (1, 10**5000), "k" * 5000):
        cache[key] = "text"
        with pytest.raises(TypeError, match="is not an int of 64 bits") as raised:
            cache.incr(key)
        assert len(str(raised.value)) < 400


def test_incr_of_a_damaged_value_is_no_matter_of_types(make_cache: MakeCache) -> None:
    """A number to which damage gave another type is SegmentCorrupt, not a TypeError."""
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
    """incr() changes versions, times and the order of use as any overwrite does."""
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
    """incr() is exact up to the largest and smallest int of 64 bits, and refused
    beyond."""
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
    """Without ttl incr() keeps an entry's expiry; a given ttl becomes the new one."""
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
    """incr() counts as neither hit nor miss, in a sliding cache as in any other."""
    cache = make_cache(ttl=60, sliding=sliding)
    cache.incr("n", initial=0)
    cache.incr("n")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (0, 0, 2)


@pytest.mark.parametrize("codec", ["msgpack", "msgspec", "pickle"])
def test_incr_of_a_number_that_was_set(make_cache: MakeCache, codec: str) -> None:
    """incr() adds to numbers that set() stored, whatever the codec."""
    cache = make_cache(codec=codec)
    cache.update(n=41, f=0.5)
    assert [cache.incr("n"), cache.incr("f")] == [42, 1.5]
    assert [cache["n"], cache["f"]] == [42, 1.5]
    assert [cache.incr("n"), cache.incr("f")] == [43, 2.5]


def test_incr_in_a_raw_cache(make_cache: MakeCache) -> None:
    """incr() in a cache with the codec "raw" is refused, as its values are bytes."""
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
    """A token stands for one version: not for an equal value, nor for a new one in its
    place."""
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
    """cas() refuses the token of another key's entry."""
    cache = make_cache()
    cache.update(a=1, b=2)
    assert cache.cas("b", 3, cache.gets("a")[1]) is False
    assert cache["b"] == 2


@pytest.mark.parametrize("token", [0, -1, 1, 1 << 64, 1 << 200])
def test_tokens_that_nobody_got(make_cache: MakeCache, token: int) -> None:
    """cas() with a number that gets() never returned stores nothing."""
    cache = make_cache()
    cache["k"] = 1
    assert cache.cas("k", 2, token) is False
    assert cache["k"] == 1


def test_counter_in_use_is_not_the_least_recently_used(make_cache: MakeCache) -> None:
    """A counter that two processes increment in turns stays, however many entries they
    store in between.
    """
    cache = make_cache(max_entries=20)

    def take_turns(link: Connection) -> None:
        with Cache.attach(cache.name) as mine:
            link.send("ready")
            while n := link.recv():
                mine.set(("theirs", n), "page")
                link.send(mine.incr("hits", initial=0))

    peer = Peer(take_turns)
    assert peer.hear() == "ready"
    for n in range(1, 200):
        cache.set(("ours", n), "page")
        assert cache.incr("hits", initial=0) == 2 * n - 1
        peer.say(n)
        assert peer.hear() == 2 * n
    peer.say(0)
    peer.end()


def test_increment_and_hits_in_their_order(make_cache: MakeCache) -> None:
    """An increment is a use that comes after the hits before it and before the hits
    after it, also of the entry that was the most recently used one until then."""
    cache = make_cache(max_entries=4)
    cache.update(a=1, b=2, c=3, d=4)
    cache.get("d")
    cache._flush_recency()
    cache.get("b")
    cache.incr("a")
    cache.get("b")
    assert by_age(cache) == ["c", "d", "a", "b"]
    cache.update(a=1, b=2, c=3, d=4)
    cache.get("d")
    cache._flush_recency()
    cache.incr("a")
    cache.get("d")
    assert by_age(cache) == ["b", "c", "a", "d"]


def test_increment_is_a_use_for_all_who_look(make_cache: MakeCache) -> None:
    """The order of a segment as others see it has the counter at the front."""
    cache = make_cache(max_entries=4)
    cache.update(a=1, b=2, c=3)
    cache.incr("a")
    with Segment(cache.name) as segment:
        entries = {key: segment.find(fmt.Kind.STR, key) for key in (b"a", b"b", b"c")}
        slots = [entry.slot for entry in entries.values() if entry]
        assert segment.ring(0) == [slots[0], slots[2], slots[1]]
        assert segment.newest(0, 2) == [slots[0], slots[2]]
    cache.incr("b")
    with Segment(cache.name) as segment:
        assert segment.ring(0) == [slots[1], slots[0], slots[2]]


@pytest.mark.damaged
@pytest.mark.parametrize("slot", [3, 4])
def test_late_use_of_no_entry_is_dropped(make_cache: MakeCache, slot: int) -> None:
    """If damage has the next holder move a slot that is free, or was never used, to the
    front, it does not."""
    cache = make_cache(max_entries=4)
    cache.update(a=1, b=2, c=3)
    del cache["c"]
    words, base = cache._attachment.words, cache._words_of(0)
    words[base + fmt.S_LATE_USE] = slot
    cache["d"] = 4
    assert words[base + fmt.S_LATE_USE] == 0
    assert cache.check() == []
    assert by_age(cache) == ["a", "b", "d"]


@pytest.mark.damaged
def test_late_use_of_a_slot_beyond_the_last_is_damage(make_cache: MakeCache) -> None:
    """A number that is no slot is reported once, and the shard goes on."""
    cache = make_cache(max_entries=4)
    cache.update(a=1, b=2)
    words, base = cache._attachment.words, cache._words_of(0)
    for number in (1 << 20, 1 << 32, fmt.MASK64):
        words[base + fmt.S_LATE_USE] = number
        with pytest.raises(shmcache.SegmentCorrupt, match="repeat the call"):
            cache.set("b", 2)
        assert words[base + fmt.S_LATE_USE] == 0
        cache.set("b", 2)
    assert by_age(cache) == ["a", "b"]


def test_tokens_are_not_given_out_again_in_a_new_segment(
    make_cache: MakeCache, name: str
) -> None:
    """A token of a segment that has gone fits no entry of the one that took its place,
    and the tokens of a key go on growing."""
    tokens: list[int] = []
    for shards in (8, 4, 1, 2):
        with Cache(name, max_entries=10, shards=shards) as cache:
            for value in range(5):
                cache["k"] = value
                for token in tokens:
                    assert cache.cas("k", "by an old token", token) is False
                tokens.append(cache.gets("k")[1])
    assert tokens == sorted(set(tokens))


def test_no_two_shards_give_out_a_token(make_cache: MakeCache) -> None:
    """The tokens of all entries differ, in whatever shards they are."""
    cache = make_cache(max_entries=1000, shards=8)
    for n in range(500):
        cache[n] = n
    tokens = {cache.gets(n)[1] for n in range(500)}
    assert len(tokens) == 500


def test_tokens_are_not_given_out_again_after_damage(make_cache: MakeCache) -> None:
    """If the number of the last write is damaged, later tokens are still new ones."""
    cache = make_cache(max_entries=10)
    cache["other"] = 1
    cache["k"] = 1
    old = [cache.gets("k")[1]]
    for _ in range(5):
        cache["k"] = 1
        old.append(cache.gets("k")[1])
    del cache["k"]
    cache._attachment.words[cache._words_of(0) + fmt.S_SEQUENCE] = fmt.MASK64 >> 1
    cache._rebuild_shard(0)
    for _ in range(10):
        cache["k"] = 1
        token = cache.gets("k")[1]
        assert token > max(old)


class Fussy:
    """A codec that refuses to read a value, as long as it is told to."""

    name = "fussy"
    refuses = True

    def dumps(self, value: object) -> bytes:
        """The text of a value."""
        return str(value).encode()

    def loads(self, data: bytes) -> object:
        """The text, or an exception."""
        if self.refuses:
            raise ZeroDivisionError(data)
        return data.decode()


@pytest.mark.parametrize("way", ["pop", "popitem", "pop with a default"])
def test_what_cannot_be_decoded_is_not_popped(make_cache: MakeCache, way: str) -> None:
    """If the codec refuses the bytes, pop() and popitem() raise, and the entry stays:
    its value, its time, and its place in the order of use."""
    codec = Fussy()
    cache = make_cache(max_entries=10, codec=codec)
    for key in "abc":
        cache.set(key, f"value of {key}", ttl=100)
    pops: dict[str, Callable[[], Any]] = {
        "pop": lambda: cache.pop("a"),
        "popitem": cache.popitem,
        "pop with a default": lambda: cache.pop("a", 5),
    }
    with pytest.raises((shmcache.SegmentCorrupt, ZeroDivisionError)):
        pops[way]()
    assert 99 < cache.ttl("a") <= 100
    codec.refuses = False
    assert cache.peek("a") == "value of a"
    assert by_age(cache) == ["a", "b", "c"]


def test_pop_meets_a_change(make_cache: MakeCache) -> None:
    """pop() returns the value that it removes, also if the entry is overwritten while
    the codec decodes."""

    class Overwriting(Fussy):
        refuses = False

        def loads(self, data: bytes) -> object:
            if data == b"old":
                cache["k"] = "new"
            return super().loads(data)

    cache = make_cache(max_entries=10, codec=Overwriting())
    cache["k"] = "old"
    assert cache.pop("k") == "new"
    assert "k" not in cache
    cache["k"] = "old"
    assert cache.popitem() == ("k", "new")
    assert len(cache) == 0
