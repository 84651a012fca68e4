"""Checks of arguments that several public calls take.

Each function raises TypeError or ValueError, and the message has the value that was
given and says what to pass instead.
"""

from __future__ import annotations

import math
import re
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from shmcache._format.layout import MAX_TTL_NS

if TYPE_CHECKING:
    from collections.abc import Callable

# The type of the argument ``ttl``: seconds, None for "never", or left out for the
# cache's default.
Ttl = float | None | EllipsisType

_SIZE = re.compile(
    r"([0-9]{1,30})(?:\.([0-9]{1,30}))?\s*(?:([kmgt])(i?))?b?", re.IGNORECASE
)


def parse_size(size: Any, what: str = "max_bytes") -> int:
    """Return the number of bytes that an argument asks for.

    Args:
        size: An int, or a text such as "64 MiB", "64M" (both binary) or "64 MB".
        what: The name of the argument, for the message.
    """
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
    """Return an int if it is one, and within bounds.

    Args:
        value: The argument.
        what: Its name.
        low: The lowest number that makes sense.
        high: The highest one.
        hint: What to do instead, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, not {value!r}; {hint}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be from {low} to {high}, not {value}; {hint}")
    return value


def check_flag(value: Any, what: str) -> bool:
    """Return an argument if it is True or False, and no other value."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return value


def check_budget(seconds: Any, what: str) -> None:
    """Refuse a time to spend, or to wait, that is neither None nor 0 seconds or more.

    Args:
        seconds: The argument; None for no limit.
        what: Its name.
    """
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
    """Return a time to live in whole nanoseconds, at least one.

    Args:
        ttl: The argument, in seconds.
        what: Its name.
    """
    remedy = (
        "None means that entries never expire"
        if what == "ttl"
        else "leave it out for the default"
    )
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(
            f"{what} must be a number of seconds, not {ttl!r}; {remedy}; for a"
            " timedelta, pass its total_seconds()"
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
    """Refuse a ``ttl`` argument that is neither left out, nor None, nor seconds."""
    if ttl is not ... and ttl is not None:
        ttl_to_ns(ttl)


def check_callable(function: Any, what: str, why: str) -> None:
    """Refuse an argument that is neither None nor callable.

    Args:
        function: The argument.
        what: Its name.
        why: What the callable is needed for, for the message.
    """
    if function is not None and not callable(function):
        raise TypeError(f"{what} must be callable, not {function!r}: {why}")


def clock_in_ns(clock: Callable[[], float] | None) -> Callable[[], int] | None:
    """Return a clock of int nanoseconds; None stands for CLOCK_MONOTONIC."""
    if clock is None:
        return None
    if not callable(clock):
        raise TypeError(
            f"clock must be callable, such as time.monotonic_ns, not {clock!r}"
        )
    first = clock()
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        raise TypeError(
            f"clock() returned {first!r}; it must return nanoseconds as an int or"
            " seconds as a float"
        )
    if not 0 <= first < math.inf:
        raise ValueError(
            f"clock() returned {first!r}; use one that counts up from 0, such as"
            " time.monotonic_ns"
        )
    if isinstance(first, int):
        return clock  # type: ignore[return-value]
    return lambda: round(clock() * 1e9)


def shown(key: object) -> str:
    """Return a key as an error message shows it.

    Args:
        key: Any object.

    Returns:
        Its ``repr``, cut off after 200 characters.
    """
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 - Python refuses to print ints of 4,301 digits
        text = f"a {type(key).__qualname__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:199]}…"
