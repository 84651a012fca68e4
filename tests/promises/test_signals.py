"""Promise 5: exceptions out of signal handlers, and calls inside them.

On the interpreted engine an exception strikes at every line, and at bytecodes; on both
engines timers strike at any moment.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
from amounts import EVERY_STRIKE, SIGNALS_THAT_CALL, SIGNALS_THAT_RAISE, offset
from caught import is_sound, shard_word
from crash_rig import SCENARIOS, Clock, Keys, Tracer
from peers import PATIENCE, Peer, finish, names_of, start

import shmcache
from shmcache import Cache
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process import lockfile as _lockfile
from shmcache._process.exit import leave_all

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from multiprocessing.connection import Connection
    from types import FrameType


# The files of the interpreted engine.
ENGINE = frozenset(map(str, Path(shmcache.__file__).parent.glob("_engine/*.py")))


class Strike(BaseException):
    """What a signal handler raises."""


class Striker:
    """A trace function that raises before the n-th line, or bytecode, of some files.

    A line is counted ``often`` times at most, as loops are long.
    """

    def __init__(
        self, n: int, what: str, files: Collection[str | None], often: int = sys.maxsize
    ) -> None:
        self.left = n
        self._what = what
        self._files = files
        self._often = often
        self._visits: Counter[tuple[str, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        """What sys.settrace wants."""
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = self._what == "opcode"
        if event == self._what:
            line = frame.f_code.co_filename, frame.f_lineno
            self._visits[line] += 1
            self.left -= self._visits[line] <= self._often
            if self.left == 0:
                self.left = -1
                raise Strike
        return self


class Stage:
    """A scenario's cache, which is set back to its beginning for each strike."""

    def __init__(
        self, name: str, make_cache: Callable[..., Cache], **settings: Any
    ) -> None:
        self.scenario = SCENARIOS[name]
        self.clock = Clock()
        self.cache = make_cache(
            **{**self.scenario.settings, **settings},
            cleanup_interval=300,
            lock_timeout=PATIENCE,
            clock=self.clock if self.scenario.timed else None,
        )
        self.keys = Keys(self.cache)
        self.scenario.fill(self.cache, self.clock, self.keys)
        self.cache._flush_recency()
        self.now = self.clock.ns
        attachment = self.cache._attachment
        self.header = _check.read_header(attachment.block.view)
        self.start = bytes(attachment.block.view[self.header.geometry.shards_at :])
        self.semaphore = posix_ipc.Semaphore(self.cache._names.semaphore(0))

    def restore(self) -> None:
        """The state in which the scenario begins."""
        view = self.cache._attachment.block.view
        view[self.header.geometry.shards_at :] = self.start
        self.cache._attachment.recency[2][0] = 0  # type: ignore[index]
        self.clock.ns = self.now

    def strike(self, n: int, what: str) -> bool:
        """Run the scenario up to the n-th line or bytecode; False if it has fewer."""
        self.restore()
        sys.settrace(Striker(n, what, ENGINE))
        try:
            self.scenario.act(self.cache, self.clock, self.keys)
        except Strike:
            return True
        finally:
            sys.settrace(None)
        return False

    def permits(self) -> int:
        """How many permits the semaphore has."""
        value: int = self.semaphore.value
        return value

    def content(self) -> dict[str, Any]:
        """What there is, by key."""
        return {key: self.cache.peek(key) for key in self.keys.all if key in self.cache}

    def findings(self) -> list[str]:
        """What the checker says of the shard."""
        stride = self.header.geometry.stride
        data = self.cache._copy_shard(0, 0, stride)
        return _check.check_shard(data, self.header, 0, quiescent=False)


interpreted_only = pytest.mark.skipif(
    shmcache.compiled, reason="compiled code has no bytecodes to be struck between"
)

# These at every line, the others at every eleventh: all of them would take minutes.
AT_EVERY_LINE = {
    "set_first",
    "overwrite",
    "insert_with_eviction",
    "get_that_moves",
    "get_expired",
    "delete_middle_of_chain",
    "incr",
}
OPERATIONS = sorted(SCENARIOS.keys() - {"attach", "count_and_close", "reap"})


def check_strikes(stage: Stage, numbers: Iterator[int], what: str) -> int:
    """Strike at these lines or bytecodes, look after each, and return how many there
    were."""
    stage.restore()
    before = stage.content()
    stage.restore()
    stage.scenario.act(stage.cache, stage.clock, stage.keys)
    after = stage.content()
    others = {key for key in before if before[key] == after.get(key)}
    count = 0
    for n in numbers:
        if not stage.strike(n, what):
            break
        count += 1
        assert shard_word(stage.cache, L.S_HOLDER) == 0, f"lock held after {what} {n}"
        # Waiters bring back a permit that was lost in the gap: see the next test.
        if stage.permits() == 0:
            stage.semaphore.release()
        assert stage.permits() == 1
        assert stage.findings() == [], f"after {what} {n}"
        for key, value in stage.content().items():
            assert value in (before.get(key), after.get(key)), f"after {what} {n}"
        assert others <= stage.content().keys(), f"after {what} {n}"
    stage.semaphore.close()
    return count


@pytest.mark.counted
@interpreted_only
@pytest.mark.parametrize("name", OPERATIONS)
def test_5_exception_at_any_line(make_cache: Callable[..., Cache], name: str) -> None:
    """An exception at any line of an operation leaves the lock free, the shard sound,
    and each entry as it was before or after the operation."""
    stage = Stage(name, make_cache)
    step = 1 if name in AT_EVERY_LINE else 31 if "repair" in name else 11
    first = 1 if step == 1 else 1 + OPERATIONS.index(name) % step
    if EVERY_STRIKE > 1:
        # The first one is near the beginning: some operations have few lines.
        first, step = 1 + offset(step, name), step * EVERY_STRIKE
    assert check_strikes(stage, itertools.count(first, step), "line") > 0


@pytest.mark.counted
@interpreted_only
@pytest.mark.parametrize("name", ["set_new", "get_of_the_latest", "pop"])
def test_5_exception_at_any_bytecode(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """An exception at any bytecode does as little harm as one at any line."""
    stage = Stage(name, make_cache)
    numbers = itertools.count(1 + offset(EVERY_STRIKE, name), 3 * EVERY_STRIKE)
    assert check_strikes(stage, numbers, "opcode") > 50 // EVERY_STRIKE


@pytest.mark.counted
@interpreted_only
def test_5_others_write_after_an_exception(make_cache: Callable[..., Cache]) -> None:
    """After an exception at any line of a write, another process can write although the
    struck process does nothing more."""
    stage = Stage("overwrite", make_cache)

    def body(link: Connection) -> None:
        mine = Cache.attach(stage.cache.name, lock_timeout=PATIENCE)
        link.send("in")
        while (n := link.recv()) is not None:
            mine["other"] = n
            link.send((mine["other"], mine.check()))
        mine.close()

    peer = Peer(body)
    assert peer.hear() == "in"
    for n in itertools.count(1 + offset(EVERY_STRIKE, "others"), EVERY_STRIKE):
        if not stage.strike(n, "line"):
            break
        peer.say(n)
        assert peer.hear() == (n, [])
    assert n > 50
    peer.say(None)
    peer.end()
    stage.semaphore.close()


def come_and_go(cache: Cache) -> None:
    """What a process does that uses a cache once."""
    with cache:
        cache["k"] = 1


def reap_and_go(name: str) -> None:
    """A process attaches, reaps dead workers, and leaves."""
    with Cache.attach(name) as cache:
        cache._attachment.reap()


def unlink_and_go(name: str) -> None:
    """What a process does that wants to start anew."""
    with Cache.attach(name) as cache:
        cache.unlink()


def die_attached(name: str) -> None:
    """Leave the row of a worker that was killed."""

    def attach_and_die(_: Connection) -> None:
        Cache.attach(name)
        os.kill(os.getpid(), signal.SIGKILL)

    Peer(attach_and_die).end(-signal.SIGKILL)


# What is struck, and whether the cache is there before.
MEMBERSHIP: dict[str, tuple[Callable[[str], object], bool]] = {
    "create": (lambda name: come_and_go(Cache(name, max_entries=10)), False),
    "warm": (lambda name: come_and_go(Cache(name, **PERSISTENT)), False),
    "attach": (lambda name: come_and_go(Cache.attach(name)), True),
    "reap": (reap_and_go, True),
    "unlink": (unlink_and_go, True),
}
PERSISTENT: dict[str, Any] = {"max_entries": 10, "persist": True}


@pytest.mark.slow
@pytest.mark.counted
@pytest.mark.once
@pytest.mark.parametrize("what", MEMBERSHIP)
def test_5_exception_while_coming_or_going(
    name: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An exception at any line of creating, attaching, reaping, leaving or removing
    does no harm: others attach and leave although the struck process does nothing
    more; it can try again; and when it ends nothing of it is left."""
    act, there = MEMBERSHIP[what]
    home = Path(shmcache.__file__).parent
    files = {str(home / file) for file in Tracer.FILES - {"cache.py"}}
    monkeypatch.setattr(_lockfile, "ADMIN_TIMEOUT", 5.0)

    def body(link: Connection) -> None:
        while numbered := link.recv():
            signal.alarm(PATIENCE)  # for each line anew: there are hundreds
            n, now = numbered
            sys.settrace(Striker(n, "line", files, 2))
            try:
                act(now)
                struck = False
            except Strike:
                struck = True
            finally:
                sys.settrace(None)
            link.send(struck)
            link.recv()
            with Cache(now, max_entries=10, persist=what == "warm") as again:
                again["again"] = n
                assert again.check() == []
            del again
            leave_all()
            link.send("gone")

    peer = Peer(body)
    for n in itertools.count(1 + offset(EVERY_STRIKE, what), EVERY_STRIKE):
        now = f"{name}-{n}"
        if what == "warm":
            Cache(now, **PERSISTENT).close()
        cache = Cache(now, max_entries=10) if there else None
        if what == "reap":
            die_attached(now)
        peer.say((n, now))
        struck = peer.hear()
        with Cache(now, max_entries=10, persist=what == "warm") as other:
            other["other"] = n
            assert other.check() == [], f"line {n}"
            peer.say()
            assert peer.hear() == "gone", f"line {n}"
            assert other["other"] == n, f"line {n}"
            if what == "warm":
                other.unlink()
        if cache:
            cache.close()
        assert names_of(now) == [], f"line {n}"
        if not struck:
            break
    assert n > 50
    peer.say(None)
    peer.end()


SIGNALS = """
import itertools, logging, random, signal, sys
from shmcache import Cache, ReentrantCall

class Strike(BaseException):
    pass

def strike(*_):
    raise Strike

logging.disable()
what, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache = Cache.attach(name, lock_timeout=60)
cache["there"] = "value"
random.seed(rounds)

def operate(n):
    key = f"key {n % 40}"
    cache[key] = key * (n % 50)
    cache.get(f"key {n % 37}")
    cache.incr("number", initial=0)
    cache.set("mortal", n, ttl=0.001)
    cache.delete(f"key {n % 11}")
    cache.pop(f"key {n % 13}", None)
    cache.get_many(["there", key])
    if n % 10 == 0:
        len(cache), list(cache)

done = 0
if what == "raises":
    signal.signal(signal.SIGALRM, strike)
    for n in range(rounds):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-3))
            for m in itertools.count(n):
                operate(m)
        except Strike:
            done += 1
            # Others must be able to go on although this process does nothing more.
            holder = cache._attachment.words[cache._words_of(0) + 1]
            assert holder != cache._attachment.token, n
        if n < rounds - 1:
            operate(n)
    assert done == rounds
else:
    answers = {"worked": 0, "refused": 0}

    def use(*_):
        try:
            cache["handler"] = cache.get("there")
            cache.incr("calls", initial=0)
            assert cache["handler"] == "value"
            answers["worked"] += 1
        except ReentrantCall:
            answers["refused"] += 1

    signal.signal(signal.SIGALRM, use)
    n = 0
    for done in range(rounds):
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-3))
        while sum(answers.values()) <= done:
            operate(n)
            n += 1
    print(answers["worked"] > 0, answers["refused"])
print("end", flush=True)
sys.stdin.read()
"""


@pytest.mark.counted
def test_5_handlers_that_raise(make_cache: Callable[..., Cache]) -> None:
    """A process that is struck by many exceptions from a signal handler, at any moment,
    and then does nothing, leaves a cache that others can use."""
    cache = make_cache(max_entries=30, max_bytes=16_384, cleanup_interval=300)
    process = start(SIGNALS, "raises", cache.name, str(SIGNALS_THAT_RAISE))
    assert process.stdout.readline() == "end\n", finish(process)
    is_sound(cache)
    assert cache.stats().lock_timeouts == 0
    finish(process)
    is_sound(cache)


@pytest.mark.counted
def test_5_handler_that_uses_the_cache(make_cache: Callable[..., Cache]) -> None:
    """A signal handler may use the cache that it interrupts: compiled, always;
    interpreted, it gets ReentrantCall when it may not. There is never a deadlock."""
    cache = make_cache(max_entries=100, max_bytes=65_536, cleanup_interval=300)
    process = start(SIGNALS, "uses", cache.name, str(SIGNALS_THAT_CALL))
    answer = process.stdout.readline() or finish(process)
    worked, refused = answer.split()
    assert worked == "True"
    if shmcache.compiled:
        assert refused == "0"
    assert process.stdout.readline() == "end\n"
    is_sound(cache)
    finish(process)
    stats = cache.stats()
    assert (0, 0) == (stats.lock_timeouts, stats.dropped)
