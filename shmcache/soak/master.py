"""Plain fork: a process that forks workers, and replaces those that die.

SIGTERM ends it in good order, and so does the death of the process that started it.
The process does not use the cache itself, so its workers begin with no more memory than
the import of the code takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

from shmcache.demo import hooks
from shmcache.soak.load import BATCH, Load, Traffic, fault

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Master:
    """The workers of one run."""

    def __init__(self, workers: int, load: Load) -> None:
        self._workers = workers
        self._load = load
        self._children: set[int] = set()
        self._ending = False
        self._serial = 0

    def run(self) -> None:
        """Fork workers and replace them, until a signal ends the run."""
        for signum in _SIGNALS:
            signal.signal(signum, self._end)
        hooks.on_starting(None)
        for _ in range(self._workers):
            self._spawn()
        while self._children:
            pid, status = os.wait()
            self._children.discard(pid)
            if status not in (0, signal.SIGKILL):
                fault(f"process {pid} ended with status {status}")
                time.sleep(0.5)  # workers that fail at once are not forked in a rush
            if not self._ending:
                self._spawn()

    def _end(self, _signum: int, _frame: object) -> None:
        self._ending = True
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _spawn(self) -> None:
        self._serial += 1
        parent = os.getpid()
        # Signals are blocked from before the fork until the child is in the set, so
        # that the handler never misses a child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = 0 if self._ending else os.fork()
            if pid:
                self._children.add(pid)
            elif not self._ending:
                hooks.end_with(parent)
                _work(self._load, self._serial)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _work(load: Load, serial: int) -> None:
    """A worker's life, which ends the process."""
    end: list[int] = []
    for signum in _SIGNALS:
        signal.signal(signum, lambda signum, _: end.append(signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    traffic = Traffic(load, serial)
    hooks.post_worker_init(None)
    pause = BATCH / load.rate
    due = time.monotonic()
    while not end:
        traffic.batch()
        # A worker that is late does not make up for more than a second.
        due = max(due + pause, time.monotonic() - 1.0)
        while not end and (left := due - time.monotonic()) > 0:
            time.sleep(min(0.1, left))
    traffic.close()
    # At its end Python restores the default handlers.  A second SIGTERM, which the
    # master sends to all its children when the run ends, would count as a failure.
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    Master(int(sys.argv[1]), Load.from_environment()).run()
