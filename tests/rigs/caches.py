"""What the tests of one cache have in common: questions, and tables of calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shmcache import Cache
from shmcache._format import layout as fmt

MakeCache = Callable[..., Cache]

PATIENCE = 60.0
TICK = 1 << fmt.WHEEL_TICK_BITS  # ns of the timer wheel's finest list

# Calls that count as a use of the entry "a", and calls that only look at it.
USES: dict[str, Callable[[Cache], object]] = {
    "get": lambda c: c.get("a"),
    "[]": lambda c: c["a"],
    "get_many": lambda c: c.get_many(["a"]),
    "gets": lambda c: c.gets("a"),
    "touch": lambda c: c.touch("a"),
    "setdefault": lambda c: c.setdefault("a", 5),
    "get_or_set": lambda c: c.get_or_set("a", lambda: 5),
    "set": lambda c: c.set("a", 5),
    "[]=": lambda c: c.__setitem__("a", 5),
    "set_many": lambda c: c.set_many({"a": 5}),
    "update": lambda c: c.update(a=5),
    "replace": lambda c: c.replace("a", 5),
    "cas": lambda c: c.cas("a", 5, c.gets("a")[1]),
    "incr": lambda c: c.incr("a"),
}
NO_USES: dict[str, Callable[[Cache], object]] = {
    "peek": lambda c: c.peek("a"),
    "in": lambda c: "a" in c,
    "ttl": lambda c: c.ttl("a"),
    "len": len,
    "iteration": list,
    "keys": lambda c: list(c.keys()),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "in keys": lambda c: "a" in c.keys(),  # noqa: SIM118
    "in items": lambda c: ("a", 1) in c.items(),
    "add": lambda c: c.add("a", 5),
    "failed cas": lambda c: c.cas("a", 5, 1),
    "stats": lambda c: c.stats(),
    "check": lambda c: c.check(),
    "sweep": lambda c: c.sweep(),
}


def files(name: str) -> list[str]:
    """What /dev/shm has of one cache."""
    return sorted(entry for entry in os.listdir("/dev/shm") if name in entry)


def contents(cache: Cache) -> dict[Any, Any]:
    """All live entries, without using them."""
    return dict(cache.items())


def by_age(cache: Cache) -> list[Any]:
    """The keys from the least to the most recently used; empties the cache."""
    keys = []
    with suppress(KeyError):
        while True:
            keys.append(cache.popitem()[0])
    return keys


def python(code: str, *args: str) -> str:
    """What a Python process of its own, with the same engine, prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE,
    ).stdout.strip()


class Upper:
    """A codec of a user's own."""

    def dumps(self, value: str) -> bytes:
        """Shouted."""
        return value.upper().encode()

    def loads(self, data: bytes) -> str:
        """Still shouted."""
        return data.decode()
