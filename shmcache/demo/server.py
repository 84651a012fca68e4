"""One gunicorn with its workers: how it is started, measured and ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import psutil

from shmcache._segment.names import SHM_DIR
from shmcache.demo import hooks
from shmcache.demo.stop import TICK, StopRequest
from shmcache.errors import ShmCacheError

if TYPE_CHECKING:
    from types import TracebackType

START_TIMEOUT = 60.0  # s
STOP_TIMEOUT = hooks.graceful_timeout + 3.0  # s

# Runs a module as ``python -m`` does, but with the import path of this process, which
# does not depend on the current directory.  So both import the same files.
_BOOT = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "del sys.argv[:2]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


class DemoError(ShmCacheError):
    """The demo cannot run, or cannot go on."""


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module in a new process of this Python."""
    return [sys.executable, "-c", _BOOT, json.dumps(sys.path), module, *arguments]


class Server:
    """A gunicorn that serves the demo's app, for the time of a with block.

    It listens on a free loopback port.  The socket is bound here and handed over, so
    that no other process can take the port in between.  Gunicorn is a process group of
    its own, so that Ctrl-C in a terminal reaches only the demo, which then ends
    gunicorn in good order.

    Args:
        workers: How many workers.
        cache_name: The name of the shared cache; None for a dict in each worker.
        stop: Tells whether the user wants the demo to end.
    """

    def __init__(self, workers: int, cache_name: str | None, stop: StopRequest) -> None:
        self.workers = workers
        self._cache_name = cache_name
        self._stop = stop
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - _end() closes it

    def __enter__(self) -> Self:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.address: tuple[str, int] = listener.getsockname()
            ready, writer = os.pipe()
            try:
                self._process = self._spawn(listener.fileno(), writer)
            finally:
                os.close(writer)
        try:
            self._wait_ready(ready)
        except BaseException:
            self._end()
            raise
        finally:
            os.close(ready)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def url(self) -> str:
        """The address for a browser."""
        return "http://{}:{}/".format(*self.address)

    def check(self) -> None:
        """Raise DemoError if gunicorn has ended by itself."""
        if self._ended():
            raise self._failure("gunicorn ended unexpectedly")

    def worker_memory(self) -> int | None:
        """The memory (PSS) of all workers in bytes, without shared segments.

        PSS counts a page that n processes share as 1/n in each of them, so the sum is
        the memory that is really taken; RSS would count the page n times.

        Returns:
            The bytes; None if they are unknown.
        """
        if sys.platform != "linux":
            return None
        try:
            return sum(
                int(mapping.pss)
                for worker in psutil.Process(self._process.pid).children()
                for mapping in worker.memory_maps(grouped=True)
                if not mapping.path.startswith(SHM_DIR)
            )
        except psutil.Error:  # a worker has just ended, or /proc cannot be read
            return None

    def _spawn(self, listener: int, ready: int) -> subprocess.Popen[bytes]:
        skip = ("GUNICORN_", "LISTEN_")  # settings that are meant for another server
        environ = {k: v for k, v in os.environ.items() if not k.startswith(skip)}
        environ[hooks.PARENT] = str(os.getpid())
        environ[hooks.CACHE] = self._cache_name or ""
        environ[hooks.READY] = str(ready)
        return subprocess.Popen(
            python(
                "gunicorn",
                f"--config=python:{hooks.__name__}",
                f"--bind=fd://{listener}",
                f"--workers={self.workers}",
                f"shmcache.demo.app:make_app({self._cache_name!r})",
            ),
            env=environ,
            cwd="/",
            pass_fds=(listener, ready),
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _wait_ready(self, ready: int) -> None:
        """Wait until every worker has written its byte."""
        deadline = time.monotonic() + START_TIMEOUT
        missing = self.workers
        while missing > 0:
            self._stop.check()
            if time.monotonic() > deadline:
                raise self._failure(f"{missing} gunicorn workers did not start")
            if select.select([ready], [], [], TICK)[0]:
                came = os.read(ready, missing)
                if not came:  # all writers have closed the pipe: gunicorn has ended
                    raise self._failure("gunicorn did not start")
                missing -= len(came)

    def _ended(self) -> bool:
        """Whether the arbiter has ended.

        It is not reaped, so that its PID cannot be given to another process.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _end(self) -> None:
        """End gunicorn: by SIGTERM, and after STOP_TIMEOUT by SIGKILL."""
        deadline = time.monotonic() + STOP_TIMEOUT
        # Popen.terminate() would first reap a process that has ended, and so free its
        # PID for another process.
        os.kill(self._process.pid, signal.SIGTERM)
        while not self._ended() and time.monotonic() < deadline:
            time.sleep(TICK / 5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # processes that are left
        self._process.wait()
        self._log.close()

    def _failure(self, what: str) -> DemoError:
        """An error with the last error that gunicorn printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        errors = [line for line in said if not line.startswith(("[", " "))]
        last = (errors or said or ["it said nothing"])[-1].strip()
        return DemoError(f"{what}: {last}")
