"""What worker processes do with connection pools: real ones, and ones that count."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from shmcache.pools import ConnectionPools, PoolSettings

_here: dict[str, Any] = {}

# --- real pools -------------------------------------------------------------------


def _urllib3_pool(url: str) -> Any:
    import urllib3

    at = urlsplit(url)
    return urllib3.HTTPConnectionPool(at.hostname or "", at.port, maxsize=4)


def _urllib3_manager(_: str) -> Any:
    import urllib3

    return urllib3.PoolManager()


def _requests_session(_: str) -> Any:
    import requests

    session = requests.Session()
    session.trust_env = False
    return session


def _httpx_client(_: str) -> Any:
    import httpx

    return httpx.Client(trust_env=False)


def _psycopg_pool(dsn: str) -> Any:
    from psycopg_pool import ConnectionPool

    pool: Any = ConnectionPool(dsn, min_size=1, max_size=2, open=True)
    pool.wait(30)
    return pool


def _ask_urllib3(pool: Any, url: str) -> str:
    return str(pool.request("GET", url).data.decode())


def _ask_by_get(pool: Any, url: str) -> str:
    return str(pool.get(url).text)


def _ask_database(pool: Any, _: str) -> str:
    with pool.connection() as connection:
        return str(connection.execute("SELECT current_database()").fetchone()[0])


LIBRARIES: dict[str, tuple[Any, Any]] = {
    "urllib3": (_urllib3_pool, _ask_urllib3),
    "urllib3-manager": (_urllib3_manager, _ask_urllib3),
    "requests": (_requests_session, _ask_by_get),
    "httpx": (_httpx_client, _ask_by_get),
    "psycopg_pool": (_psycopg_pool, _ask_database),
}


def open_pools(name: str, library: str, settings: PoolSettings) -> None:
    """Open the pools as a worker does when it starts."""
    factory, _here["ask"] = LIBRARIES[library]
    _here["pools"] = ConnectionPools(name, settings=settings, factory=factory)


def ask(server: str) -> str:
    """Send a request through the server's pool; the answer."""
    with _here["pools"].lease(server) as pool:
        return str(_here["ask"](pool, server))


def lease(server: str) -> str:
    """Take a lease and keep it; the answer to a request meanwhile."""
    _here["stack"] = stack = ExitStack()
    _here["leased"] = stack.enter_context(_here["pools"].lease(server))
    return ask_leased(server)


def ask_leased(server: str) -> str:
    """Send a request through the pool that is leased."""
    return str(_here["ask"](_here["leased"], server))


def let_go() -> None:
    """Give the lease back."""
    _here.pop("leased")
    _here.pop("stack").close()


def clear() -> int:
    """Clear all pools of the host."""
    return int(_here["pools"].clear())


def stats() -> tuple[int, int, int]:
    """Pools registered on the host, opened and closed so far."""
    counts = _here["pools"].stats()
    return counts.pools.entries, counts.opened, counts.closed


def close() -> bool:
    """Close this worker's pools."""
    return bool(_here.pop("pools").close())


def fork_beside(server: str) -> tuple[str, int, bool, bool]:
    """Fork a child that inherits an open pool, uses the server, and exits.

    The child's answer and exit code; whether the child got another pool; whether the
    parent's pool has its connection as before.
    """
    pools = _here["pools"]
    parents = pools.get(server)
    before = parents.pool.queue[-1].sock.getsockname()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            childs = pools.get(server)
            other = childs is not parents
            answer = _here["ask"](childs, server)
            status = 0 if pools.close() else 2
            os.write(writer, f"{answer} {other}".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer, differs = pipe.read().split()
    _, ended = os.waitpid(pid, 0)
    assert pools.get(server) is parents
    _here["ask"](parents, server)
    after = parents.pool.queue[-1].sock.getsockname()
    return answer, os.waitstatus_to_exitcode(ended), differs == "True", before == after


# --- pools that count ---------------------------------------------------------------

_numbers = itertools.count(1)
_opened: list[int] = []
_closed: list[int] = []


class CountedPool:
    """A pool without connections, whose end is written down."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.open = True
        _opened.append(self.number)

    def close(self) -> None:
        """Write down its number; every tenth fails then, as pools may."""
        self.open = False
        _closed.append(self.number)
        if self.number % 10 == 0:
            raise OSError("connection reset by peer")


def storm(name: str, settings: PoolSettings, seed: int, rounds: int) -> int:
    """Use, lease, discard and clear at random; fork now and then.

    How often a pool was found closed inside its lease.
    """
    pools = _here["storm"] = ConnectionPools(
        name, settings=settings, factory=lambda _: CountedPool()
    )
    rng = random.Random(seed)
    closed_inside = 0
    for n in range(rounds):
        server = f"s{rng.randrange(40)}"
        what = rng.random()
        if what < 0.5:
            pools.get(server)
        elif what < 0.9:
            with pools.lease(server) as pool:
                time.sleep(rng.random() / 2000)
                closed_inside += not pool.open
        elif what < 0.99:
            pools.discard(server)
        else:
            pools.clear()
        if n % 100 == 50:
            _fork_storm(pools, rng)
    return closed_inside


def _fork_storm(pools: ConnectionPools, rng: random.Random) -> None:
    # A child that inherits all, opens pools of its own, and is killed or exits.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _opened.clear()
            _closed.clear()
            for n in range(5):
                pools.get(f"child-{n}")
            if rng.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            pools.close()
            status = 0 if _opened and sorted(_opened) == sorted(_closed) else 2
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) in {0, -signal.SIGKILL}


def storm_end() -> tuple[list[int], list[int]]:
    """Close; the numbers of the pools opened, and of those closed."""
    assert _here.pop("storm").close(60)
    return sorted(_opened), sorted(_closed)
