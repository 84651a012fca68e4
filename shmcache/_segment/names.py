"""The names of a cache's files in /dev/shm, and opening only files that are our own.

Problem: every user of the host may create files in /dev/shm.  So the file that has a
cache's name may belong to somebody else, may be readable by others, or may be no
regular file at all: a link, a pipe, a directory.

Mechanism: each name contains the number of the user, and ``open_own`` checks the type,
the owner and the mode of a file after opening it and before anything in it is trusted.

Death in the middle: nothing here writes to a file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass

from shmcache.errors import SegmentRefused

SHM_DIR = "/dev/shm"  # noqa: S108 - where Linux keeps POSIX shared memory
LOCK_SUFFIX = ".lease"  # of the lock file; part of the format, so it stays
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True)
class Names:
    """The names that one user's cache has in /dev/shm."""

    cache: str
    segment: str  # as multiprocessing.shared_memory knows it

    @classmethod
    def of(cls, name: str, uid: int | None = None) -> Names:
        """Return the names of a cache's files.

        Args:
            name: The cache's name.
            uid: The user to whom the cache belongs; the default is the user of this
                process.

        Raises:
            ValueError: If the name cannot be part of a file name here.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"cache name {name!r} is not 1 to 100 letters, digits, '.', '_' or '-';"
                " choose such a name"
            )
        if name.endswith(LOCK_SUFFIX):
            raise ValueError(
                f"cache name {name!r} ends in {LOCK_SUFFIX}, as the lock files of"
                " caches do; choose another name"
            )
        return cls(name, f"shmcache-{os.geteuid() if uid is None else uid}-{name}")

    @property
    def segment_path(self) -> str:
        """Return the path of the segment."""
        return f"{SHM_DIR}/{self.segment}"

    @property
    def lock_path(self) -> str:
        """Return the path of the lock file."""
        return f"{SHM_DIR}/{self.segment}{LOCK_SUFFIX}"

    def semaphore(self, shard: int) -> str:
        """Return the name of a shard's semaphore, as ``sem_open`` takes it."""
        return f"/{self.segment}.{shard}"

    def semaphore_path(self, shard: int) -> str:
        """Return the path of a shard's semaphore."""
        return f"{SHM_DIR}/sem.{self.segment}.{shard}"


def identity(file: str | int) -> tuple[int, int] | None:
    """Return the device and inode of a file, which no other file has meanwhile.

    Args:
        file: A path or a descriptor.  A symbolic link is not followed.

    Returns:
        None if there is no such file.
    """
    try:
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_own(path: str, flags: int) -> int:
    """Open a file of a cache, provided that it is a regular file that only we can use.

    Args:
        path: The file.
        flags: As for ``os.open``; pass O_NOFOLLOW with them.

    Returns:
        A descriptor.

    Raises:
        SegmentRefused: If the file is not a regular one, belongs to another user, or
            can be opened by others.
        OSError: If opening failed for another reason; FileNotFoundError included.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait until another process writes
        # into it.
        fd = os.open(path, flags | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.EACCES, errno.ENXIO):
            raise
        raise SegmentRefused(
            f"{path} is no file of ours ({os.strerror(error.errno or 0)}):"
            " find out who put it there, and remove it or choose another cache name"
        ) from error
    found = os.fstat(fd)
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = "is not a regular file"
    elif found.st_uid != os.geteuid():
        reason = f"belongs to user {found.st_uid}, and we are user {os.geteuid()}"
    elif found.st_mode & 0o077:
        reason = f"has mode {stat.S_IMODE(found.st_mode):o}, so others can open it"
    if reason:
        os.close(fd)
        raise SegmentRefused(
            f"{path} {reason}; a cache's files belong to its user and have mode 600:"
            " remove the file, or choose another cache name"
        )
    return fd
