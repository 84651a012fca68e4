"""The demo: gunicorn workers that share one cache, measured on real work.

``shmcache demo`` starts gunicorn twice, with an app that renders documentation, which
is real and slow work.  The first time each worker keeps the rendered pages in a dict of
its own; the second time all workers keep them in one ``shmcache.Cache``.  Both servers
get the same requests.

Read in this order::

    app.py       the web app, and how it uses the cache, as your app would
    modules.py   which pages there are
    hooks.py     gunicorn's settings: no process outlives its parent
    server.py    one gunicorn: start, memory, end
    load.py      the load generator, and what it saw
    report.py    the table and the conclusion
    stop.py      Ctrl-C and other signals that end the demo
    progress.py  a bar on a terminal, lines in a log file
    run.py       the demo from beginning to end

This module imports none of them, so that a worker loads ``app.py`` without the rest.
"""
