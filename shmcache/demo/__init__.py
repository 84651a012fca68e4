"""The demo: gunicorn workers that share one cache, measured on real work.

``shmcache demo`` starts gunicorn twice with an app that renders documentation
(real, slow work).  First each worker keeps the rendered pages in a dict of its own,
then all of them keep them in one ``shmcache.Cache``.  The same requests go to both.

Read in this order::

    app.py       the web app, and how it uses the cache: what you would write
    modules.py   which pages there are
    hooks.py     gunicorn's settings: who ends when whom dies
    server.py    one gunicorn: start, memory, end
    load.py      the load generator, and what it saw
    report.py    the table and the conclusion
    stop.py      Ctrl-C and its kin
    progress.py  a bar for terminals, lines for log files
    run.py       the whole evening's programme

Nothing is imported here: a worker loads ``app.py`` without the rest.
"""
