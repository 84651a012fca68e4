"""A WSGI application that uses a cache and a handle map and serves their metrics.

METRICS_CACHE: the name of the cache; the map's is the same and "-handles".
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shmcache import Cache, HandleMap
from shmcache.prometheus import CacheCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

name = os.environ["METRICS_CACHE"]
cache = Cache(name, max_entries=50)
handles = HandleMap(f"{name}-handles", max_entries=20)
registry = CollectorRegistry()
registry.register(CacheCollector(cache, handles))


def get(key: str) -> Any:
    """An entry."""
    return cache.get(key)


def put(key: str) -> None:
    """Store an entry."""
    cache[key] = key


def hold(key: str) -> None:
    """Register a handle, of this worker."""
    handles[key] = object()


OPERATIONS: dict[str, Callable[..., Any]] = {"/get": get, "/put": put, "/hold": hold}


def application(
    environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    """The WSGI application."""
    if environ["PATH_INFO"] == "/metrics":
        encode, kind = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        body = encode(registry)
    else:
        query = dict(parse_qsl(environ["QUERY_STRING"]))
        result = OPERATIONS[environ["PATH_INFO"]](**query)
        kind = "application/json"
        body = json.dumps({"pid": os.getpid(), "result": result}).encode()
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    headers += [("X-Worker", str(os.getpid())), ("Connection", "close")]
    start_response("200 OK", headers)
    return [body]
