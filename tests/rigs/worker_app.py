"""A worker process that does what a test tells it: one call after the other."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

PATIENCE = 60  # s; only a failing test waits so long


def until(what: str, condition: Callable[[], Any]) -> Any:
    """What a condition returns as soon as it is true; fails after a while."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, f"did not come: {what}; it is {result!r}"
        time.sleep(0.01)
    return result


def _serve(pipe: Connection) -> None:
    signal.alarm(PATIENCE * 4)  # never outlive the test for long
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if order is None:
            return
        function, arguments = order
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class Worker:
    """A spawned process, in a with block."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its PID."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called; ``receive`` must follow."""
        self._pipe.send((function, arguments))

    def receive(self) -> Any:
        """What the function returned."""
        assert self._pipe.poll(PATIENCE), f"worker {self.pid} does not answer"
        fine, result = self._pipe.recv()
        assert fine, f"in worker {self.pid}: {result}"
        return result

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function called; what it returned."""
        self.send(function, *arguments)
        return self.receive()

    def kill(self) -> None:
        """Kill it by SIGKILL."""
        self.process.kill()
        self.process.join(PATIENCE)

    def end(self) -> None:
        """Have it end by itself, as a process does that has no more to do."""
        if self.process.is_alive():
            self._pipe.send(None)
        self.process.join(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._pipe.closed:
            if self.process.is_alive():
                try:
                    self._pipe.send(None)
                    self.process.join(PATIENCE)
                except OSError:
                    pass
            if self.process.is_alive():
                self.process.kill()
                self.process.join(PATIENCE)
            self._pipe.close()
            self.process.close()
