"""Connection pools: bounded over the host, closed by their owners; real servers."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import shutil
import socket
import subprocess
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError, astuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pools_app as app
import psutil
import pytest
from worker_app import Worker, until

from shmcache import HandleMap
from shmcache.pools import ConnectionPools, PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Pool:
    """A pool without connections, whose ends are counted."""

    def __init__(self) -> None:
        self.ends = 0

    def close(self) -> None:
        """Count."""
        self.ends += 1


@pytest.fixture
def make_pools(new_name: Callable[[], str]) -> Iterator[Callable[..., ConnectionPools]]:
    """A factory of ConnectionPools that are closed after the test."""
    made: list[ConnectionPools] = []

    def make(name: str = "", **more: Any) -> ConnectionPools:
        more.setdefault("factory", lambda _: Pool())
        made.append(ConnectionPools(name or new_name(), **more))
        return made[-1]

    yield make
    for pools in made:
        assert pools.close()


# --- settings -----------------------------------------------------------------------


def test_settings_are_those_promised() -> None:
    """Defaults and presets have the values that users know."""
    assert (1000, 1800.0, 300.0, True) == astuple(PoolSettings())
    assert (500, 3600.0, 600.0, True) == astuple(PoolSettings.conservative())
    assert (2000, 7200.0, 300.0, True) == astuple(PoolSettings.high_throughput())


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("max_server_pools", 0, ValueError),
        ("max_server_pools", -1, ValueError),
        ("max_server_pools", 1.5, TypeError),
        ("max_server_pools", True, TypeError),
        ("max_server_pools", "10", TypeError),
        ("server_pool_ttl", 0, ValueError),
        ("server_pool_ttl", float("nan"), ValueError),
        ("server_pool_ttl", float("inf"), ValueError),
        ("server_pool_ttl", None, TypeError),
        ("pool_cleanup_interval", -1.0, ValueError),
        ("pool_cleanup_interval", "5 min", TypeError),
        ("enable_pool_metrics", 1, TypeError),
    ],
)
def test_settings_are_validated(field: str, value: Any, error: type[Exception]) -> None:
    """A setting that makes no sense is refused by its name."""
    with pytest.raises(error, match=field):
        PoolSettings(**{field: value})


def test_settings_are_frozen() -> None:
    """Settings that were validated stay as they are."""
    with pytest.raises(FrozenInstanceError):
        PoolSettings().max_server_pools = 0  # type: ignore[misc]


# --- one process --------------------------------------------------------------------


def test_one_pool_a_server(make_pools: Callable[..., ConnectionPools]) -> None:
    """A server's pool is made once, from the pools' factory or the call's."""
    pools = make_pools(factory=lambda server: [server, Pool()], close=lambda _: None)
    first = pools.get("a")
    assert first[0] == "a"
    assert pools.get("a") is first
    assert pools.get("a", lambda _: Pool()) is first
    other = Pool()
    assert pools.get(("b", 80), lambda _: other) is other
    with pools.lease("a") as leased:
        assert leased is first
    assert 2 == len(pools)
    assert "a" in pools
    assert "c" not in pools


def test_one_of_many_threads_makes_it(
    make_pools: Callable[..., ConnectionPools],
) -> None:
    """Threads that ask for one server at once share one pool."""
    made: list[Pool] = []
    start = threading.Barrier(8)

    def factory(_: str) -> Pool:
        made.append(Pool())
        return made[-1]

    pools = make_pools(factory=factory)
    got: list[Pool] = []

    def ask() -> None:
        start.wait()
        got.append(pools.get("server"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 == len(made)
    assert got == made * 8


def test_evicted_pools_are_closed_once(
    make_pools: Callable[..., ConnectionPools],
) -> None:
    """With 50 pools and a bound of 5, 45 are closed, once, the others at the end."""
    pools = make_pools(settings=PoolSettings(max_server_pools=5))
    all_of_them = [pools.get(f"s{n}") for n in range(50)]
    until("45 closed", lambda: 45 == pools.stats().closed)
    assert [1] * 45 + [0] * 5 == [pool.ends for pool in all_of_them]
    assert pools.close()
    assert [1] * 50 == [pool.ends for pool in all_of_them]


def test_lease_keeps_an_evicted_pool_open(
    make_pools: Callable[..., ConnectionPools],
) -> None:
    """A pool that is evicted inside its lease is closed when the lease ends."""
    pools = make_pools(settings=PoolSettings(max_server_pools=1))
    with pools.lease("a") as pool:
        other = pools.get("b")
        assert 1 == pools.stats().pools.leased
        assert pools.clear() == 1
        until("b closed", lambda: other.ends)
        assert 0 == pool.ends
    until("a closed", lambda: pool.ends)
    assert 1 == pool.ends


@pytest.mark.parametrize(
    "ending", ["close", "closeall", "disconnect", "dispose", "clear"]
)
def test_closer_is_found(
    make_pools: Callable[..., ConnectionPools], ending: str
) -> None:
    """If no closer is given, the pool's own method for closing is used."""
    ended = threading.Event()
    pool = type("Some", (), {ending: lambda _: ended.set()})()
    pools = make_pools(factory=lambda _: pool)
    pools.get("a")
    pools.discard("a")
    assert ended.wait(60)


def test_own_closer(make_pools: Callable[..., ConnectionPools]) -> None:
    """A closer given is called with the pool, in place of the pool's own."""
    closed: list[Pool] = []
    pools = make_pools(close=closed.append)
    pool = pools.get("a")
    pools.discard("a")
    until("closed", lambda: closed)
    assert [pool] == closed
    assert 0 == pool.ends


class _Async:
    async def close(self) -> None:
        """Nothing that a thread could call."""


@pytest.mark.parametrize("pool", [object(), _Async()], ids=["object", "async"])
def test_pool_without_an_end_is_refused(
    make_pools: Callable[..., ConnectionPools], pool: Any
) -> None:
    """A pool that nobody could close is not registered, and the error says what to
    do."""
    pools = make_pools(factory=lambda _: pool)
    with pytest.raises(TypeError, match="close="):
        pools.get("a")
    assert 0 == len(pools)
    assert 0 == pools.stats().opened


def test_bad_input_changes_nothing(
    make_pools: Callable[..., ConnectionPools], name: str
) -> None:
    """Wrong arguments are refused, and what is there stays."""
    pools = make_pools(factory=None)
    kept = pools.get("kept", lambda _: Pool())

    def fail(_: str) -> Any:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        pools.get("a", fail)
    with pytest.raises(ValueError, match="returned None"):
        pools.get("a", lambda _: None)
    with pytest.raises(TypeError, match="factory"):
        pools.get("a")
    with pytest.raises(TypeError, match="factory must be callable"):
        pools.get("a", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key"):
        pools.get(["a"], lambda _: Pool())
    with pytest.raises(TypeError, match="settings must be PoolSettings"):
        ConnectionPools(name, settings=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="close must be callable"):
        ConnectionPools(name, close=5)  # type: ignore[arg-type]
    assert ["kept"] == [entry.key for entry in pools.host()]
    assert pools.get("kept") is kept
    assert 0 == kept.ends


def test_failing_close_is_counted(
    make_pools: Callable[..., ConnectionPools],
) -> None:
    """A closer that raises is counted, and other pools are closed all the same."""

    def close(pool: Pool) -> None:
        pool.close()
        raise OSError("reset by peer")

    pools = make_pools(close=close)
    both = [pools.get("a"), pools.get("b")]
    assert 2 == pools.clear()
    until("both closed", lambda: 2 == pools.stats().closed)
    assert 2 == pools.stats().pools.host.callback_failures
    assert [1, 1] == [pool.ends for pool in both]


def test_two_objects_of_one_name(
    make_pools: Callable[..., ConnectionPools], name: str
) -> None:
    """Two ConnectionPools of one name in one process do not close each other's."""
    one, two = make_pools(name), make_pools(name)
    first, second = one.get("a"), two.get("b")
    one.discard("a")
    until("a closed", lambda: first.ends)
    assert 0 == second.ends
    assert two.get("b") is second


def _pool(_: str) -> Pool:
    return Pool()


def test_pickles_as_its_arguments(make_pools: Callable[..., ConnectionPools]) -> None:
    """A copy made by pickle is on the same shared map, with handles of its own."""
    pools = make_pools(factory=_pool, settings=PoolSettings(max_server_pools=7))
    pools.get("a")
    with pickle.loads(pickle.dumps(pools)) as copy:
        assert copy.settings == pools.settings
        assert ["a"] == [entry.key for entry in copy.host()]


def test_parts_are_for_collectors(make_pools: Callable[..., ConnectionPools]) -> None:
    """``parts()`` names the shared map."""
    parts = make_pools().parts()
    assert ["pools"] == list(parts)
    assert isinstance(parts["pools"], HandleMap)


# --- real pools, several workers ----------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections

    def do_GET(self) -> None:
        """Answer with the server's port."""
        body = str(self.connection.getsockname()[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@contextmanager
def http_servers(count: int) -> Iterator[list[str]]:
    """So many servers on loopback; their URLs."""
    with ExitStack() as stack:
        urls = []
        for _ in range(count):
            server = stack.enter_context(
                ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
            )
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_address[1]}/")
        yield urls


def sockets(workers: list[Worker], ports: set[int]) -> dict[int, int]:
    """How many sockets to these ports each worker has, as seen from outside."""
    found: dict[int, int] = {}
    for worker in workers:
        connections = psutil.Process(worker.pid).net_connections("tcp")
        found[worker.pid] = sum(
            bool(c.raddr) and c.raddr.port in ports for c in connections
        )
    return found


def ports_of(urls: list[str]) -> set[int]:
    """The ports of URLs."""
    return {int(url.rstrip("/").rpartition(":")[2]) for url in urls}


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """So many worker processes."""
    with ExitStack() as stack:
        yield [stack.enter_context(Worker()) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("library", ["urllib3", "urllib3-manager", "requests", "httpx"])
def test_sockets_of_the_host_are_bounded(library: str, name: str) -> None:
    """Three workers talk to 8 servers; with a bound of 6 pools they keep 6 sockets,
    those of the pools registered, and none after ``clear()`` in any one worker."""
    pytest.importorskip(library.partition("-")[0])
    settings = PoolSettings(max_server_pools=6)
    with (
        http_servers(8) as urls,
        HandleMap(
            name,
            max_entries=6,
            ttl=settings.server_pool_ttl,
            cleanup_interval=settings.pool_cleanup_interval,
        ) as registry,
        workers(3) as all_of_them,
    ):
        ports = ports_of(urls)
        for worker in all_of_them:
            worker.call(app.open_pools, name, library, settings)
        for url in urls * 2:
            for worker in all_of_them:
                worker.send(app.ask, url)
            assert [url.rstrip("/").rpartition(":")[2]] * 3 == [
                worker.receive() for worker in all_of_them
            ]
            assert len(registry.host()) <= 6

        def as_registered() -> bool:
            owners = Counter(entry.pid for entry in registry.host())
            open_now = sockets(all_of_them, ports)
            return {pid: n for pid, n in open_now.items() if n} == owners

        until("sockets are those of the pools registered", as_registered)
        assert 6 == sum(sockets(all_of_them, ports).values())
        assert 6 == all_of_them[0].call(app.clear)
        until("no sockets", lambda: not any(sockets(all_of_them, ports).values()))
        entries, opened, closed = all_of_them[0].call(app.stats)
        assert 0 == entries
        assert opened == closed
        assert opened >= 8 * 3
        assert [True] * 3 == [worker.call(app.close) for worker in all_of_them]


@pytest.mark.once
def test_unused_pools_expire_with_their_sockets(name: str) -> None:
    """A pool that is not used for its TTL is closed with its socket by itself; one that
    is leased stays open and works until the lease ends."""
    pytest.importorskip("urllib3")
    settings = PoolSettings(server_pool_ttl=0.5, pool_cleanup_interval=0.1)
    with http_servers(3) as urls, workers(2) as (one, two):
        both = [one, two]
        ports = ports_of(urls)
        for worker in both:
            worker.call(app.open_pools, name, "urllib3", settings)
            for url in urls[1:]:
                worker.call(app.ask, url)
        port = urls[0].rstrip("/").rpartition(":")[2]
        assert port == one.call(app.lease, urls[0])
        until(
            "the leased one alone is open",
            lambda: sockets(both, ports) == {one.pid: 1, two.pid: 0},
        )
        until("it has expired", lambda: one.call(app.stats)[0] == 0)
        assert port == one.call(app.ask_leased, urls[0])
        assert {one.pid: 1, two.pid: 0} == sockets(both, ports)
        one.call(app.let_go)
        until("none is open", lambda: not any(sockets(both, ports).values()))
        assert (0, 5, 5) == until(
            "the ledger balances",
            lambda: (s := two.call(app.stats))[1] == s[2] and s,
        )
        for worker in both:
            worker.call(app.close)


@pytest.mark.once
def test_a_forked_child_has_pools_of_its_own(name: str) -> None:
    """A child forked beside an open pool makes its own, and leaves its parent's
    connection as it was when it closes and exits."""
    pytest.importorskip("urllib3")
    with http_servers(1) as (url,), workers(1) as (worker,):
        worker.call(app.open_pools, name, "urllib3", PoolSettings())
        port = worker.call(app.ask, url)
        assert (port, 0, True, True) == worker.call(app.fork_beside, url)
        assert (1, 2, 1) == worker.call(app.stats)
        worker.call(app.close)


def test_ledger_balances_after_a_storm(name: str) -> None:
    """After evictions, clears, forks and kills every pool that a living worker opened
    was closed, once; none inside its lease."""
    settings = PoolSettings(max_server_pools=15)
    with workers(3) as (*living, doomed):
        for seed, worker in enumerate([*living, doomed]):
            rounds = 1_000_000 if worker is doomed else 300
            worker.send(app.storm, name, settings, seed, rounds)
        assert [0, 0] == [worker.receive() for worker in living]
        doomed.kill()
        assert doomed.process.exitcode == -9
        for worker in living:
            opened, closed = worker.call(app.storm_end)
            assert opened
            assert opened == closed


# --- PostgreSQL ---------------------------------------------------------------------


def _postgres() -> Path | None:
    # The newest server's programs, where Debian and others put them, or in PATH.
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    beside = shutil.which("initdb")
    if not found and beside:
        found = [Path(beside)]
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[int]:
    """A PostgreSQL server of our own on loopback; its port."""
    programs = _postgres()
    if programs is None:
        pytest.skip("there is no PostgreSQL server here")
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        quiet: dict[str, Any] = {
            "user": user,
            "cwd": folder,
            "env": {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": folder},
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        subprocess.run(
            [
                *(programs / "initdb", "-D", data, "-A", "trust", "-U", "test"),
                *("-N", "-E", "UTF8"),
            ],
            check=True,
            **quiet,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        server = subprocess.Popen(
            [
                *(programs / "postgres", "-D", data, "-k", folder, "-p", str(port)),
                *("-h", "127.0.0.1", "-F"),
            ],
            **quiet,
        )
        try:
            until(
                "PostgreSQL is up",
                lambda: (
                    server.poll() is not None
                    or not subprocess.run(
                        [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)],
                        check=False,
                        **quiet,
                    ).returncode
                ),
            )
            assert server.poll() is None
            yield port
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.slow
@pytest.mark.once
def test_database_pools_are_bounded(name: str) -> None:
    """Three workers use four databases through psycopg's pools; with a bound of 3 they
    keep as many sockets as pools registered, and none after ``clear()``."""
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("psycopg_pool")
    with postgres() as port, workers(3) as all_of_them:
        server = f"host=127.0.0.1 port={port} user=test"
        databases = [f"d{n}" for n in range(4)]
        with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as admin:
            for database in databases:
                admin.execute(f"CREATE DATABASE {database}")
        for worker in all_of_them:
            worker.call(
                app.open_pools, name, "psycopg_pool", PoolSettings(max_server_pools=3)
            )
        for database in databases:
            for worker in all_of_them:
                assert database == worker.call(app.ask, f"{server} dbname={database}")
        # A pool opens a second connection only under load.
        until(
            "3 sockets",
            lambda: sum(sockets(all_of_them, {port}).values()) == 3,
        )
        assert (3, 12, 9) == until(
            "9 closed", lambda: (s := all_of_them[0].call(app.stats))[2] == 9 and s
        )
        assert 3 == all_of_them[1].call(app.clear)
        until("no sockets", lambda: not any(sockets(all_of_them, {port}).values()))
        for worker in all_of_them:
            worker.call(app.close)
    gc.collect()


def test_asynchronous_pools_by_their_loop(
    make_pools: Callable[..., ConnectionPools],
) -> None:
    """An asynchronous client is closed in its loop by the closer that the refusal of
    it recommends."""
    httpx = pytest.importorskip("httpx")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def close(client: Any) -> None:
        asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()

    try:
        pools = make_pools(factory=lambda _: httpx.AsyncClient(), close=close)
        client = pools.get("a")
        pools.discard("a")
        until("closed", lambda: client.is_closed)
        assert pools.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
