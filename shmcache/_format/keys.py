# mypy: disable-error-code="untyped-decorator, type-arg, no-any-return"
"""Keys as bytes, and back.

A key becomes a kind and canonical bytes: equal keys have equal bytes, and different
keys have different ones.  The bytes of a tuple are those of its elements, one after the
other, each as ::

    kind (1 byte)   length (2 bytes, big-endian)   bytes

so the bytes of ``("user", 1)`` are a prefix of those of ``("user", 1, "name")``.

Negative indexes are avoided here: the engine's C code is generated without support for
them.
"""

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

from shmcache._format.layout import MAX_KEY, Kind
from shmcache.errors import EntryTooLarge, SegmentCorrupt, UnsupportedKey

# Levels of tuples within tuples.  The limit bounds the recursion of both directions.
MAX_KEY_DEPTH = 32

# These are plain ints because members of an IntEnum are slow to compare.
_KEY_STR, _KEY_BYTES, _KEY_INT, _KEY_TUPLE = map(int, Kind)

_KEY_LIMIT = cython.declare(cython.Py_ssize_t, MAX_KEY)

_ELEMENT = struct.Struct(">BH")  # kind and length of an element of a tuple


def encode_key(key: Any) -> tuple[int, bytes]:
    """Encode a key.

    Instances of subclasses of str, bytes, int and tuple (enums, named tuples) are
    encoded as the plain value, to which they are equal.

    Args:
        key: A str, bytes, int or a tuple of these.

    Returns:
        The kind of the key, as in ``Kind``, and its canonical bytes.

    Raises:
        UnsupportedKey: The key, or an element of it, has another type, or is a bool, or
            a str that UTF-8 cannot encode, or stands in too many tuples.
        EntryTooLarge: The key has more than MAX_KEY bytes.
    """
    return _encode_key(key, [])


@cython.cfunc
def _encode_key(key: Any, path: list) -> tuple:
    """Encode a key or an element; ``path`` has the indexes that lead to it."""
    if isinstance(key, str):
        try:
            kind, data = _KEY_STR, str.encode(key)
        except UnicodeEncodeError as error:
            raise UnsupportedKey(
                f"{_key_path(path)} has a lone surrogate at position {error.start},"
                " which UTF-8 lacks; use key.encode('utf-8', 'surrogateescape')"
            ) from error
    elif isinstance(key, bytes):
        # A subclass may define __bytes__; its buffer has the bytes that are compared.
        kind, data = _KEY_BYTES, bytes(memoryview(key))
    elif isinstance(key, bool):
        raise UnsupportedKey(
            f"{_key_path(path)} is {key!r}, which would be the same key as {int(key)},"
            f" because True == 1; use {int(key)} or {str(key)!r}"
        )
    elif isinstance(key, int):
        number = int.__index__(key)
        size: cython.Py_ssize_t = int_size(number)
        if size > _KEY_LIMIT:
            raise _key_too_large(size, path)
        kind, data = _KEY_INT, number.to_bytes(size, "big", signed=True)
    elif isinstance(key, tuple):
        kind, data = _KEY_TUPLE, _encode_tuple(key, path)
    else:
        raise UnsupportedKey(
            f"{_key_path(path)} is a {type_name(type(key))}; a key is a str, bytes,"
            " int or a tuple of these: convert it, for instance with str()"
        )
    if len(data) > _KEY_LIMIT:
        raise _key_too_large(len(data), path)
    return kind, data


@cython.cfunc
def _encode_tuple(key: Any, path: list) -> bytes:
    if len(path) >= MAX_KEY_DEPTH:
        raise UnsupportedKey(
            f"{_key_path(path)} is inside {MAX_KEY_DEPTH} tuples, the limit;"
            " use a flatter key"
        )
    parts: list = []
    # A subclass may define __iter__; its items are what is compared.
    for index, element in enumerate(tuple.__iter__(key)):
        path.append(index)
        kind, data = _encode_key(element, path)
        path.pop()
        parts.append(_ELEMENT.pack(kind, len(data)))
        parts.append(data)
    return b"".join(parts)


@cython.cfunc
@cython.exceptval(-1)
def int_size(number: Any) -> cython.Py_ssize_t:
    """Return how many bytes the shortest two's complement of an int has."""
    return (number if number >= 0 else ~number).bit_length() // 8 + 1


@cython.cfunc
def type_name(kind: Any) -> str:
    """Return the name of a class as an error message shows it."""
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


@cython.cfunc
def _key_too_large(size: cython.Py_ssize_t, path: list) -> Any:
    return EntryTooLarge(
        f"{_key_path(path)} has {size} bytes or more, but the limit is {MAX_KEY};"
        " use a hash of it as the key"
    )


@cython.cfunc
def _key_path(path: list) -> str:
    """Return where in the key an element stands, for an error message."""
    return "key" + "".join([f"[{index}]" for index in path])


def decode_key(kind: int, data: bytes) -> Any:
    """Decode the kind and bytes that ``encode_key`` returned.

    Args:
        kind: The kind of the key, as in ``Kind``.
        data: Its canonical bytes.

    Returns:
        The key; instances of subclasses come back as the plain value.

    Raises:
        SegmentCorrupt: ``encode_key`` returns these bytes for no key.
    """
    try:
        return _decode_key(kind, data, 0)
    except (ValueError, struct.error) as error:
        raise SegmentCorrupt(
            f"{len(data)} bytes of kind {kind} are not a key ({error}); run check(),"
            " and unlink() the cache if it finds damage"
        ) from error


@cython.cfunc
def _decode_key(kind: Any, data: bytes, depth: cython.Py_ssize_t) -> Any:
    if len(data) > _KEY_LIMIT:
        raise ValueError(f"more than {MAX_KEY}")
    if kind == _KEY_STR:
        return data.decode()
    if kind == _KEY_BYTES:
        return data
    if kind == _KEY_INT:
        number = int.from_bytes(data, "big", signed=True)
        if len(data) != int_size(number):
            raise ValueError("an int of more or fewer bytes than it needs")
        return number
    if kind != _KEY_TUPLE or depth >= MAX_KEY_DEPTH:
        raise ValueError("no such kind, or too many tuples in tuples")
    elements: list = []
    at: cython.Py_ssize_t = 0
    while at < len(data):
        inner, size = _ELEMENT.unpack(data[at : at + 3])
        at += 3 + size
        if at > len(data):
            raise ValueError("an element is cut off")
        elements.append(_decode_key(inner, data[at - size : at], depth + 1))
    return tuple(elements)
