"""A shared memory block, as ``multiprocessing.shared_memory`` has it, but safer.

What that class lacks: room that is reserved at once (``posix_fallocate``, so that a
full /dev/shm is an error now and never a SIGBUS later), a look at owner, mode and size
before a byte is believed, and no resource tracker, which would remove a block that
other processes still use.  ``SharedMemory(name=...)`` opens the same block.

A module of its own, imported when the first segment is opened, as the import of
``multiprocessing`` takes longer than that of all the rest.
"""

from __future__ import annotations

import errno
import mmap
import os
from multiprocessing.shared_memory import SharedMemory

from shmcache._format import layout as L
from shmcache._segment.create import Names, identity, no_room, open_own
from shmcache.errors import SegmentCorrupt

_never_closed: list[object] = []


class Block(SharedMemory):
    """A shared memory block, opened with care and without a resource tracker."""

    _track = False  # for SharedMemory.unlink of Python 3.13

    def __init__(self, names: Names, size: int = 0) -> None:
        """Create the block with ``size`` bytes reserved, or open it if size is 0.

        Raises FileNotFoundError, OutOfSharedMemory, SegmentRefused, SegmentCorrupt.
        """
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
            raise no_room(names, size, "entries") from error

    def current(self, names: Names) -> bool:
        """Whether the segment's name leads to this very block."""
        return identity(names.segment_path) == self._file

    def close(self) -> None:
        """Let go of the block.  The mapping ends with the last view of it."""
        self.view = memoryview(b"")
        self._buf = None  # type: ignore[assignment]
        if self._fd >= 0 and identity(self._fd) != self._file:
            # Closed beneath us, as daemons do.  The mapping has a descriptor, too, and
            # would close whatever has that number by now.
            _never_closed.append(self._mmap)
            self._fd = -1
        self._mmap = None  # type: ignore[assignment]
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
