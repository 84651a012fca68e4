"""A bounded LRU + TTL map shared by all worker processes of a host.

``Cache`` is the map, ``HandleMap`` that of handles; ``errors`` holds what can go wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache._codec import MsgspecCodec
from shmcache._layout import Cause
from shmcache._slab import compiled
from shmcache.cache import Cache, Stats
from shmcache.errors import (
    CacheClosed,
    ConfigMismatch,
    EntryTooLarge,
    LockTimeout,
    OutOfSharedMemory,
    ReentrantCall,
    SegmentCorrupt,
    SegmentNotFound,
    SegmentRefused,
    ShmCacheError,
    TooManyWorkers,
    UnsupportedKey,
    UnsupportedPlatform,
    UnsupportedValue,
)

if TYPE_CHECKING:
    from shmcache.handles import HandleMap

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheClosed",
    "Cause",
    "ConfigMismatch",
    "EntryTooLarge",
    "HandleMap",
    "LockTimeout",
    "MsgspecCodec",
    "OutOfSharedMemory",
    "ReentrantCall",
    "SegmentCorrupt",
    "SegmentNotFound",
    "SegmentRefused",
    "ShmCacheError",
    "Stats",
    "TooManyWorkers",
    "UnsupportedKey",
    "UnsupportedPlatform",
    "UnsupportedValue",
    "__version__",
    "compiled",
    "errors",
]

# Imported when first asked for: importing the package shall be cheap.
_LAZY = {"HandleMap": "shmcache.handles"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(_LAZY[name]), name)
    globals()[name] = found
    return found
