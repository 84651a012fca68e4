"""One process in a segment: its worker row, its kernel locks, its threads, its end.

Reading order: ``lockfile`` (the kernel locks that tell who lives), ``rows`` (what the
segment says of each worker), ``attachment`` (the segment as one process uses it),
``exit`` (leaving at the end of the process), ``election`` (who exports metrics, who
logs); then the threads: ``sweeper``, ``callbacks``, and ``uwsgi``, where threads may
not run.
"""
