# cython: language_level=3, auto_pickle=False
# mypy: disable-error-code="untyped-decorator, type-arg, no-any-return"
"""Keys and values as bytes: what goes into a record, and back.

A **key** becomes a kind and canonical bytes: equal keys have equal bytes, and
different keys differ.  A tuple is its elements one after the other, each as ::

    kind (1 byte)   length (2 bytes, big-endian)   bytes

so the bytes of ``("user", 1)`` begin those of ``("user", 1, "name")``.

A **value** becomes a tag and bytes.  The simplest values have tags of their own;
``Tag.CODEC`` is for the cache's codec.

The msgpack codec writes plain values as ordinary msgpack, decoded by a bare call of
unpackb.  Before other values stands the byte 0xC1, which msgpack never uses: they
have extension types for what msgpack lacks.  A tuple, a set or a dict with other keys
than str and bytes is an array that begins with an empty extension, its mark.  (As
extensions with content they would nest, each decoded inside the one around it, on the
C stack.)
"""

from __future__ import annotations

import struct
import sys
from datetime import date, datetime, time, timedelta, timezone
from functools import partial
from operator import attrgetter
from reprlib import repr as brief
from types import ModuleType
from typing import Any

try:
    import cython
except ImportError:
    from shmcache._format import shim as cython

from msgpack import ExtType, Packer, unpackb
from xxhash import xxh3_64_hexdigest

from shmcache._format.layout import (
    CODEC_SIZE,
    HANDLE_PREFIX,
    HANDLES,
    MAX_KEY,
    Kind,
    Tag,
)
from shmcache.errors import (
    EntryTooLarge,
    SegmentCorrupt,
    UnsupportedKey,
    UnsupportedValue,
)

MAX_KEY_DEPTH = 32  # tuples within tuples: bounds the recursion, both ways
MAX_DEPTH = 500  # containers within containers; msgpack's own bound is 511 or more

# Plain ints: members of an IntEnum are slow to compare.
_STR, _BYTES, _INT, _TUPLE = map(int, Kind)
_CODEC, _T_BYTES, _T_STR, _T_INT, _T_FLOAT, _T_NONE, _T_TRUE, _T_FALSE = map(int, Tag)

_KEY_LIMIT = cython.declare(cython.Py_ssize_t, MAX_KEY)
_DEPTH_LIMIT = cython.declare(cython.Py_ssize_t, MAX_DEPTH)


# --- keys -----------------------------------------------------------------------

_HEAD = struct.Struct(">BH")  # kind and length of an element of a tuple


def encode_key(key: Any) -> tuple[int, bytes]:
    """Kind and canonical bytes of a key.

    Instances of subclasses of str, bytes, int and tuple (enums, named tuples) count
    as the plain value, which they equal.

    Raises UnsupportedKey, and EntryTooLarge above MAX_KEY bytes.
    """
    return _encode_key(key, [])


@cython.cfunc
def _encode_key(key: Any, path: list) -> tuple:
    if isinstance(key, str):
        try:
            kind, data = _STR, str.encode(key)
        except UnicodeEncodeError as error:
            raise UnsupportedKey(
                f"{_key_path(path)} has a lone surrogate at position {error.start},"
                " which UTF-8 lacks; use key.encode('utf-8', 'surrogateescape')"
            ) from error
    elif isinstance(key, bytes):
        kind, data = _BYTES, bytes(memoryview(key))  # exact, whatever the subclass does
    elif isinstance(key, bool):
        raise UnsupportedKey(
            f"{_key_path(path)} is {key!r}, which would be the same key as {int(key)},"
            f" because True == 1; use {int(key)} or {str(key)!r}"
        )
    elif isinstance(key, int):
        number = int.__index__(key)
        size: cython.Py_ssize_t = _int_size(number)
        if size > _KEY_LIMIT:
            raise _key_too_large(size, path)
        kind, data = _INT, number.to_bytes(size, "big", signed=True)
    elif isinstance(key, tuple):
        kind, data = _TUPLE, _encode_tuple(key, path)
    else:
        raise UnsupportedKey(
            f"{_key_path(path)} is a {_type_name(type(key))}; a key is a str, bytes,"
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
    for index, element in enumerate(key):
        path.append(index)
        kind, data = _encode_key(element, path)
        path.pop()
        parts.append(_HEAD.pack(kind, len(data)))
        parts.append(data)
    return b"".join(parts)


@cython.cfunc
@cython.exceptval(-1)
def _int_size(number: Any) -> cython.Py_ssize_t:
    """Bytes of the shortest two's complement."""
    return (number if number >= 0 else ~number).bit_length() // 8 + 1


@cython.cfunc
def _key_too_large(size: cython.Py_ssize_t, path: list) -> Any:
    return EntryTooLarge(
        f"{_key_path(path)} has {size} bytes or more, and a key at most {MAX_KEY};"
        " use a hash of it as the key"
    )


@cython.cfunc
def _key_path(path: list) -> str:
    return "key" + "".join([f"[{index}]" for index in path])


def decode_key(kind: int, data: bytes) -> Any:
    """The key of a kind and bytes; SegmentCorrupt unless they are a key's."""
    try:
        return _decode_key(kind, data, 0)
    except (ValueError, struct.error) as error:
        raise SegmentCorrupt(
            f"{len(data)} bytes of kind {kind} are no key ({error}); run check(), and"
            " unlink() the cache if it finds damage"
        ) from error


@cython.cfunc
def _decode_key(kind: Any, data: bytes, depth: cython.Py_ssize_t) -> Any:
    if len(data) > _KEY_LIMIT:
        raise ValueError(f"more than {MAX_KEY}")
    if kind == _STR:
        return data.decode()
    if kind == _BYTES:
        return data
    if kind == _INT:
        number = int.from_bytes(data, "big", signed=True)
        if len(data) != _int_size(number):
            raise ValueError("an int of more or fewer bytes than it needs")
        return number
    if kind != _TUPLE or depth >= MAX_KEY_DEPTH:
        raise ValueError("no such kind, or too many tuples in tuples")
    elements: list = []
    at: cython.Py_ssize_t = 0
    while at < len(data):
        inner, size = _HEAD.unpack(data[at : at + 3])
        at += 3 + size
        if at > len(data):
            raise ValueError("an element is cut off")
        elements.append(_decode_key(inner, data[at - size : at], depth + 1))
    return tuple(elements)


# --- values ---------------------------------------------------------------------

_INT64 = struct.Struct("<q")
_DOUBLE = struct.Struct("<d")


@cython.cclass
class Codec:
    """How values become bytes; its name is in the segment, for all to agree on."""

    if cython.compiled:
        name = cython.declare(str, visibility="readonly")

    def encode(self, value: Any) -> tuple[int, bytes]:
        """Tag and bytes of a value; UnsupportedValue when it has none."""
        raise NotImplementedError

    def decode(self, data: bytes) -> Any:
        """The value of bytes with Tag.CODEC; SegmentCorrupt when there is none."""
        raise NotImplementedError


def decode_tagged(codec: Any, tag: int, data: bytes) -> Any:
    """The value of a tag and bytes, whichever codec or ``incr`` made them."""
    if tag == _CODEC:
        return codec.decode(data)
    if tag == _T_BYTES:
        return data
    try:
        if tag == _T_STR:
            return data.decode()
        if tag == _T_INT:
            return _INT64.unpack(data)[0]
        if tag == _T_FLOAT:
            return _DOUBLE.unpack(data)[0]
    except (ValueError, struct.error) as error:
        raise _corrupt(f"tag {tag}", data, error) from error
    if data or not _T_NONE <= tag <= _T_FALSE:
        raise _corrupt(f"tag {tag}", data, "no such tag, or it has no bytes")
    return None if tag == _T_NONE else tag == _T_TRUE


@cython.cfunc
def _encode_simple(value: Any) -> Any:
    """Tag and bytes of a value that needs no codec, else None."""
    kind = type(value)
    if kind is dict or kind is list:
        return None
    if kind is bytes:
        return _T_BYTES, value
    if kind is float:
        return _T_FLOAT, _DOUBLE.pack(value)
    if kind is bool:
        return (_T_TRUE if value else _T_FALSE), b""
    if value is None:
        return _T_NONE, b""
    try:
        if kind is str:
            return _T_STR, value.encode()
        if kind is int:
            return _T_INT, _INT64.pack(value)
    except (UnicodeEncodeError, struct.error):
        pass  # a lone surrogate, or more than 64 bits: what the codec makes of it
    return None


@cython.cfunc
def _corrupt(reader: str, data: bytes, error: Any) -> Any:
    return SegmentCorrupt(
        f"{len(data)} bytes of a value cannot be decoded by {reader} ({error!r});"
        " delete() the entry, or clear() the cache if another version of the program"
        " wrote it"
    )


@cython.cfunc
def _type_name(kind: Any) -> str:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


# --- msgpack --------------------------------------------------------------------

RICH = 0xC1  # the first byte of what a bare unpackb() cannot read
_RICH = cython.declare(cython.int, RICH)
# msgpack without its C code: threads switch in the midst of a Packer.
_ATOMIC = cython.declare(cython.bint, Packer.__module__ != "msgpack.fallback")
# A packer keeps the largest buffer that it ever needed; above this, drop it.
_KEEP = cython.declare(cython.Py_ssize_t, 256 << 10)


@cython.cclass
class MsgpackCodec(Codec):
    """The default: what it accepts comes back equal and of the same type.

    dict (any of these as keys), list, tuple, set, frozenset, str, bytes, bytearray,
    int of any size, float, complex, bool, None, datetime, date, time (their zones:
    ``timezone`` and ``ZoneInfo``), timedelta, Decimal and UUID, containers up to
    MAX_DEPTH levels deep.  All else, subclasses of these included, is refused with
    the path to it.  Decoding runs no code but these types' own.
    """

    _idle: list
    _unpackb: Any

    def __init__(self) -> None:
        self.name = "msgpack"
        self._unpackb = unpackb
        # A packer must not be entered twice, and a finalizer that the garbage
        # collector runs in the midst may do just that: each call takes one out.
        self._idle = []

    def encode(self, value: Any) -> tuple[int, bytes]:
        simple = _encode_simple(value)
        if simple is not None:
            return simple
        try:
            pack = self._idle.pop()
        except IndexError:
            pack = Packer(strict_types=True).pack
        data: bytes | None = _pack_plain(pack, value) if _ATOMIC else None
        if data is None:
            data = _pack_rich(pack, value)
        if len(data) <= _KEEP:  # and nothing was raised: it is as good as new
            self._idle.append(pack)
        return _CODEC, data

    def decode(self, data: bytes) -> Any:
        try:
            if len(data) == 0 or data[0] != _RICH:
                # Of bytes that encode() did not make, this may also make msgpack's
                # ExtType or Timestamp: odd, but inert.
                return self._unpackb(data)
            return self._unpackb(data[1:], ext_hook=_load, list_hook=_load_array)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise _corrupt("msgpack", data, error) from error


@cython.cfunc
@cython.exceptval(-1)
def _is_plain(value: Any, depth: cython.Py_ssize_t) -> cython.bint:
    """Whether a Packer writes it, and a bare unpackb reads it, but for long ints.

    Compiled, it runs no Python code, nor does the Packer then: no thread can change
    the value in between.
    """
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or kind is bytes:
        return True
    if value is None:
        return True
    if depth >= _DEPTH_LIMIT:
        return False
    if kind is dict:
        mapping: dict = value
        for key, item in mapping.items():
            if type(key) is not str and type(key) is not bytes:
                return False
            if not _is_plain(item, depth + 1):
                return False
        return True
    if kind is list:
        items: list = value
        for item in items:
            if not _is_plain(item, depth + 1):
                return False
        return True
    return False


@cython.cfunc
def _pack_plain(pack: Any, value: Any) -> bytes | None:
    try:
        return pack(value) if _is_plain(value, 0) else None
    except (ValueError, OverflowError, RuntimeError):
        # A lone surrogate; a long int; interpreted, also a dict that another thread
        # changes, or the end of Python's stack.  _convert() copes, or knows where.
        return None


@cython.cfunc
def _pack_rich(pack: Any, value: Any) -> bytes:
    try:
        try:
            return b"\xc1" + pack(_convert(value, 0, False))
        except (ValueError, OverflowError):
            return b"\xc1" + pack(_convert(value, 0, True))
    except _Refusal as refusal:
        where = "$" + "".join([_step(at) for at in reversed(refusal.steps)])
        if len(where) > 200:
            where = f"{where[:120]}...{where[-60:]}"
        raise UnsupportedValue(
            f'{where} {refusal}, or give the cache codec="pickle"'
        ) from refusal.__cause__
    except RecursionError as error:
        raise UnsupportedValue(
            "the value is nested deeper than what is left of Python's stack; flatten"
            " it, or store it from a less deep call"
        ) from error


class _Refusal(Exception):
    """Why a value is not stored; with the steps to it, the last one first."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.steps: list = []


_MEMBER = ...  # the step to a key of a dict or an element of a set


@cython.cfunc
def _step(at: Any) -> str:
    if at is _MEMBER:
        return "{key}"
    try:
        text: str = brief(at)
    except ValueError:  # an int of more digits than Python is willing to print
        text = "..."
    if type(at) is str and '"' not in text and text[0] == "'":
        text = f'"{text[1:-1]}"'
    return f"[{text}]"


@cython.cfunc
def _convert(value: Any, depth: cython.Py_ssize_t, careful: cython.bint) -> Any:
    """A copy of the value that a Packer can write; ``careful``: it could not.

    Copies, because another thread could change the value in the meantime.
    """
    kind = type(value)
    if kind is str or kind is int:
        return _checked(value) if careful else value
    if kind is float or kind is bool or kind is bytes or value is None:
        return value
    if kind is not list and kind not in _MARKS:
        return ExtType._make(_dump(value))
    if depth >= _DEPTH_LIMIT:
        raise _Refusal(
            f"is more than {MAX_DEPTH} levels deep, or contains itself; flatten it"
        )
    items: list = list(value.items() if kind is dict else value)
    made: list = [] if kind is list else [_MARKS[kind]]
    fields: dict = {}
    named: cython.bint = kind is dict
    step: Any = _MEMBER
    index: cython.Py_ssize_t
    try:
        if kind is dict:
            for key, _ in items:
                named = named and (type(key) is str or type(key) is bytes)
            for key, item in items:
                step = _MEMBER
                key_made = _convert(key, depth + 1, careful)
                step = key
                item_made = _convert(item, depth + 1, careful)
                if named:
                    fields[key_made] = item_made
                else:
                    made.append(key_made)
                    made.append(item_made)
        else:
            for index, item in enumerate(items):
                step = index if kind is list or kind is tuple else _MEMBER
                made.append(_convert(item, depth + 1, careful))
    except _Refusal as refusal:
        refusal.steps.append(step)
        raise
    return fields if named else made


@cython.cfunc
def _checked(value: Any) -> Any:
    """A str or int, or the extension type for a long int."""
    if type(value) is int:
        fits = -(1 << 63) <= value < 1 << 64
        return value if fits else ExtType._make(_dump(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Refusal(f"is no UTF-8 ({error}); encode it") from error
    return value


# --- what msgpack lacks ---------------------------------------------------------

_ARRAYS: dict = {0: dict, 1: tuple, 2: set, 3: frozenset}
_MARKS: dict = {kind: ExtType(code, b"") for code, kind in _ARRAYS.items()}

_X_INT, _X_BYTEARRAY, _X_DECIMAL, _X_UUID = 4, 5, 6, 7
_X_COMPLEX, _X_DATE, _X_TIMEDELTA, _X_DATETIME, _X_TIME = 8, 9, 10, 11, 12

_DAY = ("year", "month", "day")
_CLOCK = ("hour", "minute", "second", "microsecond", "fold")
# Made from numbers; after those of the last two comes a time zone.
_FIELDS: dict = {
    _X_COMPLEX: (complex, "<dd", ("real", "imag")),
    _X_DATE: (date, "<HBB", _DAY),
    _X_TIMEDELTA: (timedelta, "<iII", ("days", "seconds", "microseconds")),
    _X_DATETIME: (datetime, "<HBBBBBIB", _DAY + _CLOCK),
    _X_TIME: (time, "<BBBIB", _CLOCK),
}
_LOADS = {
    code: (kind, struct.Struct(form)) for code, (kind, form, _) in _FIELDS.items()
}
_DUMPS = {
    kind: (code, struct.Struct(form).pack, attrgetter(*names))
    for code, (kind, form, names) in _FIELDS.items()
}


@cython.cfunc
def _dump(value: Any) -> tuple:
    """Code and content of an extension type."""
    kind = type(value)
    if kind in _DUMPS:
        code, pack, fields = _DUMPS[kind]
        data = pack(*fields(value))
        if code >= _X_DATETIME:
            data += _dump_zone(value.tzinfo)
        return code, data
    if kind is int:
        return _X_INT, value.to_bytes(_int_size(value), "little", signed=True)
    if kind is bytearray:
        return _X_BYTEARRAY, bytes(value)
    # Nobody can have an instance of a class whose module was never imported.
    if kind is getattr(sys.modules.get("decimal"), "Decimal", None):
        return _X_DECIMAL, str(value).encode()
    if kind is getattr(sys.modules.get("uuid"), "UUID", None):
        return _X_UUID, value.bytes
    for base in kind.__mro__[1:]:
        if base in _DUMPS or base in _MARKS or base in (list, str, bytes, int, float):
            raise _Refusal(
                f"is a {_type_name(kind)}, and would come back as a {base.__name__};"
                " convert it"
            )
    remedy = "convert it with bytes()" if kind is memoryview else "convert it"
    raise _Refusal(f"is a {_type_name(kind)}, which msgpack lacks; {remedy}")


def _load(code: int, data: bytes) -> Any:
    """The value of an extension type."""
    if code in _ARRAYS:
        return _ARRAYS[code]  # for _load_array; nothing else decodes to a type
    if code in _LOADS:
        kind, form = _LOADS[code]
        numbers, rest = form.unpack(data[: form.size]), data[form.size :]
        if code >= _X_DATETIME:
            made = kind(*numbers[:-1], _load_zone(rest))
            return made.replace(fold=numbers[-1]) if numbers[-1] else made
        if rest:
            raise ValueError(f"extension type {code} has {len(rest)} bytes too many")
        return kind(*numbers)
    if code == _X_INT:
        return int.from_bytes(data, "little", signed=True)
    if code == _X_BYTEARRAY:
        return bytearray(data)
    if code == _X_DECIMAL:
        from decimal import Decimal

        return Decimal(data.decode("ascii"))
    if code == _X_UUID:
        from uuid import UUID

        return UUID(bytes=data)
    raise ValueError(f"extension type {code} is unknown")


def _load_array(items: list) -> Any:
    """What an array stands for: if it begins with a type, not a list."""
    if len(items) == 0 or type(items[0]) is not type:
        return items
    kind = items[0]
    if kind is dict:
        made: dict = {}
        for i in range(1, len(items), 2):
            made[items[i]] = items[i + 1]
        return made
    del items[0]
    return kind(items)


@cython.cfunc
def _dump_zone(zone: Any) -> bytes:
    if zone is None:
        return b""
    if zone is timezone.utc:
        return b"U"
    if type(zone) is timezone:
        offset, name = zone.utcoffset(None), zone.tzname(None)
        data = _INT64.pack(offset // timedelta(microseconds=1))
        if name == timezone(offset).tzname(None):
            return b"F" + data
        return b"N" + data + name.encode("utf-8", "surrogatepass")
    if type(zone) is getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None):
        try:
            zone.__reduce__()  # refuses a zone that was read from a file
            return b"Z" + zone.key.encode()
        except Exception as error:
            raise _Refusal(f"has a time zone without a name ({error})") from error
    raise _Refusal(
        f"has a time zone that is a {_type_name(type(zone))};"
        " use datetime.timezone or zoneinfo.ZoneInfo"
    )


@cython.cfunc
def _load_zone(data: bytes) -> Any:
    kind, rest = data[:1], data[1:]
    if kind == b"Z":
        from zoneinfo import ZoneInfo

        # Refuses absolute paths and "..", and makes nothing of any file but TZif.
        return ZoneInfo(rest.decode())
    if kind == b"N" or kind == b"F":
        offset = timedelta(microseconds=_INT64.unpack(rest[:8])[0])
        if kind == b"N":
            return timezone(offset, rest[8:].decode("utf-8", "surrogatepass"))
        if len(rest) == 8:
            return timezone(offset)
    if data != b"" and data != b"U":
        raise ValueError("a time zone that makes no sense")
    return timezone.utc if data else None


# --- the other codecs -----------------------------------------------------------


@cython.cclass
class RawCodec(Codec):
    """For bytes alone, which are stored and returned as they are."""

    def __init__(self) -> None:
        self.name = "raw"

    def encode(self, value: Any) -> tuple[int, bytes]:
        if type(value) is bytes:
            return _T_BYTES, value
        raise UnsupportedValue(
            f"the value is a {_type_name(type(value))}, and a cache with codec="
            '"raw" stores bytes alone; convert it, or use another codec'
        )

    def decode(self, data: bytes) -> Any:
        raise _corrupt("raw", data, "it writes none")


@cython.cclass
class FunctionCodec(Codec):
    """A codec made of two functions, value to bytes and back, that may do anything.

    What they raise becomes UnsupportedValue or SegmentCorrupt, with it as the cause.
    """

    _dumps: Any
    _loads: Any
    _simple: cython.bint

    def __init__(self, name: str, dumps: Any, loads: Any, *, simple: bool) -> None:
        self.name = name
        self._dumps = dumps
        self._loads = loads
        self._simple = simple  # whether the tags for simple values are used

    def encode(self, value: Any) -> tuple[int, bytes]:
        simple = _encode_simple(value) if self._simple else None
        if simple is not None:
            return simple
        try:
            data = self._dumps(value)
        except MemoryError:
            raise
        except Exception as error:
            raise UnsupportedValue(
                f"{self.name} cannot encode this {_type_name(type(value))}"
                f" ({type(error).__name__}: {error}); convert it, or use another codec"
            ) from error
        if type(data) is bytes:
            return _CODEC, data
        raise UnsupportedValue(
            f"dumps() of codec {self.name} returned a {_type_name(type(data))};"
            " it must return bytes"
        )

    def decode(self, data: bytes) -> Any:
        try:
            return self._loads(data)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise _corrupt(self.name, data, error) from error


@cython.cclass
class MsgspecCodec(FunctionCodec):
    """msgspec's msgpack: faster than the default, and lossy unless values are typed.

    Without a type these come back as another type, and no word is said: tuple, set,
    frozenset and named tuple as list, bytearray as bytes, Decimal, UUID, date, time,
    timedelta and naive datetime as str, enums as their values, dataclasses and
    Structs as dict.  With a type, values come back as it says; one that does not fit
    it fails when it is read, not when it is stored.
    """

    def __init__(self, type: Any = None) -> None:  # noqa: A002
        try:
            from msgspec import msgpack
        except ImportError as error:
            raise ImportError(
                'codec="msgspec" needs the package msgspec, which is not installed:'
                " pip install 'shmcache[msgspec]'"
            ) from error
        name = "msgspec"
        if type is not None:
            named = hasattr(type, "__qualname__") and not hasattr(type, "__origin__")
            name = _shortened(f"msgspec:{_type_name(type) if named else repr(type)}")
        decoder = msgpack.Decoder(Any if type is None else type)
        # Without a type the simplest values are the same either way, and as they have
        # tags of their own, incr() can add to them.
        simple = type is None
        FunctionCodec.__init__(
            self, name, msgpack.Encoder().encode, decoder.decode, simple=simple
        )


def pickle_codec() -> Codec:
    """A codec for nearly every object, by pickle: only where all writers are trusted.

    Whoever can write into the segment, which is every process of the same user, can
    make those who read from it run any code.
    """
    from pickle import dumps, loads

    return FunctionCodec("pickle", partial(dumps, protocol=5), loads, simple=True)


_OWNER = struct.Struct("=QQB")  # token and number, as the engine reads them; a tag


@cython.cclass
class HandleCodec(Codec):
    """For entries that stand for handles: owner, number, and a value for all."""

    _values: MsgpackCodec

    def __init__(self) -> None:
        self.name = HANDLES
        self._values = MsgpackCodec()

    def encode(self, value: Any) -> tuple[int, bytes]:
        token, number, shown = value
        tag, data = self._values.encode(shown)
        return _CODEC, _OWNER.pack(token, number, tag) + data

    def decode(self, data: bytes) -> Any:
        if len(data) <= HANDLE_PREFIX:
            raise _corrupt(HANDLES, data, "no owner")
        token, number, tag = _OWNER.unpack_from(data)
        return token, number, decode_tagged(self._values, tag, data[_OWNER.size :])


_BY_NAME: dict[str, Any] = {
    "msgpack": MsgpackCodec,
    "msgspec": MsgspecCodec,
    "pickle": pickle_codec,
    "raw": RawCodec,
}


def make_codec(codec: Any) -> Codec:
    """The codec that ``Cache(codec=...)`` means; ValueError when it means none."""
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str) and codec in _BY_NAME:
        made: Codec = _BY_NAME[codec]()
        return made
    if codec == HANDLES:
        return HandleCodec()  # of HandleMap, not offered to users
    dumps, loads = getattr(codec, "dumps", None), getattr(codec, "loads", None)
    if not callable(dumps) or not callable(loads):
        raise ValueError(  # noqa: TRY004
            f"codec={codec!r} is unknown; use one of {', '.join(map(repr, _BY_NAME))},"
            " MsgspecCodec(type), or an object with dumps and loads"
        )
    name = getattr(codec, "name", None)
    if name is None and isinstance(codec, ModuleType):
        name = codec.__name__
    if name is None:
        name = _shortened(_type_name(codec if isinstance(codec, type) else type(codec)))
    if type(name) is not str or not 0 < len(name.encode()) < CODEC_SIZE:
        raise ValueError(
            f"the codec's name is {name!r}; it must be a str of 1 to {CODEC_SIZE - 1}"
            " bytes of UTF-8"
        )
    if name.partition(":")[0] in (*_BY_NAME, HANDLES):
        raise ValueError(
            f"the codec's name is {name!r}, which means a codec of this package;"
            f" use codec={name!r}, or give yours another name"
        )
    return FunctionCodec(name, dumps, loads, simple=False)


@cython.cfunc
def _shortened(name: str) -> str:
    """A name that fits into the segment: a hash stands for the end of a long one."""
    data = name.encode("utf-8", "backslashreplace")
    if len(data) < CODEC_SIZE:
        return data.decode()
    start = data[: CODEC_SIZE - 18].decode("utf-8", "ignore")
    return f"{start}~{xxh3_64_hexdigest(data)}"
