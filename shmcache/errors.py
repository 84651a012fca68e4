"""The errors of this package, as one tree; every message ends with what to do.

::

    ShmCacheError
    ├── ConfigMismatch(ValueError)      the segment exists with other settings
    ├── SegmentNotFound(LookupError)    Cache.attach() of a name that does not exist
    ├── SegmentCorrupt                  the segment's bytes make no sense
    ├── SegmentRefused(PermissionError) another user's file, or one that others can read
    ├── OutOfSharedMemory(MemoryError)  /dev/shm has no room for the segment
    ├── TooManyWorkers                  all worker rows are taken
    ├── LockTimeout(TimeoutError)       a lock or a result took too long
    ├── ReentrantCall(RuntimeError)     a call that would wait for itself
    ├── CacheClosed(ValueError)         use after close()
    ├── EntryTooLarge(ValueError)       the entry could never fit
    ├── UnsupportedKey(TypeError)       not a str, bytes, int or tuple of them
    ├── UnsupportedValue(TypeError)     a value the codec cannot bring back unchanged
    └── UnsupportedPlatform(OSError)    no POSIX shared memory here

The second base is the error that code without knowledge of this package would catch.
"""

from __future__ import annotations


class ShmCacheError(Exception):
    """Base of all errors of this package."""


class ConfigMismatch(ShmCacheError, ValueError):
    """The segment exists with other settings; the message names each difference."""


class SegmentNotFound(ShmCacheError, LookupError):
    """No segment of this name exists."""


class SegmentCorrupt(ShmCacheError):
    """The segment's content makes no sense and could not be rebuilt."""


class SegmentRefused(ShmCacheError, PermissionError):
    """A file under the cache's name is not safely ours: its owner, mode or type."""


class OutOfSharedMemory(ShmCacheError, MemoryError):
    """The file system of shared memory has no room for the segment."""


class TooManyWorkers(ShmCacheError):
    """More processes want to attach than a segment has worker rows."""


class LockTimeout(ShmCacheError, TimeoutError):
    """A lock was not free, or a result did not come, within the given time."""


class ReentrantCall(ShmCacheError, RuntimeError):
    """A call, made during another operation, that would wait for that operation."""


class CacheClosed(ShmCacheError, ValueError):
    """The cache was closed in this process."""


class EntryTooLarge(ShmCacheError, ValueError):
    """Key and value together are larger than the cache, or a shard, can ever hold."""


class UnsupportedKey(ShmCacheError, TypeError):
    """A key must be a str, bytes, an int, or a tuple of them."""


class UnsupportedValue(ShmCacheError, TypeError):
    """The codec cannot bring this value back equal and of the same type."""


class UnsupportedPlatform(ShmCacheError, OSError):
    """This system lacks what the package needs; Linux has all of it."""
