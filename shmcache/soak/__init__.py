"""The soak: does the memory of worker processes stay flat?

``shmcache soak`` runs real worker processes on a cache for as long as the user wants.
It kills and recycles workers, and watches what they hold: memory, descriptors, threads,
shared memory, blocks and slots, handles.  ``shmcache soak --pid MASTER`` watches a
server that is running already, such as the user's own; then it only reads ``/proc``.

Read in this order::

    options.py   the options of a run
    load.py      the operations of a worker, from a seed or from a trace
    master.py    plain fork: a process that forks workers and replaces the dead
    app.py       the same work behind gunicorn
    servers.py   either of them: how it is started and ended
    sampling.py  what is measured each second
    ledger.py    what must add up: blocks, slots, entries, handles
    verdict.py   flat or not: Theil-Sen slopes over workers that come and go
    record.py    what a run has seen
    plot.py      line plots as SVG
    charts.py    which plots a report has
    report.py    the text, the page with the plots, and the JSON of the samples
    run.py       the run itself

None of this is imported by ``import shmcache``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, prog: str = "shmcache soak") -> int:
    """Run a soak.

    Args:
        argv: The command line; None for that of this process.
        prog: The name of the command, for its help.

    Returns:
        The exit code: 0, memory is flat and everything adds up; 1, it is not so; 2,
        the soak could not be run; 128 + N, signal N ended it.
    """
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
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
