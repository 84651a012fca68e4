"""An application over one cache, for WSGI and ASGI servers.

SERVED_CACHE: a JSON object, the arguments of the cache.
SERVED_WARM: use the cache while the application is loaded, before workers are forked
if the server preloads it.
"""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from shmcache import Cache

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

cache = Cache(**json.loads(os.environ["SERVED_CACHE"]))
if os.environ.get("SERVED_WARM"):
    cache["warm"] = "by the loader"


def meet() -> list[int]:
    """Leave this worker's PID in the cache; the PIDs of all who did."""
    cache["pid", os.getpid()] = os.getpid()
    return sorted(value for key, value in cache.items() if key[0] == "pid")


def count(times: str) -> int:
    """Add to the counter so many times."""
    for _ in range(int(times)):
        number = cache.incr("counter", initial=0)
    return int(number)


def get(key: str) -> Any:
    """An entry."""
    return cache.get(key)


def put(key: str, value: str, ttl: str = "") -> None:
    """Store an entry."""
    cache.set(key, value, float(ttl) if ttl else None)


def state() -> dict[str, Any]:
    """What there is to know of the cache, and of this worker."""
    stats = cache.stats()
    return {
        "workers": stats.workers,
        "entries": stats.entries,
        "expired": stats.expired,
        "recoveries": stats.recoveries,
        "lock_timeouts": stats.lock_timeouts,
        "compiled": stats.compiled,
        "findings": cache.check(),
        "token": cache._attachment.token,
        "threads": [thread.name for thread in threading.enumerate()],
    }


OPERATIONS: dict[str, Callable[..., Any]] = {
    f"/{operation.__name__}": operation for operation in (meet, count, get, put, state)
}


def answer(path: str, query: str) -> bytes:
    """The body of a response."""
    result = OPERATIONS[path](**dict(parse_qsl(query)))
    return json.dumps({"pid": os.getpid(), "result": result}).encode()


HEADERS = [("Content-Type", "application/json"), ("Connection", "close")]


def application(
    environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    """The WSGI application."""
    body = answer(environ["PATH_INFO"], environ["QUERY_STRING"])
    start_response("200 OK", [*HEADERS, ("Content-Length", str(len(body)))])
    return [body]


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        # Uvicorn ends a worker by the signal that stopped it, not by exit().
        cache.close()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = answer(scope["path"], scope["query_string"].decode())
    headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
