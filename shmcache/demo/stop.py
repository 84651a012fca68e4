"""Ctrl-C and its kin."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

TICK = 0.1  # s


class Stopped(KeyboardInterrupt):
    """The user, or the system, wants the demo to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """A note that a signal to end has come; ``check()`` raises when it has.

    An exception raised by the signal handler itself could strike in the middle of
    cleaning up, or between the start of a process and the line that remembers it.
    So the handler only takes a note, and whoever waits looks at it every TICK.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in self._SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, or a shell's &
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = signum

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._signum:
            raise Stopped(self._signum)

    def tick(self) -> None:
        """Sleep one TICK, then check."""
        time.sleep(TICK)
        self.check()
