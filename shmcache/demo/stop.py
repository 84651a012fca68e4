"""Ctrl-C and other signals that end a run."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

TICK = 0.1  # s


class Stopped(KeyboardInterrupt):
    """The user, or the system, wants the run to end.

    Args:
        signum: The signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """Records that a signal to end has come; then ``check()`` raises.

    If the signal handler itself raised, the exception could come in the middle of a
    cleanup, or between the start of a process and the line that stores the process.  So
    the handler only records the signal, and code that waits checks it every TICK.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in self._SIGNALS:
            # A signal that is ignored, by nohup or a shell's &, stays ignored.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, _frame: FrameType | None) -> None:
        self._signum = signum

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._signum:
            raise Stopped(self._signum)

    def tick(self) -> None:
        """Sleep one TICK, then check."""
        time.sleep(TICK)
        self.check()
