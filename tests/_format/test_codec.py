"""Keys and values as bytes: an accepted one comes back, all others are refused."""

from __future__ import annotations

import gc
import inspect
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections import OrderedDict, defaultdict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shmcache._engine import (
    MsgspecCodec,
    decode_key,
    decode_tagged,
    encode_key,
    make_codec,
)
from shmcache._format import keys as interpreted_keys
from shmcache._format import values as interpreted
from shmcache._format.keys import MAX_KEY_DEPTH
from shmcache._format.layout import CODEC_SIZE, MAX_KEY, Kind, Tag
from shmcache._format.richtypes import MAX_DEPTH
from shmcache.errors import (
    EntryTooLarge,
    SegmentCorrupt,
    UnsupportedKey,
    UnsupportedValue,
)

MSGPACK = make_codec("msgpack")
RICH = b"\xc1"  # before a value that has more than msgpack knows


class Color(StrEnum):
    """An enum whose members are str."""

    RED = "red"


class Number(IntEnum):
    """An enum whose members are int."""

    ONE = 1


class Text(str):
    """A subclass without any difference."""

    __slots__ = ()


class Octets(bytes):
    """A subclass that bytes() converts to something else."""

    def __bytes__(self) -> bytes:
        return b"something else"


Point = namedtuple("Point", "x y")  # noqa: PYI024


class Fixed(tzinfo):
    """A time zone of a user's own."""

    def utcoffset(self, _when: datetime | None) -> timedelta:
        """One hour."""
        return timedelta(hours=1)

    def dst(self, _when: datetime | None) -> None:
        """Unknown."""

    def tzname(self, _when: datetime | None) -> str:
        """A name."""
        return "fixed"


class Unhelpful:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


# --- what values and keys are made of ---------------------------------------------

ZONES = sorted(available_timezones())


def zone_info(index: int) -> ZoneInfo:
    """Return a zone; as a function, so that failures do not show all names."""
    return ZoneInfo(ZONES[index])


zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(
        timezone,
        st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23)),
    ),
    st.builds(timezone, st.just(timedelta(hours=2)), st.text(max_size=8)),
    *([st.integers(0, len(ZONES) - 1).map(zone_info)] if ZONES else []),
)
folds = st.sampled_from((0, 1))
moments = st.builds(
    lambda when, zone, fold: when.replace(tzinfo=zone, fold=fold),
    st.datetimes(),
    zones,
    folds,
)
clocks = st.builds(
    lambda when, zone, fold: when.replace(tzinfo=zone, fold=fold),
    st.times(),
    zones,
    folds,
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.decimals().filter(lambda number: not number.is_snan()),  # has no hash
    st.uuids(),
    moments,
    st.dates(),
    clocks,
    st.timedeltas(),
)
members = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.frozensets(inner, max_size=4), st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=8,
)
values = st.recursive(
    st.one_of(leaves, st.binary().map(bytearray), st.just(Decimal("-sNaN7"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.sets(members, max_size=5),
        st.frozensets(members, max_size=5),
        st.dictionaries(st.text(), inner, max_size=5),
        st.dictionaries(members, inner, max_size=5),
    ),
    max_leaves=25,
)
keys = st.recursive(
    st.one_of(st.text(), st.binary(), st.integers(), st.integers(-(1 << 99), 1 << 99)),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=10,
)


def exact(value: Any) -> str:
    """Return a text that is the same only for equal values of equal types."""
    kind = type(value)
    if kind in (list, tuple):
        content = ", ".join([exact(item) for item in value])
    elif kind in (set, frozenset):
        content = ", ".join(sorted(exact(item) for item in value))
    elif kind is dict:
        content = ", ".join([f"{exact(k)}: {exact(v)}" for k, v in value.items()])
    elif kind is float:
        content = struct.pack("<d", value).hex()
    elif kind is complex:
        content = struct.pack("<dd", value.real, value.imag).hex()
    elif kind in (datetime, time):
        zone = value.tzinfo
        name = getattr(zone, "key", None) or (zone and zone.tzname(None))
        content = f"{value.replace(tzinfo=None)!r} {type(zone).__name__} {name!r}"
        content += f" {value.utcoffset() if type(zone) is timezone else None!r}"
    elif kind is int:
        content = hex(value)
    else:
        content = repr(value)
    return f"{kind.__module__}.{kind.__qualname__}({content})"


def back(codec: Any, value: Any) -> Any:
    """Return what a cache with this codec returns for a value."""
    tag, data = codec.encode(value)
    assert type(data) is bytes
    return decode_tagged(codec, tag, data)


def nested(kind: type, levels: int) -> Any:
    """Return a container in a container in ..."""
    value: Any = kind()
    for _ in range(levels - 1):
        value = {"k": value} if kind is dict else kind((value,))
    return value


def levels(value: Any) -> int:
    """Return how many containers are inside one another."""
    count = 0
    while True:
        count += 1
        if not value:
            return count
        value = next(iter(value.values() if isinstance(value, dict) else value))


def shown(error: Exception) -> str:
    """Return what an error says, whatever this module was imported as."""
    return str(error).replace(f"{__name__}.", "HERE.")


# --- keys -------------------------------------------------------------------------


@pytest.mark.slow
@given(keys)
@example("")
@example(b"")
@example(())
@example(((),))
@example(-128)
@example(128)
@example(-(1 << 63))
def test_key_comes_back(key: Any) -> None:
    """A decoded key equals the encoded one, with the same types throughout."""
    kind, data = encode_key(key)
    assert exact(key) == exact(decode_key(kind, data))
    assert (kind, data) == interpreted_keys.encode_key(key)


@given(keys, keys)
@example(1, "1")
@example("1", b"1")
@example("", ())
@example((1, 2), ((1, 2),))
@example(("a", "b"), ("ab",))
@example((b"\x02\x00\x00",), (b"", b""))
def test_different_keys_differ_in_bytes(one: Any, other: Any) -> None:
    """Two keys have the same kind and bytes if and only if they are equal."""
    assert (one == other) == (encode_key(one) == encode_key(other))


@given(st.lists(keys, max_size=4).map(tuple), st.lists(keys, max_size=4).map(tuple))
@example((), ("a",))
@example(("user", 1), ("user", 1, "name"))
@example(("user", 1), ("user", 10))
@example(("use",), ("user",))
@example((("a",),), (("a", "b"),))
def test_tuple_is_prefix_in_bytes_as_in_elements(short: Any, rest: Any) -> None:
    """The bytes of a tuple are a prefix of another's if and only if the tuple is."""
    prefix = encode_key(short)[1]
    assert encode_key(short + rest)[1].startswith(prefix)
    expected = rest[: len(short)] == short
    assert expected == encode_key(rest)[1].startswith(prefix)


@pytest.mark.parametrize(
    ("key", "kind", "data"),
    [
        ("é", Kind.STR, "c3a9"),
        (b"\xff", Kind.BYTES, "ff"),
        (0, Kind.INT, "00"),
        (-1, Kind.INT, "ff"),
        (127, Kind.INT, "7f"),
        (128, Kind.INT, "0080"),
        (-128, Kind.INT, "80"),
        (-129, Kind.INT, "ff7f"),
        (1 << 64, Kind.INT, "010000000000000000"),
        (("u", 1), Kind.TUPLE, "01000175 03000101"),
        ((), Kind.TUPLE, ""),
        (("a", ((), b"b")), Kind.TUPLE, "01000161 040007 040000 02000162"),
    ],
)
def test_bytes_of_keys_are_pinned(key: Any, kind: Kind, data: str) -> None:
    """The bytes of a key are these; others would need a new format number."""
    assert (kind, bytes.fromhex(data)) == encode_key(key)


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (Color.RED, "red"),
        (Number.ONE, 1),
        (Octets(b"b"), b"b"),
        (Point(1, "y"), (1, "y")),
        ((Color.RED, Number.ONE, Octets(b"b")), ("red", 1, b"b")),
    ],
)
def test_subclass_counts_as_the_plain_value(key: Any, plain: Any) -> None:
    """An enum member, a named tuple ... is the same key as its plain value."""
    assert encode_key(plain) == encode_key(key)
    assert exact(plain) == exact(decode_key(*encode_key(key)))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (True, "key is True, which would be the same key as 1"),
        ((1, (2, False)), "key[1][1] is False, which would be the same key as 0"),
        (1.0, "key is a float"),
        (None, "key is a NoneType"),
        (bytearray(b"k"), "key is a bytearray"),
        ([1], "key is a list"),
        (frozenset(), "key is a frozenset"),
        (("a", (b"b", Decimal(1))), "key[1][1] is a decimal.Decimal"),
        ((Unhelpful(),), "key[0] is a HERE.Unhelpful"),
        ("\ud800", "key has a lone surrogate at position 0"),
        (("a", "b\udcff"), "key[1] has a lone surrogate at position 1"),
    ],
)
def test_other_keys_are_refused(key: Any, words: str) -> None:
    """A refused key's error names the offending part, and what to do."""
    with pytest.raises(UnsupportedKey) as caught:
        encode_key(key)
    assert shown(caught.value).startswith(words)
    assert "use " in str(caught.value) or "convert it" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "x" * MAX_KEY,
        b"x" * MAX_KEY,
        (1 << 8 * MAX_KEY - 1) - 1,
        -(1 << 8 * MAX_KEY - 1),
        ("x" * (MAX_KEY - 3),),
        ("x" * (MAX_KEY - 6), ""),
        (((b"x" * (MAX_KEY - 9),),),),
    ],
    ids=lambda key: type(key).__name__,
)
def test_longest_key_is_accepted_and_no_longer_one(key: Any) -> None:
    """MAX_KEY bytes are accepted and come back; one more is EntryTooLarge."""
    kind, data = encode_key(key)
    assert len(data) == MAX_KEY
    assert key == decode_key(kind, data)

    def longer(key: Any) -> Any:
        if isinstance(key, tuple):
            return (longer(key[0]), *key[1:])
        return key * 2 if isinstance(key, int) else key + key[:1]

    with pytest.raises(EntryTooLarge) as caught:
        encode_key(longer(key))
    assert str(MAX_KEY) in str(caught.value)
    assert str(MAX_KEY + 1) in str(caught.value) or isinstance(key, tuple)


def test_huge_int_key_is_refused_by_its_size() -> None:
    """An int that Python would not even print is refused with its size in bytes."""
    with pytest.raises(EntryTooLarge, match="1250001 bytes"):
        encode_key((("a", 1 << 10_000_000),))


def test_shared_parts_of_a_key_do_not_multiply() -> None:
    """A key of 2**30 elements, made of thirty tuples, is refused at once."""
    key: Any = "x"
    for _ in range(30):
        key = (key, key)
    with pytest.raises(EntryTooLarge):
        encode_key(key)


def test_nesting_of_keys_is_bounded() -> None:
    """Nested tuples can be decoded as deep as they can be encoded, and no deeper."""
    kind, data = encode_key(nested(tuple, MAX_KEY_DEPTH))
    assert levels(decode_key(kind, data)) == MAX_KEY_DEPTH
    with pytest.raises(UnsupportedKey, match="flatter"):
        encode_key(nested(tuple, MAX_KEY_DEPTH + 1))
    deeper = struct.pack(">BH", Kind.TUPLE, len(data)) + data
    with pytest.raises(SegmentCorrupt):
        decode_key(Kind.TUPLE, deeper)
    deepest = b"".join(struct.pack(">BH", 4, n) for n in range(65_529, -1, -3))
    with pytest.raises(SegmentCorrupt):
        decode_key(Kind.TUPLE, deepest)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (0, b""),
        (5, b"x"),
        (255, b"x"),
        (Kind.STR, b"\xff"),
        (Kind.STR, b"\xed\xa0\x80"),
        (Kind.STR, b"x" * (MAX_KEY + 1)),
        (Kind.INT, b""),
        (Kind.INT, b"\x00\x01"),
        (Kind.INT, b"\xff\xff"),
        (Kind.TUPLE, b"\x01"),
        (Kind.TUPLE, b"\x01\x00"),
        (Kind.TUPLE, b"\x01\x00\x01"),
        (Kind.TUPLE, b"\x01\xff\xff"),
        (Kind.TUPLE, b"\x00\x00\x00"),
        (Kind.TUPLE, b"\x03\x00\x00"),
    ],
)
def test_nonsense_is_no_key(kind: int, data: bytes) -> None:
    """Bytes that no key has raise SegmentCorrupt."""
    with pytest.raises(SegmentCorrupt):
        decode_key(kind, data)


@given(st.integers(0, 16), st.binary(max_size=64))
@settings(max_examples=300)
def test_bytes_that_decode_are_those_of_the_key(kind: int, data: bytes) -> None:
    """Any bytes either are exactly what a key has, or raise SegmentCorrupt."""
    try:
        key = decode_key(kind, data)
    except SegmentCorrupt:
        return
    assert (kind, data) == encode_key(key)


# --- values: the msgpack codec ----------------------------------------------------


@pytest.mark.slow
@given(values)
@settings(max_examples=200)
@example(math.nan)
@example(-0.0)
@example([-0.0, 0, False, "", b""])
@example({1: "int", "1": "str", b"1": "bytes", (1,): "tuple", None: "none"})
@example([(1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1])
@example((1 << 63) - 1)
@example(1 << 63)
@example(datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=UTC))
@example([Decimal("-0"), Decimal("1E+999999"), Decimal("NaN123"), Decimal("-Infinity")])
@example({"a": [bytearray(b"x"), {"b": {1, 2}}], "c": ((), [[]], {}, set())})
def test_value_comes_back(value: Any) -> None:
    """A decoded value equals the encoded one, and every part has the same type."""
    assert exact(value) == exact(back(MSGPACK, value))


@pytest.mark.slow
@given(values)
def test_both_modes_write_the_same_bytes(value: Any) -> None:
    """Compiled and interpreted codec encode alike, and read each other's bytes."""
    twin = interpreted.make_codec("msgpack")
    tag, data = MSGPACK.encode(value)
    assert (tag, data) == twin.encode(value)
    assert exact(value) == exact(interpreted.decode_tagged(twin, tag, data))


@pytest.mark.slow
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text()
        | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
    ).filter(lambda value: isinstance(value, list | dict))
)
def test_plain_value_is_plain_msgpack(value: Any) -> None:
    """A value that msgpack knows is written as msgpack itself would write it."""
    assert (Tag.CODEC, msgpack.packb(value)) == MSGPACK.encode(value)


@pytest.mark.parametrize(
    ("value", "tag", "data"),
    [
        (b"raw", Tag.BYTES, b"raw".hex()),
        ("é", Tag.STR, "c3a9"),
        (-2, Tag.INT, "feffffffffffffff"),
        (1.0, Tag.FLOAT, "000000000000f03f"),
        (None, Tag.NONE, ""),
        (True, Tag.TRUE, ""),
        (False, Tag.FALSE, ""),
        ({"a": [1, None]}, Tag.CODEC, "81a1619201c0"),
        ((1, "a"), Tag.CODEC, "c1 93c7000101a161"),
        ({1}, Tag.CODEC, "c1 92c7000201"),
        (frozenset({1}), Tag.CODEC, "c1 92c7000301"),
        ({1: 2}, Tag.CODEC, "c1 93c700000102"),
        ([[(1,)]], Tag.CODEC, "c1 919192c7000101"),
        (1 << 64, Tag.CODEC, "c1 c70904000000000000000001"),
        (bytearray(b"x"), Tag.CODEC, "c1 d40578"),
        (Decimal("-0.10"), Tag.CODEC, "c1 c705062d302e3130"),
        (UUID(int=5), Tag.CODEC, "c1 d807" + "00" * 15 + "05"),
        (1j, Tag.CODEC, "c1 d808" + "00" * 8 + "000000000000f03f"),
        (date(2024, 2, 29), Tag.CODEC, "c1 d609e807021d"),
        (timedelta(-1, 2, 3), Tag.CODEC, "c1 c70c0affffffff0200000003000000"),
        (
            datetime(2024, 2, 29, 1, 2, 3, 4, fold=1),  # noqa: DTZ001
            Tag.CODEC,
            "c1 c70c0be807021d01020304000000" + "01",
        ),
        (time(1, 2, 3, 4, UTC), Tag.CODEC, "c1 c7090c01020304000000" + "0055"),
    ],
)
def test_bytes_of_values_are_pinned(value: Any, tag: Tag, data: str) -> None:
    """The bytes of a value are these; others would need a new format number."""
    assert (tag, bytes.fromhex(data)) == MSGPACK.encode(value)


@pytest.mark.parametrize("key", ["UTC", "Europe/Paris", "America/New_York"])
@pytest.mark.parametrize("fold", [0, 1])
def test_named_zone_comes_back_with_its_fold(key: str, fold: int) -> None:
    """An hour that a clock shows twice keeps which of the two it is."""
    if key not in ZONES:
        pytest.skip("the time zone database is not installed")
    value = datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo(key), fold=fold)
    result = back(MSGPACK, [value])[0]
    assert (value, fold, value.utcoffset()) == (result, result.fold, result.utcoffset())
    assert value.tzinfo is result.tzinfo


def test_zone_without_a_name_is_refused() -> None:
    """A ZoneInfo read from a file is refused: its name says nothing elsewhere."""
    path = Path("/usr/share/zoneinfo/UTC")
    if not path.is_file():
        pytest.skip("the time zone database is not installed")
    for key in (None, "Europe/Paris"):
        zone = ZoneInfo.from_file(BytesIO(path.read_bytes()), key=key)
        with pytest.raises(UnsupportedValue, match=r"\$\[0\] has a time zone without"):
            MSGPACK.encode([datetime(2024, 1, 1, tzinfo=zone)])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "$ is a object"),
        ({"users": [0, 1, 2, {"tags": Fraction(1)}]}, '$["users"][3]["tags"] is a '),
        ({"a": ({"b": object()},)}, '$["a"][0]["b"] is a object'),
        ({(1, "x"): [object()]}, "$[(1, 'x')][0] is a object"),
        ({Point(1, 2): 0}, "${key} is a HERE.Point, and would come"),
        ({("a", Point(1, 2)): 0}, "${key}[1] is a HERE.Point"),
        ([{1, Fraction(1, 2)}], "$[0]{key} is a fractions.Fraction"),
        ([OrderedDict()], "$[0] is a collections.OrderedDict, and would come"),
        (defaultdict(list), "$ is a collections.defaultdict, and would come"),
        (Number.ONE, "$ is a HERE.Number, and would come back as a int"),
        ([Color.RED], "$[0] is a HERE.Color, and would come back as a str"),
        ({"k": Text("x")}, '$["k"] is a HERE.Text, and would come back as a str'),
        ({Text("x"): 1}, "${key} is a HERE.Text, and would come back as a str"),
        (Octets(b"x"), "$ is a HERE.Octets, and would come back as a bytes"),
        ([memoryview(b"x")], "$[0] is a memoryview"),
        ([msgpack.ExtType(4, b"x")], "$[0] is a msgpack.ext.ExtType"),
        ([msgpack.Timestamp(1)], "$[0] is a msgpack.ext.Timestamp"),
        ([1, ..., 2], "$[1] is a ellipsis"),
        ([int], "$[0] is a type"),
        ([datetime(2024, 1, 1, tzinfo=Fixed())], "$[0] has a time zone that"),
        ({"t": time(1, tzinfo=Fixed())}, '$["t"] has a time zone that is a HERE.'),
        ("\ud800", "$ is not UTF-8"),
        ({"a": ["ok", "b\udcff"]}, '$["a"][1] is not UTF-8'),
        ([{"\ud800": 1}], "$[0]{key} is not UTF-8"),
        ([Unhelpful()], "$[0] is a HERE.Unhelpful"),
        ({1 << 20_000: object()}, "$[...] is a object"),
        ({'"': object()}, "$['\"'] is a object"),
        ({"k" * 1000: object()}, '$["kkkkkkkkkkkk...kkkkkkkkkkkkk"] is a object'),
    ],
)
def test_other_values_are_refused(value: Any, words: str) -> None:
    """A refused value's error names the path to the part, its type, and a way out."""
    with pytest.raises(UnsupportedValue) as caught:
        MSGPACK.encode(value)
    assert shown(caught.value).startswith(words)
    assert 'or give the cache codec="pickle"' in str(caught.value)
    # A refusal leaves nothing behind.
    assert back(MSGPACK, [1]) == [1]


@pytest.mark.parametrize("kind", [list, dict, tuple, frozenset])
def test_deepest_value_is_accepted_and_no_deeper_one(kind: type) -> None:
    """MAX_DEPTH levels come back; one more is refused, with a path of sane length."""
    value = nested(kind, MAX_DEPTH)
    assert levels(back(MSGPACK, value)) == MAX_DEPTH
    with pytest.raises(UnsupportedValue, match="500 levels deep") as caught:
        MSGPACK.encode(nested(kind, MAX_DEPTH + 1))
    assert len(str(caught.value)) < 400
    # The same below a part that is not plain, and with one at the bottom.
    assert levels(back(MSGPACK, (nested(kind, MAX_DEPTH - 1), {1}))) == MAX_DEPTH
    with pytest.raises(UnsupportedValue, match="500 levels deep"):
        MSGPACK.encode((nested(kind, MAX_DEPTH), {1}))


@pytest.mark.slow
@pytest.mark.parametrize("levels", [100_000, 1_000_000])
def test_any_depth_is_refused_in_peace(levels: int) -> None:
    """However deep a value is, it is refused, and the C stack holds."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    with pytest.raises(UnsupportedValue):
        MSGPACK.encode(value)
    while value:  # taken apart level by level, as list's own deallocation may not be
        value = value[0]


def test_value_within_itself_is_refused() -> None:
    """A list or dict that contains itself is UnsupportedValue, not RecursionError."""
    circle: list[Any] = [1]
    circle.append({"again": circle})
    with pytest.raises(UnsupportedValue, match="contains itself"):
        MSGPACK.encode(circle)
    ring: dict[Any, Any] = {}
    ring[(1,)] = [ring]
    with pytest.raises(UnsupportedValue, match="contains itself"):
        MSGPACK.encode(ring)


def test_deep_call_is_told_that_the_stack_is_short() -> None:
    """Near the end of Python's stack a deep value is either stored or refused."""

    def descend(calls: int, value: Any) -> Any:
        return descend(calls - 1, value) if calls else back(MSGPACK, value)

    room = sys.getrecursionlimit() - len(inspect.stack(0))
    for kind in (list, tuple):
        value = nested(kind, MAX_DEPTH - 1)
        try:
            assert levels(descend(room - 200, value)) == MAX_DEPTH - 1
        except UnsupportedValue as error:
            refusal = str(error)
            assert isinstance(MSGPACK, interpreted.Codec)
            assert "Python's stack" in refusal
    assert back(MSGPACK, [[1]]) == [[1]]


def test_a_big_value_leaves_no_big_buffer() -> None:
    """The memory that it took to encode 32 MiB is given back."""
    codec = make_codec("msgpack")
    value = ["x" * (1 << 20)] * 32
    tracemalloc.start()
    try:
        codec.encode(value)
        codec.encode((value,))
        assert tracemalloc.get_traced_memory()[0] < 4 << 20
    finally:
        tracemalloc.stop()


def test_threads_do_not_mix_their_values() -> None:
    """Threads that encode with one codec at once each get their own value back."""
    codec = make_codec("msgpack")
    wrong: list[BaseException] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        value = {"n": [number] * 50, "t": (number, Decimal(number)), "s": {number}}
        plain = [{"n": number}] * 20
        try:
            for _ in range(1000):
                assert back(codec, value) == value
                assert back(codec, plain) == plain
        except BaseException as error:
            wrong.append(error)
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("plain", [True, False])
def test_value_that_changes_meanwhile_still_decodes(plain: bool) -> None:
    """Containers that another thread changes are stored as they were at some moment."""
    bottom = [] if plain else [(Decimal(1), bytearray(b"2"))]
    items: list[Any] = [0]
    fields: dict[Any, Any] = {"0": 0}
    members = {0}
    value = [items, fields, bottom] if plain else [items, fields, members, bottom]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for n in range(1, 30):
                items.append(n)
                fields[str(n)] = n
                members.add(n)
            for n in range(1, 30):
                items.pop()
                del fields[str(n)]
                members.remove(n)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(1000):
            result = back(MSGPACK, value)
            assert bottom == result[-1]
            assert list(range(len(result[0]))) == result[0]
            assert result[1].get("0") == 0
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_finalizer_that_encodes_disturbs_nothing() -> None:
    """A finalizer that runs while a codec encodes may encode with it, too."""
    codec = make_codec("msgpack")
    wrong: list[Any] = []
    ran = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            ran.append(1)
            inner = {"from": "a finalizer", "set": {1}}
            if back(codec, inner) != inner or back(codec, ["plain"]) != ["plain"]:
                wrong.append(inner)

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for turn in range(300):
            Cycle()
            value = {"turn": turn, "rows": [(turn, Decimal(turn), 1 << 70)] * 5}
            plain = [{"turn": turn}] * 20
            assert value == back(codec, value)
            assert plain == back(codec, plain)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert wrong == []
    assert len(ran) == 300


@pytest.mark.slow
@pytest.mark.once
def test_all_holds_with_msgpack_in_python() -> None:
    """If msgpack has no C code, threads switch inside it, and values stay whole."""
    names = "mix or finalizer or meanwhile or comes_back or refused"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", __file__, "-k", names, "-q"),
            *("--import-mode=importlib", "--numprocesses=0", "-p", "no:cacheprovider"),
        ],
        env={**os.environ, "MSGPACK_PUREPYTHON": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def test_late_types_decode_where_nobody_imported_them() -> None:
    """A process that never saw decimal, uuid or zoneinfo reads their values."""
    value = [Decimal("1.5"), UUID(int=7), time(1, tzinfo=UTC)]
    if ZONES:
        value.append(datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")))
    code = (
        "import sys; from shmcache._engine import make_codec;"
        "late = {'decimal', 'uuid', 'zoneinfo', 'msgspec'} & set(sys.modules);"
        "value = make_codec('msgpack').decode(bytes.fromhex(sys.argv[1]));"
        "print(sorted(late), value)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, MSGPACK.encode(value)[1].hex()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"[] {value}" == run.stdout.strip(), run.stderr


# --- values: bytes that nobody encoded --------------------------------------------


def survives(data: bytes) -> None:
    """Decode, or raise SegmentCorrupt that says what to do and mostly has a cause."""
    for tag in Tag:
        caught = None
        try:
            decode_tagged(MSGPACK, tag, data)
        except SegmentCorrupt as error:
            caught = error
        if caught:
            assert "delete()" in str(caught)
            assert caught.__cause__ is not None or tag >= Tag.NONE


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_decode_or_are_corrupt(data: bytes) -> None:
    """Random bytes, also after the mark of a rich value, decode or are corrupt."""
    survives(data)
    survives(RICH + data)
    for code in range(-3, 16):
        ext = msgpack.packb(msgpack.ExtType(code & 0x7F, data))
        survives(RICH + ext)
        survives(RICH + b"\x93" + ext + b"\x01" + ext)


@given(values, st.data())
@settings(max_examples=150)
def test_damaged_bytes_decode_or_are_corrupt(value: Any, data: st.DataObject) -> None:
    """Flipped, cut and doubled bytes of a value give a value or SegmentCorrupt."""
    whole = bytearray(MSGPACK.encode(value)[1])
    for _ in range(data.draw(st.integers(1, 4))):
        if whole:
            at = data.draw(st.integers(0, len(whole) - 1))
            whole[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    survives(bytes(whole))
    survives(bytes(whole[:cut]))
    survives(bytes(whole[cut:] + whole))


BOMBS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "str": b"\xdb\xff\xff\xff\xff",
    "bin": b"\xc6\xff\xff\xff\xff",
    "ext": b"\xc9\xff\xff\xff\xff\x04",
    "arrays": b"\x91" * 100_000,
    "maps": b"\x81\xa0" * 100_000,
    "arrays of many": b"\xdc\x20\x00" * 3000,
    "marks": b"\x92\xc7\x00\x01" * 50_000,
    "keys": b"\x81" * 100_000,
    "unhashable key": b"\x93\xc7\x00\x00\x90\x01",
    "unhashable member": b"\x92\xc7\x00\x02\x90",
    "odd dict": b"\x92\xc7\x00\x00\x01",
    "mark alone": b"\xc7\x00\x01",
    "unknown ext": b"\xd4\x63\x00",
    "digits": msgpack.packb(msgpack.ExtType(6, b"9" * 500_000)),
    "exponent": msgpack.packb(msgpack.ExtType(6, b"1E+999999999999999999999")),
    "no number": msgpack.packb(msgpack.ExtType(6, b"abc")),
    "short uuid": msgpack.packb(msgpack.ExtType(7, b"abc")),
}


@pytest.mark.parametrize("prefix", [b"", RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_little_memory(bomb: str, prefix: bytes) -> None:
    """Bytes with false lengths or depths take no more than some 100 MB to refuse."""
    tracemalloc.start()
    try:
        survives(prefix + BOMBS[bomb])
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0\xc0",
        b"\x81\x01\x01",
        RICH,
        RICH + RICH + b"\x01",
        RICH + BOMBS["odd dict"],
        RICH + BOMBS["unhashable key"],
        RICH + BOMBS["unhashable member"],
        RICH + BOMBS["unknown ext"],
        RICH + BOMBS["no number"],
        RICH + BOMBS["short uuid"],
        RICH + b"\x81\x01\x01",
    ],
)
def test_nonsense_is_no_value(data: bytes) -> None:
    """Bytes that no value has raise SegmentCorrupt."""
    with pytest.raises(SegmentCorrupt):
        MSGPACK.decode(data)


@pytest.mark.parametrize(
    "zone",
    [
        b"Z../../../../../../etc/passwd",
        b"Z/etc/passwd",
        b"Z/usr/share/zoneinfo/UTC",
        b"ZEurope/../../../../etc/passwd",
        b"ZEurope",
        b"Z",
        b"Z.",
        b"Za\0b",
        b"Z\xff",
        b"Zzone.tab",
        b"Z" + b"x" * 10_000,
        b"F",
        b"F" + b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"F" + bytes(9),
        b"N" + bytes(7),
        b"N" + bytes(8) + b"\xff",
        b"UU",
        b"x",
    ],
)
def test_hostile_zones_are_corrupt(zone: bytes) -> None:
    """A zone that is a path, or nonsense, is SegmentCorrupt, and no file is opened."""
    plain = msgpack.unpackb(MSGPACK.encode(datetime(2024, 1, 1))[1][1:])  # noqa: DTZ001
    data = RICH + msgpack.packb(msgpack.ExtType(plain.code, plain.data + zone))
    with pytest.raises(SegmentCorrupt) as caught:
        MSGPACK.decode(data)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (9, b"\xe8\x07\x0d\x01"),  # month 13
        (9, b"\xe8\x07\x01"),
        (9, b"\xe8\x07\x01\x01\x00"),
        (10, b"\xff\xff\xff\x7f" + bytes(8)),
        (11, b"\xe8\x07\x01\x01\x18" + bytes(7)),  # hour 24
        (11, b"\xe8\x07\x01\x01" + bytes(7) + b"\x02"),  # fold 2
        (12, bytes(8)[:7] + b"\x02"),
        (12, b""),
        (8, bytes(15)),
    ],
)
def test_hostile_dates_are_corrupt(code: int, data: bytes) -> None:
    """Dates and times that do not exist are SegmentCorrupt, never odd objects."""
    with pytest.raises(SegmentCorrupt):
        MSGPACK.decode(RICH + msgpack.packb(msgpack.ExtType(code, data)))


@pytest.mark.parametrize(
    ("tag", "data"),
    [
        (Tag.STR, b"\xff"),
        (Tag.INT, b""),
        (Tag.INT, bytes(7)),
        (Tag.INT, bytes(9)),
        (Tag.FLOAT, bytes(4)),
        (Tag.NONE, b"x"),
        (Tag.TRUE, b"x"),
        (Tag.FALSE, b"x"),
        (8, b""),
        (15, b""),
        (-1, b""),
    ],
)
def test_tags_with_wrong_bytes_are_corrupt(tag: int, data: bytes) -> None:
    """An unknown tag, or one that does not fit its bytes, is SegmentCorrupt."""
    with pytest.raises(SegmentCorrupt):
        decode_tagged(MSGPACK, tag, data)


# --- the other codecs -------------------------------------------------------------


class Upper:
    """A codec of a user's own."""

    name = "upper"

    def dumps(self, value: Any) -> bytes:
        """Upper case."""
        return str(value).upper().encode()

    def loads(self, data: bytes) -> Any:
        """Upper case."""
        return data.decode()


class Nameless(Upper):
    """A codec without a name."""

    name = None  # type: ignore[assignment]


SIMPLE = [b"b", "s", -5, 1.5, None, True, False]


@pytest.mark.parametrize("name", ["msgpack", "msgspec", "pickle", "raw", Upper()])
def test_every_codec_reads_every_tag(name: Any) -> None:
    """With any codec, what incr stores as an int is read as an int."""
    if name == "msgspec":
        pytest.importorskip("msgspec")
    codec = make_codec(name)
    for value in SIMPLE:
        tag, data = MSGPACK.encode(value)
        assert exact(value) == exact(decode_tagged(codec, tag, data))


@pytest.mark.parametrize("name", ["msgpack", "pickle"])
@pytest.mark.parametrize("value", SIMPLE)
def test_simple_values_have_tags(name: str, value: Any) -> None:
    """Plain bytes, str, int ... do not pass through msgpack or pickle."""
    tag, _ = make_codec(name).encode(value)
    assert tag != Tag.CODEC


def test_codec_has_a_name() -> None:
    """The name of a codec, which the segment records, has at most 63 bytes."""
    pytest.importorskip("msgspec")
    assert make_codec("msgpack").name == "msgpack"
    assert make_codec("pickle").name == "pickle"
    assert make_codec("raw").name == "raw"
    assert make_codec("msgspec").name == "msgspec"
    assert make_codec(Upper()).name == "upper"
    assert make_codec(Nameless()).name == f"{__name__}.Nameless"
    assert make_codec(Nameless).name == f"{__name__}.Nameless"
    assert make_codec(json).name == "json"
    assert make_codec(MsgspecCodec(Point)).name == f"msgspec:{__name__}.Point"
    names = {
        make_codec(MsgspecCodec(kind)).name
        for kind in (list[int], list[str], dict[str, dict[str, dict[str, list[int]]]])
    }
    assert len(names) == 3
    long = [type("T" * 100 + end, (Nameless,), {})() for end in ("a", "b")]
    names |= {make_codec(codec).name for codec in long}
    assert len(names) == 5
    assert all(len(name.encode()) < CODEC_SIZE for name in names)


def test_codec_object_is_taken_as_it_is() -> None:
    """A codec object that already exists is used as it is."""
    codec = make_codec("pickle")
    assert codec is make_codec(codec)


@pytest.mark.parametrize(
    "codec",
    ["json", "", None, 5, object(), MsgspecCodec, "msgspec:builtins.int"],
)
def test_unknown_codec_is_refused_with_the_choices(codec: Any) -> None:
    """An unknown codec is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match="'msgpack', 'msgspec', 'pickle', 'raw'"):
        make_codec(codec)


@pytest.mark.parametrize(
    "name",
    ["msgpack", "pickle", "raw", "msgspec:x", "", "x" * 64, "é" * 32, 5, "\ud800"],
)
def test_bad_name_of_a_codec_is_refused(name: Any) -> None:
    """A codec's name is refused if it is taken, too long, or not a name."""
    codec = Upper()
    codec.name = name
    with pytest.raises(ValueError):
        make_codec(codec)


def test_pickle_is_taken_by_name_only() -> None:
    """The pickle module itself is refused, with the way to ask for it."""
    with pytest.raises(ValueError, match="codec='pickle'"):
        make_codec(pickle)


def test_pickle_codec_brings_back_objects() -> None:
    """Subclasses, and str that is not UTF-8, come back through pickle; locks do not."""
    codec = make_codec("pickle")
    for value in (
        Point(1, 2),
        OrderedDict(a=1),
        Number.ONE,
        "\ud800",
        1 << 70,
        {1: [2]},
    ):
        assert exact(value) == exact(back(codec, value))
    with pytest.raises(
        UnsupportedValue, match=r"pickle cannot encode this _thread\.lock"
    ):
        codec.encode(threading.Lock())
    with pytest.raises(UnsupportedValue):
        codec.encode([lambda: None])
    with pytest.raises(SegmentCorrupt):
        codec.decode(b"no pickle")


def test_raw_codec_takes_bytes_alone() -> None:
    """codec="raw" stores bytes as they are and refuses every other type."""
    codec = make_codec("raw")
    assert codec.encode(b"x") == (Tag.BYTES, b"x")
    for value in (bytearray(b"x"), memoryview(b"x"), "x", None, 1, Octets(b"x")):
        with pytest.raises(UnsupportedValue, match=type(value).__name__):
            codec.encode(value)
    with pytest.raises(SegmentCorrupt):
        codec.decode(b"x")


def test_custom_codec_sees_every_value() -> None:
    """An object with dumps and loads also encodes values that have a tag."""
    codec = make_codec(Upper())
    assert codec.encode("abc") == (Tag.CODEC, b"ABC")
    assert codec.encode(None) == (Tag.CODEC, b"NONE")
    assert back(codec, 1) == "1"
    with pytest.raises(SegmentCorrupt) as caught:
        codec.decode(b"\xff")
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)


def test_custom_codec_must_return_bytes() -> None:
    """A dumps that returns str, or raises, is UnsupportedValue with the reason."""
    codec = make_codec(json)
    with pytest.raises(
        UnsupportedValue, match=r"dumps\(\) of codec json returned a str"
    ):
        codec.encode({"a": 1})
    with pytest.raises(UnsupportedValue, match="not JSON serializable") as caught:
        codec.encode(object())
    assert isinstance(caught.value.__cause__, TypeError)


def test_msgspec_codec_with_a_type_brings_it_back() -> None:
    """With a type, values come back as it says; others are corrupt."""
    msgspec = pytest.importorskip("msgspec")
    user = msgspec.defstruct("User", [("name", str), ("tags", set[str])])
    codec = make_codec(MsgspecCodec(user))
    value = user("ann", {"a", "b"})
    tag, data = codec.encode(value)
    assert tag == Tag.CODEC
    assert value == codec.decode(data)
    with pytest.raises(SegmentCorrupt):
        codec.decode(MsgspecCodec().encode({"name": 5})[1])


def test_msgspec_codec_without_a_type_is_lossy() -> None:
    """Without a type, the types change that the docstring lists."""
    pytest.importorskip("msgspec")
    codec = make_codec("msgspec")
    assert back(codec, {"a": [1, "x", 2.5, None]}) == {"a": [1, "x", 2.5, None]}
    lossy: dict[type, list[Any]] = {
        list: [(1,), {1}, frozenset({1}), Point(1, 2)],
        bytes: [bytearray(b"x")],
        str: [
            *(Decimal(1), UUID(int=1), date(2024, 1, 1), time(1), timedelta(1)),
            *(datetime(2024, 1, 1), Color.RED),  # noqa: DTZ001
        ],
        int: [Number.ONE],
    }
    for kind, originals in lossy.items():
        assert [kind] * len(originals) == [type(back(codec, v)) for v in originals]
    for value in (object(), 1 << 70, "\ud800"):
        with pytest.raises(UnsupportedValue):
            codec.encode(value)


def test_missing_msgspec_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """If msgspec is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError, match=r"pip install 'shmcache\[msgspec\]'"):
        make_codec("msgspec")


def test_random_walk_over_a_long_life() -> None:
    """A codec that has encoded and refused ten thousand values is as good as new."""
    rng = random.Random(5)
    codec = make_codec("msgpack")
    makers: list[Any] = [
        lambda: {"id": rng.random()},
        lambda: (rng.random(), {rng.randrange(9)}),
        lambda: [1 << rng.randrange(200)],
        lambda: ["x" * rng.randrange(100_000)],
        lambda: [object()],
        lambda: "\ud800",
    ]
    for _ in range(10_000):
        value = rng.choice(makers)()
        try:
            result = back(codec, value)
        except UnsupportedValue:
            assert value == "\ud800" or type(value[0]) is object
        else:
            assert value == result
