"""The views that ``Cache.values()`` and ``Cache.items()`` return."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any, Protocol

from shmcache._engine import MISSING
from shmcache.errors import UnsupportedKey


class Viewed(Protocol):
    """The methods of a cache that the views use, besides the iterator that they get."""

    def __len__(self) -> int: ...

    def peek(self, key: Any, default: Any) -> Any:
        """Return the value of a key, without using the entry."""


class Values(ValuesView[Any]):
    """The values of a cache, as they are when they are iterated over."""

    def __init__(self, cache: Viewed, values: Callable[[], Iterator[Any]]) -> None:
        self._cache = cache
        self._values = values

    def __len__(self) -> int:
        return len(self._cache)

    def __iter__(self) -> Iterator[Any]:
        return self._values()

    def __contains__(self, value: object) -> bool:
        return any(v is value or v == value for v in self)


class Items(ItemsView[Any, Any]):
    """The pairs of key and value of a cache; each pair was so at one moment."""

    def __init__(
        self, cache: Viewed, items: Callable[[], Iterator[tuple[Any, Any]]]
    ) -> None:
        self._cache = cache
        self._items = items

    def __len__(self) -> int:
        return len(self._cache)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._items()

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        try:
            found = self._cache.peek(item[0], MISSING)
        except UnsupportedKey:
            return False
        return found is not MISSING and bool(found is item[1] or found == item[1])
