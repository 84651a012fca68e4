"""Real servers whose workers share one cache: forked, preloaded, killed, reloaded."""

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

import shmcache
from shmcache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm and /proc"),
]

APPS = Path(__file__).parent.parent / "apps"
PATIENCE = 60  # s; only a failing test waits so long
SHM = "/dev/shm"


def names_of(name: str) -> list[str]:
    """What is in /dev/shm for a cache."""
    ours = f"shmcache-{os.getuid()}-{name}"
    return sorted(
        entry
        for entry in os.listdir(SHM)
        if entry == ours or entry.startswith((f"{ours}.", f"sem.{ours}."))
    )


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
            # uWSGI's first process ends without Python's farewell, and only C code can
            # take leave then.  What it leaves nobody uses, and anybody may remove.
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


# --- tests ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "warm"),
    [
        *((kind, kind.preloads) for kind in KINDS),
        *(
            (kind, False)
            for kind in KINDS
            if kind.id in {"gunicorn-sync-preload", "uwsgi"}
        ),
    ],
    ids=lambda value: getattr(value, "id", "warm" if value else "cold"),
)
def test_workers_share_one_cache(kind: Kind, name: str, warm: bool) -> None:
    """Workers read each other's writes and lose no increment, a killed one takes
    nothing with it, its successor finds everything, and the end leaves nothing."""
    with Server(installed(kind), name, warm=warm) as server:
        workers = server.meet()
        states = server.ask_all("state")
        assert len({state["token"] for state in states.values()}) == len(workers)
        assert server.ask("get", key="warm") == ("by the loader" if warm else None)

        at_once(lambda: [server.ask("count", times=100) for _ in range(10)], 4)
        assert server.ask("get", key="counter") == 4000

        server.ask("put", key="kept", value="over a death")
        victim = min(workers)
        acknowledged, vain = server.count_while(lambda: os.kill(victim, signal.SIGKILL))
        assert victim not in server.meet()
        assert server.ask("get", key="kept") == "over a death"
        counter = server.ask("get", key="counter")
        assert 4000 + 100 * acknowledged <= counter
        assert counter <= 4000 + 100 * (acknowledged + vain)

        at_once(lambda: [server.ask("count", times=100) for _ in range(5)], 4)
        assert server.ask("get", key="counter") == counter + 2000
        state = server.ask("state")
        assert state["findings"] == []
        assert state["lock_timeouts"] == 0
        server.stop()
    assert names_of(name) == []


@pytest.mark.parametrize(
    ("kind", "persist"),
    [
        (gunicorn("sync", "--preload"), False),  # the first process keeps the cache
        (gunicorn("gthread"), True),
        (uwsgi(), True),
        (uwsgi("--lazy-apps"), True),
    ],
    ids=lambda value: getattr(value, "id", f"persist={value}"),
)
def test_reload_and_restart(kind: Kind, name: str, persist: bool) -> None:
    """All workers are replaced at a reload, and their successors find everything; a
    persistent cache outlives the server as well."""
    installed(kind)
    with Server(kind, name, persist=persist) as server:
        before = server.meet()
        server.ask("put", key="kept", value="over a reload")
        server.ask("count", times=100)
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda: not any(map(psutil.pid_exists, before)))
        assert not server.meet() & before
        assert server.ask("get", key="kept") == "over a reload"
        assert server.ask("count", times=100) == 200
        assert server.ask("state")["findings"] == []
        server.stop()
    if not persist:
        assert names_of(name) == []
        return
    with Server(kind, name, persist=persist) as server:
        server.meet()
        assert server.ask("get", key="kept") == "over a reload"
        assert server.ask("count", times=100) == 300
        server.stop()
    with Cache.attach(name) as left:
        assert left["counter"] == 300
        assert left.check() == []
        left.unlink()
    assert names_of(name) == []


@pytest.mark.once
def test_celery(name: str, tmp_path: Path) -> None:
    """The processes of a Celery worker share one cache: at once, without losing an
    increment, computing once; and the end leaves nothing."""
    if not find_spec("celery"):
        pytest.skip("celery is not installed: pip install 'shmcache[test]'")
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    env = {**os.environ, "TASKS_CACHE": name, "TASKS_HOME": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(APPS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", "tasks", "worker", "-c", "3"),
            *("--loglevel", "WARNING", "--hostname", "test"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ],
        env=env,
        cwd=tmp_path,
    )
    try:
        client = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import json, tasks; print(json.dumps(tasks.ask(3, 60)))",
            ],
            env=env,
            stdout=subprocess.PIPE,
            check=True,
            timeout=2 * PATIENCE,
        )
        answers = json.loads(client.stdout)
        assert worker.poll() is None
        children = {each.pid for each in psutil.Process(worker.pid).children()}
        worker.terminate()
        assert worker.wait(PATIENCE) == 0
    finally:
        worker.kill()
        worker.wait()
    [met] = {tuple(each) for each in answers["met"]}
    assert set(met) <= children
    assert len(met) == 3
    pids, numbers, firsts = zip(*answers["worked"], strict=True)
    assert set(pids) <= set(met)
    assert sorted(numbers) == list(range(1, 61))
    for n in range(5):
        assert len(set(firsts[n::5])) == 1
    assert names_of(name) == []


@pytest.mark.parametrize("kind", [uwsgi(), uwsgi("--lazy-apps")], ids=lambda k: k.id)
def test_expired_entries_go_without_threads(kind: Kind, name: str) -> None:
    """Under uWSGI without threads there is no sweeper, and inserts sweep as they go."""
    with Server(installed(kind), name, warm=True, cleanup_interval=1) as server:
        workers = server.meet()
        for n in range(20):
            server.ask("put", key=n, value="short", ttl=0.001)
        server.ask("put", key="last", value="short", ttl=0.001)
        server.until(lambda: server.ask("get", key="last") is None)
        state = server.ask("state")
        assert not [name for name in state["threads"] if "sweeper" in name]
        for n in range(10):
            server.ask("put", key=-n, value="stays")
        state = server.ask("state")
        assert state["expired"] == 21
        assert state["entries"] == 10 + 1 + len(workers)
        server.stop()


@pytest.mark.parametrize(
    "kind",
    [uwsgi("--enable-threads"), gunicorn("sync"), gunicorn("gevent", "--preload")],
    ids=lambda k: k.id,
)
def test_expired_entries_go_by_themselves(kind: Kind, name: str) -> None:
    """Each worker's sweeper removes what has expired, without any operation, and the
    process that forks the workers has no sweeper that it does not stop for it."""
    with Server(installed(kind), name, warm=True, cleanup_interval=0.05) as server:
        server.meet()
        for n in range(20):
            server.ask("put", key=n, value="short", ttl=0.001)
        server.until(lambda: server.ask("state")["expired"] == 20)
        # Workers that are forked beside all this work, too.
        _, *victims = server.meet()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        server.until(lambda: not any(map(psutil.pid_exists, victims)))
        server.meet()
        server.ask("put", key="again", value="short", ttl=0.001)
        server.until(lambda: server.ask("state")["expired"] == 21)
        server.stop()
    assert names_of(name) == []
