"""Promises 6 and 7: creation by many at once, and where memory is short."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from amounts import CREATIONS_WITH_KILLS
from namespaces import needs_mounts
from peers import PATIENCE, SHM, finish, names_of, run_and_end

from shmcache import Cache
from shmcache._process import lockfile as _lockfile

if TYPE_CHECKING:
    from collections.abc import Callable


# --- 6. creation ----------------------------------------------------------------

CREATORS = 50


def admin_of(path: str) -> int | None:
    """The PID of the process that holds the admin lock of a segment; None if no one
    does."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    asked = struct.pack(_lockfile.FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    answer = struct.unpack(_lockfile.FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    os.close(fd)
    return answer[4] if answer[0] != fcntl.F_UNLCK else None


def kill_a_creator(name: str, alive: set[int], told: int, random: Random) -> set[int]:
    """Kill the process that has the admin lock, at a random moment, and return its PID;
    return nothing if all have attached."""
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


@pytest.mark.slow
@pytest.mark.counted
@pytest.mark.once
def test_6_creators_killed_at_random(new_name: Callable[[], str]) -> None:
    """50 processes create a cache at once, and one to three of them are killed while
    they have the admin lock: the others meet in one sound segment, and nothing is left
    after them."""
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
            os.close(fd)  # closing ``go`` makes them begin
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
    """The output of a script that runs with its own /dev/shm of a certain size."""
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
    """Where a segment cannot fit, creation says how much it needs, how much is free and
    what to do, and leaves nothing."""
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
    """With any room left in /dev/shm, creation succeeds, or raises OutOfSharedMemory
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
