"""One segment as one process uses it, from attaching to leaving.

Problem: processes attach and leave at any time, in any order, by fork and by name.  The
first one creates the segment, the last one removes it, and each of them may be killed
at any line of this code.

Mechanism: processes attach and leave under the admin lock (see lockfile.py).  A process
that attaches finds the segment, or makes it, and takes a worker row (see rows.py) whose
byte it locks.  A process that leaves retires its row, and if no other row is locked, it
removes all files.  All Cache objects of one name in a process share one Attachment,
because the process has one row.

Fork is noticed without hooks, because some servers fork in C: ``guard`` is a page that
the kernel fills with zeros in the child (MADV_WIPEONFORK), and that holds the token in
the process that took the row.  A child takes a row of its own at its first use.

Death in the middle: the kernel drops the locks, and the next process to come can tell
what was left.  No magic word: the creator died, so the segment is replaced.  No row
lock held: all users died, so the segment is replaced or, if it is to persist, taken
over.  A row without its lock: it is reaped.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shmcache._format import layout as L
from shmcache._format.fields import row_of
from shmcache._process import rows
from shmcache._process.exit import arrange_leaving, at_leaving
from shmcache._process.lockfile import LockFile, mutex
from shmcache._segment import create as _create
from shmcache._segment import semaphores
from shmcache._segment.closed_view import ClosedView
from shmcache._segment.header import read_header
from shmcache.errors import SegmentCorrupt, SegmentNotFound, TooManyWorkers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from shmcache._segment.block import Block
    from shmcache._segment.header import Header
    from shmcache._segment.names import Names
    from shmcache._segment.settings import Settings

log = logging.getLogger("shmcache")

_MADV_WIPEONFORK = 18  # of <asm-generic/mman-common.h>; module mmap has no name for it

# Seconds to wait for another thread that takes a shard's lock over, which takes it some
# tens of microseconds.
RECOVERY_PATIENCE = 0.025

# The attachments of this process, by the segment's name.
_attachments: dict[str, Attachment] = {}


def of_this_process(names: Names) -> Attachment | None:
    """Return the attachment of this process to a segment, if it has one."""
    return _attachments.get(names.segment)


class Attachment:
    """One segment as one process, and each process forked from it, uses it.

    Attributes:
        block: The shared memory.
        header: The header, as it was when this process attached.
        words: The memory as 64-bit words.
        token: The token of the process that took the row; see ``entered``.
        row: The first 64-bit word of that row.
        guard: One word that is the token in that process and 0 in its children.
        references: How many Cache objects share this attachment.
        owners: Which thread of this process is inside which shard, or about to be.
            The interpreted engine needs it.
        recovering: Which thread of this process takes over which shard's lock.
        flights: Which keys this process computes just now, for ``get_or_set``.
        recency: Hits of this process that wait to be applied, for all its Cache
            objects; see ``recency_buffers`` in the engine.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.block: Block
        self.header: Header
        self.words: memoryview
        self.references = 0
        self._guard_page, self.guard = _fork_guard()
        self.token = 0
        self.row = 0
        self._exit_registration = 0
        self.lockfile = LockFile.open(names, self)
        self.owners: dict[int, int] = {}
        self.recovering: dict[int, int] = {}
        self.flights: dict[int, Any] = {}
        self.recency: tuple[memoryview, memoryview, memoryview] | None = None

    # --- coming: the segment --------------------------------------------------------

    @classmethod
    def open(
        cls,
        names: Names,
        settings: Settings | None,
        now: int,
        prepare: Callable[[Attachment], None],
    ) -> Attachment:
        """Attach to a segment, or create it.

        Args:
            names: The names of the cache's files.
            settings: What to create, and what an existing segment must agree with; None
                to attach to a segment as it is, and to create none.
            now: The time by the cache's clock, in ns.
            prepare: Called under the admin lock when all former users of the segment
                died and it is to be used again.

        Returns:
            The attachment, with one reference more, which the caller will ``release``.

        Raises:
            SegmentNotFound: If there is no segment and ``settings`` is None.
            ConfigMismatch: If the segment has other settings.
            SegmentCorrupt: If it is damaged, and in use.
            TooManyWorkers: If all rows are taken.
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
            # This is one line, so that no exception from a signal handler can strike
            # while nobody is there to give the reference back.
            return cls._come(names, settings, now, prepare)

    @classmethod
    def _come(
        cls,
        names: Names,
        settings: Settings | None,
        now: int,
        prepare: Callable[[Attachment], None],
    ) -> Attachment:
        while True:
            self = cls(names)
            try:
                with self.admin():
                    # Another process may have removed the lock file before we locked
                    # it; then we begin again with the new one.
                    if self.lockfile.current():
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
            left = self._find(settings, now)
            self.words = self.block.view.cast("Q")
            if left:
                self._reset()
            self.enter()
            if left:
                prepare(self)
        except BaseException:
            self._remove_lone_lock_file()
            raise

    def _find(self, settings: Settings | None, now: int) -> bool:
        # Find the segment, or make it.  Return whether all its former users died.
        names = self.names
        in_use = self.lockfile.used_by_others()
        try:
            self.block = _create.open_block(names)
            self.header = read_header(names, self.block.view)
        except FileNotFoundError:
            if settings is None:
                self._remove_lock_file()
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
        # It has no magic word: its creator was killed before the end.
        try:
            with open(self.names.segment_path, "rb") as file:
                return not file.read(8).strip(b"\0")
        except OSError:
            return False

    def _create(self, settings: Settings, now: int) -> None:
        self.block = _create.create(self.names, settings, self.lockfile.inode, now)
        self.header = read_header(self.names, self.block.view)
        log.info(
            "created cache %s: %d bytes, %d shards",
            self.names.cache,
            self.header.geometry.size,
            self.header.geometry.shards,
            extra={"cache": self.names.cache, "event": "created"},
        )

    def _replace(self, settings: Settings | None, now: int, why: str) -> None:
        _create.remove(self.names)
        if settings is None:
            self._remove_lock_file()
            raise SegmentNotFound(
                f"cache {self.names.cache!r} was left over ({why}) and has been"
                " removed; create it with Cache(name, ...)"
            )
        log.info(
            "cache %s is created anew: %s",
            self.names.cache,
            why,
            extra={"cache": self.names.cache, "event": "replaced"},
        )
        self._create(settings, now)

    def _reset(self) -> None:
        # No process has a row, so what locks, rows and in-flight tables say is about
        # dead processes.
        semaphores.reset(self.names, self.header.geometry.shards)
        self.reap()
        geometry = self.header.geometry
        for shard in range(geometry.shards):
            base = geometry.shard_at(shard)
            self.words[base + L.S_HOLDER] = 0
            for i in range(2 * L.IN_FLIGHT):
                self.words[base + L.S_IN_FLIGHT + i] = 0

    def usable(self) -> bool:
        """Return whether the name still refers to this segment.

        Both files are checked, because a segment whose users have all died is replaced
        while the lock file stays.
        """
        return self.lockfile.current() and self.block.current(self.names)

    # --- coming: the process --------------------------------------------------------

    def entered(self) -> bool:
        """Return whether this very process, not one that forked it, has the token."""
        return self.token != 0 and self.guard[0] == self.token

    def enter(self) -> None:
        """Take a worker row for this process, unless it has one.

        Raises:
            SegmentNotFound: If the name does not refer to this segment any more.
            TooManyWorkers: If all rows are taken.
        """
        with mutex():
            if self.entered():
                return
            if not self.usable():
                raise SegmentNotFound(self.names.cache)
            with self.admin():
                if not self.usable():
                    raise SegmentNotFound(self.names.cache)
                self._forget_parent()
                try:
                    self._take_row()
                except BaseException:
                    if not self.entered():
                        self.lockfile.free_row(self)
                    raise
        arrange_leaving()
        log.debug(
            "worker %d attached to cache %s",
            os.getpid(),
            self.names.cache,
            extra={"cache": self.names.cache, "event": "attached", "pid": os.getpid()},
        )

    def _forget_parent(self) -> None:
        # The notes about threads and hits belong to the parent process.
        self.owners.clear()
        self.recovering.clear()
        self.flights.clear()
        if self.recency:
            for shard in range(len(self.recency[2])):
                self.recency[2][shard] = 0

    def _take_row(self) -> None:
        row = self._free_row()
        self._remove_on_exit()
        self.row = L.row_at(row)
        token = rows.occupy(self.words, row)
        self.token = token
        self.guard[0] = token

    def _free_row(self) -> int:
        # Find a row that no process has, and lock it; if need be, reap dead workers'
        # rows first.
        for _ in range(2):
            for row in range(L.ROWS):
                token = self.words[L.row_at(row) + L.R_TOKEN]
                if token == 0 and self.lockfile.take_row(row, self):
                    return row
            self.reap()
        raise TooManyWorkers(
            f"cache {self.names.cache!r} has {L.ROWS} processes attached, and no more"
            " fit; close it in processes that do not need it"
        )

    def _remove_on_exit(self) -> None:
        if self.header.settings.persist:
            return
        names = self.names
        shards = range(self.header.geometry.shards)
        paths = [names.lock_path, names.segment_path]
        paths += [names.semaphore_path(shard) for shard in shards]
        self._exit_registration = self.lockfile.remove_on_exit(paths)

    # --- leaving --------------------------------------------------------------------

    def release(self) -> None:
        """Give up one reference; with the last one this process leaves the segment."""
        with mutex():
            self.references -= 1
            if self.references <= 0:
                self._end()

    def _end(self) -> None:
        try:
            if _attachments.get(self.names.segment) is self:
                del _attachments[self.names.segment]
            if self.entered():
                if self.lockfile.intact():
                    self._leave()
                else:
                    log.error(
                        "cache %s lost its worker row: something closed the file"
                        " descriptors of this process; create the Cache after that",
                        self.names.cache,
                        extra={"cache": self.names.cache, "event": "lease lost"},
                    )
        finally:
            self._close_files()

    def _leave(self) -> None:
        # The last process to leave removes the segment, unless it is to persist.
        with self.admin():
            row = row_of(self.token)
            self.guard[0] = 0
            rows.retire(self.words, row)
            # The row is freed under the admin lock.  Otherwise each of two processes
            # that leave together would see the other's row locked, and neither would
            # be the last.
            self.lockfile.free_row(self)
            if self.header.settings.persist or not self.usable():
                return
            if not self.lockfile.used_by_others():
                try:
                    _create.remove(self.names, self.header.geometry.shards)
                    self._remove_lock_file()
                except PermissionError as error:
                    # This process has changed its user since it attached.
                    log.warning(
                        "cache %s is left behind: %s",
                        self.names.cache,
                        error,
                        extra={"cache": self.names.cache, "event": "left behind"},
                    )

    def _remove_lone_lock_file(self) -> None:
        # The admin lock is held.  A lock file without a segment is of no use, and we
        # must not leave a new one beside a segment that was refused to us.
        if (
            self.lockfile.current()
            and (self.lockfile.is_new or not os.path.lexists(self.names.segment_path))
            and not self.lockfile.in_use()
        ):
            self._remove_lock_file()

    def _remove_lock_file(self) -> None:
        os.unlink(self.names.lock_path)

    def _close_files(self) -> None:
        try:
            try:
                self.lockfile.cancel_exit(self._exit_registration)
                self.words = ClosedView()  # type: ignore[assignment]
                if hasattr(self, "block"):
                    self.block.close()
            finally:
                self.lockfile.close(self)
        finally:
            self.lockfile.close(self)  # again, for the reason given in LockFile.admin

    def unlink(self) -> None:
        """Remove the names of all files; attached processes keep what they have."""
        with mutex(), self.admin():
            if self.lockfile.current():
                _create.remove(self.names, self.header.geometry.shards)
                self._remove_lock_file()

    # --- locks ------------------------------------------------------------------------

    def admin(self) -> AbstractContextManager[None]:
        """Hold the admin lock during a ``with`` block; the caller holds ``mutex()``.

        Such blocks may be nested.
        """
        return self.lockfile.admin(f"cache {self.names.cache!r}")

    @contextmanager
    def recovery(self, shard: int) -> Iterator[bool]:
        """Let only one thread of all processes take over a shard's lock.

        Engines without compare-and-swap need it.  If an exception strikes where no
        ``finally`` is in force, ``recovering`` tells what to give back.

        Yields:
            Whether this is the one.  If not, another one may be stopped; nobody waits
            for it longer than ``RECOVERY_PATIENCE``.
        """
        me = threading.get_ident()
        deadline = time.monotonic() + RECOVERY_PATIENCE
        while self.recovering.setdefault(shard, me) != me:
            if time.monotonic() > deadline:
                yield False
                return
            time.sleep(0.0001)
        try:
            mine = self.lockfile.try_recovery(shard)
            while not mine and time.monotonic() < deadline:
                time.sleep(0.0001)
                mine = self.lockfile.try_recovery(shard)
            yield mine
        finally:
            self.end_recovery(shard)

    def end_recovery(self, shard: int) -> None:
        """Let other threads and processes take over a shard's lock."""
        self.lockfile.unlock_recovery(shard)
        self.recovering.pop(shard, None)

    # --- workers ----------------------------------------------------------------------

    def alive(self, token: int) -> bool:
        """Return whether the worker with this token lives and has not left.

        Args:
            token: Any number; it may come from a damaged word.
        """
        if token == self.token and self.entered():
            return True
        if not rows.has_row(self.words, token):
            return False
        return self.lockfile.row_holder(row_of(token)) is not None

    def pid(self, token: int) -> int:
        """Return the PID that a worker wrote down, 0 if its row has been handed on."""
        return rows.pid_of(self.words, token)

    def tokens(self) -> list[int]:
        """Return the tokens of all workers, dead ones not yet reaped included."""
        return rows.tokens_in(self.words)

    def held(self) -> tuple[int, int]:
        """Return how many handles and how many leases living workers have.

        O(workers).
        """
        handles = leases = 0
        for token in filter(self.alive, self.tokens()):
            opened, leased = rows.held_by(self.words, token)
            handles += opened
            leases += leased
        return handles, leases

    def reap(self) -> int:
        """Free the rows of dead workers and keep their counts.

        Rows of workers that died holding a shard's lock are kept, so that the process
        that takes the lock over can log which process died.

        Returns:
            How many rows were freed.
        """
        dead = {token for token in self.tokens() if not self.alive(token)}
        dead -= self._holders() if dead else set()
        if not dead:
            return 0
        with mutex(), self.admin():
            reaped = 0
            for token in dead:
                row = row_of(token)
                # Another process may have reaped the row and handed it on meanwhile.
                if 0 <= row < L.ROWS and not self.alive(
                    self.words[L.row_at(row) + L.R_TOKEN]
                ):
                    rows.retire(self.words, row)
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
        return {
            self.words[geometry.shard_at(shard) + L.S_HOLDER]
            for shard in range(geometry.shards)
        }

    def count(self, word: int, n: int = 1) -> None:
        """Add to a counter of this worker's row.

        Args:
            word: The counter, one of the layout's ``R_...``.
            n: How much to add.
        """
        at = self.row + word
        self.words[at] = (self.words[at] + n) & L.MASK64

    def counters(self) -> list[int]:
        """Return the sums of all workers' counters, dead workers included.

        Raises:
            LockTimeout: If rows are retired all the time, and the admin lock, which
                stops that, is not free within ADMIN_TIMEOUT.
        """
        sums, exact = rows.sum_counters(self.words)
        if not exact:
            with mutex(), self.admin():
                sums, _ = rows.sum_counters(self.words)
        return sums


def _referred(names: Names) -> Attachment | None:
    # Return the attachment with one reference more.  Until it is counted, the garbage
    # collector may finalize the last user at any moment, which closes the attachment.
    known = _attachments.get(names.segment)
    if known:
        known.references += 1
        if _attachments.get(names.segment) is not known:
            known = None
    return known


def _fork_guard() -> tuple[mmap.mmap, memoryview]:
    # Return a private page that reads as zeros in a forked child.
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = memoryview(page).cast("Q")
    try:
        page.madvise(_MADV_WIPEONFORK)
    except OSError:
        # This happens before Linux 4.14, and under emulated kernels.  Then forks in C
        # are not noticed.
        def wipe() -> None:
            words[0] = 0

        os.register_at_fork(after_in_child=wipe)
    return page, words


@at_leaving
def _leave_segments() -> None:
    with mutex():
        for attachment in list(_attachments.values()):
            if attachment.entered():
                attachment.references = 1
                attachment.release()
