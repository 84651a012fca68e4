"""Gunicorn's settings for the demo: a Python file, as ``gunicorn -c`` takes it.

No process of the demo may outlive it, whatever ends it.  Told to stop, gunicorn stops
its workers.  For the deaths of which nobody is told (``kill -9``) the kernel sends each
process SIGTERM when its parent is gone: from the demo to gunicorn's arbiter, from
there to the workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any

PARENT = "SHMCACHE_DEMO_PARENT"  # PID of the demo
CACHE = "SHMCACHE_DEMO_CACHE"  # the shared cache's name, if there is one
READY = "SHMCACHE_DEMO_READY"  # a pipe: each worker writes a byte when it can serve

worker_class = "sync"
loglevel = "warning"
graceful_timeout = 2  # s; the slowest page takes a third of that on an idle machine
# It would be a file in the user's home.  Older gunicorns skip names unknown to them.
control_socket_disable = True

_PR_SET_PDEATHSIG = 1


def on_starting(_arbiter: Any) -> None:
    """Called by gunicorn in the arbiter, before the first fork."""
    _end_with(int(os.environ[PARENT]))


def on_exit(_arbiter: Any) -> None:
    """Called by gunicorn in the arbiter, after the last worker."""
    if name := os.environ.get(CACHE):
        from shmcache.demo.app import remove_cache

        remove_cache(name)


def post_fork(_arbiter: Any, worker: Any) -> None:
    """Called by gunicorn in a new worker."""
    _end_with(worker.ppid)


def post_worker_init(_worker: Any) -> None:
    """Called by gunicorn in a worker that has loaded the app."""
    with suppress(BrokenPipeError):  # the demo died; our turn is next
        os.write(int(os.environ[READY]), b".")


def _end_with(parent: int) -> None:
    """SIGTERM for this process as soon as its parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)
