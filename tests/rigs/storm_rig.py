"""The storm: workers under mixed load, killed at random moments, and a judge.

Each worker has keys of its own, so that a ledger can say exactly what must be there:
it notes what it is about to do, does it, and notes that it was done, in memory that
outlives it.  The worker that takes a dead one's place first compares.  Values carry
their key, their number and a filling that follows from both, so every reader
recognizes a torn or foreign one.

Run as a program, this module is the judge and the zygote of the workers; the last line
that it prints is a JSON object of what happened.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import signal
import sys
import time
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn

import shmcache
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 4
KEYS = 24  # of each worker, that only it writes
CLEARED = 6  # the first of them are what it clears together
SIZES = (10, 60, 64, 200, 1_000, 5_000, 40_000)
# This is five times as long as a death may delay the others, as test machines are busy.
LONGEST_WAIT = 5.0
# Without progress for so long, the storm has failed.
PATIENCE = 60.0

VARIANTS: dict[str, dict[str, Any]] = {
    # Nothing is ever evicted here, so what was acknowledged must be there.
    "roomy": {"max_entries": 2_000, "max_bytes": 16 << 20, "shards": 2},
    # Both bounds are reached all the time.
    "tight": {"max_entries": 40, "max_bytes": 300_000, "shards": 1},
}
ROOMY = "roomy"

# What the ledger says about a key: number << 2 | what was done.
SET, DELETED = 1, 2


class Violation(Exception):
    """The cache has broken one of its promises."""


def payload(key: str, number: int) -> bytes:
    """The value of a key with a number; no other value is like it."""
    seed = blake2b(f"{key} {number}".encode(), digest_size=16).digest()
    size = SIZES[seed[0] % len(SIZES)]
    return f"{key} {number} ".encode() + (seed * (size // 16 + 1))[:size]


def number_of(key: str, value: Any) -> int:
    """The number of a value of a key; Violation if it is not that value, byte for
    byte."""
    try:
        name, number, _ = value.split(b" ", 2)
        if name.decode() == key and value == payload(key, int(number)):
            return int(number)
    except (AttributeError, ValueError):
        pass
    raise Violation(f"{key}: {value[:80]!r} was never stored under it")


class Page:
    """The part of the ledger of one worker, in memory that outlives it."""

    SIZE = 2 * KEYS + 16

    def __init__(self, words: memoryview, slot: int) -> None:
        self.words = words[slot * self.SIZE : (slot + 1) * self.SIZE]
        self.slot = slot

    INTENT, DONE = 0, KEYS
    OWN_INTENT, OWN_DONE, SHARED_INTENT, SHARED_DONE, OPERATIONS, SLOWEST = range(
        2 * KEYS, 2 * KEYS + 6
    )

    def expected(self, key: int) -> set[int]:
        """What may be there: the state noted last, or the one that was about to
        come."""
        return {self.words[self.DONE + key], self.words[self.INTENT + key]}


class Worker:
    """What one worker does until it is killed."""

    def __init__(
        self, cache: shmcache.Cache, page: Page, seed: int, variant: str
    ) -> None:
        self.cache = cache
        self.page = page
        self.words = page.words
        self.roomy = variant == ROOMY
        self.random = random.Random(seed)
        self.names = [
            f"w{page.slot}:{'c' if key < CLEARED else 'k'}{key}" for key in range(KEYS)
        ]
        self.numbers = count(1 + max(self.words[: 2 * KEYS]) // 4)
        self.over: dict[str, int] = {}  # by when short-lived entries have expired

    # --- one key of its own ---------------------------------------------------------

    def found(self, key: int, value: Any) -> int:
        """What the ledger would say about a key with this value."""
        if value is None:
            return DELETED
        return number_of(self.names[key], value) << 2 | SET

    def compare(self, key: int, value: Any, expected: set[int]) -> int:
        """The entry of the ledger to which a value found belongs."""
        found = self.found(key, value)
        for entry in expected:
            gone = entry & 3 != SET
            if entry == found or (found == DELETED and (gone or not self.roomy)):
                return entry
        raise Violation(
            f"{self.names[key]}: found {found}, expected one of {sorted(expected)}"
        )

    def settle(self) -> None:
        """Find out what became of what the predecessor was about to do."""
        for key in range(KEYS):
            expected = self.page.expected(key)
            if not self.roomy:
                expected.add(max(expected) | DELETED)
            entry = self.compare(key, self.cache.peek(self.names[key]), expected)
            self.words[Page.DONE + key] = self.words[Page.INTENT + key] = entry
        self.settle_own_counter()

    def settle_own_counter(self) -> None:
        expected = {self.words[Page.OWN_DONE], self.words[Page.OWN_INTENT]}
        value = self.cache.peek(f"w{self.page.slot}:n", 0)
        if self.roomy and value not in expected:
            raise Violation(f"w{self.page.slot}:n is {value}, expected {expected}")
        self.words[Page.OWN_DONE] = self.words[Page.OWN_INTENT] = value

    def change(self, key: int, what: int, act: Callable[[str, bytes], Any]) -> None:
        """Note an intent, act, and note that it was done."""
        number = next(self.numbers)
        entry = number << 2 | what
        value = payload(self.names[key], number)
        self.words[Page.INTENT + key] = entry
        self.act(lambda: act(self.names[key], value))
        self.words[Page.DONE + key] = entry

    def act(self, operation: Callable[[], Any]) -> Any:
        """Do something to the cache, and note how long it took."""
        started = time.monotonic_ns()
        result = operation()
        elapsed = time.monotonic_ns() - started
        self.words[Page.SLOWEST] = max(elapsed, self.words[Page.SLOWEST])
        return result

    def a_key(self) -> int:
        return self.random.randrange(KEYS)

    def set(self) -> None:
        self.change(self.a_key(), SET, self.cache.set)

    def set_with_ttl(self) -> None:
        self.change(self.a_key(), SET, lambda k, v: self.cache.set(k, v, ttl=3600))

    def replace(self) -> None:
        key = self.a_key()
        if self.act(lambda: self.names[key] in self.cache):
            # In a tight cache it may have gone meanwhile.
            self.change(key, SET, self.replace_or_set)

    def cas(self) -> None:
        key = self.a_key()
        value, token = self.act(lambda: self.cache.gets(self.names[key]))
        self.compare(key, value, {self.words[Page.DONE + key]})
        self.change(
            key,
            SET,
            lambda k, v: self.cache.cas(k, v, token) or self.replace_or_set(k, v),
        )

    def replace_or_set(self, name: str, value: bytes) -> bool:
        if not self.cache.replace(name, value):
            self.cache.set(name, value)
        return True

    def get(self) -> None:
        key = self.a_key()
        value = self.act(lambda: self.cache.get(self.names[key]))
        self.compare(key, value, {self.words[Page.DONE + key]})

    def delete(self) -> None:
        self.change(self.a_key(), DELETED, lambda k, _: self.cache.delete(k))

    def pop(self) -> None:
        key = self.a_key()
        before = self.words[Page.DONE + key]

        def pop(name: str, _: bytes) -> None:
            self.compare(key, self.cache.pop(name, None), {before})

        self.change(key, DELETED, pop)

    def touch(self) -> None:
        key = self.a_key()
        ttl = self.random.choice([None, 100, 10_000])
        there = self.act(lambda: self.cache.touch(self.names[key], ttl=ttl))
        if self.roomy and there != (self.words[Page.DONE + key] & 3 == SET):
            raise Violation(f"{self.names[key]}: touch found {there}")

    def clear(self) -> None:
        number = next(self.numbers)
        for key in range(CLEARED):
            self.words[Page.INTENT + key] = number << 2 | DELETED
        self.act(lambda: self.cache.clear(prefix=f"w{self.page.slot}:c"))
        for key in range(CLEARED):
            self.words[Page.DONE + key] = number << 2 | DELETED

    # --- what all share ---------------------------------------------------------------

    def incr_own(self) -> None:
        self.words[Page.OWN_INTENT] += 1
        name = f"w{self.page.slot}:n"
        value = self.act(lambda: self.cache.incr(name, initial=0))
        if self.roomy and value != self.words[Page.OWN_INTENT]:
            raise Violation(f"{name}: counted {value}")
        self.words[Page.OWN_INTENT] = value
        self.words[Page.OWN_DONE] = value

    def incr_shared(self) -> None:
        self.words[Page.SHARED_INTENT] += 1
        self.act(lambda: self.cache.incr("shared", initial=0))
        self.words[Page.SHARED_DONE] += 1

    def get_others(self) -> None:
        key = self.a_key()
        kind = "c" if key < CLEARED else "k"
        name = f"w{self.random.randrange(WORKERS)}:{kind}{key}"
        value = self.act(lambda: self.cache.get(name))
        if value is not None:
            number_of(name, value)

    def get_or_set(self) -> None:
        name = f"f{self.random.randrange(8)}"
        number = next(self.numbers)
        value = self.act(
            lambda: self.cache.get_or_set(name, lambda: payload(name, number), ttl=0.02)
        )
        number_of(name, value)

    def short_lived(self) -> None:
        name = f"w{self.page.slot}:t{self.random.randrange(4)}"
        ttl = self.random.choice([0.001, 0.003, 0.02])
        self.act(lambda: self.cache.set(name, "short-lived", ttl=ttl))
        self.over[name] = time.monotonic_ns() + round(ttl * 1e9)

    def get_short_lived(self) -> None:
        name = f"w{self.page.slot}:t{self.random.randrange(4)}"
        now = time.monotonic_ns()
        value = self.act(lambda: self.cache.get(name))
        if value is not None and now > self.over.get(name, now):
            raise Violation(f"{name}: expired {now - self.over[name]} ns ago")

    def sweep(self) -> None:
        self.act(self.cache.sweep)

    def iterate(self) -> None:
        for name, value in self.cache.items():
            if name[0] == "f" or ":c" in name or ":k" in name:
                number_of(name, value)

    def live(self) -> NoReturn:
        """Do one thing after the other, for ever."""
        self.settle()
        often = [self.set, self.set, self.set, self.get, self.get_others, self.replace]
        often += [self.delete, self.incr_own, self.incr_shared, self.touch, self.cas]
        often += [self.pop, self.set_with_ttl, self.short_lived, self.get_short_lived]
        often += [self.get_or_set]
        now_and_then = [self.clear, self.sweep, self.iterate]
        while True:
            some = often if self.random.random() < 0.98 else now_and_then
            self.random.choice(some)()
            self.words[Page.OPERATIONS] += 1


class Storm:
    """The judge: starts workers, kills them, and compares."""

    def __init__(self, name: str, kills: int, seed: int, variant: str) -> None:
        self.kills = kills
        self.variant = variant
        self.random = random.Random(seed)
        self.cache = shmcache.Cache(
            name, **VARIANTS[variant], cleanup_interval=0.2, lock_timeout=LONGEST_WAIT
        )
        words = memoryview(mmap.mmap(-1, 8 * Page.SIZE * WORKERS)).cast("Q")
        self.pages = [Page(words, slot) for slot in range(WORKERS)]
        self.pids = [0] * WORKERS
        self.shards = VARIANTS[variant]["shards"]
        self.doubtful = 0  # increments that were under way when the worker was killed

    def start(self, slot: int) -> None:
        seed = self.random.getrandbits(64)
        pid = os.fork()
        if pid:
            self.pids[slot] = pid
            return
        try:
            cache = self.cache
            if slot & 1:
                # It attaches by name, as unrelated processes do.
                cache = shmcache.Cache.attach(cache.name, lock_timeout=LONGEST_WAIT)
            Worker(cache, self.pages[slot], seed, self.variant).live()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(1)

    def inside(self) -> list[int]:
        """The worker that holds a lock at this moment, by one look at the holder
        words."""
        words = self.cache._attachment.words
        holders = [self.cache._words_of(s) + L.S_HOLDER for s in range(self.shards)]
        for _ in range(3_000):
            for at in holders:
                token = words[at]
                pid = token and self.cache._attachment.pid(token)
                if pid in self.pids:
                    return [self.pids.index(pid)]
        return []

    def kill(self, slots: list[int]) -> None:
        """Kill workers, at once if there are several."""
        for slot in slots:
            os.kill(self.pids[slot], signal.SIGKILL)
        for slot in slots:
            _, status = os.waitpid(self.pids[slot], 0)
            code = os.waitstatus_to_exitcode(status)
            if code != -signal.SIGKILL:
                raise Violation(f"worker {slot} had ended by itself: {code}")
            words = self.pages[slot].words
            in_doubt = words[Page.SHARED_INTENT] - words[Page.SHARED_DONE]
            self.doubtful += in_doubt
            words[Page.SHARED_INTENT] = words[Page.SHARED_DONE]

    def progress(self, slots: list[int]) -> None:
        """Wait until some workers have done some more operations."""
        before = [page.words[Page.OPERATIONS] for page in self.pages]
        deadline = time.monotonic() + PATIENCE
        for slot in slots:
            while self.pages[slot].words[Page.OPERATIONS] < before[slot] + 10:
                if time.monotonic() > deadline:
                    os.kill(self.pids[slot], signal.SIGABRT)  # shows where it is
                    raise Violation(f"worker {slot} hangs")
                pid, status = os.waitpid(self.pids[slot], os.WNOHANG)
                if pid:
                    raise Violation(f"worker {slot} has ended by itself: {status}")
                time.sleep(0.001)

    def compare(self) -> None:
        """With no worker alive, check that all acknowledged is there, and is sound."""
        findings = self.cache.check()
        if findings:
            raise Violation(f"check(): {findings}")
        for page in self.pages:
            Worker(self.cache, page, 0, self.variant).settle()
        done = sum(page.words[Page.SHARED_DONE] for page in self.pages)
        shared = self.cache.peek("shared", 0)
        if self.variant == ROOMY and not done <= shared <= done + self.doubtful:
            raise Violation(f"shared is {shared}, not {done} + up to {self.doubtful}")
        # Nobody writes now, so entries can only leave, when their time is over.
        before, met, after = len(self.cache), len(list(self.cache)), len(self.cache)
        if not after <= met <= before:
            raise Violation(f"{before} entries, then {after}, met {met}")

    def has_raged(self) -> bool:
        """Whether a worker has died inside, and a tight cache has been full."""
        stats = self.cache.stats()
        return stats.recoveries > 0 and (self.variant == ROOMY or stats.evicted > 0)

    def rage(self) -> dict[str, Any]:
        """Kill at least as often as requested, and return what happened."""
        everybody = list(range(WORKERS))
        for slot in everybody:
            self.start(slot)
        killed = since = 0
        while killed < self.kills or not self.has_raged():
            time.sleep(self.random.expovariate(1 / 0.003))
            number = self.random.choice([1, 1, 1, 1, 2, 3])
            slots = self.random.sample(everybody, number)
            if self.random.random() < 0.7:
                slots = self.inside() or slots
            self.kill(slots)
            killed += len(slots)
            since += len(slots)
            if since >= 200:
                since = 0
                rest = [slot for slot in everybody if slot not in slots]
                self.progress(rest)
                self.kill(rest)
                killed += len(rest)
                self.compare()
                slots = everybody
                faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
            for slot in slots:
                self.start(slot)
        self.progress(everybody)
        self.kill(everybody)
        self.compare()
        stats = self.cache.stats()
        self.cache.close()
        return {
            "kills": killed + WORKERS,
            "operations": sum(page.words[Page.OPERATIONS] for page in self.pages),
            "recoveries": stats.recoveries,
            "dropped": stats.dropped,
            "evicted": stats.evicted,
            "lock_timeouts": stats.lock_timeouts,
            "slowest_ms": max(page.words[Page.SLOWEST] for page in self.pages) / 1e6,
            "in_doubt": self.doubtful,
        }


def main() -> None:
    """Start a storm: name, kills, seed, variant."""
    name, kills, seed, variant = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    print(json.dumps(Storm(name, int(kills), int(seed), variant).rage()))


if __name__ == "__main__":
    main()
