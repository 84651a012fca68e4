"""Keys and values of the histories of fuzz_model.py, and what they are as bytes."""

from __future__ import annotations

import pickle
import reprlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from shmcache._engine import make_codec

if TYPE_CHECKING:
    from collections.abc import Iterator


# --- keys -----------------------------------------------------------------------


class Text(str):
    """A str that lies about itself wherever it is asked, but equals the plain one."""

    __slots__ = ()

    def encode(self, *_: Any, **__: Any) -> bytes:
        """Other bytes than the text has."""
        return b"lie"

    def __iter__(self) -> Iterator[str]:
        return iter("lie")

    def __str__(self) -> str:
        return "lie"


class Octets(bytes):
    """Bytes that lie about themselves, but equal the plain ones."""

    def __bytes__(self) -> bytes:
        return b"lie"

    def __iter__(self) -> Iterator[int]:
        return iter(b"lie")


class Whole(int):
    """An int that lies about itself, but equals the plain one."""

    def __index__(self) -> int:
        return 77

    __int__ = __abs__ = __index__

    def to_bytes(self, *_: Any, **__: Any) -> bytes:
        """Other bytes than the number has."""
        return b"lie"


class Pair(tuple[Any, ...]):
    """A tuple that lies about itself, but equals the plain one."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(("lie",))


def disguised(key: Any) -> Any:
    """An equal key of subclasses."""
    if type(key) is tuple:
        return Pair([disguised(part) for part in key])
    return {str: Text, bytes: Octets, int: Whole}[type(key)](key)


def plain(key: Any) -> Any:
    """The key of built-in types that equals a key."""
    if isinstance(key, str):
        return str.__str__(key) if type(key) is str else "".join(str.__iter__(key))
    if isinstance(key, bytes):
        return key if type(key) is bytes else bytes(bytes.__iter__(key))
    if isinstance(key, int):
        return int.__index__(key)
    return tuple(plain(part) for part in tuple.__iter__(key))


def encoded(key: Any) -> tuple[int, bytes]:
    """The kind and the bytes of a key, by docs/format.md."""
    if isinstance(key, str):
        return 1, str.encode(key)
    if isinstance(key, bytes):
        return 2, plain(key)
    if isinstance(key, int):
        number = plain(key)
        bits = (number if number >= 0 else -number - 1).bit_length() + 1  # and the sign
        return 3, number.to_bytes(-(-bits // 8), "big", signed=True)
    parts = [encoded(part) for part in tuple.__iter__(key)]
    return 4, b"".join(struct.pack(">BH", k, len(data)) + data for k, data in parts)


# --- values ---------------------------------------------------------------------


@dataclass(frozen=True)
class Rotten:
    """A value that the codec of a history writes, but cannot read."""

    error: type[Exception]


class Fragile:
    """A codec of pickles whose ``loads`` raises for rotten values."""

    name = "fragile"

    def dumps(self, value: Any) -> bytes:
        """A pickle."""
        return pickle.dumps(value, 5)

    def loads(self, data: bytes) -> Any:
        """The value of a pickle, unless it is rotten."""
        value = pickle.loads(data)
        if type(value) is Rotten:
            raise value.error
        return value


def is_number(value: Any) -> bool:
    """Whether a value is a float, or an int of 64 bits."""
    is_int = type(value) is int and -(1 << 63) <= value < 1 << 63
    return is_int or type(value) is float


def size_of(value: Any, codec: str) -> int:
    """Bytes of a value in the arena."""
    if codec == "fragile":
        return len(pickle.dumps(value, 5))
    if value is None or value is True or value is False:
        return 0
    if is_number(value):
        return 8
    if type(value) in (str, bytes):
        return len(value if type(value) is bytes else value.encode())
    if codec == "pickle":
        return len(pickle.dumps(value, 5))
    if type(value) in (list, dict) and "rich" not in value:
        return len(msgpack.packb(value))
    return len(make_codec("msgpack").encode(value)[1])


def same(one: Any, two: Any) -> bool:
    """Whether two results are equal, and of the same types."""
    if type(one) is not type(two):
        return False
    if type(one) is float:
        return struct.pack("d", one) == struct.pack("d", two)
    if type(one) in (list, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if type(one) is dict:
        return len(one) == len(two) and all(
            key in two and same(value, two[key]) for key, value in one.items()
        )
    return bool(one == two)


def in_order(results: Any) -> list[Any]:
    """The results of an iteration in an order that does not depend on the cache."""
    return sorted(results, key=rank)


def rank(result: Any) -> str:
    """What results are sorted by; ``repr`` would take too long for long ints."""
    if type(result) is tuple:
        return f"({','.join(map(rank, result))})"
    return hex(result) if type(result) is int else repr(result)


class Shown(reprlib.Repr):
    """Short forms of arguments and results."""

    def repr_int(self, number: int, level: int) -> str:
        """Long ints take long to be written out."""
        bits = number.bit_length()
        return repr(number) if bits < 200 else f"<int of {bits} bits>"

    repr_Whole = repr_int  # noqa: N815


shown = Shown()
shown.maxstring = shown.maxother = 60
shown.maxtuple = shown.maxdict = shown.maxlist = 12
