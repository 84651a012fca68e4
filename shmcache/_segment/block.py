"""A shared memory block, as ``multiprocessing.shared_memory`` has it, but safer.

Problem: three things that SharedMemory does are not safe here.  It does not reserve
the room, so a full /dev/shm becomes a SIGBUS at some later store.  It opens any file
that has the name.  And before Python 3.13 its resource tracker removes a block that
other processes still use.

Mechanism: ``Block`` reserves the room at once (``posix_fallocate``), so that too small
a /dev/shm is an error at creation; it opens only files that are our own (see names.py);
and it has no resource tracker.  ``SharedMemory(name=...)`` opens the same block.

Death in the middle: a creator that dies leaves a file without a magic word, or one that
is too short, and the next process that holds the admin lock replaces it.

Only create.py imports this module, and does so when the first segment is opened: the
import of ``multiprocessing`` takes longer than that of everything else together.
"""

from __future__ import annotations

import errno
import mmap
import os
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING

from shmcache._format import layout as L
from shmcache._segment.names import SHM_DIR, identity, open_own
from shmcache.errors import OutOfSharedMemory, SegmentCorrupt

if TYPE_CHECKING:
    from shmcache._segment.names import Names

_never_closed: list[object] = []


class Block(SharedMemory):
    """A shared memory block that is opened with care and without a resource tracker.

    Args:
        names: The names of the cache's files.
        size: Bytes to reserve for a new block; 0 to open an existing one.

    Raises:
        FileNotFoundError: If there is no block to open.
        OutOfSharedMemory: If /dev/shm has not enough room for a new block.
        SegmentRefused: If the file is not safely ours.
        SegmentCorrupt: If an existing block is too short to have a header.
    """

    _track = False  # for SharedMemory.unlink of Python 3.13

    def __init__(self, names: Names, size: int = 0) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if size:
            flags |= os.O_CREAT | os.O_EXCL
        self._name = "/" + names.segment
        self._fd = open_own(names.segment_path, flags)
        try:
            if size:
                self._reserve(names, size)
            self._size = os.fstat(self._fd).st_size
            if self._size < L.ROWS_AT + L.ROWS * L.ROW_SIZE:
                raise SegmentCorrupt(
                    f"{names.segment_path} has {self._size} bytes, too few for a"
                    " segment: its creation was cut short, or another program cut the"
                    f" file; remove it with: shmcache unlink {names.cache}"
                )
            self._mmap = mmap.mmap(self._fd, self._size)
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        self._buf = self.view = memoryview(self._mmap)
        self._file = identity(self._fd)

    def _reserve(self, names: Names, size: int) -> None:
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            os.unlink(names.segment_path)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise out_of_room(names, size, "entries") from error

    def current(self, names: Names) -> bool:
        """Return whether the segment's name still refers to this block."""
        return identity(names.segment_path) == self._file

    def close(self) -> None:
        """Close the block; the memory stays mapped until the last view of it goes."""
        self.view = memoryview(b"")
        self._buf = None  # type: ignore[assignment]
        if self._fd >= 0 and identity(self._fd) != self._file:
            # Something else has closed our descriptor, as daemons close all that they
            # inherit.  The mapping has a duplicate of it, which has been closed, too:
            # unmapping would close any other file that has its number by now.
            _never_closed.append(self._mmap)
            self._fd = -1
        self._mmap = None  # type: ignore[assignment]
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def out_of_room(names: Names, size: int, what: str) -> OutOfSharedMemory:
    """Return the error that says how much room /dev/shm lacks, and what to do.

    Args:
        names: The names of the cache's files.
        size: How many bytes were needed.
        what: What they were needed for.
    """
    free = os.statvfs(SHM_DIR)
    return OutOfSharedMemory(
        f"cache {names.cache!r} needs {size:,} bytes of shared memory for its {what},"
        f" and {SHM_DIR} has {free.f_bavail * free.f_frsize:,} free;"
        " lower max_bytes or max_entries, or give it more room (docker:"
        " --shm-size, Kubernetes: an emptyDir of medium Memory on /dev/shm)"
    )
