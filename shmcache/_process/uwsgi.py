"""What uWSGI says of this process; elsewhere, that it is not uWSGI's.

uWSGI loads the application in its first process, forks the workers in C, and ends
that process by C's ``exit`` without finalizing Python there.
"""

from __future__ import annotations

import sys
from typing import Any


def _module() -> Any:
    # Built into the server; importing it anywhere else would fail or find a stranger.
    return sys.modules.get("uwsgi")


def in_first_process() -> bool:
    """Whether this is the process that forks, or has not yet become, the workers."""
    uwsgi = _module()
    return uwsgi is not None and getattr(uwsgi, "worker_id", int)() == 0


def threads_run() -> bool:
    """Whether a thread started here would run while the main thread waits.

    In the first process it is not to: a worker forked in C while another thread
    waits for the interpreter's lock waits for it, too, for ever.
    """
    uwsgi = _module()
    if uwsgi is None:
        return True
    options = getattr(uwsgi, "opt", {})
    return not in_first_process() and any(
        option in options or option.encode() in options
        for option in ("enable-threads", "threads")
    )
