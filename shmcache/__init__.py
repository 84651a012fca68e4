"""A bounded LRU + TTL map shared by all worker processes of a host.

``Cache`` is the map, and ``HandleMap`` is the map for objects that cannot be shared.
``ConnectionPools``, ``CorrelationMap`` and ``ConfigCache`` are ready-made maps, built
from these two.  ``errors`` has the errors that they raise.  ``help(shmcache.Cache)``
lists the methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache._engine import MsgspecCodec
from shmcache._engine import is_compiled as compiled
from shmcache._format.layout import Cause
from shmcache._version import __version__
from shmcache.cache import Cache
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
from shmcache.stats import Stats

if TYPE_CHECKING:
    from shmcache._observe.report import report
    from shmcache._observe.stats_log import log_stats
    from shmcache.configs import ConfigCache, ConfigSettings
    from shmcache.correlations import CorrelationMap, CorrelationSettings
    from shmcache.handles import HandleMap, HandleStats, HostEntry
    from shmcache.pools import ConnectionPools, PoolSettings

__all__ = [
    "Cache",
    "CacheClosed",
    "Cause",
    "ConfigCache",
    "ConfigMismatch",
    "ConfigSettings",
    "ConnectionPools",
    "CorrelationMap",
    "CorrelationSettings",
    "EntryTooLarge",
    "HandleMap",
    "HandleStats",
    "HostEntry",
    "LockTimeout",
    "MsgspecCodec",
    "OutOfSharedMemory",
    "PoolSettings",
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
    "log_stats",
    "report",
]

# These are imported when first asked for, so that importing the package is cheap.
_LAZY = {
    "ConfigCache": "configs",
    "ConfigSettings": "configs",
    "ConnectionPools": "pools",
    "CorrelationMap": "correlations",
    "CorrelationSettings": "correlations",
    "HandleMap": "handles",
    "HandleStats": "handles",
    "HostEntry": "handles",
    "PoolSettings": "pools",
    "log_stats": "_observe.stats_log",
    "report": "_observe.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"shmcache.{_LAZY[name]}"), name)
    globals()[name] = found
    return found
