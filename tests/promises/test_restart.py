"""Promises 9 and 10: nothing is left, and what is to persist is found again."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import signal
import struct
from functools import partial
from typing import TYPE_CHECKING

from caught import ROOMY, Writer, stop_inside
from peers import Peer, names_of

from shmcache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    import pytest


# --- 9. nothing left ------------------------------------------------------------


def test_9_attach_and_close_after_a_crash_leaves_nothing(
    make_cache: Callable[..., Cache],
) -> None:
    """When all users were killed, one of them in the midst of writing, the next process
    that opens and closes the cache removes all that they left."""
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
    """A persistent cache has all its entries after a clean stop, and the counts say
    so."""
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
    """When all workers are killed while they write, what they had written is there:
    under each worker's key the value acknowledged last, or the next one."""

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
