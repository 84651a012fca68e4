"""Gunicorn's settings for the demo: a Python file, as ``gunicorn -c`` takes it.

Problem: no process of the demo may outlive it, whatever ends it.

Mechanism: when gunicorn is told to stop, it stops its workers.  Nobody can tell it of a
``kill -9``, so the kernel does: each process has asked to be sent SIGTERM when its
parent dies.  The parent of gunicorn's arbiter is the demo, and that of the workers is
the arbiter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any

# Environment variables.
PARENT = "SHMCACHE_DEMO_PARENT"  # the PID of the demo
CACHE = "SHMCACHE_DEMO_CACHE"  # the name of the shared cache, if there is one
READY = "SHMCACHE_DEMO_READY"  # a pipe to which each worker writes a byte when ready

worker_class = "sync"
loglevel = "warning"
graceful_timeout = 2  # s; on an idle machine the slowest page takes a third of that
# The control socket would be a file in the user's home.  Older versions of gunicorn
# ignore names that they do not know.
control_socket_disable = True

_PR_SET_PDEATHSIG = 1


def on_starting(_arbiter: Any) -> None:
    """Gunicorn calls this in the arbiter, before the first fork."""
    end_with(int(os.environ[PARENT]))


def on_exit(_arbiter: Any) -> None:
    """Gunicorn calls this in the arbiter, after the last worker has ended."""
    if name := os.environ.get(CACHE):
        from shmcache.demo.app import remove_cache

        remove_cache(name)


def post_fork(_arbiter: Any, worker: Any) -> None:
    """Gunicorn calls this in a new worker."""
    end_with(worker.ppid)


def post_worker_init(_worker: Any) -> None:
    """Gunicorn calls this in a worker that has loaded the app."""
    with suppress(BrokenPipeError):  # the demo has died, so this process ends as well
        os.write(int(os.environ[READY]), b".")


def end_with(parent: int) -> None:
    """Have the kernel send this process SIGTERM when its parent dies.

    Args:
        parent: The PID of the parent.  If it has died already, this process ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the request to the kernel
        os._exit(0)
