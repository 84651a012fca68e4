"""A Celery application whose tasks use one cache.

TASKS_CACHE: the name of the cache.  TASKS_HOME: a folder for broker and results.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery

from shmcache import Cache

HOME = os.environ["TASKS_HOME"]

app = Celery("tasks", broker="filesystem://", backend=f"file://{HOME}/results")
app.conf.broker_transport_options = {
    "data_folder_in": f"{HOME}/queue",
    "data_folder_out": f"{HOME}/queue",
    "control_folder": f"{HOME}/control",
}
cache = Cache(os.environ["TASKS_CACHE"], max_entries=1000)


@app.task  # type: ignore[untyped-decorator]
def meet(workers: int) -> list[int]:
    """Wait for so many workers to do the same at once; their PIDs."""
    cache["met", os.getpid()] = True
    deadline = time.monotonic() + 60
    while len(met := sorted(pid for what, pid in cache if what == "met")) < workers:
        if time.monotonic() > deadline:
            raise TimeoutError(met)
        time.sleep(0.01)
    return met


@app.task  # type: ignore[untyped-decorator]
def work(n: int) -> tuple[int, int, int]:
    """A number that nobody else gets, and what the first to be asked computed."""
    number = cache.incr(("counter", 0), initial=0)
    return os.getpid(), number, cache.get_or_set(("first", n % 5), os.getpid)


def ask(workers: int, calls: int) -> dict[str, Any]:
    """What a client does: all results."""
    meetings = [meet.delay(workers) for _ in range(workers)]
    met = [meeting.get(timeout=60) for meeting in meetings]
    works = [work.delay(n) for n in range(calls)]
    return {"met": met, "worked": [each.get(timeout=60) for each in works]}
