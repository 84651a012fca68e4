"""A bounded LRU + TTL map shared by all worker processes of a host.

``Cache`` is the map; ``errors`` holds what can go wrong.
"""

from __future__ import annotations

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

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheClosed",
    "Cause",
    "ConfigMismatch",
    "EntryTooLarge",
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
