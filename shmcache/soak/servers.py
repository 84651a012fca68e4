"""Worker processes under plain fork or gunicorn: how they are started and ended."""

from __future__ import annotations

import http.client
import itertools
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from importlib import util
from typing import TYPE_CHECKING, Self

import psutil

from shmcache.demo import hooks
from shmcache.demo.server import python
from shmcache.demo.stop import TICK, StopRequest
from shmcache.soak.load import BATCH, FAULTS, SETTINGS, Load
from shmcache.soak.options import SoakError

if TYPE_CHECKING:
    from types import TracebackType

START_TIMEOUT = 120.0  # s
STOP_TIMEOUT = 120.0


class Server:
    """A master that forks workers, for the time of a with block.

    The master and its workers are a process group of their own, so that Ctrl-C in a
    terminal reaches only the soak, which then ends the master in good order.  If the
    soak dies, the kernel ends the master, and if the master dies, the workers.

    Args:
        workers: How many workers.
        load: What they do.
        stop: Tells whether the user wants the soak to end.
    """

    def __init__(self, workers: int, load: Load, stop: StopRequest) -> None:
        self.wanted = workers
        self._load = load
        self._stop = stop
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - end() closes it
        self._started = False

    def __enter__(self) -> Self:
        ready, ready_writer = os.pipe()
        self._faults, faults_writer = os.pipe()
        os.set_blocking(self._faults, False)
        try:
            self._start(ready_writer, faults_writer)
        except BaseException:
            os.close(self._faults)
            os.close(ready)
            raise
        finally:
            os.close(ready_writer)
            os.close(faults_writer)
        self._started = True
        self.master = psutil.Process(self._process.pid)
        try:
            self._wait_ready(ready)
        except BaseException:
            self.end()
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
        self.end()

    def _command(self) -> list[str]:
        return python("shmcache.soak.master", str(self.wanted))

    def _start(self, ready: int, faults: int, *more: int) -> None:
        skip = ("GUNICORN_", "LISTEN_")  # settings that are meant for another server
        environ = {k: v for k, v in os.environ.items() if not k.startswith(skip)}
        environ[hooks.PARENT] = str(os.getpid())
        environ[hooks.CACHE] = ""
        environ[hooks.READY] = str(ready)
        environ[FAULTS] = str(faults)
        environ[SETTINGS] = self._load.to_json()
        self._process = subprocess.Popen(
            self._command(),
            env=environ,
            cwd="/",
            pass_fds=(ready, faults, *more),
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _wait_ready(self, ready: int) -> None:
        # Each worker writes a byte when it is ready.
        deadline = time.monotonic() + START_TIMEOUT
        missing = self.wanted
        while missing > 0:
            self._stop.check()
            if time.monotonic() > deadline:
                raise SoakError(f"{missing} workers did not start: {self.said()}")
            if select.select([ready], [], [], TICK)[0]:
                came = os.read(ready, missing)
                if not came:  # all writers have closed the pipe: the master has ended
                    raise SoakError(f"the server did not start: {self.said()}")
                missing -= len(came)

    # --- while it runs --------------------------------------------------------------

    def workers(self) -> list[psutil.Process]:
        """The workers that are alive now."""
        with suppress(psutil.NoSuchProcess):
            return [p for p in self.master.children() if _alive(p)]
        return []

    def ended(self) -> bool:
        """Whether the master has ended.

        It is not reaped, so that its PID cannot be given to another process.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def faults(self) -> list[str]:
        """The faults that workers have reported since the last call."""
        data = b""
        with suppress(BlockingIOError):
            while piece := os.read(self._faults, 1 << 16):
                data += piece
        return data.decode(errors="replace").splitlines()

    def said(self) -> str:
        """The last line that the server printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing; run it again"

    # --- the end --------------------------------------------------------------------

    def end(self) -> list[str]:
        """End master and workers: by SIGTERM, and after STOP_TIMEOUT by SIGKILL.

        Returns:
            A complaint if SIGKILL was needed, and the last faults of the workers.
        """
        if not self._started:
            return []
        self._started = False
        deadline = time.monotonic() + STOP_TIMEOUT
        # Popen.terminate() would first reap a process that has ended, and so free its
        # PID for another process.
        os.kill(self._process.pid, signal.SIGTERM)
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(TICK / 5)
        forced = [] if self.ended() else [f"the server did not end: {self.said()}"]
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # processes that are left
        self._process.wait()
        forced += self.faults()
        os.close(self._faults)
        self._log.close()
        return forced


class Gunicorn(Server):
    """Gunicorn with sync workers, and clients whose requests are batches of operations.

    Args:
        workers: How many workers.
        load: What they do.
        stop: Tells whether the user wants the soak to end.

    Raises:
        SoakError: Gunicorn is not installed.
    """

    def __init__(self, workers: int, load: Load, stop: StopRequest) -> None:
        if util.find_spec("gunicorn") is None:
            raise SoakError(
                "--server gunicorn needs gunicorn, which is not installed:"
                " pip install 'shmcache[demo]'"
            )
        super().__init__(workers, load, stop)
        self._halt = threading.Event()
        self._clients: list[threading.Thread] = []

    def _command(self) -> list[str]:
        return python(
            "gunicorn",
            f"--config=python:{hooks.__name__}",
            f"--bind=fd://{self._listener}",
            f"--workers={self.wanted}",
            "--timeout=300",  # gunicorn must not kill a worker that is only slow
            "--graceful-timeout=60",
            "shmcache.soak.app:make_app()",
        )

    def _start(self, ready: int, faults: int, *_: int) -> None:
        # The port is bound here and handed over, so that no other process can take it
        # in between.
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self._address: tuple[str, int] = listener.getsockname()
            self._listener = listener.fileno()
            super()._start(ready, faults, listener.fileno())

    def __enter__(self) -> Self:
        super().__enter__()
        serials = itertools.count(1)  # next() of it is atomic
        self._clients = [
            threading.Thread(target=self._ask, args=(serials,), daemon=True)
            for _ in range(self.wanted)
        ]
        for client in self._clients:
            client.start()
        return self

    def end(self) -> list[str]:
        """End the clients, then master and workers; returns as ``Server.end``."""
        self._halt.set()
        for client in self._clients:
            client.join()
        return super().end()

    def _ask(self, serials: itertools.count[int]) -> None:
        pause = BATCH / self._load.rate
        due = time.monotonic()
        while not self._halt.is_set():
            connection = http.client.HTTPConnection(*self._address, timeout=30)
            # The request of a worker that is killed fails.
            with suppress(OSError, http.client.HTTPException):
                connection.request("GET", f"/{next(serials)}")
                connection.getresponse().read()
            connection.close()
            due = max(due + pause, time.monotonic() - 1.0)
            self._halt.wait(max(0.0, due - time.monotonic()))


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def halt(process: psutil.Process, patience: float = 10.0) -> bool:
    """Stop a process by SIGSTOP, and wait until it stands still.

    Args:
        process: The process.
        patience: Seconds to wait.

    Returns:
        Whether the process stands still; if not, it has ended or is still running.
    """
    deadline = time.monotonic() + patience
    try:
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
    except psutil.NoSuchProcess:
        return False
    return True
