"""Real servers whose workers share one cache: forked, preloaded, killed, reloaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import pytest
from peers import PATIENCE, names_of
from servers import APPS, KINDS, Kind, Server, at_once, gunicorn, installed, uwsgi

from shmcache import Cache

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm and /proc"),
]

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
    """The processes of a Celery worker share one cache: they see writes at once, lose
    no increment, and compute once; the end leaves nothing."""
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
    """Under uWSGI without threads there is no sweeper, and inserts remove what has
    expired."""
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
    process that forks the workers stops its own sweeper first."""
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
