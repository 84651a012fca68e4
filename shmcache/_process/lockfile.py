"""The lock file of a segment: kernel locks that prove which processes are alive.

Problem: a process must know for certain that another one is dead: in any PID
namespace, whatever that process died of, and although its children live.

Mechanism: each process that uses a segment holds a kernel lock, a classic record lock
(fcntl), on one byte of the lock file, which stands for its worker row.  The kernel
drops the lock when the process ends, before the process becomes a zombie; a forked
child does not inherit it; and any process can ask (F_GETLK) whether a byte is locked.
PIDs are stored only for people to read.  Other bytes serve for other locks::

    byte 0         the admin lock: under it segments are created, removed and taken
                   over, and worker rows are handed out and reaped
    byte 1, 2      an office each, see ``Office``
    byte 16 ...    the recovery of a shard, one byte for each shard
    byte 4096 ...  a worker row, one byte for each row

There are three traps, and LockFile is built around them.  When a process closes *any*
descriptor of a file, the kernel drops all locks that the process has on that file: so
each process opens a lock file once, as one LockFile, which all users in the process
share.  The kernel grants a lock again to the process that has it already, and does not
report a process's locks to the process itself: so LockFile notes which rows are taken
by this process, and how deeply the admin lock is nested.

Death in the middle: the kernel drops all locks of the process, and the next holder of
the admin lock can tell from the header and the rows what was left half-done: no magic
word, no row lock held, a row with a token but without its lock.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from shmcache._engine import leave_on_exit, left_before_exit
from shmcache._format import layout as L
from shmcache._segment.names import identity, open_own
from shmcache.errors import LockTimeout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shmcache._segment.names import Names

_ADMIN = 0
_RECOVERY = 16  # first of MAX_SHARDS bytes
_ROW = 4096  # first of ROWS bytes
# This is in seconds.  Creating a large segment, or taking over a whole one, happens
# under the admin lock and may take that long on a slow machine.
ADMIN_TIMEOUT = 60.0

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class Office(IntEnum):
    """A task that at most one process of the host has; the value is its byte."""

    REPORTER = 1  # exports metrics, see otel.py
    LOGGER = 2  # logs statistics, see _observe/stats_log.py


class LockFile:
    """The open lock file of a segment, and the kernel locks of this process on it.

    There is one object for each file in a process; see ``open``.  A *user* is any
    object that stands for one reason to keep the file open.
    """

    def __init__(self, names: Names, *, create: bool) -> None:
        self._path = names.lock_path
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT * create
        self.is_new = create
        try:
            self._fd = open_own(self._path, flags | os.O_EXCL * create)
        except FileExistsError:
            self.is_new = False
            self._fd = open_own(self._path, flags)
        file = os.fstat(self._fd)
        self.inode = file.st_ino
        self._file = file.st_dev, file.st_ino
        self._users: set[object] = set()
        self._pid = 0
        self._rows: dict[int, object] = {}  # taken by this process, each with its user
        self._depth = 0  # how often this process has the admin lock, nested

    # --- life -----------------------------------------------------------------------

    @classmethod
    def open(cls, names: Names, user: object, *, create: bool = True) -> LockFile:
        """Open the lock file of a cache for a user, which must ``close`` it.

        Args:
            names: The names of the cache's files.
            user: The object that needs the file open.
            create: Whether to make the file if there is none.

        Raises:
            FileNotFoundError: If there is none, and ``create`` is False.
            SegmentRefused: If the file is not safely ours.
        """
        with mutex():
            self = _open_files.get(identity(names.lock_path))
            if not self or not self.intact():
                self = cls(names, create=create)
                _open_files[self._file] = self
            self._users.add(user)
            return self

    @classmethod
    @contextmanager
    def opened(cls, names: Names, *, create: bool = True) -> Iterator[LockFile]:
        """Do as ``open``, for the time of a ``with`` block."""
        user = object()
        self = cls.open(names, user, create=create)
        try:
            yield self
        finally:
            self.close(user)

    def close(self, user: object) -> None:
        """Free the user's row, and close the file after its last user.

        A second call does nothing.
        """
        with mutex():
            self.free_row(user)
            self._users.discard(user)
            if self._users:
                return
            if _open_files.get(self._file) is self:
                del _open_files[self._file]
            if self.intact():
                os.close(self._fd)
                self._fd = -1

    def intact(self) -> bool:
        """Return whether our descriptor still refers to the lock file.

        Daemons close all descriptors that they inherit; the number of ours may have
        been given to another file since.
        """
        if self._fd >= 0 and identity(self._fd) != self._file:
            self._fd = -1
        return self._fd >= 0

    def current(self) -> bool:
        """Return whether the file is open and still has its name in /dev/shm."""
        return self.intact() and identity(self._path) == self._file

    def _notice_fork(self) -> None:
        # A child has none of its parent's locks.
        if self._pid != os.getpid():
            self._rows = {}
            self._depth = 0
            self._pid = os.getpid()

    # --- the admin lock -------------------------------------------------------------

    @contextmanager
    def admin(self, what: str, timeout: float | None = None) -> Iterator[None]:
        """Hold the admin lock during a ``with`` block; blocks may be nested.

        The caller holds ``mutex()``.

        Args:
            what: What is locked, for the message of LockTimeout.
            timeout: Seconds to wait; None for ADMIN_TIMEOUT.

        Raises:
            LockTimeout: If another process keeps the lock for so long.
        """
        self._notice_fork()
        outer = self._depth
        try:
            try:
                if outer == 0:
                    self._wait(_ADMIN, what, timeout)
                self._depth = outer + 1
                yield
            finally:
                self._end_admin(outer)
        finally:
            # Unlock once more, because an exception from a signal handler may have
            # ended the first attempt.
            self._end_admin(outer)

    def _end_admin(self, outer: int) -> None:
        self._depth = outer
        if outer == 0 and self.intact():
            self._unlock(_ADMIN)

    def admin_held(self) -> bool:
        """Return whether another process holds the admin lock."""
        return self._holder(_ADMIN) is not None

    # --- worker rows ----------------------------------------------------------------

    def take_row(self, row: int, user: object) -> bool:
        """Lock a worker row for a user.

        Returns:
            False if the row is locked already, by this process or another.
        """
        self._notice_fork()
        # The kernel would grant a lock again that this process has already.
        if self._rows.setdefault(row, user) is not user:
            return False
        if self._try_lock(_ROW + row):
            return True
        del self._rows[row]
        return False

    def free_row(self, user: object) -> None:
        """Unlock the row that a user has in this process, if it has one."""
        self._notice_fork()
        for row in [row for row, owner in self._rows.items() if owner is user]:
            if self.intact():
                self._unlock(_ROW + row)
            del self._rows[row]

    def row_holder(self, row: int) -> int | None:
        """Return the PID of the other process that has a row, or None.

        It is 0 for a process in a PID namespace that we cannot see into.
        """
        return self._holder(_ROW + row)

    def used_by_others(self) -> bool:
        """Return whether another process has a worker row."""
        return self._holder(_ROW, L.ROWS) is not None

    def in_use(self) -> bool:
        """Return whether any process, this one included, has a worker row."""
        self._notice_fork()
        return bool(self._rows) or self.used_by_others()

    def remove_on_exit(self, paths: Iterable[str]) -> int:
        """Have the C library's ``exit`` remove files if no other process has a row.

        This is for processes that end without finalizing Python, see exit.h; without
        the compiled engine it does nothing.

        Args:
            paths: The files, of which the first is the lock file.

        Returns:
            The argument for ``cancel_exit``.
        """
        return leave_on_exit(self._fd, _ROW, L.ROWS, paths)

    def cancel_exit(self, registration: int) -> None:
        """Undo ``remove_on_exit``."""
        left_before_exit(registration, self._fd)

    # --- offices and recovery -------------------------------------------------------

    def take_office(self, office: Office) -> bool:
        """Lock an office; False if another process has it."""
        return self._try_lock(office)

    def leave_office(self, office: Office) -> None:
        """Unlock an office, if this process has it."""
        self._unlock(office)

    def office_holder(self, office: Office) -> int | None:
        """Return the PID of the other process that has an office, or None."""
        return self._holder(office)

    def try_recovery(self, shard: int) -> bool:
        """Become the only process that may take over a shard; see ``Attachment``.

        Returns:
            Whether that succeeded at once.
        """
        return self._try_lock(_RECOVERY + shard)

    def unlock_recovery(self, shard: int) -> None:
        """Let other processes take over a shard's lock."""
        self._unlock(_RECOVERY + shard)

    # --- bytes ----------------------------------------------------------------------

    def _try_lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def _holder(self, byte: int, length: int = 1) -> int | None:
        # Return the PID of another process with a lock in a range of bytes, or None.
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0)
        kind, _, _, _, pid = struct.unpack(
            FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, asked)
        )
        return None if kind == fcntl.F_UNLCK else max(0, pid)

    def _wait(self, byte: int, what: str, timeout: float | None = None) -> None:
        # A blocking lock (F_SETLKW) has no timeout, so this tries again and again.
        patience = ADMIN_TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + patience
        pause = 0.0005
        while not self._try_lock(byte):
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    f"{what} is locked by process {self._holder(byte)} for over"
                    f" {patience:.0f} s; see whether that process is stopped"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)


# The lock files that this process has open, by device and inode.
_open_files: dict[tuple[int, int] | None, LockFile] = {}


# One mutex for each process, by PID: a mutex inherited through fork may be held by a
# thread that does not exist in the child.  A dict, because setdefault is atomic.
_mutexes: dict[int, threading.RLock] = {}


def mutex() -> threading.RLock:
    """Return the lock that guards the attachments and lock files of this process."""
    pid = os.getpid()
    return _mutexes.get(pid) or _mutexes.setdefault(pid, threading.RLock())
