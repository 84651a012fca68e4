"""Long random histories of a cache, each result compared with that of a model.

- In a history of *one process* the LRU order is exact: the model says what is evicted.
- In a history *in lock-step* two processes take turns.  The hits of one of them may be
  seen by the other up to one recency buffer late, so the model is told what was evicted
  and says whether it may have been the least recently used entry.

A history is drawn from one number, and so is the seed of its segment.  A failure prints
that number; ``SHMCACHE_SEED``, or ``--seed`` of this program, begins with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any
from unittest import mock

from fuzz_map import BEGINNING, LEFT_OUT, NEVER, Clock, Geometry, Model, Outcome, ttl_ns
from fuzz_values import Rotten, disguised, encoded, in_order, same, shown
from peers import Peer

from shmcache import (
    Cache,
    EntryTooLarge,
    ShmCacheError,
    UnsupportedKey,
    UnsupportedValue,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

ABSENT = "<absent>"
YEAR = 31_557_600 * 10**9  # ns
END = BEGINNING + 50 * YEAR  # the clock goes no further
LONGEST_KEY = 65_535
LAST = 30  # so many acts are shown after a failure

TTLS: list[Any] = [LEFT_OUT] * 6 + [
    *(None, None, 1e-9, 3e-9, 0.001, 0.0021, 0.05, 1, 1.5, 7.3, 60, 100.0, 3600, 1e5),
    *(1.234567891, 4321.123456789, 1e6, 3e7, 1_073_741_823),
]
STEPS = [1, 2, 1000, 2**20 - 1, 2**20, 5 * 10**7, 10**9, 10**9, 10**10, 6 * 10**10]
LEAPS = [10**11, 10**12, 10**13, 10**14, 10**15, 10**16, YEAR, 10 * YEAR]
NUMBERS: list[Any] = [0, 1, 7, -1, -200, 1.5, -0.0, 1e308, math.inf, math.nan]
NUMBERS += [2**63 - 1, -(2**63), 2**62, 10**15]
DELTAS: list[Any] = [1, 1, 1, -1, 5, 0.5, -2.25, 2**63 - 1, -(2**63), 1e308]
RICH: list[Any] = [
    *(None, True, False, "", b"", 2**64, -(2**70), "é☃" * 9, [], {}, (), set()),
    *([1, [2, {"a": None}]], {"a": [1.5, "b"], "c": b"d"}, (1, ("x", b"y"))),
    *(frozenset({1, 2}), Decimal("1.10"), timedelta(3, 5), 3 + 4j, bytearray(b"z")),
]
ROTTEN = [Rotten(ValueError), Rotten(KeyError), Rotten(MemoryError)]
BAD_KEYS: list[Any] = [None, 1.5, True, ["a"], "\ud800", ("a", None), ("a", ("b", 1.0))]
BAD_KEYS += [frozenset("a"), bytearray(b"a"), (("a", False),)]
BAD_TTLS: list[tuple[Any, type[Exception]]] = [
    *((0, ValueError), (-1, ValueError), (math.nan, ValueError)),
    *((math.inf, ValueError), (1_073_741_824, ValueError)),
    *((True, TypeError), ("1", TypeError)),
]
# The names of acts that read or write by one key, and how often each is drawn.
READS = {"get": 30, "[]": 10, "gets": 8, "peek": 3, "in": 3, "ttl": 5}
WRITES = {"set": 14, "[]=": 6, "add": 5, "replace": 4, "cas": 7, "setdefault": 2}
WRITES |= {"incr": 12, "decr": 3, "touch": 5, "delete": 3, "del": 1, "pop": 3}
OTHERS = {"popitem": 2, "clear": 0.15, "len": 1, "sweep": 1, "burst": 1}
OTHERS |= {"iter": 0.2, "keys": 0.2, "values": 0.2, "items": 0.4, "stats": 3}
OTHERS |= {"check": 0.2, "long key": 0.3, "bad": 1}
ALONE = {"get_many": 4, "set_many": 2, "update": 2, "delete_many": 1, "get_or_set": 2}
TIMES = {"step": 4, "leap": 0.5, "to an expiry": 4, "back": 0.5}
COMINGS = {"switch": 1, "close one": 0.3, "come back": 0.1, "begin anew": 0.1}


class Disagreement(AssertionError):
    """A cache that did not what the model did; the message tells how to repeat it."""


# --- calls ----------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """What ``gets`` of the cache returned, and what that of the model did."""

    real: Any
    model: Any

    def of(self, target: Any) -> Any:
        """The token that a target knows."""
        return self.model if isinstance(target, Model) else self.real


# An act is the name of a method and its arguments.  These names need more than a call.
SPECIAL: dict[str, Callable[..., Any]] = {
    "[]": lambda c, key: c[key],
    "[]=": lambda c, key, value: c.__setitem__(key, value),
    "del": lambda c, key: c.__delitem__(key),
    "in": lambda c, key: key in c,
    "len": len,
    "iter": in_order,
    "keys": lambda c: in_order(c.keys()),
    "values": lambda c: in_order(c.values()),
    "items": lambda c: in_order(c.items()),
    "cas": lambda c, key, value, token, ttl: c.cas(key, value, token.of(c), ttl),
    "incr": lambda c, key, by, first, ttl: c.incr(key, by, initial=first, ttl=ttl),
    "decr": lambda c, key, by, first, ttl: c.decr(key, by, initial=first, ttl=ttl),
    "get_or_set": lambda c, key, value, ttl: c.get_or_set(key, lambda: value, ttl),
}
RAISED = (ShmCacheError, KeyError, TypeError, ValueError, ArithmeticError, MemoryError)


def outcome(target: Any, act: tuple[Any, ...]) -> Outcome:
    """What a call returned or raised."""
    name, *arguments = act
    try:
        if name in SPECIAL:
            return "returned", SPECIAL[name](target, *arguments)
        return "returned", getattr(target, name)(*arguments)
    except RAISED as error:
        return "raised", type(error)


# --- what a history has to do with ----------------------------------------------


def draw_geometry(rng: Random) -> Geometry:
    """Settings of a cache, from one entry and one block to some MB."""
    entries = rng.choice([0, 0, 1, 1, 2, 3, 7, 7, 20, 64, 64, 1000])
    shards = min(rng.choice([1, 1, 1, 1, 2, 3, 8]), entries or 8)
    if entries:
        each = rng.choice([64, 64, 100, 256, 700, 1024, 4096, 16_384, 20_000])
        size = min(4 << 20, entries * each // rng.choice([1, 1, 1, 2, 10]))
        size = max(size, 64 * shards)
    else:
        size = 256 * shards * rng.choice([1, 2, 5, 10, 64, 500])
    geometry = Geometry(
        max_entries=entries,
        max_bytes=size,
        shards=shards,
        ttl=rng.choice([None, None, 1e-9, 0.05, 1.0, 100.0, 86_400.0, 1e9]),
        sliding=rng.random() < 0.35,
        persist=rng.random() < 0.5,
        codec=rng.choice(["msgpack"] * 5 + ["raw", "pickle", "fragile", "fragile"]),
    )
    geometry.max_bytes = max(size, geometry.block * shards)
    return geometry


def draw_keys(rng: Random, geometry: Geometry) -> list[Any]:
    """Different keys of all kinds, some more of them than the cache has room for."""
    entries = min(geometry.max_entries or 999, geometry.blocks * geometry.shards)
    number = min(2000, 3 + round(entries * rng.choice([0.5, 1.2, 2, 4])))
    makers: list[Callable[[int], Any]] = [
        lambda i: f"k{i}",
        lambda i: f"user:{i % 7}:{i}",
        lambda i: b"k%d" % i,
        lambda i: rng.choice([i, -i, 1 << i % 200, -(1 << i % 200)]),
        lambda i: ("user", i % 7, i),
        lambda i: ("n", ("x", b"%d" % i, (-i,)), ""),
        lambda i: f"{i}é☃" + "z" * rng.randrange(300),
    ]
    keys = [*rng.sample(["", b"", 0, (), -1, 128, "k", ("",), ((),)], 3)]
    if geometry.blocks * geometry.block > 100_000:
        keys += ["L" * LONGEST_KEY, b"L" * LONGEST_KEY, ("t", b"L" * 40_000)]
        keys += [1 << 8 * LONGEST_KEY - 2]
    keys += [rng.choice(makers)(i) for i in range(number)]
    rng.shuffle(keys)
    return list({encoded(key): key for key in keys}.values())


@dataclass
class Draw:
    """The source of keys, values and times of a history."""

    rng: Random
    geometry: Geometry

    def __post_init__(self) -> None:
        self.keys = draw_keys(self.rng, self.geometry)
        self.serial = 0
        self.floor = 0  # ns; each entry that is stored lives longer

    def place(self) -> int:
        """The number of a key; the first ones are drawn more often."""
        return int(self.rng.random() ** 2 * len(self.keys))

    def key(self) -> Any:
        """A key, perhaps of subclasses."""
        key = self.keys[self.place()]
        return disguised(key) if self.rng.random() < 0.1 else key

    def counter(self) -> Any:
        """One of the keys that mostly have numbers."""
        key = self.keys[self.place() // 3 * 3]
        return disguised(key) if self.rng.random() < 0.1 else key

    def ttl(self) -> Any:
        """A time to live that is over the floor."""
        while True:
            ttl = self.rng.choice(TTLS)
            ns = ttl_ns(self.geometry.ttl if ttl is LEFT_OUT else ttl)
            if ns == 0 or ns > self.floor:
                return ttl

    def value(self, key: Any) -> Any:
        """A value for a key."""
        rng, codec = self.rng, self.geometry.codec
        self.serial += 1
        if codec == "raw":
            return self.text(key).encode()
        if rng.random() < 0.3:
            return rng.choice(NUMBERS)
        if codec == "fragile" and rng.random() < 0.15:
            return rng.choice(ROTTEN)
        if rng.random() < 0.3:
            return rng.choice([*RICH, self.serial, f"{self.serial}", [self.serial]])
        text = self.text(key)
        return text if rng.random() < 0.3 else text.encode()

    def text(self, key: Any) -> str:
        """A text of any size, often such that an entry just fills its blocks."""
        rng, block = self.rng, self.geometry.block
        room = block * self.geometry.blocks
        size = rng.choice([0, rng.randrange(2 * block), block, 2 * block, 3 * block])
        if rng.random() < 0.1:
            size = rng.choice([room, room // 2, room // 3, room * 2])
        size += rng.choice([-1, 0, 0, 1]) - len(encoded(key)[1])
        size = min(max(0, size), room + block)
        return f"{self.serial}/".ljust(size, "x")[:size]


# --- who acts -------------------------------------------------------------------


def serve(link: Connection, name: str, settings: dict[str, Any]) -> None:
    """Be one of the processes in lock-step: do what comes through the pipe."""
    signal.alarm(0)
    clock, cache = Clock(), None
    while (message := link.recv()) is not None:
        clock.ns, act = message
        if cache is None:
            cache = Cache(name, clock=clock, **settings)
        link.send(outcome(cache, act))
    if cache is not None:
        cache.close()


class History:
    """One history: a cache, a model, and what both are asked."""

    def __init__(self, seed: int, name: str, *, lock_step: bool) -> None:
        self.seed = seed
        self.name = name
        self.rng = Random(seed)
        self.seeds = Random(seed)  # of segments
        self.geometry = draw_geometry(self.rng)
        self.lock_step = lock_step
        if lock_step:
            self.geometry.shards = min(self.geometry.shards, 2)
        self.draw = Draw(self.rng, self.geometry)
        self.clock = Clock()
        self.model = Model(self.geometry, self.clock)
        # In every other history it is known when entries that expire go.
        self.model.swept_at_once = seed % 2 == 1
        self.tokens: deque[tuple[Any, Token]] = deque(maxlen=300)
        self.token_of: dict[int, int] = {}  # versions, by the tokens of the cache
        self.log: deque[tuple[int, int, int, Any]] = deque(maxlen=LAST)
        self.operations = 0
        self.only: int | None = None  # the process that acts, if only one does
        self.caches: list[Cache] = []
        self.peers: list[Peer] = []
        names: dict[str, float] = READS | WRITES | OTHERS
        if not lock_step:
            names |= ALONE | COMINGS
        self.plain_acts = [*(READS | WRITES), "len", "popitem"]
        names |= TIMES
        self.names, self.weights = list(names), list(names.values())
        self.length = self.rng.choices([1500, 15_000, 200_000], [100, 10, 1])[0]

    def run(self, until: float) -> int:
        """Play the history; return how many operations it had.

        Args:
            until: It ends at this time of ``time.monotonic``, if not before.
        """
        try:
            self.come()
            while self.operations < self.length and time.monotonic() < until:
                name = self.rng.choices(self.names, self.weights)[0]
                self.act(name)
            self.end()
        except Exception as error:
            raise Disagreement(self.story(error)) from error
        finally:
            self.leave()
        return self.operations

    def story(self, error: Exception) -> str:
        """What must be known to understand and repeat a failure."""
        kind = "lock-step" if self.lock_step else "one-process"
        acts = [
            f"  {number} at {ns} ns: process {who}: {shown.repr(act)}"
            for number, ns, who, act in self.log
        ]
        return "\n".join(
            [
                f"{type(error).__name__}: {error}",
                f"history {self.seed} ({kind}), operation {self.operations}",
                f"{self.geometry}",
                f"repeat: SHMCACHE_SEED={self.seed} with the test, or",
                f"        fuzz_model.py --kind {kind} --seed {self.seed}",
                "the last acts:",
                *acts,
            ]
        )

    # --- coming and going ---

    def come(self) -> None:
        """Open the cache; in lock-step the parent looks, and its children act."""
        if self.lock_step:
            settings = self.geometry.settings
            for _ in range(2):
                self.peers.append(Peer(lambda link: serve(link, self.name, settings)))
            self.model.observe = lambda: set(map(encoded, self.caches[0]))
        self.open()
        self.begin()

    def open(self) -> None:
        """Open the cache; what the segment draws for itself is repeatable, too."""
        with mock.patch("os.urandom", self.seeds.randbytes):
            for _ in range(1 if self.lock_step else 2):
                cache = Cache(self.name, clock=self.clock, **self.geometry.settings)
                self.caches.append(cache)
        self.cache = self.caches[0]

    def begin(self) -> None:
        """Tell the model of a new segment."""
        self.model.begin(self.cache.internals.attachment.header.seed)

    def leave(self) -> None:
        """Close all, and leave no files."""
        for peer in self.peers:
            with suppress(OSError):
                peer.say(None)
            peer.end()
        for cache in self.caches:
            with suppress(Exception):
                cache.unlink()
            cache.close()

    def switch(self) -> None:
        """Go on with another Cache object of this process."""
        self.cache = self.rng.choice(self.caches)

    def close_one(self) -> None:
        """Close an object, and attach another one."""
        self.caches.pop(self.rng.randrange(len(self.caches))).close()
        codec = self.geometry.settings["codec"]
        self.caches.append(Cache.attach(self.name, clock=self.clock, codec=codec))
        self.switch()

    def come_back(self) -> None:
        """Close all; a persistent segment keeps everything, another one is new."""
        for cache in self.caches:
            cache.close()
        self.caches.clear()
        self.open()
        if not self.geometry.persist:
            self.begin()

    def begin_anew(self) -> None:
        """Remove the names, and begin a new segment under them."""
        self.cache.unlink()
        for cache in self.caches:
            cache.close()
        self.caches.clear()
        self.open()
        self.begin()

    def end(self) -> None:
        """All counts are exact after a sweep, and popitem() goes by age."""
        self.do("sweep")
        self.look()
        self.do("items")
        self.check(always=True)
        for _ in range(len(self.model)):
            if self.do("popitem")[0] == "raised":
                break
        self.look()
        self.check(always=True)

    # --- acting ---

    def act(self, name: str) -> None:
        """Do something of a name."""
        rng, draw = self.rng, self.draw
        special = getattr(self, name.replace(" ", "_"), None)
        if name in READS | WRITES:
            self.act_on_key(name)
        elif name in TIMES or name in COMINGS:
            self.log.append((self.operations, self.clock.ns, -1, name))
            getattr(self, name.replace(" ", "_"))()
        elif name in ("get_many", "delete_many"):
            self.do(name, [draw.key() for _ in range(rng.randrange(6))])
        elif name in ("set_many", "update"):
            keys = [draw.key() for _ in range(rng.randrange(5))]
            pairs = {key: draw.value(key) for key in keys}
            self.do(name, pairs, *([draw.ttl()] if name == "set_many" else []))
        elif name == "get_or_set":
            self.act_on_key("setdefault", name)
        elif name == "stats":
            self.look()
        elif name == "check":
            self.check()
        elif special:
            special()
        else:
            self.do(name)

    def act_on_key(self, kind: str, name: str = "") -> None:
        """Read or write by one key."""
        rng, draw, name = self.rng, self.draw, name or kind
        key = draw.key()
        if name in ("get", "peek"):
            self.do(name, key, ABSENT)
        elif name == "pop":
            self.do(name, key, *rng.choice([(), (ABSENT,)]))
        elif name == "touch":
            self.do(name, key, draw.ttl())
        elif name == "[]=":
            self.do(name, key, draw.value(key))
        elif name == "cas":
            self.cas()
        elif name in ("incr", "decr"):
            if self.geometry.codec != "raw":
                first = rng.choice([None, 0, 10, 2.5, 2**63 - 1])
                key = draw.counter() if rng.random() < 0.9 else key
                self.do(name, key, rng.choice(DELTAS), first, draw.ttl())
        elif kind in WRITES and name not in ("delete", "del"):
            self.do(name, key, draw.value(key), draw.ttl())
        else:
            self.do(name, key)

    def do(self, *act: Any) -> Outcome:
        """Ask the cache and the model the same."""
        self.operations += 1
        who = self.rng.randrange(2) if self.only is None else self.only
        who *= self.lock_step
        self.log.append((self.operations, self.clock.ns, who, act))
        if self.lock_step:
            self.peers[who].say((self.clock.ns, act))
            actual = self.peers[who].hear()
        else:
            actual = outcome(self.cache, act)
        self.model.told, self.model.who = actual, who
        expected = outcome(self.model, act)
        if act[0] == "gets" and (expected[0], actual[0]) == ("returned", "returned"):
            self.learn(act[1], expected[1], actual[1])
        else:
            assert same(expected, actual), (
                f"{shown.repr(act)} {shown.repr(actual)}, not {shown.repr(expected)}"
            )
        return expected

    def learn(self, key: Any, expected: Any, actual: Any) -> None:
        """Keep a token; it never stands for another version of any entry."""
        (value, serial), (got, token) = expected, actual
        assert same(value, got), f"gets() gave {shown.repr(got)}"
        if serial is None:
            assert token is None
            return
        assert type(token) is int
        known = self.token_of.setdefault(token, serial)
        assert known == serial, f"the token {token} has stood for another version"
        self.tokens.append((key, Token(token, serial)))

    def cas(self) -> None:
        """Swap by a token of this version, of an older one or another key, or none."""
        key, token = self.draw.key(), Token(None, None)
        chance = self.rng.random()
        if self.tokens and chance < 0.8:
            newest = self.tokens[-1 - int(self.rng.random() ** 3 * len(self.tokens))]
            key, token = newest if chance < 0.7 else (key, newest[1])
        elif chance < 0.9:
            token = Token(self.rng.choice([0, -1, 1 << 64, 1 << 70]), -1)
        self.do("cas", key, self.draw.value(key), token, self.draw.ttl())

    def burst(self) -> None:
        """Hit a few entries more often than a recency buffer has room.

        In lock-step one process does, and the other one may store many entries then.
        """
        rng, draw = self.rng, self.draw
        keys = [draw.key() for _ in range(rng.choice([1, 1, 2, 5]))]
        self.only = rng.choice([0, 1])
        for _ in range(rng.choice([60, 70, 150])):
            self.do("get", rng.choice(keys), ABSENT)
        self.only = 1 - self.only
        if self.lock_step and rng.random() < 0.7:
            for _ in range(min(100, len(draw.keys))):
                key = draw.key()
                self.do("set", key, draw.value(key), draw.ttl())
        self.only = None

    def clear(self) -> None:
        """Clear by a prefix of any kind."""
        prefixes: list[Any] = [None, "", "k", "user:3", "é", b"", b"k1", (), ("user",)]
        prefix = self.rng.choice([*prefixes, ("user", 3), ("n", ("x", b"1", (-1,)))])
        if prefix is not None and self.rng.random() < 0.2:
            prefix = disguised(prefix)
        self.do("clear", prefix)

    def look(self) -> None:
        """Compare what is counted."""
        self.model.counts.compare(
            self.caches[0].stats(),
            self.model.live(),
            self.model.stamp,
            self.geometry.block,
        )

    def check(self, *, always: bool = False) -> None:
        """Have the independent checker look, less often at what is large."""
        if always or self.rng.randrange(65_536) > self.geometry.max_bytes:
            findings = self.caches[0].check()
            assert findings == [], findings

    # --- what is refused ---

    def refused(self, act: tuple[Any, ...], *errors: type[Exception]) -> None:
        """A call raises one of the errors; that nothing has changed is seen later."""
        self.log.append((self.operations, self.clock.ns, 0, act))
        actual = outcome(self.caches[0], act)
        assert actual in [("raised", each) for each in errors], actual

    def bad(self) -> None:
        """Arguments that no cache takes."""
        rng, key = self.rng, self.draw.key()
        bad = rng.choice(BAD_KEYS)
        ttl, error = rng.choice(BAD_TTLS)
        absent = Token(rng.choice([True, "1", 1.5]), None)
        self.refused(
            rng.choice(
                [
                    *(("get", bad), ("[]", bad), ("in", bad), ("gets", bad)),
                    *(("peek", bad), ("ttl", bad), ("delete", bad), ("pop", bad)),
                    *(("set", bad, b"1"), ("add", bad, b""), ("touch", bad)),
                    *(("clear", 1), ("clear", (bad,)), ("get_many", [bad])),
                ]
            ),
            UnsupportedKey,
        )
        self.refused(
            rng.choice(
                [
                    *(("set", key, b"", ttl), ("add", key, b"", ttl)),
                    *(("touch", key, ttl), ("set_many", {}, ttl)),
                ]
            ),
            error,
        )
        self.refused(("cas", key, b"", absent, LEFT_OUT), TypeError)
        if self.geometry.codec == "raw":
            self.refused(("set", key, "text"), UnsupportedValue)
            self.refused(("incr", key, 1, 0, LEFT_OUT), UnsupportedValue)
        else:
            self.refused(("incr", key, "1", 0, LEFT_OUT), TypeError)
            self.refused(("incr", key, 1 << 66, 0, LEFT_OUT), OverflowError)
            self.refused(("set", key, (each for each in "")), UnsupportedValue)

    def long_key(self) -> None:
        """A key of one byte too many is refused by writers, and absent for readers."""
        size = LONGEST_KEY + 1
        key = self.rng.choice(["y" * size, b"y" * size, ("y" * (size - 3),)])
        self.refused(("set", key, b""), EntryTooLarge)
        self.refused(("add", key, b""), EntryTooLarge)
        self.model.counts.too_large.add(0, 2)
        found = outcome(self.caches[0], ("in", key))
        assert found in [("returned", False), ("raised", EntryTooLarge)]

    # --- time ---

    def move(self, ns: int) -> None:
        """Move the clock on, if there is time left."""
        if self.clock.ns + ns < END:
            self.clock.ns += ns
        if self.model.swept_at_once:
            self.do("sweep")

    def step(self) -> None:
        """A short time goes by."""
        self.move(self.rng.choice(STEPS))

    def leap(self) -> None:
        """A long time goes by."""
        self.move(self.rng.choice(LEAPS))

    def to_an_expiry(self) -> None:
        """Time goes by until an entry expires, or just before that."""
        due = [entry.expires for entry in self.model.live() if entry.expires != NEVER]
        if due:
            first = min(due) if self.rng.random() < 0.8 else self.rng.choice(due)
            self.move(max(0, first - self.clock.ns - self.rng.choice([0, 0, 1])))

    def back(self) -> None:
        """The clock steps back for a while: clocks of two processes differ a little.

        What has expired is gone before, and nothing expires meanwhile.
        """
        ns = self.rng.choice([1, 1000, 1 << 20, 1 << 26, 10**9])
        if 0 < ttl_ns(self.geometry.ttl) <= ns:
            return
        self.do("sweep")
        self.clock.ns -= ns
        self.draw.floor = ns
        for _ in range(self.rng.randrange(1, 30)):
            self.act(self.rng.choice(self.plain_acts))
        self.draw.floor = 0
        self.clock.ns += ns


# --- many histories -------------------------------------------------------------


@dataclass
class Played:
    """How much was played, beginning with which seed."""

    operations: int
    histories: int
    seed: int


def play(
    seconds: float, seed: int, new_name: Callable[[], str], *kinds: bool
) -> Played:
    """Play histories for a time, at least one of each kind.

    Args:
        seconds: The time.
        seed: Of the first history; the next ones have the numbers that follow.
        new_name: Makes names of caches.
        kinds: Whether histories are in lock-step, in turn.

    Raises:
        Disagreement: The cache did not what the model did.
    """
    until = time.monotonic() + seconds
    played = Played(0, 0, seed)
    while time.monotonic() < until:
        lock_step = kinds[played.histories % len(kinds)]
        number = seed + played.histories // len(kinds)
        history = History(number, new_name(), lock_step=lock_step)
        played.operations += history.run(until)
        played.histories += 1
    return played


def main() -> None:
    """Play for a time, and print how much was played."""
    choices = {"one-process": [False], "lock-step": [True], "both": [False, True]}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=choices, default="both")
    options = parser.parse_args()
    numbers = count(1)
    played = play(
        options.seconds,
        options.seed,
        lambda: f"fuzz{os.getpid()}-{next(numbers)}",
        *choices[options.kind],
    )
    print(json.dumps(vars(played)))


if __name__ == "__main__":
    main()
