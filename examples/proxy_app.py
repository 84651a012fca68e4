"""A WSGI app that forwards requests to many servers, through bounded pools.

The answer to ``GET /8001/path`` is that of http://127.0.0.1:8001/path.  Run the app by

    PROXY_BOUND=20 gunicorn -w 4 proxy_app:app

or run proxy_run.py, which compares it with the same app with plain dicts
(PROXY_BOUND=0).
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import urllib3

from shmcache.pools import ConnectionPools, PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

BOUND = int(os.environ.get("PROXY_BOUND", "20"))
NAME = os.environ.get("PROXY_NAME", "proxy")


def connect(server: str) -> urllib3.HTTPConnectionPool:
    """Make a pool of connections to one server."""
    host, _, port = server.partition(":")
    return urllib3.HTTPConnectionPool(host, int(port), maxsize=4)


class Dict:
    """The usual way: a dict in each worker, which has no bound."""

    def __init__(self) -> None:
        self.pools: dict[str, urllib3.HTTPConnectionPool] = {}

    def lease(self, server: str) -> AbstractContextManager[urllib3.HTTPConnectionPool]:
        """Yield the pool of a server, and make it if there is none."""
        if server not in self.pools:
            self.pools[server] = connect(server)
        return nullcontext(self.pools[server])


pools: Any = (
    ConnectionPools(
        NAME, factory=connect, settings=PoolSettings(max_server_pools=BOUND)
    )
    if BOUND
    else Dict()
)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a request: this is the WSGI application."""
    port, _, path = environ["PATH_INFO"].lstrip("/").partition("/")
    if not port.isdigit():
        start_response("404 Not Found", [("Content-Length", "0")])
        return [b""]
    with pools.lease(f"127.0.0.1:{port}") as pool:
        answer = pool.request("GET", f"/{path}", timeout=10, retries=False)
    start_response(
        f"{answer.status} {answer.reason}", [("Content-Length", str(len(answer.data)))]
    )
    return [answer.data]
