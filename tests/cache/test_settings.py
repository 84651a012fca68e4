"""The settings of a cache: defaults, limits, sizes in words, refusals."""

from __future__ import annotations

import math
import os
import re
from fractions import Fraction
from typing import Any

import pytest
from caches import MakeCache, files

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt


def test_defaults(make_cache: MakeCache) -> None:
    """Without settings a cache has 10,000 entries of 512 bytes in one shard, and no
    expiry."""
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
    """The default of max_bytes is 512 bytes for each entry, at least 1 MiB."""
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
    """The default of cleanup_interval is a quarter of the TTL, from one second to five
    minutes."""
    assert interval == make_cache(ttl=ttl).cleanup_interval


def test_cleanup_interval_can_be_given(make_cache: MakeCache) -> None:
    """A given interval is taken as it is."""
    assert make_cache(ttl=100, cleanup_interval=0.25).cleanup_interval == 0.25


@pytest.mark.parametrize(
    ("entries", "shards"), [(1, 1), (16_384, 1), (16_385, 2), (65_536, 8)]
)
def test_default_of_shards(make_cache: MakeCache, entries: int, shards: int) -> None:
    """Up to 16,384 entries there is one shard, so LRU is exact; above there are
    more."""
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
    """Each nonsensical setting is refused by its name, with what to do, and leaves
    nothing."""
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
    """Names that differ in one character are different caches."""
    names = [name + end for end in ("", ".", "_", "-", ".0", ".A", ".a", ".lease.1")]
    caches = [make_cache(each, max_entries=2) for each in names]
    for cache in caches:
        cache["me"] = cache.name
    assert names == [cache["me"] for cache in caches]


def test_memory_is_reserved_at_creation(make_cache: MakeCache, name: str) -> None:
    """Every page of the segment is allocated from the start, so no SIGBUS comes
    later."""
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
