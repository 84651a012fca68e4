"""Promise 11: nothing that stands in a segment is run as code."""

from __future__ import annotations

import os
import pickle
import resource
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from peers import SHM, Peer, names_of, run

from shmcache import Cache, ConfigMismatch, SegmentCorrupt
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def test_11_files_are_for_their_owner_only(make_cache: Callable[..., Cache]) -> None:
    """Segment, lock file and semaphores have mode 600, whatever the umask."""
    umask = os.umask(0)
    try:
        cache = make_cache(max_entries=10, shards=3)
    finally:
        os.umask(umask)
    entries = names_of(cache.name)
    assert len(entries) == 5
    modes = {stat.S_IMODE(Path(SHM, entry).stat().st_mode) for entry in entries}
    assert modes == {0o600}


class Bomb:
    """An object whose pickle counts each time it is loaded."""

    loaded = 0

    def __reduce__(self) -> Any:
        """Pickles as a call."""
        return Bomb.load, ()

    @staticmethod
    def load() -> int:
        """What unpickling runs."""
        Bomb.loaded += 1
        return 1


def test_11_no_pickle_unless_asked_by_name(make_cache: Callable[..., Cache]) -> None:
    """A segment with the codec "pickle" serves only those that ask for "pickle" by
    name."""
    cache = make_cache(max_entries=10, codec="pickle")
    cache["bomb"] = Bomb()
    with pytest.raises(ConfigMismatch, match="codec is 'pickle' but asked for 'msgp"):
        Cache.attach(cache.name, codec="msgpack")
    with pytest.raises(ConfigMismatch, match="codec is 'pickle' but asked for 'msgp"):
        Cache(cache.name, max_entries=10)
    with Cache.attach(cache.name) as unasked:
        assert unasked.stats().entries == 1
        for use in (lambda: unasked["bomb"], lambda: list(unasked.values())):
            with pytest.raises(ConfigMismatch, match="attach with codec='pickle'"):
                use()
        with pytest.raises(ConfigMismatch, match="attach with codec='pickle'"):
            unasked["other"] = Bomb()
        with (
            pickle.loads(pickle.dumps(unasked)) as other,
            pytest.raises(ConfigMismatch, match="attach with codec='pickle'"),
        ):
            other.get("bomb")
    assert Bomb.loaded == 0
    with Cache.attach(cache.name, codec="pickle") as same:
        assert same["bomb"] == 1
        with pickle.loads(pickle.dumps(same)) as third:
            assert third["bomb"] == 1
    assert Bomb.loaded == 2
    Bomb.loaded = 0


@pytest.mark.damaged
def test_11_codec_changed_in_the_segment(make_cache: Callable[..., Cache]) -> None:
    """A header that was changed to say "pickle" makes no process load pickles."""
    cache = make_cache(max_entries=10, codec="msgpack")
    cache["list"] = [pickle.dumps(Bomb())]
    cache._attachment.block.view[L.CODEC_AT : L.CODEC_AT + 7] = b"\x06pickle"

    assert run(UNASKED, cache.name) == "ConfigMismatch\n" * 3
    assert cache["list"] == [pickle.dumps(Bomb())]
    assert Bomb.loaded == 0


UNASKED = """
import logging, sys
from shmcache import Cache, ConfigMismatch, SegmentCorrupt
logging.getLogger("shmcache").addHandler(logging.NullHandler())  # it is logged, too
for read in (
    lambda: Cache(sys.argv[1], max_entries=10, codec="raw"),
    lambda: Cache.attach(sys.argv[1], codec="raw"),
    lambda: Cache.attach(sys.argv[1])["list"],
):
    try:
        print(read())
    except ConfigMismatch:
        print("ConfigMismatch")
"""

HOSTILE = {
    "array of 2**32 - 1": b"\xdd\xff\xff\xff\xff",
    "map of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
    "str of 2**32 - 1": b"\xdb\xff\xff\xff\xff",
    "bin of 2**32 - 1": b"\xc6\xff\xff\xff\xff",
    "ext of 2**32 - 1": b"\xc9\xff\xff\xff\xff\x01",
    "array in arrays": b"\xdd\x7f\xff\xff\xff" * 100,
    "depth of 100,000": b"\x91" * 100_000,
    "maps of maps": b"\x81" * 100_000,
    "unused byte": b"\xc1" + b"\xdd\xff\xff\xff\xff",
    "unhashable key": b"\x81\x90\x01",
    "no UTF-8": b"\xa2\xff\xff",
    "two values": b"\x90\x90",
    "nothing": b"",
}


@pytest.mark.damaged
@pytest.mark.parametrize("bomb", HOSTILE)
def test_11_hostile_msgpack(make_cache: Callable[..., Cache], bomb: str) -> None:
    """Bytes that claim billions of elements, or endless depth, raise SegmentCorrupt,
    and cost no more memory than they have bytes."""
    cache = make_cache(max_entries=10, max_bytes=1 << 20, codec="msgpack")
    plant(cache, "bomb", HOSTILE[bomb])

    def read(link: Connection) -> None:
        mine = Cache.attach(cache.name)
        # Address space for a hundred times the bomb, not for billions of pointers.
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(SegmentCorrupt, match="cannot be decoded"):
            mine.get("bomb")
        with pytest.raises(SegmentCorrupt, match="cannot be decoded"):
            mine.pop("bomb")
        link.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        mine.close()

    reader = Peer(read)
    assert reader.hear() < 32 << 10  # KiB
    reader.end()
    assert cache.check() == []


def plant(cache: Cache, key: str, data: bytes) -> None:
    """Store bytes as if the cache's codec had produced them."""
    # The bytes and a tag of their own; then the tag is made the codec's.
    cache[key] = data
    words = cache._attachment.block.view.cast("I")
    geometry = cache._attachment.header.geometry
    [record] = [
        at
        for slot in range(1, geometry.slots + 1)
        if words[
            (at := (geometry.shards_at + geometry.records_at + slot * L.RECORD) // 4)
        ]
        & 1
    ]
    words[record + L.F_META] &= ~(15 << L.META_TAG_SHIFT)
    words[record + L.F_CHECKSUM] = L.checksum(data, words[record + L.F_HASH], 0)
