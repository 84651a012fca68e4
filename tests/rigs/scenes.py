"""Scenes: a cache in the state in which a scenario of crash_rig.py begins.

A test orders a zygote to fork a child that dies, or is stopped, right before its n-th
step, and looks at what the child left.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import crash_rig
import posix_ipc
from crash_rig import SCENARIOS, Clock, Keys

from shmcache._format import layout as L

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator

    import pytest

    import shmcache

ABSENT = "absent"
FOR_EVER = 1_000_000
# A death must not make anybody wait longer than this; otherwise LockTimeout is raised.
LONGEST_WAIT = 1.0

WORKERS = ("attach", "count_and_close", "reap")
OPERATIONS = [name for name in SCENARIOS if name not in WORKERS]


class Answer(NamedTuple):
    """How a child ended that was ordered to die, or that it was stopped."""

    pid: int
    code: int
    steps: int
    token: int
    stopped: bool


class Zygote:
    """The process from which the children that die are forked."""

    def __init__(self, process: subprocess.Popen[str], clock: Clock) -> None:
        self._process = process
        self._clock = clock

    def order(self, scenario: str, steps: int) -> Answer:
        """Have a child run a scenario, and die right before the step of a number."""
        words = {"scenario": scenario, "steps": steps, "now": self._clock.ns}
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return Answer(**self._read())

    def stop(self, scenario: str, steps: int) -> Answer:
        """Have a child run a scenario, and stop right before the step of a number.

        ``end_stopped`` must follow, unless the child ended before that step.
        """
        words = {"scenario": scenario, "steps": steps, "now": self._clock.ns}
        order = json.dumps({**words, "stop": True})
        print(order, file=self._process.stdin, flush=True)
        return Answer(**self._read())

    def end_stopped(self, number: signal.Signals) -> Answer:
        """Send SIGCONT or SIGKILL to the stopped child, and wait for its end."""
        order = json.dumps({"signal": int(number)})
        print(order, file=self._process.stdin, flush=True)
        return Answer(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    @classmethod
    @contextmanager
    def of(
        cls, cache: str, clock: Clock, mode: str, env: dict[str, str]
    ) -> Iterator[Self]:
        """A zygote for a cache.

        In the modes "timed" (by the scenario's clock) and "real" (by the system's) it
        is attached to it and leaves at the end; in mode "life" its children come by
        themselves.
        """
        rig = Path(crash_rig.__file__)
        command = [sys.executable, str(rig), cache, mode]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        ) as process:
            zygote = cls(process, clock)
            zygote._read()
            yield zygote
            assert process.stdin
            process.stdin.close()
            assert process.wait(60) == 0


class Scene:
    """A cache in the state in which a scenario begins, over and over again."""

    def __init__(
        self,
        name: str,
        make_cache: Callable[..., shmcache.Cache],
        log: pytest.LogCaptureFixture,
    ) -> None:
        self.name = name
        self.scenario = SCENARIOS[name]
        self.clock = Clock()
        self.cache = make_cache(
            **self.scenario.settings,
            cleanup_interval=300,
            lock_timeout=LONGEST_WAIT,
            clock=self.clock if self.scenario.timed else None,
        )
        self.log = log
        log.set_level(logging.WARNING, "shmcache")
        self.keys = Keys(self.cache)
        self.scenario.fill(self.cache, self.clock, self.keys)
        self.cache._flush_recency()
        self._now = self.clock.ns
        self.attachment = self.cache._attachment
        self._geometry = self.attachment.header.geometry
        self._start = bytes(self.attachment.block.view[self._geometry.shards_at :])
        self.entries = self.word(L.S_ENTRIES)
        self.before = self.content()
        self.before_left = self.times_left()
        self.before_order = self.order_of_use()
        self.restore()

    def zygote(self, env: dict[str, str]) -> AbstractContextManager[Zygote]:
        """A zygote that is attached to the cache."""
        mode = "timed" if self.scenario.timed else "real"
        return Zygote.of(self.cache.name, self.clock, mode, env)

    def restore(self) -> None:
        """The shard as it was at first; nobody is inside."""
        assert self.permits() == 1
        self.clock.ns = self._now
        self.attachment.block.view[self._geometry.shards_at :] = self._start
        self.log.clear()

    def permits(self) -> int:
        """The value of the shard's semaphore."""
        semaphore = posix_ipc.Semaphore(self.cache._names.semaphore(0))
        value: int = semaphore.value
        semaphore.close()
        return value

    def word(self, number: int) -> int:
        """A word of the shard."""
        return self.attachment.words[self._geometry.shards_at // 8 + number]

    def content(self) -> dict[str, Any]:
        """The value of each key, without leaving a mark."""
        return {key: self.cache.peek(key, ABSENT) for key in self.keys.all}

    def times_left(self) -> dict[str, Any]:
        """How long each key has to live; by a clock that moves, whether for ever."""
        left: dict[str, Any] = {}
        for key in self.keys.all:
            try:
                left[key] = self.cache.ttl(key)
            except KeyError:
                left[key] = ABSENT
            if not self.scenario.timed and left[key] not in (None, ABSENT):
                left[key] = "some time"
        return left

    def order_of_use(self) -> list[int]:
        """Live slots, the latest used first, read from the bytes.

        The slots of entries that an operation does not write stay the same.
        """
        buffer = self.attachment.block.view
        at = self._geometry.shards_at + self._geometry.records_at
        records = buffer[at : at + L.RECORD * (self._geometry.slots + 1)].cast("I")
        found, slot = [], records[L.F_LRU_NEXT]
        while slot:
            found.append(slot)
            slot = records[slot * L.RECORD_WORDS + L.F_LRU_NEXT]
        # The next holder of the lock moves this one to the front before all else.
        late = self.word(L.S_LATE_USE)
        return [late, *(slot for slot in found if slot != late)] if late else found

    def exercise(self) -> None:
        """Use every list of the shard: fill, evict, overwrite, expire, remove."""
        cache = self.cache
        for number in range(12):
            cache.set(f"more {number}", b"m" * (40 * number), ttl=900)
            cache.incr("count", initial=0)
        for key in self.keys.all:
            cache.touch(key, ttl=1000)
            cache.get(key)
        assert cache.popitem()
        cache.delete("count")
        self.clock.ns += 2_000_000_000_000
        cache.sweep()
        cache["last"] = b"l" * 64 * 20
        assert cache.peek("last") == b"l" * 64 * 20
        cache.clear()
        assert len(cache) == 0


def either(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    """The values that each key may have: the old or the new one, or none if they
    differ."""
    return {
        key: [old, after[key]] + [ABSENT] * (old != after[key])
        for key, old in before.items()
    }
