"""The soak: does memory stay flat, of the library, and of the user's own service?

``shmcache soak`` runs real worker processes on a cache for as long as one likes, kills
and recycles them, and watches what they hold: memory, descriptors, threads, shared
memory, blocks and slots, handles.  ``shmcache soak --pid MASTER`` watches a server that
runs already, and only reads ``/proc``.

Read in this order::

    options.py   what can be asked for
    load.py      what a worker does all day, from a seed or from a trace
    master.py    plain fork: a process that forks workers and replaces the dead
    app.py       the same work behind gunicorn
    servers.py   either of them: started, prodded, ended
    sampling.py  what is measured each second
    ledger.py    what must add up: blocks, slots, entries, handles
    verdict.py   flat or not: Theil-Sen slopes over workers that come and go
    plot.py      lines as SVG
    charts.py    which plots there are
    report.py    the page with the plots, and the JSON of the samples
    run.py       the run itself

Nothing of this is imported with ``shmcache``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "shmcache soak") -> int:
    """Run a soak; 0: flat and sound, 1: it is not, 2: it could not be run."""
    from shmcache.errors import ShmCacheError
    from shmcache.soak.options import parser
    from shmcache.soak.run import run_parsed

    try:
        return run_parsed(parser(prog).parse_args(argv))
    except ShmCacheError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
