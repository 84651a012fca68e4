# mypy: disable-error-code="untyped-decorator, type-arg, no-any-return"
"""Values that have more than msgpack knows, as msgpack, and back.

Before such a value stands the byte 0xC1, which msgpack never uses; a bare ``unpackb``
refuses it.  The types that msgpack lacks become extension types: a code and content.

A tuple, a set, and a dict with other keys than str and bytes become an array whose
first element is an empty extension, the mark of the type.  If they were extensions with
content, each would be decoded inside the one around it, and a deep value would use up
the C stack.

Negative indexes are avoided here: the engine's C code is generated without support for
them.
"""

import struct
import sys
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from operator import attrgetter
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

from msgpack import ExtType, unpackb

from shmcache.errors import UnsupportedValue

if not cython.compiled:
    from shmcache._format.keys import int_size, type_name

RICH = 0xC1  # the first byte of a value that a bare unpackb() cannot read

# Levels of containers within containers.  msgpack's own limit is 511 or more.
MAX_DEPTH = 500
DEPTH_LIMIT = cython.declare(cython.Py_ssize_t, MAX_DEPTH)


# --- between a value and what a Packer can write ----------------------------------


@cython.cfunc
def pack_rich(pack: Any, value: Any) -> bytes:
    """Encode a value; UnsupportedValue names the place of what cannot be encoded.

    ``pack`` is the method of an idle msgpack ``Packer``.
    """
    try:
        try:
            return b"\xc1" + pack(_convert(value, 0, False))
        except (ValueError, OverflowError):
            return b"\xc1" + pack(_convert(value, 0, True))
    except _Refusal as refusal:
        where = "$" + "".join([_step_text(at) for at in reversed(refusal.steps)])
        if len(where) > 200:
            where = f"{where[:120]}...{where[len(where) - 60 :]}"
        raise UnsupportedValue(
            f'{where} {refusal}, or give the cache codec="pickle"'
        ) from refusal.__cause__
    except RecursionError as error:
        raise UnsupportedValue(
            "the value is nested deeper than what is left of Python's stack; flatten"
            " it, or store it from a less deep call"
        ) from error


@cython.cfunc
def unpack_rich(data: bytes) -> Any:
    """Decode what ``pack_rich`` returned; other bytes may raise any exception."""
    return unpackb(data[1:], ext_hook=_load_extension, list_hook=_load_array)


class _Refusal(Exception):
    """Says why a value is not stored; ``steps`` lead to it, the last step first."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.steps: list = []


_MEMBER = ...  # the step to a key of a dict or an element of a set


@cython.cfunc
def _step_text(at: Any) -> str:
    """Return a step of the path as an error message shows it."""
    if at is _MEMBER:
        return "{key}"
    try:
        text: str = brief(at)
    except ValueError:  # an int of more digits than Python is willing to print
        text = "..."
    if type(at) is str and '"' not in text and text.startswith("'"):
        text = f'"{text[1 : len(text) - 1]}"'
    return f"[{text}]"


@cython.cfunc
def _convert(value: Any, depth: cython.Py_ssize_t, careful: cython.bint) -> Any:
    """Return a copy of the value that a Packer can write.

    It has to be a copy, because another thread could change the value while the Packer
    writes it.  With ``careful``, each str and int is examined as well, because a Packer
    has refused one of them.
    """
    kind = type(value)
    if kind is str or kind is int:
        return _checked(value) if careful else value
    if kind is float or kind is bool or kind is bytes or value is None:
        return value
    if kind is not list and kind not in _MARKS:
        return ExtType._make(_dump_extension(value))
    if depth >= DEPTH_LIMIT:
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
    """Return a str or int that a Packer accepts, or an extension for a long int."""
    if type(value) is int:
        fits = -(1 << 63) <= value < 1 << 64
        return value if fits else ExtType._make(_dump_extension(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Refusal(f"is not UTF-8 ({error}); encode it") from error
    return value


# --- extension types ---------------------------------------------------------------

_ARRAYS: dict = {0: dict, 1: tuple, 2: set, 3: frozenset}
_MARKS: dict = {kind: ExtType(code, b"") for code, kind in _ARRAYS.items()}

_X_INT, _X_BYTEARRAY, _X_DECIMAL, _X_UUID = 4, 5, 6, 7
_X_COMPLEX, _X_DATE, _X_TIMEDELTA, _X_DATETIME, _X_TIME = 8, 9, 10, 11, 12

_DAY = ("year", "month", "day")
_CLOCK = ("hour", "minute", "second", "microsecond", "fold")
# Types whose content is numbers; a time zone follows those of the last two.
_FIELDS: dict = {
    _X_COMPLEX: (complex, "<dd", ("real", "imag")),
    _X_DATE: (date, "<HBB", _DAY),
    _X_TIMEDELTA: (timedelta, "<iII", ("days", "seconds", "microseconds")),
    _X_DATETIME: (datetime, "<HBBBBBIB", _DAY + _CLOCK),
    _X_TIME: (time_of_day, "<BBBIB", _CLOCK),
}
_LOADS = {
    code: (kind, struct.Struct(form)) for code, (kind, form, _) in _FIELDS.items()
}
_DUMPS = {
    kind: (code, struct.Struct(form).pack, attrgetter(*names))
    for code, (kind, form, names) in _FIELDS.items()
}


@cython.cfunc
def _dump_extension(value: Any) -> tuple:
    """Return the code and the content of a value's extension type."""
    kind = type(value)
    if kind in _DUMPS:
        code, pack, fields = _DUMPS[kind]
        data = pack(*fields(value))
        if code >= _X_DATETIME:
            data += _dump_zone(value.tzinfo)
        return code, data
    if kind is int:
        return _X_INT, value.to_bytes(int_size(value), "little", signed=True)
    if kind is bytearray:
        return _X_BYTEARRAY, bytes(value)
    # A value cannot be an instance of a class whose module was never imported.
    if kind is getattr(sys.modules.get("decimal"), "Decimal", None):
        return _X_DECIMAL, str(value).encode()
    if kind is getattr(sys.modules.get("uuid"), "UUID", None):
        return _X_UUID, value.bytes
    for base in kind.__mro__[1:]:
        if base in _DUMPS or base in _MARKS or base in (list, str, bytes, int, float):
            raise _Refusal(
                f"is a {type_name(kind)}, and would come back as a {base.__name__};"
                " convert it"
            )
    remedy = "convert it with bytes()" if kind is memoryview else "convert it"
    raise _Refusal(f"is a {type_name(kind)}, which msgpack lacks; {remedy}")


def _load_extension(code: int, data: bytes) -> Any:
    """Return the value of an extension type; ``unpackb`` calls this."""
    if code in _ARRAYS:
        # _load_array takes the type for the mark; no value decodes to a type.
        return _ARRAYS[code]
    if code in _LOADS:
        kind, form = _LOADS[code]
        numbers, rest = form.unpack(data[: form.size]), data[form.size :]
        if code >= _X_DATETIME:
            *clock, fold = numbers
            made = kind(*clock, _load_zone(rest))
            return made.replace(fold=fold) if fold else made
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
    """Return what an array stands for: a list, unless its first element is a type."""
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


# --- time zones ---------------------------------------------------------------------

_MICROSECONDS = struct.Struct("<q")  # the offset of a fixed time zone


@cython.cfunc
def _dump_zone(zone: Any) -> bytes:
    """Return a time zone as a letter and what it needs; no bytes for None."""
    if zone is None:
        return b""
    if zone is timezone.utc:
        return b"U"
    if type(zone) is timezone:
        offset, name = zone.utcoffset(None), zone.tzname(None)
        data = _MICROSECONDS.pack(offset // timedelta(microseconds=1))
        if name == timezone(offset).tzname(None):
            return b"F" + data
        return b"N" + data + name.encode("utf-8", "surrogatepass")
    if type(zone) is getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None):
        try:
            zone.__reduce__()  # raises if the zone was read from a file
            return b"Z" + zone.key.encode()
        except Exception as error:
            raise _Refusal(f"has a time zone without a name ({error})") from error
    raise _Refusal(
        f"has a time zone that is a {type_name(type(zone))};"
        " use datetime.timezone or zoneinfo.ZoneInfo"
    )


@cython.cfunc
def _load_zone(data: bytes) -> Any:
    kind, rest = data[:1], data[1:]
    if kind == b"Z":
        from zoneinfo import ZoneInfo

        # ZoneInfo refuses absolute paths and "..", and every file that is not TZif.
        return ZoneInfo(rest.decode())
    if kind == b"N" or kind == b"F":
        offset = timedelta(microseconds=_MICROSECONDS.unpack(rest[:8])[0])
        if kind == b"N":
            return timezone(offset, rest[8:].decode("utf-8", "surrogatepass"))
        if len(rest) == 8:
            return timezone(offset)
    if data != b"" and data != b"U":
        raise ValueError("the time zone makes no sense")
    return timezone.utc if data else None
