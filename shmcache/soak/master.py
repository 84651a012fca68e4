"""Plain fork: a process that forks workers, and others in place of those that die.

SIGTERM ends it in good order, and so does the death of the process that started it.
It uses no cache itself, so its workers begin with what importing the code takes.
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
        """Until told to end."""
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
                time.sleep(0.5)  # what fails at once is not to be tried for ever
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
        # A signal must find the child either unborn or in the set.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = 0 if self._ending else os.fork()
            if pid:
                self._children.add(pid)
            elif not self._ending:
                hooks._end_with(parent)
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
        # Late is late: a machine that was busy is not made up for in a rush.
        due = max(due + pause, time.monotonic() - 1.0)
        while not end and (left := due - time.monotonic()) > 0:
            time.sleep(min(0.1, left))
    traffic.close()
    sys.exit(0)


if __name__ == "__main__":
    Master(int(sys.argv[1]), Load.from_environment()).run()
