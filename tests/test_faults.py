"""Faults that are not deaths at a certain store: one section for each promise.

2 stopped processes, 3 who is alive, 4 fork, 5 exceptions out of signal handlers,
6 creation, 7 memory, 8 foreign and damaged files, 9 leaks, 10 warm restart, 11 code
from the segment, 12 fairness.  A test's name begins with the number.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

import posix_ipc
import psutil
import pytest
from crash_rig import SCENARIOS, Clock, Keys
from test_processes import PATIENCE, SHM, Peer, finish, names_of, run, run_and_end, start

import shmcache
from shmcache import (
    Cache,
    LockTimeout,
    OutOfSharedMemory,
    ReentrantCall,
    SegmentCorrupt,
    SegmentNotFound,
    SegmentRefused,
    _check,
    _segment,
    _workers,
)
from shmcache import _layout as L
from shmcache._slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from types import FrameType

HOLDER = "holder"

# --- processes caught inside the write section ----------------------------------

# Writing so much takes long enough to be stopped in the midst of it.
BIG = 4 << 20
ROOMY: dict[str, Any] = {
    "max_entries": 50,
    "max_bytes": 4 * BIG,
    "shards": 1,
    "cleanup_interval": 300,
}


def writes(cache: Cache, link: Connection) -> None:
    """Overwrites an entry until it is told to end."""
    data = itertools.cycle([b"a" * BIG, b"b" * BIG])
    while not link.poll(0):
        cache["big"] = next(data)


def shard_word(cache: Cache, word: int, shard: int = 0) -> int:
    """A word of a shard, read without the lock."""
    return cache._attachment.words[cache._words_of(shard) + word]


def stop_inside(cache: Cache, pid: int, token: int) -> None:
    """Stop a process that writes, at a moment at which it is in the write section."""
    deadline = time.monotonic() + PATIENCE
    random = Random(token)
    process = psutil.Process(pid)
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.0001)
        if (
            shard_word(cache, L.S_HOLDER) == token
            and shard_word(cache, L.S_EPOCH) & 1 == 1
        ):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.002))
    raise TimeoutError(f"process {pid} was never caught inside")


def token_of(cache: Cache, pid: int) -> int:
    """The token of a worker, by the PID that it wrote down."""
    attachment = cache._attachment
    [token] = [t for t in attachment.tokens() if attachment.pid(t) == pid]
    return token


class Writer(Peer):
    """A process that overwrites "big" all the time."""

    def __init__(self, cache: Cache) -> None:
        name = cache.name

        def body(link: Connection) -> None:
            mine = Cache.attach(name)
            mine["big"] = b""
            link.send(mine._attachment.token)
            writes(mine, link)
            mine.close()

        super().__init__(body)
        self.token: int = self.hear()


def is_sound(cache: Cache) -> None:
    """The cache works here and for a newcomer, and the checker finds nothing."""
    cache["sound"] = "yes"
    assert cache.check() == []
    assert run("import sys; from shmcache import Cache\n"
               "cache = Cache.attach(sys.argv[1])\n"
               "cache['newcomer'] = cache['sound']\n"
               "cache.close()", cache.name) == ""
    assert cache["newcomer"] == "yes"


# --- 2. a stopped process is not robbed -----------------------------------------


def test_2_stopped_process_is_not_robbed(make_cache: Callable[..., Cache]) -> None:
    """While a process is stopped in the write section, writes elsewhere end in
    LockTimeout that names it, hits and misses are answered; then it goes on."""
    cache = make_cache(**ROOMY, lock_timeout=0.2)
    cache["there"] = "value"
    cache.set("mortal", "value", ttl=1000)
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    for write in (
        lambda: cache.set("there", "other"),
        lambda: cache.delete("there"),
        lambda: cache.incr("number", initial=0),
        lambda: cache.touch("there"),
        lambda: cache.add("absent", 1),
        cache.popitem,
        cache.clear,
    ):
        with pytest.raises(LockTimeout, match=f"process {writer.pid}, which lives"):
            write()
    assert cache["there"] == cache.get("mortal") == "value"
    assert cache.get_many(["there", "absent"]) == {"there": "value"}
    assert "there" in cache
    assert cache.get("absent") is None
    assert "absent" not in cache
    # A newcomer can come, read and leave.
    reader = Peer(lambda link: link.send(Cache.attach(cache.name).get("there")))
    assert reader.hear() == "value"
    reader.end()
    assert shard_word(cache, L.S_HOLDER) == writer.token
    os.kill(writer.pid, signal.SIGCONT)
    writer.say("end")
    writer.end()
    is_sound(cache)
    assert len(cache["big"]) == BIG
    stats = cache.stats()
    assert stats.lock_timeouts >= 7
    assert (0, 0) == (stats.recoveries, stats.dropped)


def test_2_stopped_process_that_is_killed_is_robbed(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as a stopped process dies, a write that waits for it goes through, and
    the log says who died."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    turns = shard_word(cache, L.S_TURNS)

    def wait_and_write(link: Connection) -> None:
        mine = Cache.attach(cache.name, lock_timeout=PATIENCE)
        link.send("waiting")
        mine["waited"] = "yes"
        mine.close()

    waiter = Peer(wait_and_write)
    assert waiter.hear() == "waiting"
    time.sleep(0.1)  # several looks; if the waiter robs, here it does
    assert turns == shard_word(cache, L.S_TURNS)
    with caplog.at_level(logging.WARNING, "shmcache"):
        writer.kill()
        waiter.end()
        is_sound(cache)
    assert (cache["there"], cache["waited"]) == ("value", "yes")
    assert cache.stats().recoveries == 1


# --- 3. liveness ----------------------------------------------------------------


def takes_over(cache: Cache, log: pytest.LogCaptureFixture) -> str:
    """What the log says when the next write takes the lock over from a dead holder."""
    log.clear()
    before = cache.stats().recoveries
    with log.at_level(logging.WARNING, "shmcache"):
        cache["after"] = "death"
    assert before + 1 == cache.stats().recoveries
    assert cache["there"] == "value"
    [record] = log.records
    return record.getMessage()


@pytest.mark.parametrize("owner", ["ours", "another's"])
def test_3_zombie_holder_is_dead(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture, owner: str
) -> None:
    """A holder that was killed, and that its parent has not waited for, is dead,
    whoever its parent is."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    if owner == "ours":
        parent, pid = None, os.fork()
        if pid == 0:
            write_for_ever(cache.name)
    else:

        def have_a_child(link: Connection) -> None:
            pid = os.fork()
            if pid == 0:
                write_for_ever(cache.name)
            link.send(pid)
            link.recv()
            os.waitpid(pid, 0)

        parent = Peer(have_a_child)
        pid = parent.hear()
    token = token_when_there(cache, pid)
    stop_inside(cache, pid, token)
    os.kill(pid, signal.SIGKILL)
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert f"process {pid} died holding its lock" in takes_over(cache, caplog)
    assert process.status() == psutil.STATUS_ZOMBIE
    if parent:
        parent.say()
        parent.end()
    else:
        os.waitpid(pid, 0)
    is_sound(cache)


def write_for_ever(name: str) -> NoReturn:
    """What a forked process does until it is killed."""
    try:
        signal.alarm(PATIENCE)
        cache = Cache.attach(name)
        data = itertools.cycle([b"a" * BIG, b"b" * BIG])
        while True:
            cache["big"] = next(data)
    finally:
        os._exit(1)


def token_when_there(cache: Cache, pid: int) -> int:
    """The token of a worker that is about to attach."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(ValueError):
            return token_of(cache, pid)
        time.sleep(0.001)
    raise TimeoutError(f"process {pid} did not attach")


def test_3_reused_pid_does_not_revive_a_dead_holder(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """A dead holder stays dead although another process has its PID now."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    row = L.ROWS_AT + ((writer.token & 0xFFFF) - 1) * L.ROW_SIZE
    cache._attachment.words[row // 8 + L.R_PID] = os.getpid()
    writer.kill()
    assert f"process {os.getpid()} died" in takes_over(cache, caplog)
    is_sound(cache)


def test_3_row_handed_on_does_not_revive_a_dead_holder(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """A dead holder stays dead although a living process has its worker row now."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    writer.kill()
    cache._attachment.reap()

    def take_row(link: Connection) -> None:
        mine = Cache.attach(cache.name)
        link.send(mine._attachment.token)
        link.recv()
        mine.close()

    heir = Peer(take_row)
    token = heir.hear()
    assert token != writer.token
    assert token & 0xFFFF == writer.token & 0xFFFF
    assert "process unknown died holding its lock" in takes_over(cache, caplog)
    heir.say()
    heir.end()
    is_sound(cache)


def may(*command: str) -> bool:
    """Whether a command of unshare is permitted here."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", *command, "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


needs_pid_namespaces = pytest.mark.skipif(
    not may("--pid", "--fork"), reason="no right to make a PID namespace"
)
needs_mounts = pytest.mark.skipif(
    not may("--mount"), reason="no right to make a mount namespace"
)

IN_NAMESPACE = """
import itertools, os, sys
from shmcache import Cache, LockTimeout

cache = Cache.attach(sys.argv[1], lock_timeout=float(sys.argv[2]))
print(os.getpid(), cache._attachment.token, flush=True)
if sys.argv[3] == "writes":
    data = itertools.cycle([b"a" * (4 << 20), b"b" * (4 << 20)])
    while True:
        cache["big"] = next(data)
for line in sys.stdin:
    try:
        cache["other"] = line.strip()
        print("written", cache.stats().recoveries, flush=True)
    except LockTimeout as error:
        print(error, flush=True)
cache.close()
"""


@contextmanager
def contained(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process in a PID namespace of its own, its PID out here, and its token."""
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c",
         IN_NAMESPACE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            pid, token = map(int, process.stdout.readline().split())
            assert pid == 1
            [inside] = psutil.Process(process.pid).children()
            yield process, inside.pid, token
        finally:
            process.kill()


@needs_pid_namespaces
def test_3_two_pid_namespaces(make_cache: Callable[..., Cache]) -> None:
    """Processes in two PID namespaces, both of PID 1, see of each other whether they
    live: a stopped holder is waited for, a killed one is taken over from."""
    cache = make_cache(**ROOMY)
    cache["there"] = "value"
    with (
        contained(cache.name, "60", "writes") as (_, pid, token),
        contained(cache.name, "0.3", "waits") as (waiter, _, _),
    ):
        assert cache.stats().workers == 3
        stop_inside(cache, pid, token)
        assert waiter.stdin
        assert waiter.stdout
        print("1", file=waiter.stdin, flush=True)
        assert "it is held by process 1, which lives" in waiter.stdout.readline()
        assert shard_word(cache, L.S_HOLDER) == token
        os.kill(pid, signal.SIGKILL)
        for n in itertools.count(2):
            print(n, file=waiter.stdin, flush=True)
            answer = waiter.stdout.readline()
            if "which lives" not in answer:  # until the kernel has done its part
                break
        assert answer == "written 1\n"
        assert cache["other"] == str(n)
        waiter.stdin.close()
        assert waiter.wait(PATIENCE) == 0
    is_sound(cache)


# --- 4. fork --------------------------------------------------------------------


def test_4_death_of_a_holder_is_noticed_although_its_child_lives(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """A child that inherited everything does not keep its dead parent alive."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    name = cache.name

    def body(link: Connection) -> None:
        mine = Cache.attach(name)
        mine["big"] = b""
        child = os.fork()
        if child == 0:
            run_and_end(signal.pause)
        link.send((mine._attachment.token, child))
        writes(mine, link)

    parent = Peer(body)
    token, child = parent.hear()
    stop_inside(cache, parent.pid, token)
    parent.kill()
    assert f"process {parent.pid} died" in takes_over(cache, caplog)
    assert psutil.Process(child).status() == psutil.STATUS_SLEEPING
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)  # an orphan of our child is ours
    is_sound(cache)


# --- 5. exceptions out of signal handlers ---------------------------------------


class Strike(BaseException):
    """What a signal handler raises."""


class Striker:
    """A trace function that raises before the n-th line, or bytecode, of the engine."""

    def __init__(self, n: int, what: str) -> None:
        self.left = n
        self._what = what
        self._file = inspect.getsourcefile(Slab)

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        """What sys.settrace wants."""
        if frame.f_code.co_filename != self._file:
            return None
        frame.f_trace_opcodes = self._what == "opcode"
        if event == self._what:
            self.left -= 1
            if self.left == 0:
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
        self.cache._flush_touches()
        self.now = self.clock.ns
        attachment = self.cache._attachment
        self.header = _check.read_header(attachment.block.view)
        self.start = bytes(attachment.block.view[self.header.geometry.shards_at :])
        self.semaphore = posix_ipc.Semaphore(self.cache._names.semaphore(0))

    def restore(self) -> None:
        """The state in which the scenario begins."""
        view = self.cache._attachment.block.view
        view[self.header.geometry.shards_at :] = self.start
        self.cache._attachment.touches[2][0] = 0  # type: ignore[index]
        self.clock.ns = self.now

    def strike(self, n: int, what: str) -> bool:
        """Run the scenario up to the n-th line or bytecode; False if it has fewer."""
        self.restore()
        sys.settrace(Striker(n, what))
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
        data = self.cache._snapshot(0, 0, stride)
        return _check.check_shard(data, self.header, 0, quiescent=False)


interpreted_only = pytest.mark.skipif(
    shmcache.compiled, reason="compiled code has no bytecodes to be struck between"
)

# These at every line, the others at every seventh: a list of all would take minutes.
AT_EVERY_LINE = {
    "set_first",
    "overwrite",
    "insert_with_eviction",
    "get_that_moves",
    "get_expired",
    "delete_middle_of_chain",
    "incr",
    "repair",
}
OPERATIONS = sorted(SCENARIOS.keys() - {"attach", "count_and_close", "reap"})


def check_strikes(stage: Stage, numbers: Iterator[int], what: str) -> int:
    """Strike at these lines or bytecodes, look after each; how many there were."""
    stage.restore()
    before = stage.content()
    stage.restore()
    stage.scenario.act(stage.cache, stage.clock, stage.keys)
    after = stage.content()
    count = 0
    for n in numbers:
        if not stage.strike(n, what):
            break
        count += 1
        assert shard_word(stage.cache, L.S_HOLDER) == 0, f"lock held after {what} {n}"
        # A permit lost in the gap comes back by those who wait: see the next test.
        if stage.permits() == 0:
            stage.semaphore.release()
        assert stage.permits() == 1
        assert stage.findings() == [], f"after {what} {n}"
        for key, value in stage.content().items():
            assert value in (before.get(key), after.get(key)), f"after {what} {n}"
        lost = before.keys() & after.keys() - stage.content().keys()
        assert not lost, f"after {what} {n}"
    stage.semaphore.close()
    return count


@interpreted_only
@pytest.mark.parametrize("name", OPERATIONS)
def test_5_exception_at_any_line(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """An exception at any line of an operation leaves the lock free, the shard sound,
    and of each entry what was there before or after the operation."""
    stage = Stage(name, make_cache)
    step = 1 if name in AT_EVERY_LINE else 7
    first = 1 if step == 1 else 1 + OPERATIONS.index(name) % step
    assert check_strikes(stage, itertools.count(first, step), "line") > 0


@interpreted_only
@pytest.mark.parametrize("name", ["set_new", "get_of_the_latest", "pop"])
def test_5_exception_at_any_bytecode(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """An exception at any bytecode does as little harm as one at any line."""
    stage = Stage(name, make_cache)
    assert check_strikes(stage, itertools.count(1, 3), "opcode") > 50


@interpreted_only
def test_5_others_write_after_an_exception(make_cache: Callable[..., Cache]) -> None:
    """After an exception at any line of a write, another process can write although
    the one that was struck does nothing more."""
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
    for n in itertools.count(1):
        if not stage.strike(n, "line"):
            break
        peer.say(n)
        assert peer.hear() == (n, [])
    assert n > 50
    peer.say(None)
    peer.end()
    stage.semaphore.close()


SIGNALS = """
import itertools, random, signal, sys, time
from shmcache import Cache, ReentrantCall

class Strike(BaseException):
    pass

def strike(*_):
    raise Strike

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
            # The process does nothing: others must go on.  It is they who tell.
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
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    for n in itertools.count():
        operate(n)
        if sum(answers.values()) >= rounds:
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(answers["worked"] > 0, answers["refused"])
print("end", flush=True)
sys.stdin.read()
"""


def test_5_handlers_that_raise(make_cache: Callable[..., Cache]) -> None:
    """A process that is struck by hundreds of exceptions out of a signal handler, at
    any point of time, and then does nothing, leaves a cache that others can use."""
    cache = make_cache(max_entries=30, max_bytes=16_384, cleanup_interval=300)
    process = start(SIGNALS, "raises", cache.name, "400")
    assert process.stdout.readline() == "end\n"
    is_sound(cache)
    assert cache.stats().lock_timeouts == 0
    finish(process)
    is_sound(cache)


def test_5_handler_that_uses_the_cache(make_cache: Callable[..., Cache]) -> None:
    """A signal handler may use the cache that it interrupts: compiled, always;
    interpreted, it is told when it may not; never is there a deadlock."""
    cache = make_cache(max_entries=100, max_bytes=65_536, cleanup_interval=300)
    process = start(SIGNALS, "uses", cache.name, "500")
    worked, refused = process.stdout.readline().split()
    assert worked == "True"
    if shmcache.compiled:
        assert refused == "0"
    assert process.stdout.readline() == "end\n"
    is_sound(cache)
    finish(process)
    stats = cache.stats()
    assert (0, 0) == (stats.lock_timeouts, stats.dropped)
