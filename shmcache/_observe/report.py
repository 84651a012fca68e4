"""``shmcache.report()``: one report of all ready-made maps of a process."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from shmcache._component import components
from shmcache.errors import CacheClosed, ShmCacheError


def report() -> dict[str, dict[str, Any]]:
    """Component -> statistics, of all open ready-made maps of this process.

    Plain dicts, lists, texts and numbers: ``json.dumps`` takes it, and a service can
    log it once a minute.  A component whose settings do not enable metrics is left
    out.  Costs what the ``stats()`` of all parts cost: about a quarter ms each.
    """
    result: dict[str, dict[str, Any]] = {}
    for component in components():
        try:
            counts = _plain(asdict(component.stats()))
        except CacheClosed:
            continue  # by another thread, just now
        except ShmCacheError as error:
            counts = {"error": str(error)}
        name, n = component.name, 1
        while name in result:
            n += 1
            name = f"{component.name}#{n}"
        head = {"kind": type(component).__name__, "pid": os.getpid()}
        result[name] = {**head, **counts}
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
