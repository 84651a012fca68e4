"""Access traces: the cache hits exactly when an LRU made of an OrderedDict hits.

Two traces are made here.  The others are published ones of real systems and are not
part of the repository: they are looked for in ``$SHMCACHE_TRACES``, then in
``shared/traces`` beside or above the tests, and skipped if they are nowhere.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import os
from array import array
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from amounts import ACCESSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import shmcache

HERE = Path(__file__).resolve().parent

TRACES = [
    "web07.trace.xz",
    "orm-busy.trace.xz",
    "multi3.trace.gz",
    "2_pools.trace.gz",
    "loop.trace.gz",
]


def folder() -> Path:
    """The folder of the traces; the test is skipped if there is none."""
    given = os.environ.get("SHMCACHE_TRACES")
    places = [Path(given)] if given else [p / "shared/traces" for p in HERE.parents]
    for place in places:
        if (place / TRACES[0]).is_file():
            return place
    pytest.skip(
        "no access traces in $SHMCACHE_TRACES or in shared/traces beside or above the"
        " repository"
    )


def accesses(path: Path) -> Iterator[int]:
    """The numbers of the objects, in the order of the requests."""
    if path.suffix == ".xz":
        with lzma.open(path) as file:
            while piece := file.read(4 * 8192):
                numbers = array("I", piece)
                numbers.byteswap()  # they are big-endian
                yield from numbers
    else:
        with gzip.open(path, "rt") as lines:
            yield from (int(line) for line in lines if "*" not in line)


def skewed() -> Iterator[int]:
    """Few objects are requested often, and many rarely; which ones are popular changes
    slowly."""
    random = Random(1)
    for n in itertools.count():
        yield int(random.paretovariate(0.6)) % 50_000 + n // 500


def loops() -> Iterator[int]:
    """Walks in circles of several sizes, which is the worst case of an LRU."""
    random = Random(2)
    while True:
        first, size = random.randrange(30_000), random.choice([30, 60, 900, 1_200])
        for _ in range(random.randint(2, 5)):
            yield from range(first, first + size)


MADE = {"skewed": skewed, "loops": loops}


def trace_of(name: str) -> list[int]:
    """The first accesses of a trace; the test is skipped if it is a real one and not
    here."""
    numbers = MADE[name]() if name in MADE else accesses(folder() / name)
    return list(islice(numbers, ACCESSES))


def reference(trace: list[int], capacity: int) -> list[bool]:
    """For each access, whether an exact LRU of this capacity hits."""
    stock: OrderedDict[int, None] = OrderedDict()
    hits = []
    for number in trace:
        hits.append(number in stock)
        stock[number] = None
        stock.move_to_end(number)
        if len(stock) > capacity:
            stock.popitem(last=False)
    return hits


@pytest.mark.counted
@pytest.mark.parametrize("capacity", [50, 1000, 20_000])
@pytest.mark.parametrize("name", [*MADE, *TRACES])
def test_hits_are_those_of_an_lru(
    make_cache: Callable[..., shmcache.Cache], name: str, capacity: int
) -> None:
    """Access by access a cache of one shard hits when an exact LRU does."""
    trace = trace_of(name)
    assert len(trace) > ACCESSES // 10
    expected = reference(trace, capacity)
    cache = make_cache(max_entries=capacity, max_bytes=64 * capacity, shards=1)
    hits = []
    for number in trace:
        hit = cache.get(number) == number
        if not hit:
            cache.set(number, number)
        hits.append(hit)
    differs = [i for i, hit in enumerate(hits) if hit != expected[i]]
    assert differs[:5] == []
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (sum(expected), len(trace) - sum(expected))
    assert stats.entries == min(capacity, len(set(trace)))
    if name in MADE:
        assert min(stats.hits, stats.misses) > 0


def test_a_trace_is_read_as_it_was_written() -> None:
    """The readers find the numbers that the formats' descriptions promise."""
    place = folder()
    assert list(islice(accesses(place / "web07.trace.xz"), 5)) == [0, 1, 2, 0, 1]
    assert list(islice(accesses(place / "multi3.trace.gz"), 3)) == [0, 1, 2]
    numbers = sum(1 for _ in accesses(place / "2_pools.trace.gz"))
    assert numbers == 100_000  # without the two lines that are marks
