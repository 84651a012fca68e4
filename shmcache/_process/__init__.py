"""One process in a segment: its worker row, kernel locks, threads and end.

Reading order: ``lockfile`` (the kernel locks that prove which processes live), ``rows``
(what the segment says about each worker), ``attachment`` (the segment as one process
uses it), ``exit`` (leaving at the end of the process), ``election`` (who exports
metrics, who logs); then the threads: ``sweeper``, ``callbacks``, and ``uwsgi``, where
threads may not run.
"""
