"""The sweeper: one daemon thread in each process that uses caches.

Problem: expired entries must go although nobody asks for them, hits of this process
must be applied although it writes nothing, rows of dead workers must be freed, and the
owners of evicted handles must be told; all of that without delaying a caller.

Mechanism: a thread looks after all caches and maps of the process, each at its own
interval, and does a bounded piece of work at a time.  It starts with the first
operation in a process, never at import or construction, so that a server can load its
application and fork before there is a thread.  Around ``os.fork`` it is stopped and
started again, because a child that is forked while the thread holds a lock would find
that lock taken for ever.

Where threads do not run (uWSGI without --enable-threads), expired entries are removed
by inserts (each removes a few), by ``len()`` and by ``sweep()``.

Death in the middle: the work is made of ordinary operations of the cache, and the
sweepers of other processes do what a dead one has left undone.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from shmcache._process.uwsgi import threads_run
from shmcache.errors import CacheClosed, LockTimeout

log = logging.getLogger("shmcache")

# The sweeper spends at most this long (s) on one cache before it turns to the next.
STEP_BUDGET = 0.05
# After a failure the sweeper waits this long (s) for the next attempt.
RETRY = 1.0


class Tended(Protocol):
    """A cache or map that the sweeper looks after."""

    name: str

    @property
    def closed(self) -> bool:
        """Return whether the sweeper has nothing more to do for it."""


_T = TypeVar("_T", bound=Tended)
# A function that does what is due for a cache or map.  Its argument is about how many
# seconds it may take, and it returns the seconds until it wants to be called again.
Tend = Callable[[_T, float], float]


class _Turn(NamedTuple):
    """When a cache or map is to be looked after, and how."""

    due: float
    tend: Callable[[Any, float], float]


class Sweeper:
    """The thread of one process, and the caches and maps that it looks after."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._turns: weakref.WeakKeyDictionary[Tended, _Turn] = (
            weakref.WeakKeyDictionary()
        )
        self._wake = threading.Event()
        # It is reentrant, because a signal handler may interrupt us and use a cache.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stop = False

    def watch(self, tended: _T, tend: Tend[_T], delay: float) -> None:
        """Look after a cache or map, for the first time in ``delay`` seconds.

        Args:
            tended: The cache or map; the sweeper does not keep it alive.
            tend: A function, no bound method, which would keep it alive.
            delay: Seconds.
        """
        if not threads_run():
            return
        with self._lock:
            self._turns[tended] = _Turn(time.monotonic() + delay, tend)
            self._start()
        self._wake.set()

    def forget(self, tended: Tended) -> None:
        """Stop looking after a cache or map; after the last one the thread ends."""
        with self._lock:
            self._turns.pop(tended, None)
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
            # The user's limit of threads is reached, or the process is about to end.
            log.info(
                "no sweeper thread, so only inserts remove expired entries: %s",
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
            if len(self._turns):
                self._start()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            # This is tested after the event was cleared; otherwise a call of pause() in
            # between would be missed.
            if self._stop:
                return
            with self._lock:
                work = list(self._turns.items())
                if not work:
                    # Nothing is left: the next watch() starts another thread.
                    self._thread = None
                    return
            now = time.monotonic()
            for tended, turn in work:
                if turn.due <= now and not self._stop:
                    self._look_after(tended, turn)
            # While the thread waits, its variables must keep no cache alive.
            work = tended = None  # type: ignore[assignment]
            with self._lock:
                next_due = min((t.due for t in self._turns.values()), default=now)
            self._wake.wait(max(0.005, next_due - time.monotonic()))

    def _look_after(self, tended: Tended, turn: _Turn) -> None:
        delay = RETRY
        try:
            if not tended.closed:
                delay = turn.tend(tended, STEP_BUDGET)
        except CacheClosed:
            pass
        except LockTimeout as error:
            log.warning(
                "sweep of cache %s postponed: %s",
                tended.name,
                error,
                extra={"cache": tended.name, "event": "sweep put off"},
            )
        except Exception:  # the other caches need the thread
            if not tended.closed:
                log.exception(
                    "sweep of cache %s failed",
                    tended.name,
                    extra={"cache": tended.name, "event": "sweep failed"},
                )
        with self._lock:
            # If it differs, watch() has set another time meanwhile.
            if self._turns.get(tended) is turn:
                if tended.closed:
                    del self._turns[tended]
                else:
                    self._turns[tended] = _Turn(time.monotonic() + delay, turn.tend)


def _wait_for_end(thread: threading.Thread) -> None:
    # Before Python 3.13, join() returns a moment before the thread has ended in the
    # kernel, and Python warns of a fork in that moment.  Under gevent the "thread" is a
    # greenlet, which has the main thread's number and does not end.
    if sys.version_info >= (3, 13) or thread.native_id == threading.get_native_id():
        return
    deadline = time.monotonic() + 1
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        if time.monotonic() > deadline:
            return
        os.sched_yield()


_current: Sweeper | None = None


def sweeper() -> Sweeper:
    """Return the sweeper of this process, not that of the process that forked it."""
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
