"""Faults that are not deaths at a certain store: one section for each promise.

2 stopped processes, 3 who is alive, 4 fork, 5 exceptions out of signal handlers,
6 creation, 7 memory, 8 foreign and damaged files, 9 leaks, 10 warm restart, 11 code
from the segment, 12 fairness.  A test's name begins with the number.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

import posix_ipc
import psutil
import pytest
from amounts import (
    CREATIONS_WITH_KILLS,
    EVERY_STRIKE,
    FAIRNESS_SECONDS,
    SIGNALS_THAT_CALL,
    SIGNALS_THAT_RAISE,
    SPARE_PERMITS,
    offset,
)
from crash_rig import SCENARIOS, Clock, Keys
from peers import (
    PATIENCE,
    SHM,
    Peer,
    finish,
    names_of,
    run,
    run_and_end,
    start,
)

import shmcache
from shmcache import (
    Cache,
    ConfigMismatch,
    LockTimeout,
    SegmentCorrupt,
    SegmentRefused,
)
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process import attachment as _workers
from shmcache._segment import block as _block
from shmcache._segment import create as _segment

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from multiprocessing.connection import Connection
    from types import FrameType

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
            and shard_word(cache, L.S_SEQ) & 1 == 1
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
    assert (
        run(
            "import sys; from shmcache import Cache\n"
            "cache = Cache.attach(sys.argv[1])\n"
            "cache['newcomer'] = cache['sound']\n"
            "cache.close()",
            cache.name,
        )
        == ""
    )
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
    turns = shard_word(cache, L.S_ACQUISITIONS)

    def wait_and_write(link: Connection) -> None:
        mine = Cache.attach(cache.name, lock_timeout=PATIENCE)
        link.send("waiting")
        mine["waited"] = "yes"
        mine.close()

    waiter = Peer(wait_and_write)
    assert waiter.hear() == "waiting"
    time.sleep(0.1)  # several looks; if the waiter robs, here it does
    assert turns == shard_word(cache, L.S_ACQUISITIONS)
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
    attachment = cache._attachment
    assert attachment.reap() == 0  # for the one who takes over to say who died
    with _workers.mutex(), attachment.admin():
        attachment._fold((writer.token & 0xFFFF) - 1)  # a reaper that looked too early

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
        [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            sys.executable,
            "-c",
            IN_NAMESPACE,
            *arguments,
        ],
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


def test_4_orphan_lives_on_in_the_cache_that_followed(name: str) -> None:
    """A child whose parent was killed, who joins the cache that others have made in
    place of theirs and then closes the old one, is alive in the eyes of the others."""

    def be_killed(link: Connection) -> None:
        old = Cache(name, max_entries=10)
        old["old"] = 1

        def join_anew(_: Connection) -> None:
            link.recv()
            new = Cache(name, max_entries=10)
            old.close()
            link.send(new._attachment.token)
            link.recv()
            new["new"] = 2
            new.close()

        link.send(Peer(join_anew).pid)
        signal.pause()

    parent = Peer(be_killed)
    child = parent.hear()
    os.kill(parent.pid, signal.SIGKILL)
    os.waitpid(parent.pid, 0)
    with Cache(name, max_entries=10) as cache:
        assert len(cache) == 0
        parent.say()
        token = parent.hear()
        assert (True, child) == (
            cache._attachment.alive(token),
            cache._attachment.pid(token),
        )
        parent.say()
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert cache["new"] == 2
        assert cache.check() == []
    parent.link.close()
    assert names_of(name) == []


# --- 5. exceptions out of signal handlers ---------------------------------------


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
        self.cache._attachment.touches[2][0] = 0  # type: ignore[index]
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
    """Strike at these lines or bytecodes, look after each; how many there were."""
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
        # A permit lost in the gap comes back by those who wait: see the next test.
        if stage.permits() == 0:
            stage.semaphore.release()
        assert stage.permits() == 1
        assert stage.findings() == [], f"after {what} {n}"
        for key, value in stage.content().items():
            assert value in (before.get(key), after.get(key)), f"after {what} {n}"
        assert others <= stage.content().keys(), f"after {what} {n}"
    stage.semaphore.close()
    return count


@interpreted_only
@pytest.mark.parametrize("name", OPERATIONS)
def test_5_exception_at_any_line(make_cache: Callable[..., Cache], name: str) -> None:
    """An exception at any line of an operation leaves the lock free, the shard sound,
    and of each entry what was there before or after the operation."""
    stage = Stage(name, make_cache)
    step = 1 if name in AT_EVERY_LINE else 31 if "repair" in name else 11
    first = 1 if step == 1 else 1 + OPERATIONS.index(name) % step
    if EVERY_STRIKE > 1:
        first, step = 1 + offset(step * EVERY_STRIKE, name), step * EVERY_STRIKE
    assert check_strikes(stage, itertools.count(first, step), "line") > 0


@interpreted_only
@pytest.mark.parametrize("name", ["set_new", "get_of_the_latest", "pop"])
def test_5_exception_at_any_bytecode(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """An exception at any bytecode does as little harm as one at any line."""
    stage = Stage(name, make_cache)
    numbers = itertools.count(1 + offset(EVERY_STRIKE, name), 3 * EVERY_STRIKE)
    assert check_strikes(stage, numbers, "opcode") > 50 // EVERY_STRIKE


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
    """What a process does that notices deaths."""
    with Cache.attach(name) as cache:
        cache._attachment.reap()


def unlink_and_go(name: str) -> None:
    """What a process does that wants to start anew."""
    with Cache.attach(name) as cache:
        cache.unlink()


def die_attached(name: str) -> None:
    """A worker that was killed has left its row."""

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


@pytest.mark.once
@pytest.mark.parametrize("what", MEMBERSHIP)
def test_5_exception_while_coming_or_going(
    name: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An exception at any line of creating, attaching, reaping, leaving or removing
    hinders nobody: others come and go although the process that was struck does
    nothing more, it can try again, and when it ends nothing is left of it."""
    act, there = MEMBERSHIP[what]
    files = {module.__file__ for module in (_workers, _segment, _block)}
    monkeypatch.setattr(_workers, "ADMIN_TIMEOUT", 5.0)

    def body(link: Connection) -> None:
        while numbered := link.recv():
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
            _workers.leave_all()
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


def test_5_handlers_that_raise(make_cache: Callable[..., Cache]) -> None:
    """A process that is struck by many exceptions out of a signal handler, at
    any point of time, and then does nothing, leaves a cache that others can use."""
    cache = make_cache(max_entries=30, max_bytes=16_384, cleanup_interval=300)
    process = start(SIGNALS, "raises", cache.name, str(SIGNALS_THAT_RAISE))
    assert process.stdout.readline() == "end\n", finish(process)
    is_sound(cache)
    assert cache.stats().lock_timeouts == 0
    finish(process)
    is_sound(cache)


def test_5_handler_that_uses_the_cache(make_cache: Callable[..., Cache]) -> None:
    """A signal handler may use the cache that it interrupts: compiled, always;
    interpreted, it is told when it may not; never is there a deadlock."""
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


# --- 6. creation ----------------------------------------------------------------

CREATORS = 50


def admin_of(path: str) -> int | None:
    """The PID of the process that creates a segment just now."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    asked = struct.pack(_workers._FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    answer = struct.unpack(_workers._FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    os.close(fd)
    return answer[4] if answer[0] != fcntl.F_UNLCK else None


def kill_a_creator(name: str, alive: set[int], told: int, random: Random) -> set[int]:
    """Kill who has the admin lock, at a random moment; nobody if all have attached."""
    path = f"{SHM}/shmcache-{os.getuid()}-{name}.lease"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        waiting = fcntl.ioctl(told, termios.FIONREAD, struct.pack("i", 0))
        if struct.unpack("i", waiting)[0] >= 16 * len(alive):
            return set()
        pid = admin_of(path)
        if pid in alive:
            until = time.monotonic_ns() + random.randrange(1_000_000)
            while time.monotonic_ns() < until:
                pass
            os.kill(pid, signal.SIGKILL)
            return {pid}
    raise TimeoutError("nobody has the admin lock, and not all have attached")


@pytest.mark.once
def test_6_creators_killed_at_random(new_name: Callable[[], str]) -> None:
    """Of 50 processes that create a cache at once, one to three are killed while they
    have the admin lock: the others meet in one sound segment, and none is left when
    they have gone; many times over."""
    random = Random(6)
    settings: dict[str, Any] = {"max_entries": 2000, "shards": 4}
    rounds = 0
    while rounds < CREATIONS_WITH_KILLS:
        name = new_name()
        begin, go = os.pipe()
        told, tell = os.pipe()
        ending, end = os.pipe()

        def create(
            name: str = name,
            fds: tuple[int, ...] = (begin, go, tell, ending, end),
        ) -> None:
            begin, go, tell, ending, end = fds
            os.close(go)
            os.close(end)
            os.read(begin, 1)
            cache = Cache(name, **settings)
            cache[os.getpid()] = os.getpid()
            inode = os.fstat(cache._attachment.block._fd).st_ino
            os.write(tell, struct.pack("<QQ", os.getpid(), inode))
            os.read(ending, 1)
            cache.close()

        pids = []
        for _ in range(CREATORS):
            pid = os.fork()
            if pid == 0:
                run_and_end(create)
            pids.append(pid)
        for fd in (begin, tell, ending, go):
            os.close(fd)  # of go: and so they begin
        killed: set[int] = set()
        for _ in range(random.randint(1, 3)):
            killed |= kill_a_creator(name, set(pids) - killed, told, random)
        rounds += bool(killed)  # none, if this process was not given its turn in time
        inodes: dict[int, int] = {}
        while len(inodes.keys() | killed) < CREATORS:
            pid, inode = struct.unpack("<QQ", os.read(told, 16))
            inodes[pid] = inode
        survivors = set(pids) - killed
        assert len({inodes[pid] for pid in survivors}) == 1
        with Cache(name, **settings) as cache:
            assert all(cache[pid] == pid for pid in survivors)
            assert cache.check() == []
            os.close(end)
            for pid in pids:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert code == (-signal.SIGKILL if pid in killed else 0)
            assert cache.check() == []
        os.close(told)
        assert names_of(name) == []


# --- 7. memory ------------------------------------------------------------------


def with_shm_of(size: str, script: str) -> str:
    """What a script prints that runs with a /dev/shm of its own, of a certain size."""
    mount = f"mount -t tmpfs -o size={size},mode=1777 tmpfs {SHM} && "
    command = mount + 'exec "$0" -W always -c "$1"'
    process = subprocess.Popen(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            command,
            sys.executable,
            textwrap.dedent(script),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finish(process)


@pytest.mark.once
@needs_mounts
def test_7_too_small() -> None:
    """Where a segment cannot fit, creation says how much it needs, how much is free
    and what to do, and leaves nothing."""
    output = with_shm_of(
        "1m",
        """
    import os
    from shmcache import Cache, OutOfSharedMemory
    try:
        Cache("c", max_entries=10, max_bytes="4 MiB")
    except OutOfSharedMemory as error:
        print(error)
    print(os.listdir("/dev/shm"))
    """,
    )
    needed = 4 << 20
    said = re.search(r"needs ([\d,]+) bytes .* has ([\d,]+) free", output)
    assert said, output
    assert needed < int(said[1].replace(",", "")) < needed + (1 << 20)
    assert 1 << 20 == int(said[2].replace(",", ""))
    assert "--shm-size" in output
    assert output.endswith("[]\n")


@pytest.mark.once
@needs_mounts
def test_7_room_for_all_but_the_semaphores() -> None:
    """Whatever the room that is left, creation succeeds, or ends in OutOfSharedMemory
    and leaves nothing."""
    output = with_shm_of(
        "4m",
        """
    import os
    from shmcache import Cache, OutOfSharedMemory
    cache = Cache("c", max_entries=10, max_bytes="1 MiB", shards=4)
    needed = cache.stats().segment_bytes
    cache.close()
    total = os.statvfs("/dev/shm")
    total = total.f_bavail * total.f_frsize
    for spare in range(-2, 7):
        with open("/dev/shm/other", "wb") as other:
            os.posix_fallocate(other.fileno(), 0, total - needed - 4096 * spare)
        try:
            cache = Cache("c", max_entries=10, max_bytes="1 MiB", shards=4)
            cache["a"] = 1
            cache.close()
            print("made")
        except OutOfSharedMemory:
            print("refused")
        assert os.listdir("/dev/shm") == ["other"], os.listdir("/dev/shm")
    """,
    )
    assert ["refused"] * 6 + ["made"] * 3 == output.split()


@needs_mounts
def test_7_filled_by_another_program_afterwards() -> None:
    """Another program that fills /dev/shm after creation does no harm: the cache can
    be filled to its capacity and be emptied again."""
    output = with_shm_of(
        "8m",
        """
    import os, warnings
    from shmcache import Cache
    # Python 3.13.0 counts threads that begin after the fork: see test_processes.py.
    warnings.simplefilter("ignore", DeprecationWarning)
    cache = Cache("c", max_entries=1000, max_bytes="2 MiB", shards=2)
    with open("/dev/shm/other", "wb", buffering=0) as other:
        try:
            while True:
                other.write(bytes(4096))
        except OSError:
            pass
    for n in range(3000):
        cache[n] = bytes(n % 5000)
        cache.get(n // 2)
    print(cache.stats().bytes_used > 1_500_000, cache.check())
    if os.fork() == 0:
        cache["child"] = 1
        cache.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), cache["child"])
    cache.clear()
    cache.close()
    print(os.listdir("/dev/shm"))
    """,
    )
    assert output == "True []\n0 1\n['other']\n"


# --- 8. foreign and damaged files -----------------------------------------------


def snapshot(name: str) -> dict[str, Any]:
    """All that is in /dev/shm for a cache: kinds, modes, owners and contents."""
    found = {}
    for entry in names_of(name):
        path = Path(SHM, entry)
        is_ = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(is_.st_mode) else None
        found[entry] = (is_.st_mode, is_.st_uid, is_.st_ino, content)
    return found


@pytest.fixture
def left(name: str) -> Iterator[tuple[str, Path, Path]]:
    """The name of a persistent cache that nobody uses, its segment, its lease file."""
    with Cache(name, max_entries=10, persist=True) as cache:
        cache["there"] = "value"
        names = cache._names
    yield name, Path(names.segment_path), Path(names.lock_path)
    for entry in names_of(name):
        path = Path(SHM, entry)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def refused(name: str, error: type[Exception], reason: str) -> None:
    """Neither attaching nor creating goes, for this reason, and nothing changes."""
    before = snapshot(name)
    uses: tuple[Callable[[], object], ...] = (
        lambda: Cache.attach(name),
        lambda: Cache(name, max_entries=10, persist=True),
        lambda: Cache(name, max_entries=99),
    )
    for use in uses:
        with pytest.raises(error, match=reason):
            use()
        assert before == snapshot(name)


def overwrite(path: Path, word: int, value: int) -> None:
    """Change a word of a file."""
    with path.open("r+b") as file:
        file.seek(8 * word)
        file.write(struct.pack("=Q", value))


@pytest.mark.once
@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        (L.H_MAGIC, L.MAGIC ^ 1, "is not a segment of this package"),
        (L.H_MAGIC, int.from_bytes(b"shmcache", "big"), "is not a segment"),
        (L.H_FORMAT, L.FORMAT + 1, f"has format {L.FORMAT + 1}, .* format {L.FORMAT}"),
        (L.H_SHARDS, 0, "claims 0 shards"),
        (L.H_SHARDS, 1 << 63, "claims 9223372036854775808 shards"),
        (L.H_SIZE, 1 << 40, "damaged geometry"),
        (L.H_SLOTS, 1 << 32, "damaged geometry"),
        (L.H_BLOCK_SIZE, 0, "damaged geometry"),
        (L.H_MAX_BYTES, 1 << 62, "damaged geometry"),
        (L.H_MAX_ENTRIES, 1 << 63, "damaged geometry"),
        (L.NAME_AT // 8, 0, "was made for a cache named"),
    ],
)
def test_8_damaged_header(
    left: tuple[str, Path, Path], word: int, value: int, reason: str
) -> None:
    """A segment whose header makes no sense is refused, says why, and stays as is."""
    name, segment, _ = left
    overwrite(segment, word, value)
    refused(name, SegmentCorrupt, reason)


@pytest.mark.once
@pytest.mark.parametrize("shift", [-1, 1, -4096, 4096, 1 << 20])
def test_8_wrong_size(left: tuple[str, Path, Path], shift: int) -> None:
    """A segment that was cut short or made longer is refused; no SIGBUS."""
    name, segment, _ = left
    size = segment.stat().st_size
    os.truncate(segment, size + shift)
    refused(
        name, SegmentCorrupt, f"has {size + shift:,} bytes and should have {size:,}"
    )


@pytest.mark.once
@pytest.mark.parametrize("size", [0, 1, 7, 4096])
def test_8_stump(left: tuple[str, Path, Path], size: int) -> None:
    """What is left of a segment, too short for a header, is refused unless it is as
    empty as a killed creator leaves it."""
    name, segment, _ = left
    os.truncate(segment, size)
    if size:
        refused(name, SegmentCorrupt, f"has {size} bytes, too few")
    else:
        with Cache(name, max_entries=10, persist=True) as cache:
            assert len(cache) == 0


@pytest.mark.once
@pytest.mark.parametrize("which", ["segment", "lease"])
@pytest.mark.parametrize("mode", [0o644, 0o660, 0o606, 0o777])
def test_8_wrong_mode(left: tuple[str, Path, Path], which: str, mode: int) -> None:
    """A file that others can open is refused."""
    name, *paths = left
    paths[which == "lease"].chmod(mode)
    refused(name, SegmentRefused, f"has mode {mode:o}, so others can open it")


@pytest.mark.once
@pytest.mark.parametrize("which", ["segment", "lease"])
@pytest.mark.parametrize("what", ["symlink", "dangling", "directory", "fifo", "socket"])
def test_8_no_regular_file(
    left: tuple[str, Path, Path], tmp_path: Path, which: str, what: str
) -> None:
    """Something under the name of a segment, or lease file, that is no file of ours is
    refused, neither followed nor waited for."""
    name, *paths = left
    path = paths[which == "lease"]
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.chmod(0o600)
    path.unlink()
    if what == "symlink":
        path.symlink_to(other)
    elif what == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    refused(name, SegmentRefused, "is not a regular file|is no file of ours")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.once
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["segment", "lease"])
def test_8_another_users_file(left: tuple[str, Path, Path], which: str) -> None:
    """Another user's file under our name is refused, also to root."""
    name, *paths = left
    os.chown(paths[which == "lease"], 12345, -1)
    refused(name, SegmentRefused, "belongs to user 12345, and we are user 0")


@pytest.mark.once
def test_8_refusal_leaves_no_lease_file(left: tuple[str, Path, Path]) -> None:
    """Being refused a foreign segment leaves no new lease file beside it."""
    name, segment, lease = left
    lease.unlink()
    segment.chmod(0o644)
    refused(name, SegmentRefused, "has mode 644")


@pytest.mark.damaged
def test_8_header_damaged_while_in_use(
    name: str, make_cache: Callable[..., Cache]
) -> None:
    """Who is attached goes on when the magic word is overwritten; newcomers are
    refused, and the data stays."""
    cache = make_cache(name, max_entries=10)
    cache["there"] = "value"
    cache._attachment.words[L.H_MAGIC] = 0
    assert run(REFUSED, name).count("no magic word") == 2
    cache["more"] = 1
    assert (cache["there"], cache["more"]) == ("value", 1)
    cache._attachment.words[L.H_MAGIC] = L.MAGIC
    assert cache.check() == []


REFUSED = """
import sys
from shmcache import Cache, SegmentCorrupt
for use in Cache.attach, Cache:
    try:
        use(sys.argv[1])
    except SegmentCorrupt as error:
        print(error)
"""


# --- 9. nothing left ------------------------------------------------------------


def test_9_attach_and_close_after_a_crash_leaves_nothing(
    make_cache: Callable[..., Cache],
) -> None:
    """When all users were killed, one of them in the midst of writing, the next that
    comes and leaves takes all that they left with it."""
    cache = make_cache(**ROOMY, lock_timeout=0.1)
    name = cache.name
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)

    def keep(link: Connection) -> None:
        mine = Cache.attach(name)
        link.send(mine._attachment.token)
        signal.pause()

    keeper = Peer(keep)
    keeper.hear()
    cache.close()
    writer.kill()
    keeper.kill()
    assert len(names_of(name)) == 3
    with Cache(name, max_entries=1) as heir:
        assert heir.get("big") is None
    assert names_of(name) == []


# --- 10. warm restart -----------------------------------------------------------


def test_10_warm_restart_after_a_clean_stop(name: str) -> None:
    """A persistent cache is all there after a clean stop, and the counts say so."""
    with Cache(name, max_entries=100, shards=2, persist=True) as cache:
        for n in range(60):
            cache[n] = n
        assert cache.stats().recovered == 0
    with Cache.attach(name) as cache:
        assert {n: n for n in range(60)} == dict(cache.items())
        assert (60, 0) == (cache.stats().recovered, cache.stats().dropped)
        assert cache.check() == []
        cache.unlink()


def test_10_warm_restart_after_all_were_killed(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When all workers are killed in the midst of writing, what they had written is
    there: of each worker's key the value acknowledged last, or the next one."""

    def count(number: int, link: Connection) -> None:
        cache = Cache(name, max_entries=100, shards=2, persist=True)
        key = f"worker {number}"
        for n in itertools.count():
            cache[key] = (n, b"x" * (n % 3000))
            os.write(acknowledge, struct.pack("<QQ", number, n))
            if n == 20:
                link.send("going")

    for restart in range(3):
        acknowledged, acknowledge = os.pipe()
        peers = [Peer(partial(count, number)) for number in range(4)]
        os.close(acknowledge)
        last: dict[int, int] = {}
        fcntl.fcntl(acknowledged, 1031, 1 << 20)  # F_SETPIPE_SZ
        for peer in peers:
            assert peer.hear() == "going"
        for peer in peers:
            os.kill(peer.pid, signal.SIGKILL)
        while data := os.read(acknowledged, 16):
            number, n = struct.unpack("<QQ", data)
            last[number] = n
        os.close(acknowledged)
        for peer in peers:
            peer.end(-signal.SIGKILL)
        with (
            caplog.at_level(logging.INFO, "shmcache"),
            Cache.attach(name) as cache,
        ):
            stats = cache.stats()
            for number, n in last.items():
                found, data = cache[f"worker {number}"]
                assert found in (n, n + 1)
                assert data == b"x" * (found % 3000)
            assert cache.check() == []
            assert len(last) == len(cache) == stats.recovered == 4
            if restart == 2:
                cache.unlink()
    assert "4 entries recovered, 0 dropped" in caplog.text


# --- 11. no code from the segment -----------------------------------------------


def test_11_files_are_for_their_owner_only(make_cache: Callable[..., Cache]) -> None:
    """Segment, lease file and semaphores have mode 600, whatever the umask."""
    umask = os.umask(0)
    try:
        cache = make_cache(max_entries=10, shards=3)
    finally:
        os.umask(umask)
    entries = names_of(cache.name)
    assert len(entries) == 5
    modes = {stat.S_IMODE(Path(SHM, entry).stat().st_mode) for entry in entries}
    assert modes == {0o600}


class Bomb:
    """An object whose pickle says that it was loaded."""

    loaded = 0

    def __reduce__(self) -> Any:
        """Pickles as a call."""
        return Bomb.load, ()

    @staticmethod
    def load() -> int:
        """What unpickling runs."""
        Bomb.loaded += 1
        return 1


def test_11_no_pickle_unless_asked_by_name(make_cache: Callable[..., Cache]) -> None:
    """A segment that says "pickle" is attached to only by those who say it, too."""
    cache = make_cache(max_entries=10, codec="pickle")
    cache["bomb"] = Bomb()
    with pytest.raises(ConfigMismatch, match="codec is 'pickle' but asked for 'msgp"):
        Cache.attach(cache.name, codec="msgpack")
    with pytest.raises(ConfigMismatch, match="codec is 'pickle' but asked for 'msgp"):
        Cache(cache.name, max_entries=10)
    with Cache.attach(cache.name) as unasked:
        assert unasked.stats().entries == 1
        for use in (lambda: unasked["bomb"], lambda: list(unasked.values())):
            with pytest.raises(ConfigMismatch, match="attach with codec='pickle'"):
                use()
        with pytest.raises(ConfigMismatch, match="attach with codec='pickle'"):
            unasked["other"] = Bomb()
        with (
            pickle.loads(pickle.dumps(unasked)) as other,
            pytest.raises(ConfigMismatch, match="attach with codec='pickle'"),
        ):
            other.get("bomb")
    assert Bomb.loaded == 0
    with Cache.attach(cache.name, codec="pickle") as same:
        assert same["bomb"] == 1
        with pickle.loads(pickle.dumps(same)) as third:
            assert third["bomb"] == 1
    assert Bomb.loaded == 2
    Bomb.loaded = 0


@pytest.mark.damaged
def test_11_codec_changed_in_the_segment(make_cache: Callable[..., Cache]) -> None:
    """Who writes "pickle" into the header of a segment gets nobody to load pickles."""
    cache = make_cache(max_entries=10, codec="msgpack")
    cache["list"] = [pickle.dumps(Bomb())]
    cache._attachment.block.view[L.CODEC_AT : L.CODEC_AT + 7] = b"\x06pickle"

    assert run(UNASKED, cache.name) == "ConfigMismatch\n" * 3
    assert cache["list"] == [pickle.dumps(Bomb())]
    assert Bomb.loaded == 0


UNASKED = """
import logging, sys
from shmcache import Cache, ConfigMismatch, SegmentCorrupt
logging.getLogger("shmcache").addHandler(logging.NullHandler())  # it is logged, too
for read in (
    lambda: Cache(sys.argv[1], max_entries=10, codec="raw"),
    lambda: Cache.attach(sys.argv[1], codec="raw"),
    lambda: Cache.attach(sys.argv[1])["list"],
):
    try:
        print(read())
    except ConfigMismatch:
        print("ConfigMismatch")
"""

HOSTILE = {
    "array of 2**32 - 1": b"\xdd\xff\xff\xff\xff",
    "map of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
    "str of 2**32 - 1": b"\xdb\xff\xff\xff\xff",
    "bin of 2**32 - 1": b"\xc6\xff\xff\xff\xff",
    "ext of 2**32 - 1": b"\xc9\xff\xff\xff\xff\x01",
    "array in arrays": b"\xdd\x7f\xff\xff\xff" * 100,
    "depth of 100,000": b"\x91" * 100_000,
    "maps of maps": b"\x81" * 100_000,
    "unused byte": b"\xc1" + b"\xdd\xff\xff\xff\xff",
    "unhashable key": b"\x81\x90\x01",
    "no UTF-8": b"\xa2\xff\xff",
    "two values": b"\x90\x90",
    "nothing": b"",
}


@pytest.mark.damaged
@pytest.mark.parametrize("bomb", HOSTILE)
def test_11_hostile_msgpack(make_cache: Callable[..., Cache], bomb: str) -> None:
    """Bytes in a segment that claim billions of elements, or endless depth, are
    SegmentCorrupt, and cost no more memory than they have bytes."""
    cache = make_cache(max_entries=10, max_bytes=1 << 20, codec="msgpack")
    plant(cache, "bomb", HOSTILE[bomb])

    def read(link: Connection) -> None:
        mine = Cache.attach(cache.name)
        # Address space for a hundred times the bomb, not for billions of pointers.
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(SegmentCorrupt, match="cannot be decoded"):
            mine.get("bomb")
        with pytest.raises(SegmentCorrupt, match="cannot be decoded"):
            mine.pop("bomb")
        link.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        mine.close()

    reader = Peer(read)
    assert reader.hear() < 32 << 10  # KiB
    reader.end()
    assert cache.check() == []


def plant(cache: Cache, key: str, data: bytes) -> None:
    """Store bytes as if the cache's codec had made them."""
    # The bytes and a tag of their own; then the tag is made the codec's.
    cache[key] = data
    words = cache._attachment.block.view.cast("I")
    geometry = cache._attachment.header.geometry
    [record] = [
        at
        for slot in range(1, geometry.slots + 1)
        if words[
            (at := (geometry.shards_at + geometry.records_at + slot * L.RECORD) // 4)
        ]
        & 1
    ]
    words[record + L.F_META] &= ~(15 << L.META_TAG_SHIFT)
    words[record + L.F_CHECKSUM] = L.checksum(data, words[record + L.F_HASH], 0)


# --- 12. fairness ---------------------------------------------------------------

WRITERS = 8
LONGEST = 0.25  # s


def run_delay() -> int:
    """For how long the scheduler has kept this thread from running, in ns."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except OSError:
        return 0


def hammer(cache: Cache, number: int, seconds: float) -> tuple[int, float, int]:
    """Write without a pause: operations done, and of the longest one the seconds that
    the scheduler has not to answer for, and the turns that others took meanwhile."""
    turns = cache._words_of(0) + L.S_ACQUISITIONS
    words = cache._attachment.words
    done, longest, passed = 0, 0.0, 0
    end = time.monotonic() + seconds
    before, delayed, taken = time.monotonic(), run_delay(), words[turns]
    while before < end:
        cache[done % 50] = number
        done += 1
        now = time.monotonic()
        if now - before > LONGEST / 4:
            waited = now - before - (run_delay() - delayed) / 1e9
            if waited > longest:
                longest, passed = waited, words[turns] - taken
        if now - before > LONGEST / 4 or done % 64 == 0:
            delayed = run_delay()
            now = time.monotonic()
        before, taken = now, words[turns]
    return done, longest, passed


def test_12_spare_permits_let_nobody_in_twice(
    make_cache: Callable[..., Cache],
) -> None:
    """A semaphore that lets several in at once leaves one holder, and exact counts."""
    cache = make_cache(max_entries=100, shards=1, lock_timeout=PATIENCE)
    name = cache.name

    def count(link: Connection) -> None:
        with Cache.attach(name, lock_timeout=PATIENCE) as mine:
            link.send("ready")
            link.recv()
            for _ in range(SPARE_PERMITS):
                mine.incr("n", initial=0)
            link.send("done")

    writers = [Peer(count) for _ in range(3)]
    for writer in writers:
        assert writer.hear() == "ready"
    semaphore = posix_ipc.Semaphore(cache._names.semaphore(0))
    for writer in writers:
        writer.say()
    spare = 0
    while not all(writer.link.poll(0) for writer in writers):
        # Who finds another inside drops its permit, so they must be given anew.
        if semaphore.value < 2:
            semaphore.release()
            spare += 1
    semaphore.close()
    for writer in writers:
        assert writer.hear() == "done"
        writer.end()
    assert spare > 10
    assert cache["n"] == len(writers) * SPARE_PERMITS
    assert cache.stats().recoveries == 0
    assert cache.check() == []


def test_12_nobody_starves(make_cache: Callable[..., Cache]) -> None:
    """Of eight processes that hammer one shard each gets its turns, and none is made
    to wait a quarter of a second while the others take theirs.

    On a busy machine a process may stand still for longer: that time is known from
    the scheduler if it is the waiting process, and if it is the one that has the lock
    then no turns are taken meanwhile.  So a wait counts for the time that it took
    without the scheduler, but for no more than the turns that passed usually take.
    """
    cache = make_cache(max_entries=100, shards=1, lock_timeout=PATIENCE)
    name = cache.name

    def write(number: int, link: Connection) -> None:
        signal.alarm(PATIENCE + FAIRNESS_SECONDS)
        with Cache.attach(name, lock_timeout=PATIENCE) as mine:
            mine["in"] = 1
            link.send("ready")
            link.recv()
            link.send(hammer(mine, number, FAIRNESS_SECONDS))

    writers = [Peer(partial(write, number)) for number in range(WRITERS)]
    for writer in writers:
        assert writer.hear() == "ready"
    first, started = shard_word(cache, L.S_ACQUISITIONS), time.monotonic()
    for writer in writers:
        writer.say()
    results = []
    for writer in writers:
        assert writer.link.poll(PATIENCE + FAIRNESS_SECONDS)
        results.append(writer.hear())
    turn = (time.monotonic() - started) / (shard_word(cache, L.S_ACQUISITIONS) - first)
    for writer in writers:
        writer.end()
    assert all(done > 10 for done, _, _ in results), results
    worst = max(min(longest, passed * turn) for _, longest, passed in results)
    assert worst < LONGEST, results
