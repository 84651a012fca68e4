"""Keys, values, sizes and times as the command line prints them and reads them.

A key is printed as JSON, on one line: ``"text"``, ``5``, ``["tuple", 1]``, and bytes as
``{"hex": "00ff"}``.  ``--type json`` reads the same notation, so that the output of one
command can be the input of another.  Control characters are escaped, because a
terminal would obey them.
"""

from __future__ import annotations

import json
import math
from typing import Any

from shmcache._observe.snapshot import Undecoded
from shmcache.errors import UnsupportedKey

# Digits of an int that is printed in decimal.  Python refuses more than 4300.
_LONG = 4000


def plain(value: Any) -> Any:
    """A value for JSON, which has fewer types than Python."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() < 3 * _LONG else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else str(value)
    if kind in (bytes, bytearray):
        return {"hex": value.hex()}
    if kind is Undecoded:
        return {"hex": value.data.hex(), "undecoded": value.reason}
    if kind is dict and all(type(key) is str for key in value):
        return dict(zip(value, map(plain, value.values()), strict=True))
    if kind is dict:
        return {"items": [list(map(plain, item)) for item in value.items()]}
    if kind in (list, tuple, set, frozenset):
        return list(map(plain, value))
    return str(value)


def json_line(value: Any) -> str:
    """A value as JSON on one line, safe to print."""
    data = plain(value)
    text = json.dumps(data, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(data)


def value_text(value: Any) -> str:
    """A value for people: a str unchanged, any other value as its ``repr``."""
    if type(value) is str:
        return value
    if type(value) is Undecoded:
        return repr(value.data)
    try:
        return repr(value)
    except ValueError:  # an int of more digits than Python is willing to print
        return json_line(value)


def short(text: str, width: int) -> str:
    """A text cut to ``width`` characters, safe to print."""
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= width else text[: width - 1] + "…"


def parse_key(text: str, kind: str) -> Any:
    """The key that a user wrote.

    Args:
        text: What the user wrote.
        kind: In which of ``KEY_TYPES`` it is written.

    Raises:
        UnsupportedKey: The text is not of that type.
    """
    try:
        if kind == "int":
            return int(text, 10)
        if kind == "hex":
            return bytes.fromhex(text)
        if kind == "json":
            return _key_of(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UnsupportedKey(
            f"key {text!r} is not of --type {kind} ({error}); without --type it is"
            " taken as text"
        ) from error
    return text


def _key_of(data: Any) -> Any:
    if type(data) is list:
        return tuple(map(_key_of, data))
    if type(data) is dict and list(data) == ["hex"]:
        return bytes.fromhex(str(data["hex"]))
    if type(data) is dict and list(data) == ["int"]:
        return int(str(data["int"]), 0)
    return data  # if it cannot be a key, the encoder refuses it with the reason


def size_text(size: float) -> str:
    """A number of bytes, in three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    digits = 0 if unit == "B" else max(0, 2 - len(f"{size:.0f}") + 1)
    return f"{size:.{digits}f} {unit}"


def span_text(seconds: float | None) -> str:
    """A time span in its two largest units; "never" for None."""
    if seconds is None:
        return "never"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    first = next(n for n, (_, unit) in enumerate(units) if whole >= unit)
    parts = []
    for name, unit in units[first : first + 2]:
        if count := whole // unit:
            parts.append(f"{count} {name}")
        whole %= unit
    return " ".join(parts)


def ratio_text(hits: float, misses: float) -> str:
    """The part of the lookups that were hits, in percent; "-" without lookups."""
    lookups = hits + misses
    return f"{100 * hits / lookups:.1f} %" if lookups else "-"
