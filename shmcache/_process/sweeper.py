"""The local sweep: one daemon thread in each process that uses caches.

It removes what has expired, in short holds of one lock, applies this process's
noted hits, frees the rows of dead workers, and looks for notices to the owners of
handles.  It starts with the first operation
in a process, never at import or construction, so that a server may load its
application and fork before there is a thread.  Around ``os.fork`` it is stopped and
started again: a child must not be born while it holds something.

Where threads do not run (uWSGI without --enable-threads) sweeping rides on inserts,
which always pay for a few expired entries, and on ``len()`` and ``sweep()``.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from typing import Protocol

from shmcache._process.uwsgi import threads_run
from shmcache.errors import CacheClosed, LockTimeout

log = logging.getLogger("shmcache")

# A run takes at most this long before it lets others have their turn.
STEP_BUDGET = 0.05
# After a failure, seconds until the next try.
RETRY = 1.0


class Tended(Protocol):
    """What the sweeper looks after."""

    name: str

    @property
    def closed(self) -> bool:
        """Whether it is to be looked after no more."""

    def _tend(self, budget: float) -> float:
        """Do what is due, for about so many seconds; in how many to come again."""


class Sweeper:
    """The thread of one process, and the caches and maps it looks after."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._due: weakref.WeakKeyDictionary[Tended, float] = (
            weakref.WeakKeyDictionary()
        )
        self._wake = threading.Event()
        self._lock = threading.RLock()  # signal handlers may use caches, too
        self._thread: threading.Thread | None = None
        self._stop = False

    def watch(self, tended: Tended, delay: float) -> None:
        """Look after something, for the first time in so many seconds."""
        if not threads_run():
            return
        with self._lock:
            self._due[tended] = time.monotonic() + delay
            self._start()
        self._wake.set()

    def forget(self, tended: Tended) -> None:
        """Look after something no more; with the last one the thread ends."""
        with self._lock:
            self._due.pop(tended, None)
        self._wake.set()

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop = False
        thread = threading.Thread(
            target=self._run, name="shmcache-sweeper", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            # No more threads for this user, or none any more at the end of a process.
            log.info(
                "no sweeper, inserts sweep as they go: %s",
                error,
                extra={"event": "no sweeper"},
            )
        else:
            self._thread = thread

    def pause(self) -> None:
        """End the thread, for a fork or the end of the process."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        self._stop = True
        self._wake.set()
        thread.join(5)
        _wait_for_end(thread)
        self._thread = None

    def resume(self) -> None:
        """Start the thread again if there is something to look after."""
        with self._lock:
            if len(self._due):
                self._start()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._stop:  # after the bell was cleared, or its ring would be lost
                return
            with self._lock:
                work = list(self._due.items())
                if not work:
                    # Nobody is left: the next watch() starts another thread.
                    self._thread = None
                    return
            now = time.monotonic()
            for tended, due in work:
                if due <= now and not self._stop:
                    self._tend(tended, due)
            work = tended = None  # type: ignore[assignment] # keep none of them alive
            with self._lock:
                next_due = min(self._due.values(), default=now)
            self._wake.wait(max(0.005, next_due - time.monotonic()))

    def _tend(self, tended: Tended, due: float) -> None:
        delay = RETRY
        try:
            if not tended.closed:
                delay = tended._tend(STEP_BUDGET)
        except CacheClosed:
            pass
        except LockTimeout as error:
            log.warning(
                "sweep of cache %s put off: %s",
                tended.name,
                error,
                extra={"cache": tended.name, "event": "sweep put off"},
            )
        except Exception:  # others need the thread
            if not tended.closed:
                log.exception(
                    "sweep of cache %s failed",
                    tended.name,
                    extra={"cache": tended.name, "event": "sweep failed"},
                )
        with self._lock:
            if self._due.get(tended) == due:  # else it was asked for meanwhile
                if tended.closed:
                    del self._due[tended]
                else:
                    self._due[tended] = time.monotonic() + delay


def _wait_for_end(thread: threading.Thread) -> None:
    # Before Python 3.13 join() returns a moment before the thread has ended, and Python
    # warns of a fork in that moment.  Greenlets have the main thread's number.
    if sys.version_info >= (3, 13) or thread.native_id == threading.get_native_id():
        return
    deadline = time.monotonic() + 1
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        if time.monotonic() > deadline:
            return
        os.sched_yield()


_current: Sweeper | None = None


def sweeper() -> Sweeper:
    """This process's sweeper."""
    global _current  # noqa: PLW0603 - one thread a process
    if _current is None or _current.pid != os.getpid():
        _current = Sweeper()
    return _current


def _before_fork() -> None:
    if _current is not None and _current.pid == os.getpid():
        _current.pause()


def _after_fork_in_parent() -> None:
    if _current is not None and _current.pid == os.getpid():
        _current.resume()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
atexit.register(_before_fork)
