"""A segment's file, mapped for reading: header, shards, words.

Problem: the command line must show a cache without being one of its users.  If it
attached, it would take a worker row, and it could keep a dead cache alive.

Mechanism: the file is mapped read-only.  A reader takes no lock and no row, and the
kernel refuses every store, so the look changes nothing: neither LRU order nor
statistics nor a single byte.

Death in the middle: a reader writes nothing, so its death leaves nothing to clean up.
The bytes themselves may be damaged or cut short: only a header that gives no geometry
is refused, and ``shards`` ends where the file does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from typing import Self

from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._segment.header import Header, read_header, read_settings
from shmcache._segment.names import Names, open_own
from shmcache.errors import SegmentCorrupt, SegmentNotFound


class MappedSegment:
    """One cache's segment, mapped for reading; a context manager.

    Args:
        name: The name of the cache.

    Raises:
        SegmentNotFound: There is no cache with this name.
        SegmentRefused: The file is not safely ours.
        SegmentCorrupt: The bytes give no geometry, so nothing can be read.
    """

    header: Header
    trouble: str  # what is wrong with the header; empty if it is sound

    def __init__(self, name: str) -> None:
        self.names = Names.of(name)
        try:
            fd = open_own(
                self.names.segment_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except FileNotFoundError:
            raise SegmentNotFound(
                f"there is no cache named {name!r} of user {os.geteuid()}; shmcache ls"
                " lists what there is"
            ) from None
        try:
            self.size = os.fstat(fd).st_size
            if self.size < _check.HEADER_SIZE:
                raise SegmentCorrupt(
                    f"{self.names.segment_path} has {self.size} bytes, too few for a"
                    f" segment; remove it with: shmcache unlink {name}"
                )
            self._map = mmap.mmap(fd, self.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.bytes = memoryview(self._map)
        whole_words = self.bytes[: self.size & ~7]  # the file may be cut short
        self.w64 = whole_words.cast("Q")
        self.w32 = whole_words.cast("I")
        try:
            self.header, self.trouble = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[Header, str]:
        try:
            return read_header(self.names, self.bytes), ""
        except SegmentCorrupt as error:
            # Four numbers determine the geometry.  If they make sense, the shards can
            # be read whatever else is wrong with the header.
            plan = _check.read_header(self.bytes)
            known = self.w64[L.H_MAGIC], self.w64[L.H_FORMAT]
            if known != (L.MAGIC, L.FORMAT) or not plan.usable:
                raise
            header = Header(
                settings=read_settings(self.bytes),
                geometry=plan.geometry,
                name=self.names.cache,
                seed=plan.seed,
                created_wall_ns=self.w64[L.H_CREATED_WALL],
                created_at_ns=self.w64[L.H_CREATED_AT],
                lock_inode=self.w64[L.H_LOCK_INODE],
            )
            return header, str(error)

    def close(self) -> None:
        """Release the mapping."""
        for view in (self.w32, self.w64, self.bytes):
            view.release()
        # The frames of an exception may still have views; then the garbage collector
        # unmaps the file later.
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the header -----------------------------------------------------------------

    @property
    def name(self) -> str:
        """Return the name of the cache."""
        return self.names.cache

    @property
    def codec(self) -> str:
        """Return the name of the cache's codec."""
        return self.header.settings.codec

    @property
    def holds_handles(self) -> bool:
        """Return whether this is a map of handles."""
        return self.codec == L.HANDLES

    def now(self) -> int:
        """Return the time by the cache's clock, in ns.

        That is CLOCK_MONOTONIC, unless the cache's time of creation is later than
        CLOCK_MONOTONIC: then the cache has a clock of its own, which is assumed to be
        as fast as the wall clock.
        """
        monotonic = time.monotonic_ns()
        created = self.header.created_at_ns
        if created <= monotonic:
            return monotonic
        return created + max(0, time.time_ns() - self.header.created_wall_ns)

    # --- places ---------------------------------------------------------------------

    @property
    def shards(self) -> range:
        """Return the shards that are within the file."""
        g = self.header.geometry
        return range(min(g.shards, max(0, self.size - g.shards_at) // g.stride))

    def base(self, shard: int) -> int:
        """Return the first 64-bit word of a shard."""
        return self.header.geometry.shard_at(shard)

    def record_at(self, shard: int, slot: int) -> int:
        """Return the first byte of a record."""
        records = 8 * self.base(shard) + self.header.geometry.records_at
        return records + L.RECORD * slot

    def column(self, shard: int, field: int) -> list[int]:
        """Return one 32-bit field of all records of a shard, by slot."""
        return self._column(self.w32, shard, field)

    def versions(self, shard: int) -> list[int]:
        """Return the versions of all records of a shard, by slot."""
        return self._column(self.w64, shard, L.F_VERSION // 2)

    def _column(self, words: memoryview, shard: int, field: int) -> list[int]:
        width = L.RECORD // words.itemsize
        first = self.record_at(shard, 0) // words.itemsize + field
        last = first + width * (self.header.geometry.slots + 1)
        column: list[int] = words[first:last:width].tolist()
        return column
