"""The end of a process: it leaves its segments while Python still works.

Problem: the last process to leave a segment removes it, so each process should say
when it goes.  Processes end in ways that run different functions, or none.

Mechanism: ``leave_all`` is registered with ``atexit``.  A child of multiprocessing ends
by ``os._exit``, which runs only the finalizers of ``multiprocessing.util``, so
``leave_all`` is registered there, too.  A process that ends by C's ``exit`` without
finalizing Python, as uWSGI's do, is handled by ``LockFile.remove_on_exit``.

Death in the middle: it is like a death at any other time.  The kernel drops the locks
of the process, the others reap its rows, and a segment that nobody uses any more is
replaced or taken over by the next process that wants it.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[[], object])

log = logging.getLogger("shmcache")

_before_leaving: list[Callable[[], object]] = []
_leaving: list[Callable[[], object]] = []
_finalized: set[int] = set()  # processes whose finalizers are registered


def before_leaving(function: F) -> F:
    """Register a function to be called at the process's end, before segments are left.

    This is a decorator.  An exception of the function is logged.
    """
    _before_leaving.append(function)
    return function


def at_leaving(function: F) -> F:
    """Register a function that leaves segments, to be called at the process's end."""
    _leaving.append(function)
    return function


def leave_all() -> None:
    """Leave all segments, at the end of the process."""
    for prepare in _before_leaving:
        try:
            prepare()
        except Exception:
            log.exception("at the end of the process", extra={"event": "not ended"})
    for leave in _leaving:
        leave()


def arrange_leaving() -> None:
    """Arrange that this process leaves its segments when it ends.

    It must be called each time that the process has attached.  Only children of
    multiprocessing need more than what ``atexit`` does.  They drop their finalizers
    when they begin, perhaps after they have unpickled a cache; so the finalizer is
    registered again at that moment.
    """
    util = sys.modules.get("multiprocessing.util")
    if util is None or os.getpid() in _finalized:
        return
    if not _finalized:
        util.register_after_fork(leave_all, _finalize)
    _finalized.add(os.getpid())
    _finalize()


def _finalize(_: object = None) -> None:
    from multiprocessing import util

    util.Finalize(None, _leave_child, exitpriority=0)


def _leave_child() -> None:
    from multiprocessing import parent_process

    # A process that multiprocessing did not start runs atexit's functions, later than
    # this one and after those that users have registered.
    if parent_process() is not None:
        leave_all()


atexit.register(leave_all)
