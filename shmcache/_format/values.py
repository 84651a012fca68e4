# mypy: disable-error-code="untyped-decorator, type-arg, no-any-return"
"""Values as bytes, and back: the codecs.

A value becomes a tag and bytes.  The simplest values have tags of their own, which
every codec reads alike, so that ``incr`` can write them; the bytes of ``Tag.CODEC``
belong to the cache's codec.

The codec "msgpack" writes plain values as ordinary msgpack, which a bare call of
``unpackb`` decodes; ``richtypes`` encodes all others.

Negative indexes are avoided here: the engine's C code is generated without support for
them.
"""

import struct
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

from msgpack import Packer, unpackb
from xxhash import xxh3_64_hexdigest

from shmcache._format.layout import CODEC_SIZE, HANDLE_PREFIX, HANDLES, Tag
from shmcache.errors import SegmentCorrupt, UnsupportedValue

if not cython.compiled:
    from shmcache._format.keys import type_name
    from shmcache._format.richtypes import DEPTH_LIMIT, RICH, pack_rich, unpack_rich

# These are plain ints because members of an IntEnum are slow to compare.
_AS_CODEC, _AS_BYTES, _AS_STR, _AS_INT, _AS_FLOAT, _AS_NONE, _AS_TRUE, _AS_FALSE = map(
    int, Tag
)

_RICH_BYTE = cython.declare(cython.int, RICH)

# The bytes of Tag.INT and Tag.FLOAT.
INT64 = struct.Struct("<q")
FLOAT64 = struct.Struct("<d")


@cython.cclass
class Codec:
    """Turns values into bytes and back.

    Its ``name`` stands in the segment, so that all processes use the same codec.
    """

    if cython.compiled:
        name = cython.declare(str, visibility="readonly")

    def encode(self, value: Any) -> tuple[int, bytes]:
        """Encode a value.

        Args:
            value: The value to store.

        Returns:
            The tag, as in ``Tag``, and the bytes.

        Raises:
            UnsupportedValue: The codec cannot encode the value.
        """
        raise NotImplementedError

    def decode(self, data: bytes) -> Any:
        """Decode the bytes of a value with ``Tag.CODEC``.

        Args:
            data: What ``encode`` returned.

        Returns:
            The value.

        Raises:
            SegmentCorrupt: The codec cannot decode the bytes.
        """
        raise NotImplementedError


def decode_tagged(codec: Any, tag: int, data: bytes) -> Any:
    """Decode a value, whichever codec or ``incr`` wrote it.

    Args:
        codec: The ``Codec`` of the cache.
        tag: The tag of the value, as in ``Tag``.
        data: Its bytes.

    Returns:
        The value.

    Raises:
        SegmentCorrupt: The bytes do not fit the tag, or there is no such tag.
    """
    if tag == _AS_CODEC:
        return codec.decode(data)
    if tag == _AS_BYTES:
        return data
    try:
        if tag == _AS_STR:
            return data.decode()
        if tag == _AS_INT:
            return INT64.unpack(data)[0]
        if tag == _AS_FLOAT:
            return FLOAT64.unpack(data)[0]
    except (ValueError, struct.error) as error:
        raise _undecodable(f"tag {tag}", data, error) from error
    if data or not _AS_NONE <= tag <= _AS_FALSE:
        raise _undecodable(f"tag {tag}", data, "no such tag, or it has no bytes")
    return None if tag == _AS_NONE else tag == _AS_TRUE


@cython.cfunc
def _encode_simple(value: Any) -> Any:
    """Return tag and bytes of a value that needs no codec, else None."""
    kind = type(value)
    if kind is dict or kind is list:
        return None
    if kind is bytes:
        return _AS_BYTES, value
    if kind is float:
        return _AS_FLOAT, FLOAT64.pack(value)
    if kind is bool:
        return (_AS_TRUE if value else _AS_FALSE), b""
    if value is None:
        return _AS_NONE, b""
    try:
        if kind is str:
            return _AS_STR, value.encode()
        if kind is int:
            return _AS_INT, INT64.pack(value)
    except (UnicodeEncodeError, struct.error):
        # A str with a lone surrogate, or an int of more than 64 bits: the codec may
        # have a way to encode it.
        pass
    return None


@cython.cfunc
def _undecodable(reader: str, data: bytes, error: Any) -> Any:
    """Return the exception for bytes of a value that cannot be decoded."""
    return SegmentCorrupt(
        f"{len(data)} bytes of a value cannot be decoded by {reader} ({error!r});"
        " delete() the entry, or clear() the cache if another version of the program"
        " wrote it"
    )


# --- msgpack ------------------------------------------------------------------------

# msgpack's fallback in Python, which it uses without its C extension, lets another
# thread run while a Packer writes.
_ATOMIC = cython.declare(cython.bint, Packer.__module__ != "msgpack.fallback")
# A packer keeps the largest buffer that it ever needed.  After more bytes than this it
# is dropped.
_KEEP = cython.declare(cython.Py_ssize_t, 256 << 10)


@cython.cclass
class MsgpackCodec(Codec):
    """The default codec: a value comes back equal and of the same type, or is refused.

    It encodes dict (with any of these types as keys), list, tuple, set, frozenset, str,
    bytes, bytearray, int of any size, float, complex, bool, None, datetime, date and
    time (with ``timezone`` and ``ZoneInfo``), timedelta, Decimal and UUID, in
    containers up to MAX_DEPTH levels deep.  It refuses all other types, their
    subclasses included, and names the path to the value.  Decoding runs no code but
    that of these types.
    """

    _idle: list
    _unpackb: Any

    def __init__(self) -> None:
        self.name = "msgpack"
        self._unpackb = unpackb
        # A packer must not be entered twice, but a finalizer that the garbage
        # collector runs while one works may encode a value, too.  So each call takes a
        # packer out of this list.
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
            data = pack_rich(pack, value)
        # After an exception we do not come here, and the packer is dropped.
        if len(data) <= _KEEP:
            self._idle.append(pack)
        return _AS_CODEC, data

    def decode(self, data: bytes) -> Any:
        try:
            if len(data) == 0 or data[0] != _RICH_BYTE:
                # From bytes that encode() did not return, this may make msgpack's
                # ExtType or Timestamp, which is odd but harmless.
                return self._unpackb(data)
            return unpack_rich(data)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise _undecodable("msgpack", data, error) from error


@cython.cfunc
@cython.exceptval(-1)
def _is_plain(value: Any, depth: cython.Py_ssize_t) -> cython.bint:
    """Tell whether a Packer writes a value such that a bare unpackb reads it.

    Long ints count as plain, although a Packer refuses them.  Compiled, neither this
    function nor the Packer runs Python code, so no thread can change the value between
    the two.
    """
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or kind is bytes:
        return True
    if value is None:
        return True
    if depth >= DEPTH_LIMIT:
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
    """Encode a plain value; return None if ``pack_rich`` has to do it."""
    try:
        return pack(value) if _is_plain(value, 0) else None
    except (ValueError, OverflowError, RuntimeError):
        # The value has a lone surrogate or a long int.  Interpreted, another thread may
        # also have changed a dict, or Python's stack has ended.  pack_rich() can encode
        # the value, or say where the trouble is.
        return None


# --- the other codecs ---------------------------------------------------------------


@cython.cclass
class RawCodec(Codec):
    """The codec for bytes only, which are stored and returned as they are."""

    def __init__(self) -> None:
        self.name = "raw"

    def encode(self, value: Any) -> tuple[int, bytes]:
        if type(value) is bytes:
            return _AS_BYTES, value
        raise UnsupportedValue(
            f"the value is a {type_name(type(value))}, and a cache with codec="
            '"raw" stores only bytes; convert it, or use another codec'
        )

    def decode(self, data: bytes) -> Any:
        raise _undecodable("raw", data, "it writes no such tag")


@cython.cclass
class FunctionCodec(Codec):
    """A codec made of two functions, value to bytes and bytes to value.

    Whatever they raise becomes the cause of UnsupportedValue or SegmentCorrupt.  With
    ``simple``, the simplest values have tags of their own and do not go through them.
    """

    _dumps: Any
    _loads: Any
    _simple: cython.bint

    def __init__(self, name: str, dumps: Any, loads: Any, *, simple: bool) -> None:
        self.name = name
        self._dumps = dumps
        self._loads = loads
        self._simple = simple

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
                f"{self.name} cannot encode this {type_name(type(value))}"
                f" ({type(error).__name__}: {error}); convert it, or use another codec"
            ) from error
        if type(data) is bytes:
            return _AS_CODEC, data
        raise UnsupportedValue(
            f"dumps() of codec {self.name} returned a {type_name(type(data))};"
            " it must return bytes"
        )

    def decode(self, data: bytes) -> Any:
        try:
            return self._loads(data)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise _undecodable(self.name, data, error) from error


@cython.cclass
class MsgspecCodec(FunctionCodec):
    """msgspec's msgpack: faster than the default, and lossy unless values are typed.

    Without a type, some values come back as another type, and no error is raised:
    tuple, set, frozenset and named tuple as list, bytearray as bytes, Decimal, UUID,
    date, time, timedelta and naive datetime as str, enums as their values, dataclasses
    and Structs as dict.  With a type, values come back as the type says; a value that
    does not fit it is stored, and reading it raises SegmentCorrupt.

    Args:
        type: What all values of the cache are, as msgspec takes it: a class, or a type
            such as ``list[int]``.

    Raises:
        ImportError: The package msgspec is not installed.
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
            name = _shortened(f"msgspec:{type_name(type) if named else repr(type)}")
        decoder = msgpack.Decoder(Any if type is None else type)
        # Without a type, the simplest values come back the same either way; with tags
        # of their own, incr() can add to them.
        simple = type is None
        FunctionCodec.__init__(
            self, name, msgpack.Encoder().encode, decoder.decode, simple=simple
        )


def pickle_codec() -> Codec:
    """Return a codec for nearly every object, only for where all writers are trusted.

    Every process of the same user can write into the segment, and so make the processes
    that read from it run any code.

    Returns:
        A codec that uses pickle.
    """
    from pickle import dumps, loads

    return FunctionCodec("pickle", partial(dumps, protocol=5), loads, simple=True)


# What stands before the value of a handle's entry: the token of its owner and its
# number, both native-endian words for the engine to read, and the tag of the value.
_HANDLE_HEAD = struct.Struct("=QQB")


@cython.cclass
class HandleCodec(Codec):
    """The codec of HandleMap: an entry has an owner, a number and a value for all.

    A value is a tuple (token of the owner, number of the handle, value to show).
    """

    _values: MsgpackCodec

    def __init__(self) -> None:
        self.name = HANDLES
        self._values = MsgpackCodec()

    def encode(self, value: Any) -> tuple[int, bytes]:
        token, number, shown = value
        tag, data = self._values.encode(shown)
        return _AS_CODEC, _HANDLE_HEAD.pack(token, number, tag) + data

    def decode(self, data: bytes) -> Any:
        if len(data) <= HANDLE_PREFIX:
            raise _undecodable(HANDLES, data, "no owner")
        token, number, tag = _HANDLE_HEAD.unpack_from(data)
        shown = decode_tagged(self._values, tag, data[_HANDLE_HEAD.size :])
        return token, number, shown


_CODECS: dict[str, Any] = {
    "msgpack": MsgpackCodec,
    "msgspec": MsgspecCodec,
    "pickle": pickle_codec,
    "raw": RawCodec,
}


def make_codec(codec: Any) -> Codec:
    """Return the codec that ``Cache(codec=...)`` means.

    Args:
        codec: A ``Codec``, the name of one of this package's codecs, or an object with
            the functions ``dumps`` and ``loads``, such as the module ``json``.  Its
            ``name``, if it has one, stands in the segment.

    Returns:
        The codec.

    Raises:
        ValueError: The argument means no codec, or has an unsuitable name.
    """
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str) and codec in _CODECS:
        made: Codec = _CODECS[codec]()
        return made
    if codec == HANDLES:
        return HandleCodec()  # for HandleMap; not offered to users
    dumps, loads = getattr(codec, "dumps", None), getattr(codec, "loads", None)
    if not callable(dumps) or not callable(loads):
        raise ValueError(  # noqa: TRY004
            f"codec={codec!r} is unknown; use one of {', '.join(map(repr, _CODECS))},"
            " MsgspecCodec(type), or an object with dumps and loads"
        )
    name = getattr(codec, "name", None)
    if name is None and isinstance(codec, ModuleType):
        name = codec.__name__
    if name is None:
        name = _shortened(type_name(codec if isinstance(codec, type) else type(codec)))
    if type(name) is not str or not 0 < len(name.encode()) < CODEC_SIZE:
        raise ValueError(
            f"the codec's name is {name!r}; it must be a str of 1 to {CODEC_SIZE - 1}"
            " bytes of UTF-8"
        )
    if name.partition(":")[0] in (*_CODECS, HANDLES):
        raise ValueError(
            f"the codec's name is {name!r}, which means a codec of this package;"
            f" use codec={name!r}, or give yours another name"
        )
    return FunctionCodec(name, dumps, loads, simple=False)


@cython.cfunc
def _shortened(name: str) -> str:
    """Return a name that fits into the segment; a hash replaces the end of a long one.

    Two long names that begin alike thus stay different.
    """
    data = name.encode("utf-8", "backslashreplace")
    if len(data) < CODEC_SIZE:
        return data.decode()
    start = data[: CODEC_SIZE - 18].decode("utf-8", "ignore")
    return f"{start}~{xxh3_64_hexdigest(data)}"
