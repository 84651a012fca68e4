"""What users have asked to be called for, run in a few threads of its own.

Nobody's lock is held there, so a callback may use what it is called by; a slow one
delays the others once all threads are busy, and nothing else.  Threads end when the
queue is empty: a service that is told of little has none.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from shmcache._process.uwsgi import threads_run

if TYPE_CHECKING:
    from collections.abc import Callable


class Job(Protocol):
    """Something to run; queued twice it is run once, by who finds it not taken."""

    taken: bool


J = TypeVar("J", bound=Job)


class Callbacks(Generic[J]):
    """Runs callbacks in a few threads, which live as long as there is work."""

    def __init__(self, run: Callable[[J], None], threads: int) -> None:
        self._run = run
        self._threads = threads
        self._queue: deque[J] = deque()
        self._condition = threading.Condition()
        self._running = 0
        self._inside: set[int] = set()  # the threads that run them

    @property
    def pending(self) -> int:
        """How many wait or run."""
        return len(self._queue) + self._running

    def add(self, job: J) -> None:
        """Queue a job; ``start`` must follow, when no lock is held."""
        self._queue.append(job)

    def start(self) -> None:
        """See to it that what is queued will run: here, if no thread can be had."""
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
            except BaseException:  # a signal handler's, where no thread can be had
                with self._condition:
                    self._running -= 1
                    self._condition.notify_all()
                raise
            finally:
                self._inside.discard(threading.get_ident())

    def wait(self, timeout: float) -> bool:
        """Wait until all are done, but the caller if it is one; whether they are."""
        mine = threading.get_ident() in self._inside
        with self._condition:
            return self._condition.wait_for(
                lambda: not self._queue and self._running <= mine, timeout
            )
