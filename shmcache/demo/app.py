"""The demo's web app: pages of Python's documentation, rendered by ``pydoc``.

Rendering a page takes from a millisecond to half a second, so the app keeps the pages:
in a cache that all workers share, or, for comparison, in a dict of each worker.
"""

from __future__ import annotations

import html
import json
import os
import pydoc
import time
import warnings
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, TypedDict

from shmcache import Cache, SegmentNotFound
from shmcache.demo.modules import MODULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

# All pages together take 9 MiB, so that neither cache evicts anything in this demo.
MAX_ENTRIES = 256
MAX_BYTES = 12 << 20
TTL = 3600.0  # s


class Page(TypedDict):
    """What is cached: a page, and its worker, which shows what sharing gives."""

    body: bytes
    worker: int  # the PID of the worker that rendered it


class PageCache(Protocol):
    """What the app needs of a cache."""

    def get_or_set(self, key: str, factory: Callable[[], Page]) -> Page:
        """The cached page; if there is none, the factory's page, which is cached."""


def open_cache(name: str) -> Cache:
    """The shared cache: the first worker creates it, and the others attach to it."""
    return Cache(name, max_entries=MAX_ENTRIES, max_bytes=MAX_BYTES, ttl=TTL)


def remove_cache(name: str) -> None:
    """Remove a cache whose workers were killed.

    If the workers end in good order, the last one removes the cache.
    """
    with suppress(SegmentNotFound), Cache.attach(name) as left:
        left.unlink()


class ProcessCache:
    """The usual way without shmcache: a dict in each process, with the same bounds."""

    def __init__(self) -> None:
        self._pages: OrderedDict[str, tuple[float, Page]] = OrderedDict()
        self._bytes = 0

    def get_or_set(self, key: str, factory: Callable[[], Page]) -> Page:
        """As ``Cache.get_or_set``, for this process only."""
        found = self._pages.get(key)
        if found and time.monotonic() < found[0]:
            self._pages.move_to_end(key)
            return found[1]
        if found:
            self._drop(key)
        page = factory()
        self._pages[key] = (time.monotonic() + TTL, page)
        self._bytes += len(page["body"])
        while len(self._pages) > MAX_ENTRIES or self._bytes > MAX_BYTES:
            self._drop(next(iter(self._pages)))
        return page

    def _drop(self, key: str) -> None:
        _, page = self._pages.pop(key)
        self._bytes -= len(page["body"])


def render(name: str) -> Page:
    """Render the documentation of a module as a page of HTML, which is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = import_module(name)
        text = pydoc.html.page(
            pydoc.describe(module), pydoc.html.document(module, name)
        )
    return {"body": text.encode("utf-8", "replace"), "worker": os.getpid()}


def make_app(cache_name: str | None) -> WSGIApplication:
    """The WSGI app.

    Args:
        cache_name: The name of the shared cache; None for a dict in each worker.
    """
    shared = open_cache(cache_name) if cache_name else None
    pages: PageCache = shared if shared is not None else ProcessCache()
    index = _index().encode()

    def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        name = path.removeprefix("/").removesuffix(".html")
        if path == f"/{name}.html" and name in MODULES:
            body, origin = _page(pages, name)
            return _answer(start, "200 OK", body, origin=origin)
        if path == "/":
            return _answer(start, "200 OK", index)
        if path == "/stats" and shared is not None:
            body = json.dumps(asdict(shared.stats()), indent=2, default=str).encode()
            return _answer(start, "200 OK", body, kind="application/json")
        return _answer(start, "404 Not Found", b"<p>Not here. <a href='/'>Index</a>")

    return app


def _page(pages: PageCache, name: str) -> tuple[bytes, str]:
    """A page, and its origin, which the load generator counts.

    The origin is "rendered" if it was rendered now, else "own" or "other": this worker
    or another one had rendered it.
    """
    rendered = False

    def factory() -> Page:
        nonlocal rendered
        rendered = True
        return render(name)

    page = pages.get_or_set(name, factory)
    if rendered:
        return page["body"], "rendered"
    return page["body"], "own" if page["worker"] == os.getpid() else "other"


def _answer(
    start: StartResponse,
    status: str,
    body: bytes,
    *,
    kind: str = "text/html; charset=utf-8",
    origin: str = "",
) -> list[bytes]:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    if origin:
        headers.append(("X-Page", origin))
        headers.append(("X-Worker", str(os.getpid())))
    start(status, headers)
    return [body]


def _index() -> str:
    links = "\n".join(
        f'<li><a href="/{html.escape(name)}.html">{html.escape(name)}</a>'
        for name in MODULES
    )
    return f"""<!doctype html>
<title>shmcache demo</title>
<style>
  body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto }}
  ul {{ columns: 4; list-style: none; padding: 0 }}
</style>
<h1>Python's library, as rendered by pydoc</h1>
<p>The first request for a page renders it in one of the workers. From then on every
worker serves it from the shared cache. You can see that in the response headers
<code>X-Page</code> (rendered, own, other) and <code>X-Worker</code>, and at
<a href="/stats">/stats</a>.
<ul>
{links}
</ul>
"""
