"""The codecs of a cache: by name, or given by the user."""

from __future__ import annotations

import json
from typing import Any

import pytest
from caches import MakeCache, Upper, contents

import shmcache
from shmcache import Cache


class Point:
    """An object that only pickle can store."""

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
    """With a type, msgspec brings tuples back, and the type is a setting that all must
    agree on."""
    cache = make_cache(name, codec=shmcache.MsgspecCodec(tuple[int, str]))
    cache["k"] = (1, "x")
    assert cache["k"] == (1, "x")
    with pytest.raises(shmcache.ConfigMismatch, match="codec"):
        Cache(name, codec="msgspec")


@pytest.mark.parametrize("other", ["pickle", "raw", "msgspec", Json()])
def test_codec_mismatch(make_cache: MakeCache, name: str, other: Any) -> None:
    """Creation and attachment with another codec are refused; the message names both
    codecs."""
    cache = make_cache(name)
    for attach in (Cache, Cache.attach):
        with pytest.raises(shmcache.ConfigMismatch, match="codec is 'msgpack' but"):
            attach(name, codec=other)
    cache["a"] = 1
    assert contents(cache) == {"a": 1}


def test_attach_with_a_codec_of_ones_own(make_cache: MakeCache, name: str) -> None:
    """Attachment needs the codec object if the codec has no name; with it the values
    come back."""
    make_cache(name, codec=Json())["k"] = [1]
    with pytest.raises(ValueError, match="json"):
        Cache.attach(name)
    with Cache.attach(name, codec=Json()) as same:
        assert same["k"] == [1]


def test_value_that_cannot_be_decoded(make_cache: MakeCache) -> None:
    """A codec that fails on reading raises an error of this package, and delete() still
    works."""

    class Broken(Json):
        def loads(self, data: bytes) -> Any:
            raise RuntimeError(data)

    cache = make_cache(codec=Broken())
    cache["k"] = 1
    with pytest.raises(shmcache.SegmentCorrupt, match=r"delete\(\)"):
        cache.get("k")
    assert "k" in cache
    assert cache.delete("k") is True
