"""Real servers: how each is started, what its workers answer, how it is stopped."""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

import psutil
import pytest
from peers import PATIENCE, names_of

import shmcache

if TYPE_CHECKING:
    from collections.abc import Callable

APPS = Path(__file__).parent.parent / "apps"


@cache
def uwsgi_binary() -> str | None:
    """A uWSGI for this Python: beside this interpreter, or in PATH."""
    beside = shutil.which("uwsgi", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("uwsgi")
    if not found:
        return None
    version = subprocess.run(
        [found, "--python-version"], stdout=subprocess.PIPE, text=True, check=False
    )
    return found if version.stdout.strip() == platform.python_version() else None


# --- servers --------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A server, and how it is told to run the application with so many workers."""

    id: str
    command: Callable[[str, int], list[str]]
    workers: int
    missing: str = ""
    preloads: bool = False  # loads the application before it forks
    env: dict[str, str] = field(default_factory=dict)


def gunicorn(worker_class: str, *options: str) -> Kind:
    """Gunicorn with a kind of worker."""
    missing = "" if find_spec("gunicorn") else "gunicorn"
    if worker_class == "gevent" and not find_spec("gevent"):
        missing = "gevent"

    def command(address: str, workers: int) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", "served:application"),
            *("--bind", f"unix:{address}", "--workers", str(workers)),
            *("--worker-class", worker_class, "--chdir", str(APPS)),
            *options,
        ]

    name = "-".join(["gunicorn", worker_class, *(o.strip("-") for o in options)])
    return Kind(name, command, 3, missing, "--preload" in options)


def uvicorn() -> Kind:
    """Uvicorn, which spawns its workers."""

    def command(address: str, workers: int) -> list[str]:
        return [
            *(sys.executable, "-m", "uvicorn", "served:asgi", "--app-dir", str(APPS)),
            *("--uds", address, "--workers", str(workers), "--lifespan", "on"),
        ]

    return Kind("uvicorn", command, 2, "" if find_spec("uvicorn") else "uvicorn")


def uwsgi(*options: str) -> Kind:
    """uWSGI, which forks in C and runs no hooks of Python's."""

    def command(address: str, workers: int) -> list[str]:
        return [
            *(uwsgi_binary() or "uwsgi", "--master", "--need-app", "--die-on-term"),
            *("--http-socket", address, "--processes", str(workers)),
            *("--chdir", str(APPS), "--pythonpath", str(APPS)),
            *("--module", "served:application", "--disable-logging"),
            *options,
        ]

    name = "-".join(["uwsgi", *(o.strip("-") for o in options)])
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    preloads = "--lazy-apps" not in options
    return Kind(name, command, 3, "" if uwsgi_binary() else "uwsgi", preloads, env)


KINDS = [
    *(gunicorn(each) for each in ("sync", "gthread", "gevent")),
    *(gunicorn(each, "--preload") for each in ("sync", "gthread", "gevent")),
    uvicorn(),
    uwsgi(),
    uwsgi("--enable-threads"),
    uwsgi("--lazy-apps"),
    uwsgi("--lazy-apps", "--enable-threads"),
]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def connect(self) -> None:
        """Connects to the path that is given as the host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.host)


class Server:
    """A running server; leaving the context kills what is left of it."""

    def __init__(
        self, kind: Kind, name: str, *, warm: bool = False, **settings: Any
    ) -> None:
        self.kind = kind
        self.name = name
        self.persists = settings.get("persist", False)
        # A socket's path must be short.
        self.home = tempfile.mkdtemp(prefix="served-")
        self.address = os.path.join(self.home, "socket")
        self.log = open(os.path.join(self.home, "log"), "w+")  # noqa: SIM115
        env = {**os.environ, **kind.env, "PYTHONDONTWRITEBYTECODE": "1"}
        env["SERVED_CACHE"] = json.dumps({"name": name, **settings})
        env["SERVED_WARM"] = "1" * warm
        env["XDG_RUNTIME_DIR"] = self.home  # for gunicorn's control socket
        env.pop("PYTHONSAFEPATH", None)
        self.process = subprocess.Popen(
            kind.command(self.address, kind.workers),
            env=env,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        self.until(lambda: self.try_to_ask("get", key="nothing") is not None)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for process in [*self.family(), psutil.Process(os.getpid())]:
            if process.pid != os.getpid():
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error:
            sys.stderr.write(self.output())
        self.log.close()
        shutil.rmtree(self.home)

    def output(self) -> str:
        """What the server has written so far."""
        self.log.seek(0)
        return self.log.read()

    def family(self) -> list[psutil.Process]:
        """The processes below the server's first one."""
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def until(self, condition: Callable[[], Any]) -> None:
        """Waits for something to become true."""
        deadline = time.monotonic() + PATIENCE
        pause = 0.005
        while not condition():
            assert self.process.poll() is None, f"the server ended:\n{self.output()}"
            assert time.monotonic() < deadline, f"in vain:\n{self.output()}"
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def try_to_ask(self, operation: str, **query: Any) -> tuple[int, Any] | None:
        """The PID of the worker that answered, and its answer; None if none did."""
        connection = UnixConnection(self.address)
        try:
            connection.request("GET", f"/{operation}?{urlencode(query)}")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status != 200:
            return None
        found = json.loads(body)
        return found["pid"], found["result"]

    def ask(self, operation: str, **query: Any) -> Any:
        """The answer of some worker."""
        answer = self.try_to_ask(operation, **query)
        assert answer is not None, self.output()
        return answer[1]

    def ask_all(self, operation: str, workers: int = 0) -> dict[int, Any]:
        """The last answer of each worker, by PID, once all of them have answered."""
        answers: dict[int, Any] = {}

        def ask_more() -> bool:
            # Several at once, so that no worker gets them all.
            def one() -> None:
                answer = self.try_to_ask(operation)
                if answer:
                    answers[answer[0]] = answer[1]

            at_once(one, 6)
            return len(answers) >= (workers or self.kind.workers)

        self.until(ask_more)
        return answers

    def meet(self) -> set[int]:
        """The PIDs of all workers, each of which has read what the others wrote."""
        met: set[int] = set()

        def all_met() -> bool:
            pids = {pid for pid in self.ask_all("meet") if psutil.pid_exists(pid)}
            answers = self.ask_all("meet")
            met.clear()
            met.update(pid for pid in answers if pids <= set(answers[pid]))
            return pids == met and len(pids) == self.kind.workers

        self.until(all_met)
        return met

    def count_while(self, act: Callable[[], object]) -> tuple[int, int]:
        """How many requests to count to a hundred were answered, and how many not,
        that four clients made before and while something happened to a worker."""
        outcomes: list[bool] = []

        def request() -> None:
            outcomes.extend(
                self.try_to_ask("count", times=100) is not None for _ in range(10)
            )

        clients = [threading.Thread(target=request) for _ in range(4)]
        for client in clients:
            client.start()
        self.until(lambda: len(outcomes) > 4)
        act()
        for client in clients:
            client.join()
        return outcomes.count(True), outcomes.count(False)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Stops the server as its manager would; it must end well, and all of it."""
        family = self.family()
        self.process.send_signal(signum)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"does not stop:\n{self.output()}")
        psutil.wait_procs(family, PATIENCE)
        assert [] == [process for process in family if process.is_running()]
        assert status in {0, -signum, 128 + signum}, self.output()
        assert "Traceback" not in self.output(), self.output()
        uwsgi = self.kind.id.startswith("uwsgi") and not self.persists
        if uwsgi and not shmcache.compiled and names_of(self.name):
            # uWSGI's first process ends without finalizing Python, so only C code can
            # leave the segment then.  Nobody uses the files that it leaves, and any
            # process may remove them.
            command = [sys.executable, "-P", "-m", "shmcache", "unlink", self.name]
            subprocess.run(command, check=True, timeout=PATIENCE)


def at_once(function: Callable[[], object], times: int) -> None:
    """Runs a function in several threads, to the end of all."""
    threads = [threading.Thread(target=function) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def installed(kind: Kind) -> Kind:
    """The server; without it the test is skipped."""
    if kind.missing:
        pytest.skip(f"{kind.missing} is not installed: pip install 'shmcache[test]'")
    return kind
