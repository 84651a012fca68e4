"""Processes that are caught inside the write section, and stopped there."""

from __future__ import annotations

import itertools
import os
import signal
import time
from random import Random
from typing import TYPE_CHECKING, Any

import psutil
from peers import PATIENCE, Peer, run

from shmcache import Cache
from shmcache._format import layout as L

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


# Writing so much takes long enough to stop the process in the middle of it.
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
    """Check that the cache works here and in a new process, and is sound."""
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
