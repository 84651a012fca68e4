"""Damage: a segment is damaged in a seeded way, and then everything is done to it.

Run as a program it damages one segment again and again, each time from the same sound
bytes, and prints a JSON object of what happened.  A signal that ends it, or an
exception that the package does not promise, is the failure that a test looks for;
``replay`` in the environment is the number of the one round to run, verbosely.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import mmap
import os
import random
import signal
import sys
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import posix_ipc

import shmcache
import shmcache.handles
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process import sweeper as _sweeper
from shmcache._segment.names import Names
from shmcache.errors import ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A round that takes longer never ends; SIGALRM ends it.
ROUND_SECONDS = 30
SETTINGS: dict[str, Any] = {
    "max_entries": 30,
    "max_bytes": 120 * 64,
    "shards": 2,
    "cleanup_interval": 300,
    # Damage may put the token of a living worker into HOLDER.
    "lock_timeout": 0.2,
}
KEYS: list[Any] = [f"key {n}" for n in range(40)]
KEYS += ["k" * 150, b"bytes", 7, -(1 << 70), ("tuple", 1, (b"in", 2)), ""]


class Violation(Exception):
    """The cache has broken one of its promises."""


def value_of(key: Any, number: int) -> Any:
    """One of the values that are stored under a key, and under no other."""
    text = f"{key!r} {number} "
    return (
        text.encode() * (1 + number),
        text * 2,
        [text, number, None],
        text.encode() * 20,
    )[number]


class Clock:
    """A clock that moves when it is told to; ns."""

    ns = 1_000_000_000_000

    def __call__(self) -> int:
        """The time."""
        return self.ns


class Rounds:
    """A segment that is damaged in each round anew, while a living process uses it."""

    settings: ClassVar[dict[str, Any]] = SETTINGS

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.seed = seed
        self.seen: Counter[str] = Counter()
        self.clock = Clock()
        # The seed of the hash is fixed; otherwise a repeated round would differ.
        vars(os)["urandom"] = random.Random(seed).randbytes
        self.open()
        self.fill()
        self.start = self.clock.ns
        self.sound = bytes(self.cache._attachment.block.view)
        self.header = _check.read_header(self.sound)
        self.geometry = self.header.geometry
        self.areas = list(self.places())

    def open(self) -> None:
        """Use the cache, in one of the ways."""
        self.cache = shmcache.Cache(self.name, **self.settings, clock=self.clock)
        self.buffer: Any = self.cache._attachment.block.view
        self.semaphores = [
            posix_ipc.Semaphore(self.cache._names.semaphore(shard))
            for shard in range(SETTINGS["shards"])
        ]

    def fill(self) -> None:
        """Entries of all kinds; some were overwritten, removed, read, prolonged."""
        cache = self.cache
        for n, key in enumerate(KEYS):
            cache.set(key, value_of(key, n % 4), ttl=(None, 0.5, 30, 4000)[n % 4])
        for key in KEYS[::5]:
            cache.delete(key)
        for key in KEYS[::3]:
            cache.get(key)
            cache.touch(key, ttl=60)
        for key in KEYS[::7]:
            cache[key] = value_of(key, 1)
        cache["counter"] = 41
        cache["float"] = 0.5
        cache._enter_flight(0, 12345, 0)
        cache._flush_recency()

    # --- damage -----------------------------------------------------------------------

    def places(self) -> Iterator[tuple[str, int, int]]:
        """The parts of a segment: name, first byte, length."""
        g = self.geometry
        yield "header", 0, 1024
        yield "rows", L.ROWS_AT, 4 * L.ROW_SIZE
        for shard in range(g.shards):
            at = g.shards_at + shard * g.stride
            yield "lock line", at, 64
            yield "counts", at + 64, 8 * L.S_WHEEL_BITS - 64
            wheel = 8 * (L.S_IN_FLIGHT - L.S_WHEEL_BITS)
            yield "wheel", at + 8 * L.S_WHEEL_BITS, wheel
            yield "in-flight table", at + 8 * L.S_IN_FLIGHT, 16 * L.IN_FLIGHT
            yield "mailbox", at + 8 * L.S_MAILBOX_HEAD, 8 * 8
            yield "mailbox", at + 8 * L.S_MAILBOX, 64 * 8
            yield "buckets", at + g.buckets_at, 4 * g.slots
            records = L.RECORD * (g.slots + 1)
            yield "records", at + g.records_at, records
            yield "records", at + g.records_at, records
            yield "links", at + g.links_at, 4 * (g.blocks + 1)
            yield "arena", at + g.arena_at, g.block_size * (g.blocks + 1)

    def damage(self, rng: random.Random) -> str:
        """Change some bytes; return a description for people."""
        area, at, length = rng.choice(self.areas)
        changes = [
            ("bits", self.flip_bits),
            ("word", self.replace_word),
            ("index", self.replace_index),
            ("noise", self.overwrite),
            ("zeros", self.zero),
            ("swap", self.swap_words),
        ]
        kind, change = rng.choice(changes)
        change(rng, at, length)
        return f"{kind} in {area}"

    def flip_bits(self, rng: random.Random, at: int, length: int) -> None:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            self.buffer[at + rng.randrange(length)] ^= 1 << rng.randrange(8)

    def replace_word(self, rng: random.Random, at: int, length: int) -> None:
        size = rng.choice([4, 8])
        where = at + rng.randrange(length // size) * size
        word = rng.choice(
            [0, 1, (1 << 64) - 1, 1 << 63, (1 << 63) - 1, 1 << 31, rng.getrandbits(64)]
        )
        self.buffer[where : where + size] = word.to_bytes(8, "little")[:size]

    def replace_index(self, rng: random.Random, at: int, length: int) -> None:
        """Put a plausible link in a word, so that it leads to a wrong place."""
        where = at + rng.randrange(length // 4) * 4
        index = rng.randrange(self.geometry.slots + 3)
        self.buffer[where : where + 4] = index.to_bytes(4, "little")

    def swap_words(self, rng: random.Random, at: int, length: int) -> None:
        size = rng.choice([4, 8])
        a, b = (at + rng.randrange(length // size) * size for _ in range(2))
        first, second = bytes(self.buffer[a : a + size]), self.buffer[b : b + size]
        self.buffer[a : a + size] = bytes(second)
        self.buffer[b : b + size] = first

    def overwrite(self, rng: random.Random, at: int, length: int) -> None:
        n = min(length, rng.choice([2, 16, 64, 300, 4096]))
        where = at + rng.randrange(length - n + 1)
        self.buffer[where : where + n] = rng.randbytes(n)

    def zero(self, rng: random.Random, at: int, length: int) -> None:
        n = min(length, rng.choice([8, 64, 300, 4096]))
        where = at + rng.randrange(length - n + 1)
        self.buffer[where : where + n] = bytes(n)

    # --- use --------------------------------------------------------------------------

    def verify(self, key: Any, value: Any) -> None:
        """Check that a value found under a key was stored under it."""
        known = (value_of(key, number) for number in range(4))
        if key == "counter":
            good = type(value) is int and 41 <= value < 50
        elif key == "float":
            good = value == 0.5
        else:
            good = key in KEYS and value in known
        if not good:
            raise Violation(f"{key!r}: {value!r} was never stored under it")

    def get(self, key: Any) -> None:
        value = self.cache.get(key)
        if value is not None:
            self.verify(key, value)

    def pop(self, key: Any) -> None:
        value = self.cache.pop(key, None)
        if value is not None:
            self.verify(key, value)

    def gets(self, key: Any) -> None:
        value, token = self.cache.gets(key)
        if value is not None:
            self.verify(key, value)
            self.cache.cas(key, value_of(key, 3), token, ttl=5)

    def incr(self, _key: Any) -> None:
        # A counter that damage has removed starts anew.
        self.verify("counter", self.cache.incr("counter", initial=41))

    def items(self, _key: Any) -> None:
        for key, value in self.cache.items():
            self.verify(key, value)

    def popitem(self, _key: Any) -> None:
        with suppress(KeyError):
            self.verify(*self.cache.popitem())

    def ttl(self, key: Any) -> None:
        with suppress(KeyError):
            self.cache.ttl(key)

    def get_or_set(self, key: Any) -> None:
        # If a pair in the in-flight table names a living worker, callers wait for it.
        value = self.cache.get_or_set(key, lambda: value_of(key, 2), timeout=0.05)
        self.verify(key, value)

    def later(self, _key: Any) -> None:
        self.clock.ns += 700_000_000
        self.cache.sweep()

    def operations(self) -> list[Callable[[Any], object]]:
        """What can be done with a key."""
        cache = self.cache
        return [
            *(self.get, self.get, self.pop, self.gets, self.incr, self.items),
            *(self.popitem, self.ttl, self.get_or_set, self.later),
            *(cache.delete, cache.peek),
            lambda key: cache.set(key, value_of(key, 0)),
            lambda key: cache.set(key, value_of(key, 1), ttl=0.5),
            lambda key: cache.set(key, value_of(key, 3), ttl=3),
            lambda key: cache.add(key, value_of(key, 2)),
            lambda key: cache.replace(key, value_of(key, 0)),
            lambda key: cache.touch(key, ttl=70),
            lambda key: key in cache,
            lambda _: cache.clear(prefix="key 1"),
            lambda _: len(cache),
            lambda _: cache.stats(),
            lambda _: cache._tend(0.05),
        ]

    def use(self, rng: random.Random) -> None:
        """Do everything, in random order; refusals are counted."""
        operations = self.operations()
        if rng.random() < 0.1:
            operations.append(lambda _: self.cache.check())  # slow, on all rows
        rng.shuffle(operations)
        for operation in operations:
            try:
                operation(rng.choice(KEYS))
            except ShmCacheError as error:
                self.seen[type(error).__name__] += 1

    def shards_findings(self) -> list[str]:
        """Return the findings about the shards; headers and rows are never repaired."""
        findings = []
        for shard in range(self.geometry.shards):
            data = self.cache._copy_shard(shard, 0, self.geometry.stride)
            findings += _check.check_shard(data, self.header, shard, quiescent=False)
        # If two good entries have one version, nobody knows which one is right.
        return [line for line in findings if ", as slot" not in line]

    def restore(self) -> None:
        """The segment as it was before the damage; the locks are free."""
        self.buffer[:] = self.sound
        self.clock.ns = self.start
        for semaphore in self.semaphores:
            while semaphore.value > 1:
                semaphore.acquire(0)
            if semaphore.value == 0:
                semaphore.release()
        self.cache._attachment.flights.clear()

    def round(self, number: int) -> None:
        """Damage, use, repair, and use again."""
        rng = random.Random(f"{self.seed} {number}")
        self.restore()
        what = self.damage(rng)
        self.seen[what] += 1
        self.use(rng)
        for shard in range(SETTINGS["shards"]):
            self.cache._rebuild_shard(shard)
        self.use_what_is_sound(rng, what)

    def use_what_is_sound(self, rng: random.Random, what: str) -> None:
        """After a repair there is nothing more to find, and to refuse."""
        findings = self.shards_findings()
        if findings:
            raise Violation(f"after {what} and repair: {findings}")
        before = self.seen["SegmentCorrupt"]
        self.use(rng)
        findings = self.shards_findings()
        if findings or self.seen["SegmentCorrupt"] > before:
            raise Violation(f"after {what}, repair and use: {findings}")

    def end(self) -> None:
        """Leave, and leave nothing behind."""
        self.restore()
        for semaphore in self.semaphores:
            semaphore.close()
        self.buffer = None
        self.cache.close()


class RoundsAtRest(Rounds):
    """A segment that is damaged while nobody uses it, and then taken up again."""

    settings: ClassVar[dict[str, Any]] = {**SETTINGS, "persist": True}

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed)
        self.leave()

    def leave(self) -> None:
        """Nobody uses the segment now."""
        for semaphore in self.semaphores:
            semaphore.close()
        self.buffer = None
        self.cache.close()

    def round(self, number: int) -> None:
        """Damage, take up, and use."""
        rng = random.Random(f"{self.seed} {number}")
        self.clock.ns = self.start
        self.buffer = bytearray(self.sound)
        what = self.damage(rng)
        self.seen[what] += 1
        self.write()
        try:
            self.open()
        except ShmCacheError as error:
            self.seen[type(error).__name__] += 1
            return
        try:
            # Some damaged words of the header may describe another possible segment.
            header = self.cache._attachment.header
            self.header = _check.Header(
                header.geometry, header.seed, header.settings.max_entries, L.MASK64
            )
            self.use_what_is_sound(rng, what)
        finally:
            self.leave()

    def write(self) -> None:
        """Put bytes into the segment's file, which damage may have had removed."""
        path = Names.of(self.name).segment_path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.write(self.buffer)

    def end(self) -> None:
        """Leave nothing behind."""
        self.buffer = self.sound
        self.write()
        self.open()
        self.cache.unlink()
        self.leave()


class RoundsOfHandles(Rounds):
    """A segment of handles, damaged while their owner uses it."""

    def __init__(self, name: str, seed: int) -> None:
        for module in (_sweeper, shmcache.handles):
            vars(module)["threads_run"] = bool  # all happens here, and now
        self.closed: Counter[str] = Counter()
        super().__init__(name, seed)
        state = self.map._process
        read = list(state.delivery.read)
        self.kept = dict(state.handles), dict(state.numbers), read

    def open(self) -> None:
        """Use the map."""
        self.map = shmcache.HandleMap(
            self.name, **self.settings, clock=self.clock, ttl=100, on_evict=self.close
        )
        self.cache = self.map.registry
        self.buffer = self.cache._attachment.block.view
        self.semaphores = [
            posix_ipc.Semaphore(self.cache._names.semaphore(shard))
            for shard in range(SETTINGS["shards"])
        ]

    def fill(self) -> None:
        """Handles of all kinds of keys."""
        for n, key in enumerate(KEYS[-25:]):
            value = value_of(key, n % 3)
            self.map.set(
                key, f"handle of {key!r}", value=value, ttl=(1, None, 50)[n % 3]
            )
        self.map.discard(KEYS[-3])

    def close(self, _key: Any, handle: str, _cause: shmcache.Cause) -> None:
        """Note that a handle was closed; ``round`` checks that it never is twice."""
        self.closed[handle] += 1

    def verify(self, key: Any, value: Any) -> None:
        """The handle of a key is the one that was registered under it, and open."""
        if not value.endswith(f"handle of {key!r}") or self.closed[value]:
            raise Violation(f"{key!r}: {value!r}, closed {self.closed[value]} times")

    def round(self, number: int) -> None:
        """As ever; and then no handle is open without an entry, or was closed twice."""
        super().round(number)
        delivery = self.map._state().delivery
        delivery.deliver()
        findings = delivery.findings()
        twice = [handle for handle, times in self.closed.items() if times > 1]
        if findings or twice:
            raise Violation(f"{findings}, closed twice: {twice}")

    def new(self, key: Any) -> str:
        """Make a handle that was never registered."""
        self.number += 1
        return f"{self.number}: handle of {key!r}"

    def get(self, key: Any) -> None:
        handle = self.map.get(key)
        if handle is not None:
            self.verify(key, handle)

    def pop(self, key: Any) -> None:
        handle = self.map.pop(key, None)
        if handle is not None:
            self.verify(key, handle)

    def lease(self, key: Any) -> None:
        with self.map.lease(key, lambda: self.new(key)) as handle:
            self.verify(key, handle)

    def items(self, _key: Any) -> None:
        for key, handle in self.map.items():
            self.verify(key, handle)

    def host(self, _key: Any) -> None:
        for entry in self.map.host():
            if entry.key not in KEYS:
                raise Violation(f"{entry.key!r} was never registered")

    def later(self, _key: Any) -> None:
        self.clock.ns += 700_000_000
        self.map.sweep()

    def operations(self) -> list[Callable[[Any], object]]:
        """What can be done with a key."""
        return [
            *(self.get, self.get, self.pop, self.lease, self.lease, self.items),
            *(self.host, self.later, self.map.discard),
            lambda key: self.map.set(key, self.new(key), value=value_of(key, 1)),
            lambda key: self.map.set(key, self.new(key), ttl=0.5),
            lambda key: self.map.get_or_create(key, lambda: self.new(key)),
            lambda key: key in self.map,
            lambda _: len(self.map),
            lambda _: self.map.stats(),
            lambda _: self.map._tend(0),
            lambda _: self.map.clear(),
        ]

    def restore(self) -> None:
        """Table and segment as they were before the damage."""
        super().restore()
        self.number = 0
        self.closed.clear()
        state = self.map._process
        handles, numbers, read = self.kept
        state.handles, state.numbers = dict(handles), dict(numbers)
        state.delivery.read = read[:]
        state.gone.clear()
        for record in state.numbers.values():
            record.cause, record.taken, record.leases = None, False, 0
            record.handle = f"handle of {record.key!r}"

    def end(self) -> None:
        """Leave nothing behind."""
        self.restore()
        for semaphore in self.semaphores:
            semaphore.close()
        self.buffer = None
        self.map.close()


KINDS = {"used": Rounds, "at rest": RoundsAtRest, "handles": RoundsOfHandles}


def main() -> None:
    """Run rounds: name, seed, first round, number of rounds, shared progress."""
    name, kind, seed, first, number, progress_fd = sys.argv[1:]
    faulthandler.enable()
    logging.getLogger("shmcache").setLevel(logging.CRITICAL)
    progress = memoryview(mmap.mmap(int(progress_fd), mmap.PAGESIZE)).cast("Q")
    rounds = KINDS[kind](name, int(seed))
    for progress[0] in range(int(first), int(first) + int(number)):
        signal.setitimer(signal.ITIMER_REAL, ROUND_SECONDS)
        rounds.round(progress[0])
    signal.setitimer(signal.ITIMER_REAL, 0)
    rounds.end()
    print(json.dumps(rounds.seen))


if __name__ == "__main__":
    main()
