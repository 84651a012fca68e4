"""Making, opening and removing a segment: its block and its semaphores together.

Problem: several processes may want to create the same segment at once, and a creator
may be killed half-way.

Mechanism: the caller of ``create`` and ``remove`` holds the admin lock (see
_process/lockfile.py), so one process at a time is at work.  A new segment gets its
magic word last (see header.py), so nobody uses half a segment.

Death in the middle: a segment without a magic word is replaced by the next process.
``remove`` takes the segment away first, because a segment without semaphores would be
of no use to newcomers; semaphores without a segment are replaced when the next segment
is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from shmcache._format import layout as L
from shmcache._segment import semaphores
from shmcache._segment.header import write_header

if TYPE_CHECKING:
    from shmcache._segment.block import Block
    from shmcache._segment.names import Names
    from shmcache._segment.settings import Settings


def open_block(names: Names) -> Block:
    """Open the block of an existing segment; for what it raises see ``Block``."""
    # Imported here and not above, because it imports multiprocessing, which is slow.
    from shmcache._segment.block import Block

    return Block(names)


def create(names: Names, settings: Settings, lock_inode: int, now: int) -> Block:
    """Make a new, empty segment with its semaphores; the caller holds the admin lock.

    Args:
        names: The names of the cache's files.
        settings: The settings that later users must agree to.
        lock_inode: The inode of the lock file.
        now: The time by the cache's clock, in ns.

    Raises:
        OutOfSharedMemory: If /dev/shm has not enough room.
        SegmentRefused: If another file has the name.
    """
    from shmcache._segment.block import Block, out_of_room

    geometry = settings.geometry
    block = Block(names, geometry.size)
    try:
        try:
            semaphores.make(names, geometry.shards)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            needed = geometry.shards * L.PAGE  # each semaphore is a file
            raise out_of_room(names, needed, "semaphores") from error
        write_header(block.view, names, settings, lock_inode, now)
    except BaseException:
        remove(names, geometry.shards)
        block.close()
        raise
    return block


def remove(names: Names, shards: int | None = None) -> None:
    """Remove a segment and its semaphores; the caller holds the admin lock.

    The lock file stays: its removal is up to the caller.

    Args:
        names: The names of the cache's files.
        shards: How many semaphores there are; None to remove those that the directory
            has.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(names.segment_path)
    semaphores.unlink(names, shards)
