"""The lock of a shard: a semaphore as the queue, HOLDER as the owner, SEQ as the mark.

Problem: a POSIX semaphore has no owner.  If the process that took it is killed, it
stays taken for ever, and nobody knows whether the data is whole.

Mechanism: the semaphore is only the queue.  The worker that has its permit becomes the
holder by changing HOLDER from 0 to its token, and only the holder may write.  SEQ is
odd while it does.  A waiter that sleeps too long looks at the holder: if the kernel has
dropped the lock of the holder's worker row, the waiter puts its own token in place of
the dead one's - so the permit passes on - and rebuilds the shard if SEQ is odd.

Death in the gap between permit and HOLDER, on the way in or out, loses the permit:
HOLDER is 0 and ACQUISITIONS stands still.  A waiter that sees this twice goes in
without a permit, and so brings one back when it comes out.  If the old permit turns up
after all (its taker was only stopped), two processes come with permits; the one that
finds HOLDER taken drops its own and queues up again.  So exclusion rests on HOLDER
alone, and a spare permit is harmless.

The interpreted engine has no compare-and-swap.  It looks and then stores under a kernel
lock, which also goes when its owner dies.

Order matters in two places.  A thread registers as a user of the semaphores before it
tests ``closed``, and close() does the reverse, so one of them sees the other.  And a
holder clears HOLDER before it posts, so that the next one finds it free.
"""

import os
from array import array
from threading import get_ident
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from shmcache._segment.closed_view import ClosedView
from shmcache.errors import LockTimeout, SegmentCorrupt

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        LOOK_NS,
        PATIENCE,
        S_ACQUISITIONS,
        S_HOLDER,
        S_LATE_USE,
        S_LOCK_BUCKETS,
        S_LOCK_TIMEOUTS,
        S_LOCK_WAIT_NS,
        S_LOCK_WAITS,
        S_RECOVERIES,
        S_SEQ,
        SPINS,
        UNKNOWN,
        Index,
        Word,
    )
    from shmcache._engine.rebuild import Rebuild
    from shmcache._format.fields import kind_of


if cython.compiled:
    from cython.cimports.cpython.bytes import PyBytes_AS_STRING
    from cython.cimports.cpython.exc import PyErr_CheckSignals
    from cython.cimports.shmcache._engine.memory import (
        cas,
        has_left,
        load,
        on_exit,
        pause,
        sem_close,
        sem_open,
        sem_post,
        sem_try,
        sem_value,
        sem_wait,
    )

if not cython.compiled:
    from signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals

    from posix_ipc import BusyError, SignalError
    from posix_ipc import Semaphore as PosixSemaphore

    ALL_SIGNALS = valid_signals()


def close_semaphores(opened: Any) -> None:
    """Close what ``_open_semaphores`` returned; a second call does nothing."""
    if cython.compiled:
        i: Index
        address: Word
        for i in range(len(opened)):
            address = opened[i]
            opened[i] = 0
            if address:
                sem_close(address)
    else:
        try:
            while True:
                opened.pop().close()
        except IndexError:
            pass  # none is left, whoever else closed them


def leave_on_exit(lock_file: int, rows: int, count: int, paths: Any) -> int:
    """Have this process leave a segment when it calls C's ``exit``.

    Servers that fork in C end some processes without finalizing Python.  The last
    process to leave removes the files.  Interpreted, this does nothing.

    Args:
        lock_file: Descriptor of the segment's lock file.
        rows: The first of its bytes that stand for worker rows.
        count: How many there are.
        paths: The files to remove, the lock file first.

    Returns:
        The argument for ``left_before_exit``; 0 if there is nothing to undo.
    """
    if cython.compiled:
        data: bytes = b"\0".join([os.fsencode(path) for path in paths]) + b"\0"
        return on_exit(lock_file, rows, count, PyBytes_AS_STRING(data), len(data))
    return 0


def left_before_exit(leaver: int, lock_file: int) -> None:
    """Undo ``leave_on_exit``, given what it returned and the lock file."""
    if cython.compiled:
        if leaver:
            has_left(leaver, lock_file)


@cython.cclass
class Lock(Rebuild):
    """The lock of a shard: how it is taken, given back, and taken over."""

    sems: cython.ulonglong[::1]  # compiled: addresses, 0 for a closed one
    pysems: Any  # interpreted: posix_ipc's objects
    opened: Any  # whichever of the two is used, for close_semaphores
    waiting: cython.int  # compiled: threads of this process that sleep on a semaphore
    # Interpreted: threads that wait for a lock of this object, or hold one, and the
    # shard of it.
    inside: dict
    owners: Any  # interpreted: shard -> the thread that holds its lock
    # ACQUISITIONS of each shard when its holder was last found to be stuck.
    stuck: cython.ulonglong[::1]
    lock_timeout: Word  # ns
    lock_bounds: cython.ulonglong[::1]  # of the histogram, in ns
    random: Word
    # A flat list of what _rebuild_and_log has noted for peers.report: shard, token,
    # whether lists were rebuilt, entries dropped, and ns, of each repair.
    repair_log: list

    # --- coming and going of a cache ------------------------------------------------

    def _open_semaphores(self, names: Any) -> Any:
        """Open the semaphores of the shards, which exist.

        Args:
            names: Their names, one for each shard.

        Returns:
            The argument for ``close_semaphores``.
        """
        if not cython.compiled:
            self.opened = self.pysems = [PosixSemaphore(name) for name in names]
            return self.opened
        opened = memoryview(array("Q", bytes(8 * len(names))))
        i: Index = 0
        for name in names:
            encoded: bytes = name.encode()
            opened[i] = sem_open(PyBytes_AS_STRING(encoded))
            if opened[i] == 0:
                close_semaphores(opened)
                raise SegmentCorrupt(
                    f"semaphore {name} is missing although its segment is in use;"
                    " stop all users of the cache, then attach again"
                )
            i += 1
        self.sems = opened
        self.opened = opened
        return opened

    def _close_semaphores(self) -> None:
        # If other threads still use the semaphores, the last one to leave calls again.
        # This thread's own entry in ``inside`` does not count: it was left by a call
        # that an exception from a signal handler has ended.
        if self.waiting or len(self.inside) > (get_ident() in self.inside):
            return
        close_semaphores(self.opened)

    def _join(self, guard: Any, token: int, row: int, seed: int, owners: Any) -> None:
        """Act from now on as the worker with this token and row."""
        self.guard = guard
        self.owners = owners
        self.row = row
        self.random = seed | 1
        # Threads that waited belong to the parent process, and do not run here.
        self.waiting = 0
        self.hashing = 0
        self.inside = {}
        self.token = token
        self.visit = seed

    def _is_inside_elsewhere(self) -> bool:
        """Stop operations from beginning; return whether other threads are inside one.

        ``close()`` waits until they have left, so that none loses a lock or a permit.
        That takes no longer than a write section, or than one look of a waiter.  A lock
        that this very thread holds, because a signal handler closes the cache that it
        has interrupted, is given back.  The process must have joined.
        """
        self.guard = memoryview(array("Q", [1]))  # no operation begins any more
        if cython.compiled:
            # A holder lets other threads run only while it hashes a large value.
            return self.hashing > 0
        me = get_ident()
        if me in self.inside:
            self._leave_interrupted(self.inside[me])
        return len(self.inside) > 0

    def _leave_interrupted(self, s: int) -> None:
        # Give back the lock of a section that a signal handler of this thread has
        # interrupted (interpreted only).
        b = self._base(s)
        if self.owners.get(s) == get_ident() and self.w64[b + S_HOLDER] == self.token:
            if self.w64[b + S_SEQ] & 1:
                self._rebuild_and_log(s, b, 0)
            self._release(s, b)
        self.inside.pop(get_ident(), None)

    def _unbind(self) -> None:
        """Let go of the views, so that the mapping can be closed.

        If another thread is in the middle of a call (in a codec or clock written in
        Python), its next step finds no words or no semaphore, and fails.
        """
        self.token = 0
        self.guard = memoryview(array("Q", [1]))  # differs from the token: closed
        if cython.compiled:
            self.w64 = memoryview(array("Q"))
            self.w32 = memoryview(array("I"))
            self.mem = memoryview(bytearray())
        else:
            self.w64 = self.w32 = self.mem = ClosedView()

    # --- the fast way in and out ----------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _begin(self, s: Index, b: Index) -> cython.int:
        # Enter the write section: take the lock, and make SEQ odd.
        if not self._try_acquire(s, b):
            self._wait(s, b, True)
        self._start(s, b)
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _start(self, s: Index, b: Index) -> cython.int:
        # Begin to write, with the lock just acquired.
        if self.w64[b + S_SEQ] & 1:
            self._rebuild_and_log(s, b, 0)
        self._put_word(b + S_SEQ, self.w64[b + S_SEQ] + 1)
        if self.recent_count[s] or self.w64[b + S_LATE_USE]:
            try:
                self._apply_recency(s, b)
            except BaseException as error:
                self._abort(s, b, error)
                raise
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _end(self, s: Index, b: Index) -> cython.int:
        # Leave the write section: make SEQ even, and give the lock back.
        self._put_word(b + S_SEQ, self.w64[b + S_SEQ] + 1)
        self._release(s, b)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _abort(self, s: Index, b: Index, error: Any) -> cython.int:
        # Leave the write section after an exception.  If that was damage (an index out
        # of bounds, or a number that an interpreted view cannot hold), it becomes
        # SegmentCorrupt.
        if self.token == 0:
            self._require_joined()  # the views have gone: CacheClosed
        damage: cython.bint = isinstance(error, IndexError) or (
            not cython.compiled
            and type(error) is ValueError
            and "memoryview" in str(error)
        )
        if damage or self.w64[b + S_SEQ] & 1:
            self._rebuild_and_log(s, b, 0)
        self._release(s, b)
        if damage:
            raise SegmentCorrupt(
                f"shard {s} of the segment was damaged and has been rebuilt from those"
                " of its records that were whole; repeat the call, and look for what"
                " else writes to the segment"
            ) from error
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _acquire(self, s: Index, b: Index) -> cython.int:
        # Take the lock for reading: SEQ stays even.
        if not self._try_acquire(s, b):
            self._wait(s, b, True)
        if self.w64[b + S_SEQ] & 1:
            self._rebuild_and_log(s, b, 0)
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _release(self, s: Index, b: Index) -> cython.int:
        self._put_word(b + S_HOLDER, 0)
        self._post(s)
        if self.has_news:
            self._report()
        return 0

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _try_acquire(self, s: Index, b: Index) -> cython.bint:
        if cython.compiled:
            if not sem_try(self.sems[s]):
                return False  # taken, or closed
            if not cas(cython.address(self.w64[b + S_HOLDER]), 0, self.token):
                return False  # a spare permit, which is dropped
            self._count(b + S_ACQUISITIONS, 1)
            return True
        if not self._take_permit(s, 0):
            return False
        if self._hold_interpreted(s, b):
            return True
        self._leave_inside()
        return False

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _post(self, s: Index) -> cython.int:
        if cython.compiled:
            sem_post(self.sems[s])
        else:
            self.pysems[s].release()
            self._leave_inside()
        return 0

    def _take_permit(self, s: int, timeout: float) -> bool:
        # This is for the interpreted engine.  posix_ipc lets other threads run
        # meanwhile, and one of them may close the cache.  Order matters: this registers
        # first and then tests ``closed``; close() does the reverse.
        if cython.compiled:
            raise NotImplementedError
        me = get_ident()
        got = False
        self.inside[me] = s
        try:
            if not self.closed:
                self.pysems[s].acquire(timeout)
                got = True
                if self.closed:
                    self.pysems[s].release()
                    got = False
        except (BusyError, IndexError):
            pass
        finally:
            if not got:
                self._leave_inside()
        return got

    def _leave_inside(self) -> None:
        # This thread does not use the semaphores any more (interpreted only).
        self.inside.pop(get_ident(), None)
        if self.token == 0:
            self._close_semaphores()

    def _hold_interpreted(self, s: int, b: int) -> bool:
        # Become the holder, with the permit taken.  Return False if the permit is a
        # spare one.
        return self._replace_holder(s, b, 0)

    # --- the slow way in ------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _wait(self, s: Index, b: Index, patient: cython.bint) -> cython.bint:
        # Wait for the lock: spin a little, then sleep, and now and then look at the
        # holder.  With patient=False, return False if the holder is alive but stuck.
        self._require_joined()  # the cache may have been closed since the call began
        started: Word = monotonic_ns()
        holder: Word
        last_holder: Word = UNKNOWN
        acquisitions: Word
        last_acquisitions: Word = self.w64[b + S_ACQUISITIONS]
        looks: cython.int = 0
        got: cython.int = 0
        looked: Word = started
        if cython.compiled:
            if self._spin(s, b):
                self._count_wait(b, started)
                return True
        elif self.w64[b + S_HOLDER] == self.token:
            self.peers.check_reentry(s)
        while True:
            got = self._sleep(s)
            self._require_open_after_sleep(s, got)
            if cython.compiled and got < 0:
                PyErr_CheckSignals()
                self._require_joined()  # a handler may have closed the cache
            if got > 0 and self._replace_holder(s, b, 0):
                self._count_wait(b, started)
                return True
            if not cython.compiled:
                self._leave_inside()  # a spare permit is dropped
            holder = self.w64[b + S_HOLDER]
            acquisitions = self.w64[b + S_ACQUISITIONS]
            # Signals may end every sleep early, but not keep this thread from looking.
            if got == 0 or monotonic_ns() - looked >= LOOK_NS:
                looked = monotonic_ns()
                if self._take_over(
                    s,
                    b,
                    holder,
                    holder == 0
                    and last_holder == 0
                    and acquisitions == last_acquisitions,
                ):
                    self._count_wait(b, started)
                    return True
                looks = looks + 1 if acquisitions == last_acquisitions else 0
                if not patient and looks == PATIENCE:
                    self.stuck[s] = acquisitions
                    return False
                last_holder = holder
                last_acquisitions = acquisitions
            if monotonic_ns() - started > self.lock_timeout:
                # This thread does not hold the lock, so the count may miss another
                # timeout at the same moment.
                self._count(b + S_LOCK_TIMEOUTS, 1)
                raise LockTimeout(
                    self.peers.describe_wait(s, holder, monotonic_ns() - started)
                )

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _is_stuck(self, s: Index, b: Index) -> cython.bint:
        # Return whether the holder is the one that was found to be stuck before, and
        # lives, so that a reader need not wait to find that out again.
        holder: Word = self.w64[b + S_HOLDER]
        if self.stuck[s] == 0 or self.stuck[s] != self.w64[b + S_ACQUISITIONS]:
            return False
        return holder != 0 and not self.peers.is_dead(s, holder)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _spin(self, s: Index, b: Index) -> cython.bint:
        # Look at a busy lock for about 2 us before sleeping (compiled only).
        _i: cython.int
        for _i in range(SPINS):
            pause()
            if load(cython.address(self.w64[b + S_HOLDER])) == 0:
                if self._try_acquire(s, b):
                    return True
        return False

    @cython.cfunc
    @cython.final
    @cython.exceptval(-2)
    def _sleep(self, s: Index) -> cython.int:
        # Wait a while for a permit.  Return 1 if we have it, 0 if not, -1 if a signal
        # came.
        got: cython.int = 0
        if cython.compiled:
            self.waiting += 1
            sem: Word = self.sems[s]
            with cython.nogil:
                got = sem_wait(sem, LOOK_NS)
            self.waiting -= 1
            return got
        before = pthread_sigmask(SIG_BLOCK, ())
        try:
            # posix_ipc would lose what a signal handler raises during the wait.
            pthread_sigmask(SIG_BLOCK, ALL_SIGNALS)
            return self._take_permit(s, LOOK_NS / 1e9)
        except SignalError:
            return -1
        finally:
            pthread_sigmask(SIG_SETMASK, before)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _require_open_after_sleep(self, s: Index, got: cython.int) -> cython.int:
        # Another thread may have closed the cache meanwhile.  Then give back the permit
        # if we have it; the last thread closes the semaphores.
        if self.guard[0] != self.token:
            if got > 0:
                self._post(s)
            if self.token == 0:
                self._close_semaphores()
            self._require_joined()
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _count_wait(self, b: Index, started: Word) -> cython.int:
        i: Index
        waited: Word = monotonic_ns() - started
        self._count(b + S_LOCK_WAITS, 1)
        self._count(b + S_LOCK_WAIT_NS, waited)
        for i in range(self.lock_bounds.shape[0]):
            if waited <= self.lock_bounds[i]:
                self._count(b + S_LOCK_BUCKETS + i, 1)
                break
        return 0

    # --- taking over ----------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _take_over(
        self, s: Index, b: Index, holder: Word, nobody: cython.bint
    ) -> cython.bint:
        # Take the lock over from a dead holder.  Without a holder, take it over if
        # HOLDER was empty and the permit gone at two looks in a row.
        if holder:
            if not self.peers.is_dead(s, holder):
                return False
        elif not nobody or not self._permit_is_gone(s):
            return False
        if not self._replace_holder(s, b, holder):
            return False
        self._rebuild_and_log(s, b, holder or UNKNOWN)
        return True

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _replace_holder(self, s: Index, b: Index, holder: Word) -> cython.bint:
        # Replace the holder (0: nobody) by this worker, unless HOLDER has changed.
        if cython.compiled:
            if not cas(cython.address(self.w64[b + S_HOLDER]), holder, self.token):
                return False
            self._count(b + S_ACQUISITIONS, 1)
            return True
        with self.peers.recovery(s) as alone:
            if not alone or self.w64[b + S_HOLDER] != holder:
                return False
            self.owners[s] = get_ident()
            self.inside[get_ident()] = s
            self.w64[b + S_HOLDER] = self.token
            self._count(b + S_ACQUISITIONS, 1)
            return True

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _permit_is_gone(self, s: Index) -> cython.bint:
        if cython.compiled:
            return sem_value(self.sems[s]) == 0
        return self.pysems[s].value == 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _rebuild_and_log(self, s: Index, b: Index, dead: Word) -> cython.int:
        # Rebuild what a holder left half done, and note it in the repair log; the lock
        # is held.  ``dead`` is the token of the holder that died, or 0 if the reason is
        # damage.
        started: Word = monotonic_ns()
        torn: cython.bint = self.w64[b + S_SEQ] & 1
        dropped: Index = 0
        try:
            if not torn and not dead:
                self._put_word(b + S_SEQ, self.w64[b + S_SEQ] + 1)
                torn = True
            if torn:
                dropped = self._rebuild(b)
                self._put_word(b + S_SEQ, self.w64[b + S_SEQ] + 1)
            self._count(b + S_RECOVERIES, 1)
            took: Word = monotonic_ns() - started
            if cython.compiled:
                self.repair_log.append(s)
                self.repair_log.append(dead)
                self.repair_log.append(torn)
                self.repair_log.append(dropped)
                self.repair_log.append(took)
            else:
                self.repair_log.extend((s, dead, torn, dropped, took))
            self.has_news = True
        except BaseException:
            # There was no memory.  SEQ stays odd, so the next holder rebuilds.
            self._release(s, b)
            raise
        return 0

    def _release_left(self, frame: Any) -> None:
        # Give back locks that an exception from a signal handler has left taken
        # (interpreted only).  ``frame`` is the caller of the operation.  If it is
        # inside another operation (a signal handler or a codec made the call), the
        # outer one gives them back.
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("shmcache._engine."):
                return
            frame = frame.f_back
        self.peers.end_recoveries()
        me = get_ident()
        self.inside.pop(me, None)
        for s, owner in list(self.owners.items()):
            b = self._base(s)
            if owner == me and self.w64[b + S_HOLDER] == self.token:
                if self.w64[b + S_SEQ] & 1:
                    self._rebuild_and_log(s, b, 0)
                self._release(s, b)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _report(self) -> cython.int:
        # Pass on the logs that were written while a lock was held; it has been given
        # back.
        repairs: list = self.repair_log
        evictions: list = self.evicted_log
        self.repair_log = []
        self.evicted_log = []
        self.has_news = False
        self.peers.report(
            [tuple(repairs[i : i + 5]) for i in range(0, len(repairs) - 4, 5)],
            [
                (evictions[i], kind_of(evictions[i + 1]), evictions[i + 2])
                for i in range(0, len(evictions) - 2, 3)
            ],
        )
        return 0
