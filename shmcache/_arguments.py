"""Checks of arguments that several public calls take.

Each check raises TypeError or ValueError, and the message has the value that was given
and says what to pass instead.
"""

from __future__ import annotations

import math
import re
from types import EllipsisType
from typing import Any

from shmcache._format.layout import MAX_TTL_NS

# Seconds, None for "never", or left out for the default of the cache.
Ttl = float | None | EllipsisType

_SIZE = re.compile(
    r"([0-9]{1,30})(?:\.([0-9]{1,30}))?\s*(?:([kmgt])(i?))?b?", re.IGNORECASE
)


def parse_size(size: Any, what: str = "max_bytes") -> int:
    """Bytes of an int or of a text such as "64 MiB", "64M" (binary) or "64 MB"."""
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        whole, part, prefix, binary = match.groups("")
        base = 1000 if prefix and not binary and size.strip()[-1] in "bB" else 1024
        unit = base ** " kmgt".index(prefix.lower() or " ")
        number = int(whole + part) * unit // 10 ** len(part)
    else:
        refused = ValueError if isinstance(size, str) else TypeError
        raise refused(
            f'{what} must be a number of bytes or a text such as "64 MiB", not {size!r}'
        )
    if number <= 0:
        raise ValueError(
            f"{what} must be over 0, not {size!r}; leave it out for the"
            " default of 512 bytes an entry"
        )
    return number


def check_count(value: Any, what: str, low: int, high: int, hint: str) -> int:
    """An int within bounds, or TypeError or ValueError with the hint."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, not {value!r}; {hint}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be from {low} to {high}, not {value}; {hint}")
    return value


def check_flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return value


def check_budget(seconds: Any, what: str) -> None:
    """Refuse a time to spend or to wait that is no number of 0 or more, or None."""
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(
            f"{what} must be a number of seconds, or None for no limit, not {seconds!r}"
        )
    if not seconds >= 0:
        raise ValueError(
            f"{what} must be 0 seconds or more, or None for no limit, not {seconds!r}"
        )


def ttl_to_ns(ttl: Any, what: str = "ttl") -> int:
    """A time to live in seconds as whole nanoseconds, at least one."""
    remedy = (
        "None means that entries never expire"
        if what == "ttl"
        else "leave it out for the default"
    )
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(
            f"{what} must be a number of seconds, not {ttl!r}; {remedy}, and of a"
            " timedelta pass its total_seconds()"
        )
    if not ttl > 0 or math.isinf(ttl):
        raise ValueError(
            f"{what} must be over 0 seconds and finite, not {ttl!r}; {remedy}"
        )
    if ttl > MAX_TTL_NS // 1_000_000_000:
        raise ValueError(
            f"{what} of {ttl!r} s is over {MAX_TTL_NS // 1_000_000_000} s (34 years);"
            f" {remedy}"
        )
    return max(1, round(ttl * 1_000_000_000))


def check_ttl(ttl: Any) -> None:
    """Refuse a ``ttl`` argument that no call would take; it may be left out or None."""
    if ttl is not ... and ttl is not None:
        ttl_to_ns(ttl)


def check_callable(function: Any, what: str, why: str) -> None:
    """Refuse what is neither None nor callable.

    Args:
        function: The argument.
        what: Its name.
        why: What a callable is needed for, for the message.
    """
    if function is not None and not callable(function):
        raise TypeError(f"{what} must be callable, not {function!r}: {why}")
