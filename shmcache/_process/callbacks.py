"""User callbacks, run in a small pool of threads.

Problem: a callback of the user may take long, may raise, and may call the cache or map
that it belongs to; so it must run neither under a lock nor in a thread that has other
work.

Mechanism: jobs wait in a queue, and a few threads run them.  A slow callback delays
others only when all threads are busy.  A thread ends when the queue is empty, so a
process that gets few callbacks has no idle thread.

Death in the middle: the jobs of a process end with it.  So do the objects that they
are about, because handles never leave their process.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from shmcache._process.uwsgi import threads_run

if TYPE_CHECKING:
    from collections.abc import Callable


class Job(Protocol):
    """Something to run once, although it may be queued twice.

    Attributes:
        taken: Whether a thread has begun to run it; set under the queue's lock.
    """

    taken: bool


J = TypeVar("J", bound=Job)


class Callbacks(Generic[J]):
    """A queue of jobs, and the threads that live as long as there are jobs.

    Args:
        run: Runs a job; it handles what the user's callback raises.
        threads: How many threads at most.
    """

    def __init__(self, run: Callable[[J], None], threads: int) -> None:
        self._run = run
        self._threads = threads
        self._queue: deque[J] = deque()
        self._condition = threading.Condition()
        self._running = 0
        self._inside: set[int] = set()  # the threads that run a job just now

    @property
    def pending(self) -> int:
        """Return how many jobs wait or run."""
        return len(self._queue) + self._running

    def add(self, job: J) -> None:
        """Queue a job; ``start`` must follow as soon as the caller holds no lock."""
        self._queue.append(job)

    def start(self) -> None:
        """Have a thread run the queued jobs; if none can be started, run them here."""
        with self._condition:
            if not self._queue or self._running >= self._threads:
                return
            self._running += 1
        try:
            if not threads_run():
                raise RuntimeError
            threading.Thread(
                target=self._work, name="shmcache-callback", daemon=True
            ).start()
        except RuntimeError:
            self._work()  # at the end of the process no thread can be started

    def _work(self) -> None:
        while True:
            with self._condition:
                try:
                    job = self._queue.popleft()
                except IndexError:
                    self._running -= 1
                    self._condition.notify_all()
                    return
                if job.taken:
                    continue
                job.taken = True
                self._inside.add(threading.get_ident())
            try:
                self._run(job)
            except BaseException:
                # A signal handler raised this in the main thread, where ``start`` had
                # to run the jobs itself.
                with self._condition:
                    self._running -= 1
                    self._condition.notify_all()
                raise
            finally:
                self._inside.discard(threading.get_ident())

    def wait(self, timeout: float) -> bool:
        """Wait until all jobs are done.

        A callback may call this, too: then its own job is not waited for.

        Args:
            timeout: Seconds to wait.

        Returns:
            Whether all jobs are done.
        """
        mine = threading.get_ident() in self._inside
        with self._condition:
            return self._condition.wait_for(
                lambda: not self._queue and self._running <= mine, timeout
            )
