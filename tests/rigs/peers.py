"""Processes that a test talks to: forked ones, and unrelated ones that run a script."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

SHM = "/dev/shm"
PATIENCE = 60  # s; only a failing test waits so long


def names_of(name: str) -> list[str]:
    """What is in /dev/shm for a cache."""
    ours = f"shmcache-{os.getuid()}-{name}"
    return sorted(
        entry
        for entry in os.listdir(SHM)
        if entry == ours or entry.startswith((f"{ours}.", f"sem.{ours}."))
    )


# --- processes to talk to -------------------------------------------------------


def run_and_end(body: Callable[..., object], *arguments: object) -> NoReturn:
    """Runs ``body`` in a forked process and ends it, with 0 if nothing was raised."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        body(*arguments)
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


class Peer:
    """A forked process that runs ``body(link)``, and our end of the link."""

    def __init__(self, body: Callable[[Connection], object]) -> None:
        self.link, there = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.link.close()
            run_and_end(body, there)
        there.close()

    def hear(self) -> Any:
        """The next message from the process."""
        assert self.link.poll(PATIENCE), f"process {self.pid} says nothing"
        return self.link.recv()

    def say(self, message: object = "go") -> None:
        """Sends a message to the process."""
        self.link.send(message)

    def kill(self) -> None:
        """Kills the process, as the kernel does when memory is short."""
        os.kill(self.pid, signal.SIGKILL)
        self.end(-signal.SIGKILL)

    def end(self, status: int = 0) -> None:
        """Waits for the end of the process, which must have this status."""
        self.link.close()
        assert status == os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(script: str, *arguments: str, python: str = sys.executable) -> Any:
    """An unrelated process that runs a script, with pipes to it."""
    return subprocess.Popen(
        [python, "-W", "always", "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any, given: str = "") -> str:
    """Return what a script printed; it must have ended with 0 and an empty stderr."""
    try:
        output, complaints = process.communicate(given, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, complaints = process.communicate()
    assert (0, "") == (process.returncode, complaints), output
    return str(output)


def run(script: str, *arguments: str) -> str:
    """What an unrelated process prints that runs a script."""
    return finish(start(script, *arguments))
