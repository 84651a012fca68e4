"""The soak's work behind gunicorn: each request is a batch of operations."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from shmcache.soak.load import Load, Traffic, fault

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


def make_app() -> WSGIApplication:
    """The WSGI app, which each worker loads; a worker has one thread."""
    traffic: list[Traffic] = []

    def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if not traffic:
            traffic.append(_begin(int(environ["PATH_INFO"].strip("/") or 0)))
        traffic[0].batch()
        start("200 OK", [("Content-Length", "3")])
        return [b"ok\n"]

    return app


def _begin(serial: int) -> Traffic:
    try:
        traffic = Traffic(Load.from_environment(), serial)
    except Exception as error:
        fault(f"cannot begin: {type(error).__name__}: {error}")
        raise
    atexit.register(traffic.close)
    return traffic
