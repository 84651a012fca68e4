"""``Component``: the common base of the ready-made maps.

A component has a name and a few shared parts, each a ``Cache`` or a ``HandleMap``, and
it is closed as a whole.  ``shmcache.report()`` finds the open ones of a process here.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self

from shmcache.cache import Cache

if TYPE_CHECKING:
    import functools

    from shmcache.handles import HandleMap

_components: weakref.WeakSet[Component] = weakref.WeakSet()


class Component:
    """A ready-made map over shared parts, each a ``Cache`` or a ``HandleMap``.

    Args:
        name: The name of the component.
        metrics: Whether ``shmcache.report()`` includes it.
        made_by: Makes the same component again, in the process that unpickles it.
    """

    def __init__(
        self, name: str, metrics: bool, made_by: functools.partial[Any]
    ) -> None:
        self.name = name
        self.metrics = metrics
        self._made_by = made_by
        self._parts: dict[str, Cache | HandleMap] = {}

    def _opened(self, parts: dict[str, Cache | HandleMap]) -> None:
        # Subclasses call this at the end of their construction.
        self._parts = parts
        _components.add(self)

    @property
    def closed(self) -> bool:
        """Return whether ``close`` was called in this process."""
        return all(part.closed for part in self._parts.values())

    def parts(self) -> dict[str, Cache | HandleMap]:
        """Return the caches and handle maps that this map uses, by their purpose."""
        return dict(self._parts)

    def stats(self) -> Any:
        """Return counts of all parts, as a frozen dataclass."""
        raise NotImplementedError

    def sweep(self) -> int:
        """Remove what has expired, of any worker.

        Returns:
            How many entries were removed.
        """
        return sum(part.sweep() for part in self._parts.values())

    def check(self) -> list[str]:
        """Return what is wrong with the parts.  O(size).

        Returns:
            A sentence for each finding; an empty list when all is well.
        """
        return [
            f"{what}: {finding}"
            for what, part in self._parts.items()
            for finding in part.check()
        ]

    def unlink(self) -> None:
        """Remove the names of all parts now, as ``Cache.unlink`` does."""
        for part in self._parts.values():
            part.unlink()

    def close(self, timeout: float = 10.0) -> bool:
        """Close this worker's handles (CLOSED), and leave all parts.

        A second call does nothing.

        Args:
            timeout: Seconds to wait for the callbacks of each part.

        Returns:
            Whether all callbacks have ended.
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
        """Pickle the map as its arguments; the other process opens the same parts."""
        return self._made_by, ()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<shmcache.{type(self).__name__} {self.name!r}{state}>"


def components() -> list[Component]:
    """Return this process's open components with metrics enabled, by name."""
    found = [c for c in list(_components) if c.metrics and not c.closed]
    return sorted(found, key=lambda c: (c.name, type(c).__name__))
