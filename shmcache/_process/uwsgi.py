"""Questions to uWSGI about this process; without uWSGI the answers say so.

uWSGI loads the application in its first process and forks the workers in C, where no
hook of Python runs.  It ends the first process by C's ``exit``, without finalizing
Python.
"""

from __future__ import annotations

import sys
from typing import Any


def _module() -> Any:
    # The module is built into the server.  It is not imported here, because elsewhere
    # the import would fail, or find another module of that name.
    return sys.modules.get("uwsgi")


def in_first_process() -> bool:
    """Return whether this is uWSGI's first process, or a worker without a number."""
    uwsgi = _module()
    return uwsgi is not None and getattr(uwsgi, "worker_id", int)() == 0


def threads_run() -> bool:
    """Return whether a thread that is started here runs while the main thread waits.

    It is False without --enable-threads, and always in uWSGI's first process: if a
    thread waited there for the interpreter's lock while a worker is forked in C, the
    worker would wait for that lock for ever.
    """
    uwsgi = _module()
    if uwsgi is None:
        return True
    options = getattr(uwsgi, "opt", {})
    return not in_first_process() and any(
        option in options or option.encode() in options
        for option in ("enable-threads", "threads")
    )
