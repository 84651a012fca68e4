"""The object that replaces a cache's memory when the cache is closed."""

from __future__ import annotations

from typing import NoReturn

from shmcache.errors import CacheClosed


class ClosedView:
    """A view of memory that was closed: any access raises CacheClosed.

    Its length is 0, so it is false, as the view of an empty block is.
    """

    def __len__(self) -> int:
        return 0

    def __getitem__(self, _: object) -> NoReturn:
        raise CacheClosed(
            "the cache was closed, by another thread or a signal handler, while this"
            " call used it; let all threads end their work before close()"
        )

    def __setitem__(self, index: object, _: object) -> None:
        self[index]
