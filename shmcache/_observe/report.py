"""One report of all ready-made maps of a process: what ``shmcache.report()`` returns.

``Component`` is what ``ConnectionPools``, ``CorrelationMap`` and ``ConfigCache`` have
in common: a name, a few shared parts, and an end.
"""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from shmcache.cache import Cache
from shmcache.errors import CacheClosed, ShmCacheError

if TYPE_CHECKING:
    import functools

    from shmcache.handles import HandleMap

log = logging.getLogger("shmcache")

_components: weakref.WeakSet[Component] = weakref.WeakSet()


class Component:
    """A ready-made map over shared parts, each a ``Cache`` or a ``HandleMap``."""

    def __init__(
        self, name: str, metrics: bool, made_by: functools.partial[Any]
    ) -> None:
        self.name = name
        self.metrics = metrics
        self._made_by = made_by
        self._parts: dict[str, Cache | HandleMap] = {}

    def _opened(self, parts: dict[str, Cache | HandleMap]) -> None:
        self._parts = parts
        _components.add(self)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called in this process."""
        return all(part.closed for part in self._parts.values())

    def parts(self) -> dict[str, Cache | HandleMap]:
        """The shared parts by what they are for; collectors read them."""
        return dict(self._parts)

    def stats(self) -> Any:
        """Counts of all parts, as a frozen dataclass."""
        raise NotImplementedError

    def sweep(self) -> int:
        """Remove what has expired, of any worker; how many."""
        return sum(part.sweep() for part in self._parts.values())

    def check(self) -> list[str]:
        """What is wrong with the parts, a sentence each; empty when sound."""
        return [
            f"{what}: {finding}"
            for what, part in self._parts.items()
            for finding in part.check()
        ]

    def unlink(self) -> None:
        """Remove the names of all parts now, as ``Cache.unlink``."""
        for part in self._parts.values():
            part.unlink()

    def close(self, timeout: float = 10.0) -> bool:
        """Close this worker's handles (CLOSED), and leave all parts.

        Waits for callbacks up to ``timeout`` seconds; whether all of them ended.
        Calling it twice is fine.
        """
        _components.discard(self)
        done = True
        for part in self._parts.values():
            if isinstance(part, Cache):
                part.close()
            else:
                done = part.close(timeout) and done
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """Pickles as its arguments: the other process opens the same parts."""
        return self._made_by, ()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<shmcache.{type(self).__name__} {self.name!r}{state}>"


def components() -> list[Component]:
    """The open components of this process whose settings enable metrics, by name."""
    found = [c for c in list(_components) if c.metrics and not c.closed]
    return sorted(found, key=lambda c: (c.name, type(c).__name__))


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
