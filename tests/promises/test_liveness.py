"""Liveness: stopped processes, dead ones, and their children.

Promise 2: a stopped process is not robbed.  Promise 3: a dead one is known as dead,
also in containers.  Promise 4: a fork at any time.  A test's name begins with the
number of its promise.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

import psutil
import pytest
from caught import (
    BIG,
    ROOMY,
    Writer,
    is_sound,
    shard_word,
    stop_inside,
    token_of,
    writes,
)
from namespaces import needs_pid_namespaces
from peers import PATIENCE, Peer, names_of, run_and_end

from shmcache import Cache, LockTimeout
from shmcache._format import layout as L
from shmcache._process import lockfile as _lockfile
from shmcache._process.rows import retire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection


# --- 2. a stopped process is not robbed -----------------------------------------


def test_2_stopped_process_is_not_robbed(make_cache: Callable[..., Cache]) -> None:
    """While a process is stopped in the write section, writes by others raise
    LockTimeout, which names it, and reads are answered; after SIGCONT it goes on."""
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
    the log says which process died."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    acquisitions = shard_word(cache, L.S_ACQUISITIONS)

    def wait_and_write(link: Connection) -> None:
        mine = Cache.attach(cache.name, lock_timeout=PATIENCE)
        link.send("waiting")
        mine["waited"] = "yes"
        mine.close()

    waiter = Peer(wait_and_write)
    assert waiter.hear() == "waiting"
    time.sleep(0.1)  # time for several looks of the waiter, which must not take over
    assert acquisitions == shard_word(cache, L.S_ACQUISITIONS)
    with caplog.at_level(logging.WARNING, "shmcache"):
        writer.kill()
        waiter.end()
        is_sound(cache)
    assert (cache["there"], cache["waited"]) == ("value", "yes")
    assert cache.stats().recoveries == 1


@pytest.mark.parametrize("fate", ["stopped", "killed"])
def test_2_signals_do_not_keep_a_waiter_from_looking(
    make_cache: Callable[..., Cache], fate: str
) -> None:
    """A process that gets a signal every few ms finds out, too, that the holder of a
    lock is stuck, or has died."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    former = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        if fate == "killed":
            writer.kill()
            cache["there"] = "other"
        else:
            assert cache.get("absent") is None
            os.kill(writer.pid, signal.SIGCONT)
            writer.say("end")
            writer.end()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert cache["there"] == ("other" if fate == "killed" else "value")
    assert cache.stats().lock_timeouts == 0
    is_sound(cache)


@pytest.mark.damaged  # else close() would be checked first, which waits for the lock
def test_2_closing_does_not_wait_for_a_stopped_process(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """close() gives its recency up rather than to wait for the lock."""
    cache = make_cache(name, **ROOMY, lock_timeout=PATIENCE)
    cache["there"] = "value"
    with Cache.attach(name, lock_timeout=PATIENCE) as other:
        writer = Writer(cache)
        stop_inside(cache, writer.pid, writer.token)
        assert other["there"] == "value"
    os.kill(writer.pid, signal.SIGCONT)
    writer.say("end")
    writer.end()
    assert cache.stats().lock_timeouts == 0
    is_sound(cache)


# --- 3. liveness ----------------------------------------------------------------


def takes_over(cache: Cache, log: pytest.LogCaptureFixture) -> str:
    """The message in the log when the next write takes the lock over from a dead
    holder."""
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
    """A killed holder that its parent has not waited for is dead, also when the parent
    is another process."""
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
    """The body of a forked process: it overwrites an entry until it is killed."""
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
    # The row is kept, so that the takeover can log which process died.
    assert attachment.reap() == 0
    with _lockfile.mutex(), attachment.admin():
        # Pretend that a reaper came too early.
        retire(attachment.words, (writer.token & 0xFFFF) - 1)

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
    """A process in its own PID namespace, its PID outside of it, and its token."""
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
    """Processes in two PID namespaces, both with PID 1, know of each other whether they
    live: a stopped holder is waited for, and a killed one is taken over from."""
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
    """A child whose parent was killed joins the cache that others have created since,
    and then closes the old one: to the others it is alive."""

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
