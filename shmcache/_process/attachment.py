"""Who uses a segment: attachments, worker rows, leases.

Problem: to know for certain that a process is dead, in any PID namespace, whatever
it died of, and although its children live.

Mechanism: each process that uses a segment holds a kernel lock for its worker row:
a classic record lock (fcntl) on one byte of the lease file.  The kernel drops it
when the process ends, before it is a zombie; a forked child does not inherit it;
and anybody can ask (F_GETLK) whether a byte is locked.  A row's token is its number
and an incarnation that is never used again, so a row handed on is not mistaken for
its former owner.  PIDs are written down for people only.

The trap of record locks is that closing *any* descriptor of the file drops all the
locks that the process has on it.  So a process has each lease file open once, as one
Lease, found in ``_leases``; and all its Cache objects of one name share one Attachment,
found in ``_attachments``.

Fork is noticed without hooks, as some servers fork in C: ``guard`` is a page that
the kernel wipes in the child (MADV_WIPEONFORK) and that else holds the token.

Byte 0 of the lease file is the admin lock, under which segments are created,
removed and taken over, and rows handed out and reaped.  Death in the middle of any
of these frees the lock and leaves what the next holder can tell from the header:
no magic word, no leases, a row whose lease is gone.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import mmap
import os
import struct
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shmcache._format import layout as L
from shmcache._segment import create as _segment
from shmcache.errors import (
    LockTimeout,
    SegmentCorrupt,
    SegmentNotFound,
    TooManyWorkers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from shmcache._segment.block import Block
    from shmcache._segment.create import Header, Names, Settings
from shmcache._engine import leave_on_exit, left_before_exit

log = logging.getLogger("shmcache")

_ADMIN = 0
# Offices, each held by one process at most.
REPORTER = 1  # exports metrics, see otel.py
LOGGER = 2  # logs statistics, see _stats_log.py
_RECOVERY = 16  # first of MAX_SHARDS bytes
_ROW = 4096  # first of ROWS bytes
# Creating a large segment, or repairing one, happens under the admin lock.
ADMIN_TIMEOUT = 60.0

_MADV_WIPEONFORK = 18  # of <asm-generic/mman-common.h>; module mmap has no name for it
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class Lease:
    """The open lease file of a segment, and the kernel locks on its bytes.

    One object for each file in a process, whoever uses it: see ``open``.
    """

    def __init__(self, names: Names, *, create: bool) -> None:
        self._path = names.lock_path
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT * create
        self.is_new = create
        try:
            self.fd = _segment.open_own(self._path, flags | os.O_EXCL * create)
        except FileExistsError:
            self.is_new = False
            self.fd = _segment.open_own(self._path, flags)
        file = os.fstat(self.fd)
        self.inode = file.st_ino
        self._file = file.st_dev, file.st_ino
        self._users: set[object] = set()
        self._pid = 0
        self._rows: dict[int, object] = {}  # of this process, and which user has them
        self._depth = 0  # of the admin lock

    @classmethod
    def open(cls, names: Names, user: object, *, create: bool = True) -> Lease:
        """The lease file that has the name, for a user who will ``close`` it.

        Raises FileNotFoundError, SegmentRefused, OSError.
        """
        with mutex():
            self = _leases.get(_segment.identity(names.lock_path))
            if not self or not self.intact():
                self = cls(names, create=create)
                _leases[self._file] = self
            self._users.add(user)
            return self

    @classmethod
    @contextmanager
    def opened(cls, names: Names, *, create: bool = True) -> Iterator[Lease]:
        """The same for the time of a block."""
        user = object()
        self = cls.open(names, user, create=create)
        try:
            yield self
        finally:
            self.close(user)

    def close(self, user: object) -> None:
        """Free the user's row, and with its last user the file; fine to repeat."""
        with mutex():
            self.free_row(user)
            self._users.discard(user)
            if self._users:
                return
            if _leases.get(self._file) is self:
                del _leases[self._file]
            if self.intact():
                os.close(self.fd)
                self.fd = -1

    def intact(self) -> bool:
        """Whether the descriptor is still ours.

        Daemons close all that they inherit; its number may be another file's by now.
        """
        if self.fd >= 0 and _segment.identity(self.fd) != self._file:
            self.fd = -1
        return self.fd >= 0

    def current(self) -> bool:
        """Whether the descriptor is open on the file that has the name now."""
        return self.intact() and _segment.identity(self._path) == self._file

    def try_lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self, byte: int) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, byte)

    def holder(self, byte: int, length: int = 1) -> int | None:
        """The PID of another process with a lock in a range, None if there is none.

        It is 0 if that process lives in a PID namespace that we cannot see into.
        """
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0)
        kind, _, _, _, pid = struct.unpack(
            _FLOCK, fcntl.fcntl(self.fd, fcntl.F_GETLK, asked)
        )
        return None if kind == fcntl.F_UNLCK else max(0, pid)

    def in_use(self) -> bool:
        """Whether a process, this one included, has a worker row."""
        self._notice_fork()
        return bool(self._rows) or self.holder(_ROW, L.ROWS) is not None

    def wait(self, byte: int, what: str) -> None:
        """Lock a byte; LockTimeout, naming the holder, after ADMIN_TIMEOUT."""
        deadline = time.monotonic() + ADMIN_TIMEOUT
        pause = 0.0005
        while not self.try_lock(byte):
            if time.monotonic() > deadline:
                raise LockTimeout(
                    f"{what} is locked by process {self.holder(byte)} for over"
                    f" {ADMIN_TIMEOUT:.0f} s; see whether that process is stopped"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)

    def take_row(self, row: int, user: object) -> bool:
        """Lock a row for a user, unless anybody has it."""
        self._notice_fork()
        # The kernel would give this process a lock that it has once more.
        if self._rows.setdefault(row, user) is not user:
            return False
        if self.try_lock(_ROW + row):
            return True
        del self._rows[row]
        return False

    def free_row(self, user: object) -> None:
        """Unlock the row that a user has in this process, if any."""
        self._notice_fork()
        for row in [row for row, owner in self._rows.items() if owner is user]:
            if self.intact():
                self.unlock(_ROW + row)
            del self._rows[row]

    @contextmanager
    def admin(self, what: str) -> Iterator[None]:
        """Hold the admin lock; the caller holds ``mutex()``, as may be nested."""
        self._notice_fork()
        outer = self._depth
        try:
            try:
                if outer == 0:
                    self.wait(_ADMIN, what)
                self._depth = outer + 1
                yield
            finally:
                self._end_admin(outer)
        finally:
            # Again, as what a signal handler raises may strike in the first.
            self._end_admin(outer)

    def _end_admin(self, outer: int) -> None:
        self._depth = outer
        if outer == 0 and self.intact():
            self.unlock(_ADMIN)

    def _notice_fork(self) -> None:
        # A child has none of its parent's locks.
        if self._pid != os.getpid():
            self._rows = {}
            self._depth = 0
            self._pid = os.getpid()


_leases: dict[tuple[int, int] | None, Lease] = {}


# One mutex a process: a lock inherited through fork may be held by a thread that
# does not exist here, and setdefault is atomic.
_mutexes: dict[int, threading.RLock] = {}


def mutex() -> threading.RLock:
    """The lock of this process's attachments."""
    pid = os.getpid()
    return _mutexes.get(pid) or _mutexes.setdefault(pid, threading.RLock())


_attachments: dict[str, Attachment] = {}


def _referred(names: Names) -> Attachment | None:
    # This process's attachment, with a reference more.  The collector may finalize
    # its last user at any moment, until the reference is there, and close it.
    known = _attachments.get(names.segment)
    if known:
        known.references += 1
        if _attachments.get(names.segment) is not known:
            known = None
    return known


class Attachment:
    """One segment as one process, and each process forked from it, uses it."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.block: Block
        self.header: Header
        self.words: memoryview
        self.references = 0
        self._guard_page, self.guard = _fork_guard()
        self.token = 0
        self.row = 0
        self._leaver = 0
        self.lease = Lease.open(names, self)
        # What the interpreted engine and get_or_set must know of our threads: who is
        # inside which shard, or about to be, and who computes which key.
        self.owners: dict[int, int] = {}
        self.recovering: dict[int, int] = {}
        self.flights: dict[int, Any] = {}
        # Hits of this process that wait to be applied, for all its Cache objects: see
        # touch_buffers.
        self.touches: tuple[memoryview, memoryview, memoryview] | None = None

    # --- life -----------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        names: Names,
        settings: Settings | None,
        now: int,
        prepare: Callable[[Attachment], None],
    ) -> Attachment:
        """Attach to a segment, or create it; without settings only attach.

        ``prepare`` is called, still under the admin lock, when the segment was left by
        others and is to be used again.
        """
        with mutex():
            known = _referred(names)
            if known:
                try:
                    if known.usable():
                        if settings:
                            known.header.settings.require_same(settings, names.cache)
                        known.enter()
                        return known
                except BaseException:
                    known.release()
                    raise
                known.release()
            while True:
                self = cls(names)
                try:
                    with self.admin():
                        # Whoever locked one that was removed meanwhile tries again.
                        if self.lease.current():
                            self._find_or_create(settings, now, prepare)
                            self.references = 1
                            _attachments[names.segment] = self
                            return self
                except BaseException:
                    self._end()
                    raise
                self._end()

    def _find_or_create(
        self,
        settings: Settings | None,
        now: int,
        prepare: Callable[[Attachment], None],
    ) -> None:
        try:
            warm = self._find(settings, now)
            self.words = self.block.view.cast("Q")
            if warm:
                self._reset()
            self.enter()
            if warm:
                prepare(self)
        except BaseException:
            self._remove_lone_lease()
            raise

    def _find(self, settings: Settings | None, now: int) -> bool:
        # The segment, made if need be; whether it was left by others.
        from shmcache._segment.block import Block

        names = self.names
        in_use = self.lease.holder(_ROW, L.ROWS) is not None
        try:
            self.block = Block(names)
            self.header = _segment.read_header(names, self.block.view)
        except FileNotFoundError:
            if settings is None:
                self._remove_lease()
                raise SegmentNotFound(
                    f"there is no cache named {names.cache!r} of user {os.geteuid()};"
                    " create it with Cache(name, ...)"
                ) from None
            self._create(settings, now)
            return False
        except SegmentCorrupt:
            if in_use or not self._unfinished():
                raise
            self._replace(settings, now, "its creator died")
            return False
        if not in_use and not self.header.settings.persist:
            self._replace(settings, now, "all its users died")
            return False
        if settings:
            self.header.settings.require_same(settings, names.cache)
        return not in_use

    def _unfinished(self) -> bool:
        # No magic word: a creator was killed before it was done.
        try:
            with open(self.names.segment_path, "rb") as file:
                return not file.read(8).strip(b"\0")
        except OSError:
            return False

    def _create(self, settings: Settings, now: int) -> None:
        self.block = _segment.create(self.names, settings, self.lease.inode, now)
        self.header = _segment.read_header(self.names, self.block.view)
        log.info(
            "created cache %s: %d bytes, %d shards",
            self.names.cache,
            self.header.geometry.size,
            self.header.geometry.shards,
            extra={"cache": self.names.cache, "event": "created"},
        )

    def _replace(self, settings: Settings | None, now: int, why: str) -> None:
        _segment.remove(self.names)
        if settings is None:
            self._remove_lease()
            raise SegmentNotFound(
                f"cache {self.names.cache!r} was left over ({why}) and has been"
                " removed; create it with Cache(name, ...)"
            )
        log.info(
            "cache %s starts anew: %s",
            self.names.cache,
            why,
            extra={"cache": self.names.cache, "event": "replaced"},
        )
        self._create(settings, now)

    def _reset(self) -> None:
        # Nobody has a lease: what locks, rows and claims say is of the dead.
        _segment.reset_semaphores(self.names, self.header.geometry.shards)
        self.reap()
        geometry = self.header.geometry
        for shard in range(geometry.shards):
            base = (geometry.shards_at + shard * geometry.stride) // 8
            self.words[base + L.S_HOLDER] = 0
            for i in range(2 * L.IN_FLIGHT):
                self.words[base + L.S_IN_FLIGHT + i] = 0

    def usable(self) -> bool:
        """Whether new users of the name would come to this very segment.

        A segment left by the dead is replaced beside the lease file, which stays.
        """
        return self.lease.current() and self.block.current(self.names)

    def entered(self) -> bool:
        """Whether this process, not one that forked it, has the token."""
        return self.token != 0 and self.guard[0] == self.token

    def enter(self) -> None:
        """Take a worker row for this process, unless it has one."""
        with mutex():
            if self.entered():
                return
            if not self.usable():
                raise SegmentNotFound(self.names.cache)
            with self.admin():
                if not self.usable():
                    raise SegmentNotFound(self.names.cache)
                self.owners.clear()
                self.recovering.clear()
                self.flights.clear()
                if self.touches:  # they are of the process that forked us
                    for shard in range(len(self.touches[2])):
                        self.touches[2][shard] = 0
                try:
                    self._take_row()
                except BaseException:
                    if not self.entered():
                        self.lease.free_row(self)
                    raise
        _leave_at_exit()
        log.debug(
            "worker %d attached to cache %s",
            os.getpid(),
            self.names.cache,
            extra={"cache": self.names.cache, "event": "attached", "pid": os.getpid()},
        )

    def _take_row(self) -> None:
        row = self._free_row()
        self._provide_for_exit()
        self.row = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        self.words[L.H_GENERATION] += 1
        incarnation = self.words[L.H_GENERATION] & 0xFFFF_FFFF_FFFF
        token = incarnation << 16 | (row + 1)
        self.words[self.row + L.R_PID] = os.getpid()
        self.words[self.row + L.R_STARTED] = time.time_ns()
        self.words[self.row + L.R_TOKEN] = token
        self.token = token
        self.guard[0] = token

    def _provide_for_exit(self) -> None:
        if self.header.settings.persist:
            return
        names = self.names
        shards = range(self.header.geometry.shards)
        paths = [names.lock_path, names.segment_path]
        paths += [names.semaphore_path(shard) for shard in shards]
        self._leaver = leave_on_exit(self.lease.fd, _ROW, L.ROWS, paths)

    def _free_row(self) -> int:
        # A row that nobody has, its lease taken; the dead leave theirs if need be.
        for _ in range(2):
            for row in range(L.ROWS):
                token = self.words[(L.ROWS_AT + row * L.ROW_SIZE) // 8 + L.R_TOKEN]
                if token == 0 and self.lease.take_row(row, self):
                    return row
            self.reap()
        raise TooManyWorkers(
            f"cache {self.names.cache!r} has {L.ROWS} processes attached, and no more"
            " fit; close it in processes that do not need it"
        )

    def release(self) -> None:
        """One user less; with the last one this process leaves the segment."""
        with mutex():
            self.references -= 1
            if self.references <= 0:
                self._end()

    def _end(self) -> None:
        try:
            if _attachments.get(self.names.segment) is self:
                del _attachments[self.names.segment]
            if self.entered():
                if self.lease.intact():
                    self._leave()
                else:
                    log.error(
                        "cache %s lost its lease: something closed file descriptors"
                        " of this process; make the cache after that",
                        self.names.cache,
                        extra={"cache": self.names.cache, "event": "lease lost"},
                    )
        finally:
            self._close_files()

    def _leave(self) -> None:
        # The last one out removes the segment, unless it is to persist.
        with self.admin():
            row = (self.token & 0xFFFF) - 1
            self.guard[0] = 0
            self._fold(row)
            # Still under the admin lock: else two that leave together would each see
            # the other's lease, and neither would be the last.
            self.lease.free_row(self)
            if self.header.settings.persist or not self.usable():
                return
            if self.lease.holder(_ROW, L.ROWS) is None:
                try:
                    _segment.remove(self.names, self.header.geometry.shards)
                    self._remove_lease()
                except PermissionError as error:
                    # This process has become another user's since.
                    log.warning(
                        "cache %s is left behind: %s",
                        self.names.cache,
                        error,
                        extra={"cache": self.names.cache, "event": "left behind"},
                    )

    def _remove_lone_lease(self) -> None:
        # Under the admin lock: without a segment a lease file is of no use to anybody,
        # and beside one that we were refused it is not for us to leave one.
        if (
            self.lease.current()
            and (self.lease.is_new or not os.path.lexists(self.names.segment_path))
            and not self.lease.in_use()
        ):
            self._remove_lease()

    def _remove_lease(self) -> None:
        os.unlink(self.names.lock_path)

    def _close_files(self) -> None:
        try:
            try:
                left_before_exit(self._leaver, self.lease.fd)
                self.words = _segment.Gone()  # type: ignore[assignment]
                if hasattr(self, "block"):
                    self.block.close()
            finally:
                self.lease.close(self)
        finally:
            self.lease.close(self)  # again, for the reason given in Lease.admin

    def unlink(self) -> None:
        """Remove the names; processes that are attached keep what they have."""
        with mutex(), self.admin():
            if self.lease.current():
                _segment.remove(self.names, self.header.geometry.shards)
                self._remove_lease()

    # --- locks ------------------------------------------------------------------------

    def admin(self) -> AbstractContextManager[None]:
        """Hold the admin lock; the caller holds ``mutex()``, as may be nested."""
        return self.lease.admin(f"cache {self.names.cache!r}")

    @contextmanager
    def recovery(self, shard: int) -> Iterator[None]:
        """Be alone, among all threads of all processes, in becoming a shard's holder.

        For engines without compare-and-swap.  ``recovering`` tells what to give back
        when an exception strikes where no ``finally`` is in force.
        """
        me = threading.get_ident()
        while self.recovering.setdefault(shard, me) != me:
            time.sleep(0.0001)
        try:
            self.lease.wait(_RECOVERY + shard, f"recovery of shard {shard}")
            yield
        finally:
            self.end_recovery(shard)

    def end_recovery(self, shard: int) -> None:
        """Let others become the holder of a shard."""
        self.lease.unlock(_RECOVERY + shard)
        self.recovering.pop(shard, None)

    # --- rows -----------------------------------------------------------------------

    def alive(self, token: int) -> bool:
        """Whether the worker with this token still has its lease."""
        if token == self.token and self.entered():
            return True
        row = (token & 0xFFFF) - 1
        if not 0 <= row < L.ROWS:
            return False
        at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        if self.words[at + L.R_TOKEN] != token:
            return False
        return self.lease.holder(_ROW + row) is not None

    def pid(self, token: int) -> int:
        """The PID that a worker wrote down, 0 if its row has been handed on."""
        row = (token & 0xFFFF) - 1
        if not 0 <= row < L.ROWS:
            return 0
        at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        return self.words[at + L.R_PID] if self.words[at + L.R_TOKEN] == token else 0

    def tokens(self) -> list[int]:
        """The tokens in the rows, of the living and of the dead not yet reaped."""
        first = L.ROWS_AT // 8 + L.R_TOKEN
        last = first + L.ROWS * L.ROW_WORDS
        return [token for token in self.words[first : last : L.ROW_WORDS] if token]

    def held(self) -> tuple[int, int]:
        """Handles that living workers have not closed yet, and leases in force."""
        handles = leases = 0
        words = self.words
        for token in filter(self.alive, self.tokens()):
            at = (L.ROWS_AT + ((token & 0xFFFF) - 1) * L.ROW_SIZE) // 8
            handles += max(0, words[at + L.R_OPENED] - words[at + L.R_CLOSED])
            leases += max(0, words[at + L.R_LEASES] - words[at + L.R_RETURNED])
        return handles, leases

    def reap(self) -> int:
        """Free the rows of dead workers, keeping their counts; how many there were.

        But those of who died holding a lock: who takes it over wants to say who died.
        """
        dead = {token for token in self.tokens() if not self.alive(token)}
        dead -= self._holders() if dead else set()
        if not dead:
            return 0
        with mutex(), self.admin():
            reaped = 0
            for token in dead:
                row = (token & 0xFFFF) - 1
                at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
                if 0 <= row < L.ROWS and not self.alive(self.words[at + L.R_TOKEN]):
                    self._fold(row)
                    reaped += 1
        if reaped:
            log.info(
                "reaped %d dead workers of cache %s",
                reaped,
                self.names.cache,
                extra={"cache": self.names.cache, "event": "reaped", "count": reaped},
            )
        return reaped

    def _holders(self) -> set[int]:
        geometry = self.header.geometry
        first = geometry.shards_at // 8 + L.S_HOLDER
        return {
            self.words[first + shard * geometry.stride // 8]
            for shard in range(geometry.shards)
        }

    def _fold(self, row: int) -> None:
        # Add a row's counters to the totals of the gone; free the row.  The sums are
        # written to the bank that does not count, with the row's token; one store makes
        # it the one that counts.  Whoever dies before that store has done nothing, and
        # after it the token tells the next one that only the clearing is left.
        at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        words = self.words
        token = words[at + L.R_TOKEN]
        counting = words[L.H_RETIRED] & 1
        old = L.RETIRED_AT + counting * L.RETIRED_WORDS
        half = words[old + L.RETIRED_TOKEN]
        if half != token and self._names_row(half):
            # Whoever folded that one died before clearing it.  First things first: in
            # the next bank no word would tell that its counts are in the sums.
            self._clear_row((L.ROWS_AT + ((half & 0xFFFF) - 1) * L.ROW_SIZE) // 8)
        if token and half != token:
            new = L.RETIRED_AT + (1 - counting) * L.RETIRED_WORDS
            for i in range(L.ROW_WORDS - L.R_COUNTERS):
                total = words[old + i] + words[at + L.R_COUNTERS + i]
                words[new + i] = total & L.MASK64
            words[new + L.RETIRED_TOKEN] = token
            words[L.H_RETIRED] = 1 - counting
        self._clear_row(at)

    def _names_row(self, token: int) -> bool:
        row = (token & 0xFFFF) - 1
        at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        return 0 <= row < L.ROWS and self.words[at + L.R_TOKEN] == token

    def _clear_row(self, at: int) -> None:
        words = self.words
        for i in range(L.R_COUNTERS, L.ROW_WORDS):
            words[at + i] = 0
        words[L.H_FREED] = (words[L.H_FREED] + 1) & L.MASK64
        words[at + L.R_TOKEN] = 0

    def count(self, word: int, n: int = 1) -> None:
        """Add to a counter of this worker's row."""
        at = self.row + word
        self.words[at] = (self.words[at] + n) & L.MASK64

    def counters(self) -> list[int]:
        """The sums of all workers' counters, of the living and of the gone."""
        return sum_counters(self.words)


def elected(attachment: Attachment, byte: int) -> bool:
    """Whether this process has an office of the segment: takes it if nobody has."""
    try:
        return attachment.lease.intact() and attachment.lease.try_lock(byte)
    except (OSError, ValueError):
        return False  # closed just now


def resign(attachment: Attachment, byte: int) -> None:
    """Give up an office, if this process has it."""
    try:
        if attachment.lease.intact():
            attachment.lease.unlock(byte)
    except (OSError, ValueError):
        pass  # closed just now, and so given up


def sum_counters(words: memoryview) -> list[int]:
    """The sums of all rows' counters and of the fold bank that counts."""
    n = L.ROW_WORDS - L.R_COUNTERS
    while True:
        freed = words[L.H_FREED]
        counting = words[L.H_RETIRED] & 1
        bank = L.RETIRED_AT + counting * L.RETIRED_WORDS
        totals = words[bank : bank + n].tolist()
        folded = words[bank + L.RETIRED_TOKEN]
        rows = words[L.ROWS_AT // 8 : (L.ROWS_AT + L.ROWS * L.ROW_SIZE) // 8].tolist()
        # After two rows that were folded meanwhile the bank is the same again.
        if (words[L.H_RETIRED] & 1, words[L.H_FREED]) == (counting, freed):
            break
    for at in range(0, len(rows), L.ROW_WORDS):
        if rows[at + L.R_TOKEN] not in (0, folded):
            for i in range(n):
                totals[i] += rows[at + L.R_COUNTERS + i]
    return totals


def _fork_guard() -> tuple[mmap.mmap, memoryview]:
    # A private page that reads as zeros in a forked child.
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = memoryview(page).cast("Q")
    try:
        page.madvise(_MADV_WIPEONFORK)
    except OSError:
        # Before Linux 4.14, or under an emulated kernel: forks in C go unnoticed.
        def wipe() -> None:
            words[0] = 0

        os.register_at_fork(after_in_child=wipe)
    return page, words


_leaving: set[int] = set()


def _leave_at_exit() -> None:
    # Children of multiprocessing end by os._exit; only its own finalizers run there.
    # They are thrown away when a child begins, which may be after it has unpickled a
    # Cache, and so are renewed then.
    util = sys.modules.get("multiprocessing.util")
    if util is None or os.getpid() in _leaving:
        return
    if not _leaving:
        util.register_after_fork(leave_all, _finalize_with)
    _leaving.add(os.getpid())
    _finalize_with()


def _finalize_with(_: object = None) -> None:
    from multiprocessing import util

    util.Finalize(None, _leave_child, exitpriority=0)


def _leave_child() -> None:
    from multiprocessing import parent_process

    # Other processes leave at exit, after the functions that users have registered.
    if parent_process() is not None:
        leave_all()


# What must be done at the end of a process while its segments are still there.
before_leaving: list[Callable[[], None]] = []


def leave_all() -> None:
    """Leave all segments, at the end of the process."""
    for prepare in before_leaving:
        try:
            prepare()
        except Exception:
            log.exception("at the end of the process", extra={"event": "not ended"})
    with mutex():
        for attachment in list(_attachments.values()):
            if attachment.entered():
                attachment.references = 1
                attachment.release()


atexit.register(leave_all)
