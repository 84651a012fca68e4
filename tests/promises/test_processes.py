"""Caches and processes: all kinds of fork, spawn, exec, death; the last one out."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from amounts import CLOSES, CREATIONS, INCREMENTS, READS
from peers import PATIENCE, Peer, finish, names_of, run, run_and_end, start

from shmcache import Cache, CacheClosed, OutOfSharedMemory
from shmcache._format import layout as L
from shmcache._process.attachment import Attachment
from shmcache._process.sweeper import Sweeper

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

METHODS = ("fork", "spawn", "forkserver")


CLOSES_BESIDE_WRITES = """
import sys, threading
from shmcache import Cache, CacheClosed

def write(cache, started):
    try:
        n = 0
        while True:
            cache[n % 10] = n
            n += 1
            started.set()
    except CacheClosed:
        pass

sys.setswitchinterval(1e-6)
name, rounds = sys.argv[1], int(sys.argv[2])
for _ in range(rounds):
    cache = Cache(name, max_entries=100)
    started = threading.Event()
    thread = threading.Thread(target=write, args=(cache, started))
    thread.start()
    started.wait()
    cache.close()
    thread.join()
with Cache(name, max_entries=100) as cache:
    cache["k"] = "v"
    print(cache.check())
"""


@pytest.mark.slow
@pytest.mark.counted
def test_close_beside_a_thread_that_writes(name: str) -> None:
    """A thread that writes gets CacheClosed when another thread closes the cache, at
    any moment; nothing crashes, and nothing is left."""
    assert run(CLOSES_BESIDE_WRITES, name, str(CLOSES)) == "[]\n"
    assert names_of(name) == []


# --- fork -----------------------------------------------------------------------


@pytest.mark.counted
@pytest.mark.parametrize("created", ["before", "after"])
def test_counters_add_up_over_processes_and_threads(
    name: str, make_cache: Callable[..., Cache], created: str
) -> None:
    """No increment is lost, with the cache made before the fork or after it."""
    cache = make_cache(name)

    def count(link: Connection) -> None:
        mine = cache if created == "before" else Cache(name)

        def add() -> None:
            for i in range(INCREMENTS):
                mine.incr("all", initial=0)
                mine.incr(i % 3, 2, initial=0)

        threads = [threading.Thread(target=add) for _ in range(2)]
        link.recv()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mine.close()

    peers = [Peer(count) for _ in range(4)]
    for peer in peers:
        peer.say()
    for peer in peers:
        peer.end()
    assert 8 * INCREMENTS == cache["all"]
    assert 2 * 8 * INCREMENTS == sum(cache.get_many([0, 1, 2]).values())


@pytest.mark.slow
def test_fork_from_a_thread_while_others_write(
    make_cache: Callable[..., Cache],
) -> None:
    """Children of one thread use the cache although others of the parent write."""
    cache = make_cache()
    stop = threading.Event()
    written = [0, 0, 0]

    def write(number: int) -> None:
        while not stop.is_set():
            cache.set((number, written[number] % 100), bytes(500))
            cache.incr(("writes", number), initial=0)
            written[number] += 1

    def use() -> None:
        for _ in range(200):
            cache.incr("children", initial=0)
            cache.set("child", os.getpid())
        cache.close()

    statuses = []

    def fork() -> None:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                run_and_end(use)
            statuses.append(os.waitpid(pid, 0)[1])

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    forker = threading.Thread(target=fork)
    for thread in (*writers, forker):
        thread.start()
    forker.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert [0] * 10 == statuses
    assert 2000 == cache["children"]
    assert written == [cache[("writes", number)] for number in range(3)]


def test_child_that_never_uses_the_cache(name: str) -> None:
    """An inherited cache that the child does not use does not keep the segment
    alive."""
    cache = Cache(name)
    cache["a"] = 1
    idle = Peer(lambda link: link.recv())
    cache.close()
    assert names_of(name) == []
    idle.say()
    idle.end()
    assert names_of(name) == []


@pytest.mark.parametrize("used", [False, True])
def test_child_that_closes_takes_nothing_from_its_parent(
    name: str, make_cache: Callable[..., Cache], used: bool
) -> None:
    """A child's close() leaves its parent's lock file alone: newcomers find the
    data."""
    cache = make_cache(name)
    cache["a"] = "the parent's"

    def close(_: Connection) -> None:
        if used:
            assert cache["a"] == "the parent's"
        cache.close()
        with pytest.raises(CacheClosed):
            cache.get("a")

    def look(_: Connection) -> None:
        found = Cache(name)
        assert found["a"] == "the parent's"
        assert found.stats().workers == 2
        found.close()

    Peer(close).end()
    Peer(look).end()
    assert cache["a"] == "the parent's"


def test_two_caches_of_one_name_in_parent_and_child(name: str) -> None:
    """Each of two objects of one name works until it is closed, on both sides of a
    fork."""
    one, two = Cache(name), Cache(name)
    one["a"] = 1

    def use(_: Connection) -> None:
        two["b"] = 2
        two.close()
        assert one["b"] == 2
        three = Cache(name)
        assert three["a"] == 1
        three.close()
        one["c"] = 3
        one.close()

    Peer(use).end()
    one.close()
    assert {"a": 1, "b": 2, "c": 3} == dict(two.items())
    assert two.stats().workers == 1
    two.close()
    assert names_of(name) == []


@pytest.mark.parametrize("death", ["closes", "exits", "is killed"])
def test_child_outlives_its_parent(name: str, death: str) -> None:
    """A child that uses the cache keeps it, however its parent ends."""

    def parent(link: Connection) -> None:
        cache = Cache(name)
        cache["a"] = "the parent's"

        def child(_: Connection) -> None:
            cache["b"] = "the child's"
            link.send(os.getpid())
            link.recv()
            assert {"a", "b"} == set(cache)
            assert cache.stats().workers == 1
            cache["b"] = "the last one's"
            cache.close()
            link.send("done")

        Peer(child)
        if death == "closes":
            while "b" not in cache:
                time.sleep(0.001)
            cache.close()
        elif death == "is killed":
            signal.pause()
        os._exit(0)  # without the finalizers of local variables

    peer = Peer(parent)
    orphan = peer.hear()
    if death == "is killed":
        os.kill(peer.pid, signal.SIGKILL)
    os.waitpid(peer.pid, 0)
    assert names_of(name) != []
    peer.say()
    assert peer.hear() == "done"
    # Orphans come to this process: see PR_SET_CHILD_SUBREAPER in conftest.py.
    assert os.waitpid(orphan, 0)[1] == 0
    peer.link.close()
    assert names_of(name) == []


def test_children_of_a_parent_that_removed_the_cache_share_a_new_one(name: str) -> None:
    """Children that first use a cache after its removal share a new one, and hold no
    old one."""
    before = Cache(name)
    before["a"] = "before"
    also = Cache(name)
    peers = []

    def use(link: Connection) -> None:
        link.recv()
        assert before.get("a") is None
        before.incr("n", initial=0)
        also.incr("n")
        link.send("in")
        link.recv()
        link.send((before["n"], also["n"]))
        with open("/proc/self/maps") as maps:
            lost = list(maps)
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                lost.append(os.readlink(f"/proc/self/fd/{fd}"))
        lost = [file for file in lost if name in file and "(deleted)" in file]
        link.send(lost)
        link.recv()
        before.close()
        also.close()

    peers = [Peer(use) for _ in range(3)]
    before.close()
    also.close()
    assert names_of(name) == []
    for peer in peers:
        peer.say()
    assert ["in"] * 3 == [peer.hear() for peer in peers]
    for peer in peers:
        peer.say()
        assert peer.hear() == (6, 6)
        assert peer.hear() == []
    for peer in peers:
        peer.say()
    for peer in peers:
        peer.end()
    assert names_of(name) == []


def test_child_that_closes_all_inherited_descriptors(
    name: str, make_cache: Callable[..., Cache]
) -> None:
    """A daemon that first closes all descriptors joins anew, with its own lock file
    descriptor, and does not later close others' descriptors of the same numbers."""
    cache = make_cache(name)
    also = make_cache(name)
    cache["a"] = 1

    def use(link: Connection) -> None:
        os.closerange(3, link.fileno())
        os.closerange(link.fileno() + 1, 1000)
        # Take the numbers of the cache's descriptors.
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        assert cache["a"] == 1
        assert also["a"] == 1
        taken += [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        gc.collect()
        link.send("in")
        link.recv()
        cache["b"] = 2
        cache.close()
        assert also["b"] == 2
        also.close()
        for fd in taken:
            os.close(fd)

    peer = Peer(use)
    assert peer.hear() == "in"
    assert cache.stats().workers == 2
    peer.say()
    peer.end()
    assert cache["b"] == 2
    assert cache.stats().workers == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_child_that_becomes_another_user(
    name: str, make_cache: Callable[..., Cache]
) -> None:
    """A worker that gives up root's rights uses the cache that root made before."""
    cache = make_cache(name)
    cache["a"] = 1

    def use(link: Connection) -> None:
        os.setuid(65534)
        assert cache["a"] == 1
        for _ in range(1000):
            cache.incr("n", initial=0)
        link.send("in")
        link.recv()
        cache.close()

    peers = [Peer(use) for _ in range(2)]
    for peer in peers:
        assert peer.hear() == "in"
    assert cache["n"] == 2000
    assert cache.stats().workers == 3
    for peer in peers:
        peer.say()
        peer.end()
    assert cache.stats().workers == 1


def orphaned(name: str, persist: bool) -> tuple[int, Connection]:
    """A process that was forked from one with a cache, which was then killed.

    It has not used the cache.  On "go" it counts to a thousand in it.
    """

    def parent(link: Connection) -> None:
        cache = Cache(name, persist=persist)
        cache["a"] = "the parent's"

        def child(_link: Connection) -> None:
            link.send(os.getpid())
            while link.recv() == "go":
                for _ in range(1000):
                    cache.incr("n", initial=0)
                link.send(cache.get("a"))
            cache.close()
            link.send("closed")

        Peer(child)
        signal.pause()

    peer = Peer(parent)
    child: int = peer.hear()
    os.kill(peer.pid, signal.SIGKILL)
    os.waitpid(peer.pid, 0)
    return child, peer.link


@pytest.mark.parametrize("persist", [False, True])
def test_orphan_and_newcomer_meet_in_one_segment(
    name: str, make_cache: Callable[..., Cache], persist: bool
) -> None:
    """A forked process that comes after others have taken the segment up uses theirs:
    the same segment, and the same semaphores."""
    orphan, link = orphaned(name, persist)
    newcomer = make_cache(name, persist=persist)
    assert newcomer.get("a") == ("the parent's" if persist else None)
    newcomer["a"] = "the newcomer's"
    link.send("go")
    n = 0
    while not link.poll(0):
        newcomer.incr("n", initial=0)
        n += 1
    assert link.recv() == "the newcomer's"
    assert 1000 + n == newcomer["n"]
    link.send("end")
    assert link.poll(PATIENCE)
    assert link.recv() == "closed"
    link.close()
    assert os.waitpid(orphan, 0)[1] == 0
    assert newcomer.stats().lock_timeouts == newcomer.stats().recoveries == 0
    if persist:
        newcomer.unlink()


C_FORK = """
import ctypes, os, signal, sys, types
from shmcache import Cache

# A fork in C is safe for Python only in a process without other threads, so this one
# is to have no sweeper; as under uWSGI without --enable-threads.
sys.modules["uwsgi"] = types.ModuleType("uwsgi")
fork = ctypes.PyDLL(None).fork  # keeps the interpreter's lock, as servers do
hooks = []
os.register_at_fork(after_in_child=lambda: hooks.append("ran"))
signal.alarm(60)
cache = Cache(sys.argv[1])
cache["parent"] = os.getpid()
tokens = {cache._attachment.token}
for depth in range(3):
    r, w = os.pipe()
    pid = fork()
    if pid:
        os.close(w)
        for _ in range(1000):
            cache.incr("n", initial=0)
        # One byte when the child has joined, then the end of file with it.
        seen = os.read(r, 1), os.waitpid(pid, 0)[1], cache.stats().workers
        # The child's end has taken nothing from us.
        if seen != (b"1", 0, depth + 1):
            print("at depth", depth, seen, flush=True)
            os._exit(1)
        break
    signal.alarm(60)
    os.close(r)
    cache.incr("n", initial=0)
    tokens.add(cache._attachment.token)
    os.write(w, b"%d" % (len(tokens) == depth + 2))
for _ in range(1000):
    cache.incr("n", initial=0)
if depth == 0:
    print(cache["n"], hooks, flush=True)
cache.close()
os._exit(0)
"""


def test_c_fork_without_hooks(name: str) -> None:
    """A process forked in C, and one forked in C from that one, and so on, become
    workers without Python's fork hooks."""
    # Each of the three parents counts 2000, the last child 1000, and each child one at
    # first.
    assert f"{3 * 2000 + 1000 + 3} []\n" == run(C_FORK, name)
    assert names_of(name) == []


def test_sweeper_that_is_told_to_stop_stops(make_cache: Callable[..., Cache]) -> None:
    """The sweeper notices a stop that comes just before it clears its event; otherwise
    a fork would wait for it."""
    cache = make_cache(cleanup_interval=300)
    sweeper = Sweeper()

    class Bell(threading.Event):
        def clear(self) -> None:
            sweeper._stop = True
            self.set()
            super().clear()

    sweeper._wake = Bell()
    sweeper.watch(cache, Cache._tend, 0)
    thread = sweeper._thread
    assert thread
    thread.join(5)
    alive = thread.is_alive()
    sweeper.pause()
    assert not alive


# --- start methods --------------------------------------------------------------

_pool_cache: Cache


def join_pool(cache: Cache | str) -> None:
    """Initializes a pool's worker: the cache is a pickled one, or a name to attach."""
    global _pool_cache  # noqa: PLW0603 - what initializers are for
    _pool_cache = Cache.attach(cache) if isinstance(cache, str) else cache


def work(number: int) -> tuple[int, int]:
    """A task of a pool."""
    _pool_cache.incr("n", number, initial=0)
    _pool_cache[number] = os.getpid()
    return os.getpid(), _pool_cache["from the parent"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", ["name", "cache"])
def test_pool(
    name: str, make_cache: Callable[..., Cache], method: str, given: str
) -> None:
    """The workers of a multiprocessing pool share the cache with their parent."""
    cache = make_cache(name)
    cache["from the parent"] = 42
    context = multiprocessing.get_context(method)
    with context.Pool(2, join_pool, (name if given == "name" else cache,)) as pool:
        answers = pool.map(work, range(100), chunksize=5)
        pool.close()
        pool.join()
    assert {42} == {value for _, value in answers}
    assert sum(range(100)) == cache["n"]
    assert [pid for pid, _ in answers] == [cache[number] for number in range(100)]
    assert cache.stats().workers == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_executor(name: str, make_cache: Callable[..., Cache], method: str) -> None:
    """The workers of a process pool executor share the cache with their parent."""
    cache = make_cache(name)
    cache["from the parent"] = 42
    with concurrent.futures.ProcessPoolExecutor(
        2, multiprocessing.get_context(method), join_pool, (cache,)
    ) as executor:
        answers = list(executor.map(work, range(50)))
    assert {42} == {value for _, value in answers}
    assert sum(range(50)) == cache["n"]
    assert cache.stats().workers == 1


def answer(cache: Cache, key: str) -> None:
    """What a Process runs; it ends without close()."""
    cache[key] = cache["question"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_process_argument(
    name: str, make_cache: Callable[..., Cache], method: str
) -> None:
    """A Cache passed to a Process is the same cache there, and is left at its end."""
    cache = make_cache(name, ttl=60, codec=Reversed())
    cache["question"] = "ab"
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=answer, args=(cache, "answer")
    )
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    process.close()
    assert cache["answer"] == "abab"
    # Left in good order: its row is free, and not to be reaped.
    assert cache._attachment.tokens() == [cache._attachment.token]


class Reversed:
    """A codec without a name."""

    def dumps(self, value: str) -> bytes:
        """The text backwards."""
        return value[::-1].encode()

    def loads(self, data: bytes) -> str:
        """The text as it was."""
        return bytes(data).decode()[::-1]


def keep_to_the_end(cache: Cache, link: Connection) -> None:
    """What a Process runs that ends after its parent's close()."""
    cache["child"] = 1
    link.send("in")
    link.recv()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_last_one_out_is_a_process_that_just_ends(name: str, method: str) -> None:
    """The normal end of a multiprocessing child removes what nobody uses any more."""
    cache = Cache(name)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=keep_to_the_end, args=(cache, there)
    )
    process.start()
    assert here.poll(PATIENCE)
    assert here.recv() == "in"
    cache.close()
    assert names_of(name) != []
    here.send("end")
    process.join(PATIENCE)
    assert process.exitcode == 0
    process.close()
    here.close()
    there.close()
    assert names_of(name) == []


# --- unrelated processes --------------------------------------------------------


def test_unrelated_processes_share_a_name(name: str) -> None:
    """Processes that have only the name in common see each other's writes, and the last
    one to end removes the cache without any close()."""
    script = """
    import os, sys
    from shmcache import Cache
    cache = Cache(sys.argv[1], ttl=60)
    cache[os.getpid()] = "here"
    print("in", flush=True)
    sys.stdin.readline()
    print(len(cache), cache.stats().workers, flush=True)
    sys.stdin.readline()
    """
    processes = [start(script, name) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "in\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "3 3\n"
    for process in processes:
        finish(process, "end\n")
    assert names_of(name) == []


def test_exec_leaves_the_cache(name: str, make_cache: Callable[..., Cache]) -> None:
    """A process that becomes another program is no worker any more; the program may
    join as a new one."""
    cache = make_cache(name)
    cache["a"] = 1
    script = """
    import os, sys
    from shmcache import Cache
    cache = Cache(sys.argv[1])
    cache["b"] = os.getpid()
    again = (
        "import os, sys; from shmcache import Cache; cache = Cache.attach(sys.argv[1]);"
        " cache.incr('b', 0); cache._tend(1);"
        " print(cache['a'], cache['b'] == os.getpid(), len(cache._attachment.tokens()))"
    )
    os.execv(sys.executable, [sys.executable, "-c", again, sys.argv[1]])
    """
    assert run(script, name) == "1 True 2\n"
    assert cache.stats().workers == 1


def test_persistent_cache_after_a_clean_stop(name: str) -> None:
    """A persistent cache is found again, with all entries, after all users have
    left."""
    script = """
    import sys
    from shmcache import Cache
    with Cache(sys.argv[1], persist=True, max_entries=20_000) as cache:
        print(len(cache), cache.get("n"), cache.check())
        cache.incr("n", initial=0)
        cache.set_many({i: str(i) * 10 for i in range(500)})
    """
    assert run(script, name) == "0 None []\n"
    found = names_of(name)
    for n in (1, 2):
        assert run(script, name) == f"501 {n} []\n"
        assert names_of(name) == found
    with Cache.attach(name) as cache:
        expected: dict[Any, Any] = {i: str(i) * 10 for i in range(500)}
        assert {**expected, "n": 3} == dict(cache.items())
        assert cache.stats().workers == 1
        cache.unlink()
    assert names_of(name) == []


def test_persistent_cache_after_all_were_killed(name: str) -> None:
    """A persistent cache is found again after all users were killed."""

    def use(link: Connection) -> None:
        cache = Cache(name, persist=True)
        cache.incr("n", initial=0)
        link.send("in")
        signal.pause()

    for _ in range(2):
        peers = [Peer(use) for _ in range(2)]
        for peer in peers:
            assert peer.hear() == "in"
        for peer in peers:
            peer.kill()
    with Cache.attach(name) as cache:
        assert cache["n"] == 4
        assert cache.check() == []
        assert len(cache._attachment.tokens()) == 1
        cache.unlink()


def test_leftovers_of_killed_users_are_replaced(name: str) -> None:
    """A cache that is not to persist starts empty after a crash, also with other
    settings than before, and is removed as ever."""

    def use(link: Connection) -> None:
        cache = Cache(name, max_entries=100_000)
        cache["a"] = 1
        link.send("in")
        signal.pause()

    peer = Peer(use)
    assert peer.hear() == "in"
    peer.kill()
    assert len(names_of(name)) > 3
    with Cache(name, max_entries=10) as cache:
        assert len(cache) == 0
        assert len(names_of(name)) == 3
    assert names_of(name) == []


# --- many at once ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.counted
def test_fifty_processes_start_at_once(new_name: Callable[[], str]) -> None:
    """Fifty processes that start at once make one segment between them, without an
    error, and the last one removes it."""
    for _ in range(CREATIONS):
        name = new_name()
        starting, start = os.pipe()

        def join(link: Connection, name: str = name, start: int = start) -> None:
            os.close(start)
            os.read(starting, 1)  # noqa: B023 - forked before it changes
            cache = Cache(name, max_entries=100)
            cache.incr("n", initial=0)
            link.send("in")
            link.recv()
            link.send((cache["n"], cache.stats().workers))
            os.read(ending, 1)  # noqa: B023 - as above
            cache.close()

        ending, end = os.pipe()

        def join_and_end(link: Connection, end: int = end) -> None:
            os.close(end)
            join(link)

        peers = [Peer(join_and_end) for _ in range(50)]
        os.close(start)
        assert {"in"} == {peer.hear() for peer in peers}
        for peer in peers:
            peer.say()
        assert {(50, 50)} == {peer.hear() for peer in peers}
        os.close(end)
        for peer in peers:
            peer.end()
        os.close(starting)
        os.close(ending)
        assert names_of(name) == []


def test_two_last_ones_out(name: str) -> None:
    """Of two processes that leave at the same time one removes the cache, although the
    other has not yet closed its files."""

    def leave_slowly(link: Connection) -> None:
        cache = Cache(name)
        close_files = Attachment._close_files

        def pause(attachment: Attachment) -> None:
            link.send("out")
            link.recv()
            close_files(attachment)

        Attachment._close_files = pause  # type: ignore[method-assign, assignment]
        link.send("in")
        link.recv()
        cache.close()

    def leave(link: Connection) -> None:
        cache = Cache(name)
        link.send("in")
        link.recv()
        cache.close()

    slow, fast = Peer(leave_slowly), Peer(leave)
    assert slow.hear() == fast.hear() == "in"
    slow.say()
    assert slow.hear() == "out"
    fast.say()
    fast.end()
    slow.say()
    slow.end()
    assert names_of(name) == []


# CRC-32 of any data followed by its own CRC-32.
SEALED = 0x2144DF1C
KEYS = [f"key {n}" for n in range(7)]
PREFIX = {key: key.encode() + b"|" for key in KEYS}


def sealed(key: str, random: Random) -> bytes:
    """A value of some random length that names its key and carries its checksum."""
    data = PREFIX[key] + random.randbytes(int(2 ** random.uniform(0, 11)))
    return data + struct.pack("<I", zlib.crc32(data))


def whole(key: str, value: Any) -> bool:
    """Whether a value is one that was written under the key."""
    return bool(value.startswith(PREFIX[key]) and zlib.crc32(value) == SEALED)


@pytest.mark.slow
@pytest.mark.counted
def test_no_torn_or_foreign_value_in_a_million_reads(
    make_cache: Callable[..., Cache],
) -> None:
    """Readers of a few keys that others overwrite, delete and evict all the time get
    values of that very key, as they were written, or none."""
    # Less room than the keys' largest values need together.
    cache = make_cache(max_entries=6, max_bytes=8192, shards=1)
    read = {"get": cache.get, "peek": cache.peek, "gets": lambda k: cache.gets(k)[0]}

    def write(link: Connection) -> None:
        random = Random(os.getpid())
        n = 0
        while not link.poll(0):
            for key in random.choices(KEYS, k=100):
                n += 1
                if n % 11 == 0:
                    cache.delete(key)
                elif n % 7 == 0:
                    cache.add(key, sealed(key, random))
                else:
                    cache[key] = sealed(key, random)
        cache.close()

    def look(how: str, seed: int, found: list[int], wrong: list[object]) -> None:
        get = read[how]
        hits = 0
        for key in Random(seed).choices(KEYS, k=READS):
            value = get(key)  # type: ignore[no-untyped-call]
            if value is not None:
                hits += 1
                if not whole(key, value):
                    wrong.append((how, key, value))
        found.append(hits)

    def read_all(link: Connection) -> None:
        found: list[int] = []
        wrong: list[object] = []
        threads = [
            threading.Thread(target=look, args=(how, i, found, wrong))
            for i, how in enumerate(("get", "get", "peek", "gets"))
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            several = cache.get_many(KEYS)
            several |= cache.items()
            wrong += [pair for pair in several.items() if not whole(*pair)]
        for thread in threads:
            thread.join()
        cache.close()
        link.send((sum(found), wrong[:5]))

    writers = [Peer(write) for _ in range(2)]
    readers = [Peer(read_all) for _ in range(2)]
    hits = 0
    for _ in range(2 * READS):
        # This process reads as well.
        for key in KEYS[:2]:
            value = cache.get(key)
            hits += value is not None
            assert value is None or whole(key, value)
    for reader in readers:
        found, wrong = reader.hear()
        assert wrong == []
        hits += found
        reader.end()
    for writer in writers:
        writer.say("stop")
        writer.end()
    # In the full run of the compiled engine these are three million reads.
    assert hits > 2 * READS


# --- threads, the collector, and the end of a process ---------------------------


def test_close_while_another_thread_waits_for_the_lock(name: str) -> None:
    """The waiting thread gets CacheClosed, and touches no unmapped memory."""

    def hold(link: Connection) -> None:
        # Put the token of a holder in place, instead of stopping a real one at the
        # right moment.
        cache = Cache(name)
        cache["a"] = 1
        cache._pop_oldest(0, 0)
        words = cache._attachment.words
        holder = cache._words_of(0) + L.S_HOLDER
        semaphore = posix_semaphore(cache)
        semaphore.acquire()
        words[holder] = cache._attachment.token
        link.send("held")
        link.recv()
        words[holder] = 0
        semaphore.release()
        semaphore.close()
        cache.close()

    def wait_and_close(link: Connection) -> None:
        cache = Cache(name, lock_timeout=PATIENCE)
        outcome: list[str] = []

        def wait() -> None:
            try:
                cache["b"] = 1
            except Exception as error:
                outcome.append(type(error).__name__)

        thread = threading.Thread(target=wait)
        thread.start()
        task = f"/proc/self/task/{thread.native_id}/syscall"
        # The thread must be in the kernel, in a futex call on the semaphore and not on
        # the GIL.
        seen = ""
        while not asleep(seen := read_text(task), cache):
            time.sleep(0.001)
        cache.close()
        thread.join()
        link.send((seen, outcome))

    holder = Peer(hold)
    assert holder.hear() == "held"
    waiter = Peer(wait_and_close)
    seen, outcome = waiter.hear()
    assert outcome == ["CacheClosed"], seen
    waiter.end()
    holder.say()
    holder.end()


def posix_semaphore(cache: Cache) -> Any:
    """The semaphore of a cache's first shard."""
    import posix_ipc

    return posix_ipc.Semaphore(cache._names.semaphore(0))


def read_text(path: str) -> str:
    """A file's text."""
    with open(path) as file:
        return file.read()


def asleep(call: str, cache: Cache) -> bool:
    """Whether a thread's system call, as /proc shows it, waits for shard 0."""
    fields = call.split()
    if len(fields) < 2 or fields[0] == "running":
        return False
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(cache._names.semaphore_path(0)):
                first, last = (int(at, 16) for at in line.split()[0].split("-"))
                return first <= int(fields[1], 16) < last
    return False


class Closing:
    """A codec and clock that closes a cache in the middle of an operation, as a thread
    may."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def close(self) -> None:
        """Closes the cache, if there is one to close."""
        if self.cache:
            self.cache.close()

    def dumps(self, value: object) -> bytes:
        """Five bytes."""
        self.close()
        return b"value"

    def loads(self, data: object) -> str:
        """A text."""
        self.close()
        return "value"

    def __call__(self) -> int:
        """The time, in ns."""
        self.close()
        return time.monotonic_ns()


@pytest.mark.parametrize("at", ["codec", "clock"])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(
    "operate",
    [
        lambda cache: cache.set("b", 1),
        lambda cache: cache.get("a"),
        lambda cache: cache.incr("n"),
        lambda cache: cache.pop("a"),
        lambda cache: cache.ttl("a"),
        lambda cache: cache.touch("a"),
        lambda cache: cache.gets("a"),
        list,
        len,
        lambda cache: cache.sweep(),
        lambda cache: cache.clear(),
    ],
    ids=[
        *("set", "get", "incr", "pop", "ttl", "touch"),
        *("gets", "list", "len", "sweep", "clear"),
    ],
)
def test_close_in_the_middle_of_an_operation(
    name: str, at: str, sliding: bool, operate: Callable[[Cache], Any]
) -> None:
    """An operation whose cache is closed under it either succeeds or raises
    CacheClosed."""
    closing = Closing()
    given: dict[str, Any] = {at: closing}
    cache = Cache(name, ttl=60, sliding=sliding, **given)
    cache["a"] = 1
    cache.incr("n", initial=1)
    closing.cache = cache
    with suppress(CacheClosed):
        operate(cache)
    closing.cache = None
    cache.close()
    assert names_of(name) == []


@pytest.mark.slow
def test_collector_closes_the_last_cache_while_a_new_one_opens(
    name: str,
) -> None:
    """A cache that is garbage may be finalized at any moment of another's creation."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what is there already would only cost time
    try:
        for allocations in range(1, 100):
            cache = Cache(name)
            cycle: list[object] = [cache]
            cycle.append(cycle)
            gc.disable()
            gc.collect()
            del cache, cycle
            gc.set_threshold(allocations)
            gc.enable()
            new = Cache(name)
            new["a"] = 1
            gc.set_threshold(*threshold)
            assert new["a"] == 1
            new.close()
            gc.collect()
    finally:
        gc.enable()
        gc.set_threshold(*threshold)
        gc.unfreeze()
    assert names_of(name) == []


def test_process_that_can_start_no_thread(name: str) -> None:
    """Where no thread can be started, the cache works without its sweeper."""

    def use(_: Connection) -> None:
        threading.stack_size(1 << 46)
        with pytest.raises(RuntimeError):
            threading.Thread(target=int).start()
        cache = Cache(name, ttl=60)
        cache["a"] = 1
        assert cache["a"] == 1
        assert len(cache) == 1
        pid = os.fork()
        if pid == 0:
            cache["b"] = 1
            cache.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert cache["b"] == 1
        cache.close()

    Peer(use).end()
    assert names_of(name) == []


def test_failed_creation_leaves_nothing(name: str) -> None:
    """A segment for which there is no room leaves no lock file and no descriptor."""
    with pytest.raises(OutOfSharedMemory):
        Cache(name, max_bytes=1 << 44, max_entries=1000, shards=256)
    assert names_of(name) == []


# --- other versions of Python ---------------------------------------------------


def interpreters() -> list[str]:
    """This interpreter, and those of other versions in SHMCACHE_PYTHONS or on the
    PATH."""
    named = os.environ.get("SHMCACHE_PYTHONS", "").split(os.pathsep)
    found = [shutil.which(f"python3.{minor}") for minor in range(11, 20)]
    this = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return [
        sys.executable,
        *(path for path in (*named, *found) if path and not path.endswith(this)),
    ]


@pytest.fixture(params=interpreters(), ids=os.path.basename)
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter that has shmcache."""
    path: str = request.param
    probe = subprocess.run(
        [path, "-c", "import shmcache"], check=False, capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"shmcache cannot be imported by {path}")
    return path


def test_attach_and_exit_while_another_uses_the_cache(
    name: str, make_cache: Callable[..., Cache], python: str
) -> None:
    """No resource tracker removes, or complains about, what a process attached to."""
    cache = make_cache(name)
    script = """
    import sys
    from multiprocessing import get_context, resource_tracker
    from shmcache import Cache
    resource_tracker.ensure_running()
    cache = Cache.attach(sys.argv[1])
    cache.incr("n", initial=0)
    """
    for n in (1, 2):
        assert finish(start(script, name, python=python)) == ""
        assert n == cache["n"]
    assert len(names_of(name)) == 3
    late = """
    import sys
    from shmcache import Cache
    cache = Cache(sys.argv[1])
    cache["late"] = 1
    print("in", flush=True)
    sys.stdin.read()
    """
    last = start(late, name, python=python)
    assert last.stdout.readline() == "in\n"
    cache.close()
    assert len(names_of(name)) == 3
    finish(last)
    assert names_of(name) == []


def test_use_at_exit(name: str, python: str) -> None:
    """A function that runs at the end of the process may use the cache."""
    script = """
    import atexit, sys
    from shmcache import Cache
    cache = Cache(sys.argv[1])

    @atexit.register
    def last_words():
        cache["a"] = "b"
        print(cache["a"])
    """
    assert finish(start(script, name, python=python)) == "b\n"
    assert names_of(name) == []


WARNS_OF_HOOKS = """
import os, threading, warnings

warnings.simplefilter("always")
wait = threading.Thread(target=threading.Event().wait, daemon=True)
os.register_at_fork(after_in_parent=wait.start)
if os.fork() == 0:
    os._exit(0)
"""


def test_fork_beside_the_sweeper_is_no_fork_beside_a_thread(
    name: str, python: str
) -> None:
    """The sweeper has ended when a process forks, so Python does not warn of a
    thread."""
    command = [python, "-c", WARNS_OF_HOOKS]
    if subprocess.run(command, capture_output=True, check=True).stderr:
        # As 3.13.0 does: it counts threads after the hooks, which start the sweeper.
        pytest.skip("this Python warns of threads that began after the fork, too")
    script = """
    import os, sys
    from shmcache import Cache
    cache = Cache(sys.argv[1])
    for _ in range(100):
        cache.incr("n", initial=0)
        pid = os.fork()
        if pid == 0:
            cache.incr("n")
            cache.close()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the child failed")
    print(cache["n"])
    """
    assert finish(start(script, name, python=python)) == "200\n"
    assert names_of(name) == []
