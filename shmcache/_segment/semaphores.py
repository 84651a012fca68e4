"""The semaphores of a segment, one a shard: making, resetting and removing them.

A semaphore has one permit while nobody is inside its shard.  It is only the queue in
front of the shard's lock; the segment says which worker holds the lock (see
_engine/lock.py).

Death in the middle: the caller holds the admin lock, and the next process that makes or
resets semaphores does it for all shards, whatever the dead one has left.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import posix_ipc

from shmcache._segment.names import SHM_DIR

if TYPE_CHECKING:
    from shmcache._segment.names import Names


def make(names: Names, shards: int) -> None:
    """Make new semaphores with one permit each, in place of any that are there."""
    for shard in range(shards):
        _make(names.semaphore(shard))


def reset(names: Names, shards: int) -> None:
    """Give each semaphore one permit; no process uses the segment now.

    The semaphores are kept wherever possible, because a process that was forked from a
    dead user may have them open although it has not used the cache yet.  It must not
    wait at other semaphores than new processes do.
    """
    for shard in range(shards):
        name = names.semaphore(shard)
        try:
            semaphore = posix_ipc.Semaphore(name)
        except (posix_ipc.Error, OSError):
            _make(name)
            continue
        permits = semaphore.value
        if permits == 0:
            semaphore.release()
        elif permits > 1:
            # Only damage leaves so many permits; a new semaphore is the simplest
            # remedy.
            _make(name)
        semaphore.close()


def unlink(names: Names, shards: int | None = None) -> None:
    """Remove the semaphores' names.

    Args:
        names: The names of the cache's files.
        shards: How many there are; None to remove those that the directory has.
    """
    if shards is None:
        prefix = f"sem.{names.segment}."
        left = [
            entry.removeprefix("sem.")
            for entry in os.listdir(SHM_DIR)
            if entry.startswith(prefix) and entry[len(prefix) :].isdigit()
        ]
    else:
        left = [names.semaphore(shard)[1:] for shard in range(shards)]
    for name in left:
        _unlink("/" + name)


def _make(name: str) -> None:
    _unlink(name)
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=1).close()


def _unlink(name: str) -> None:
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError as error:
        raise PermissionError(f"semaphore {name}: {error}") from error
