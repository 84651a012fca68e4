"""The header of a segment: writing it once, and reading it with distrust.

Problem: a process that attaches must know that the segment is complete, that it has
the format that this version reads, and that all shards are where they are expected.

Mechanism: ``write_header`` stores the magic word last, so a segment with the magic word
is a complete one.  ``read_header`` plans the geometry anew from the settings, and
refuses a segment in which the planned sizes are not the written ones.  The words of the
header that change later (see layout.py) are read elsewhere.

Death in the middle: without the magic word the segment counts as unfinished, and the
next process that holds the admin lock replaces it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcache._format import layout as L
from shmcache._segment.settings import Settings
from shmcache.errors import SegmentCorrupt

if TYPE_CHECKING:
    from shmcache._segment.names import Names


@dataclass(frozen=True)
class Header:
    """The header of a segment after all checks."""

    settings: Settings
    geometry: L.Geometry
    name: str
    seed: int
    created_wall_ns: int  # wall clock
    created_at_ns: int  # the cache's clock
    lock_inode: int  # inode of the lock file

    @property
    def first_sequence(self) -> int:
        """The write sequence that each shard began with; see ``write_header``."""
        # A damaged time must leave room to count on.
        return min(first_sequence(self.created_wall_ns), L.LAST_SEQUENCE >> 1)


def first_sequence(created_ns: int) -> int:
    """Return what the write sequence of a shard begins with.

    It counts units of 256 ns since 1970.  No shard sees a write in each of them, all
    its life, so a later segment begins with a higher number than its predecessor has
    reached.

    Args:
        created_ns: When the segment was created, in ns.
    """
    return created_ns >> 8


# --- writing ----------------------------------------------------------------------


def write_header(
    buffer: memoryview, names: Names, settings: Settings, lock_inode: int, now: int
) -> None:
    """Write the header of a new segment; the caller holds the admin lock.

    The write sequences of the shards begin with the time of creation, so that they go
    on growing if a segment takes the place of another one: a token of ``gets`` is never
    given out again.

    Args:
        buffer: The segment, filled with zeros.
        names: The names of the cache's files.
        settings: The settings that later users must agree to.
        lock_inode: The inode of the lock file.
        now: The time by the cache's clock, in ns.

    Raises:
        ValueError: If the name of the cache or codec is too long for the header.
    """
    geometry = settings.geometry
    words = buffer.cast("Q")
    flags = L.FLAG_PERSIST * settings.persist | L.FLAG_SLIDING * settings.sliding
    created = time.time_ns()
    for word, value in {
        L.H_FORMAT: L.FORMAT,
        L.H_SIZE: geometry.size,
        L.H_SEED: int.from_bytes(os.urandom(8)),
        L.H_CREATED_WALL: created,
        L.H_CREATED_AT: now,
        L.H_SHARDS: geometry.shards,
        L.H_SLOTS: geometry.slots,
        L.H_BLOCKS: geometry.blocks,
        L.H_BLOCK_SIZE: geometry.block_size,
        L.H_STRIDE: geometry.stride,
        L.H_ROWS: L.ROWS,
        L.H_MAX_ENTRIES: settings.max_entries,
        L.H_MAX_BYTES: settings.max_bytes,
        L.H_TTL: settings.ttl_ns,
        L.H_JITTER: settings.jitter_ppm,
        L.H_CLEANUP: settings.cleanup_ns,
        L.H_FLAGS: flags,
        L.H_LOCK_INODE: lock_inode,
    }.items():
        words[word] = value
    for shard in range(geometry.shards):
        words[geometry.shard_at(shard) + L.S_SEQUENCE] = first_sequence(created)
    _put_text(buffer, L.CODEC_AT, L.CODEC_SIZE, settings.codec)
    _put_text(buffer, L.NAME_AT, L.NAME_SIZE, names.cache)
    # This is stored last: from now on the segment counts as complete.
    words[L.H_MAGIC] = L.MAGIC


def _put_text(buffer: memoryview, at: int, size: int, text: str) -> None:
    data = text.encode()
    if len(data) >= size:
        raise ValueError(
            f"{text!r} takes {len(data)} bytes of UTF-8; the segment has room for"
            f" {size - 1}: choose a shorter name"
        )
    buffer[at] = len(data)
    buffer[at + 1 : at + 1 + len(data)] = data


# --- reading ----------------------------------------------------------------------


def read_settings(buffer: memoryview) -> Settings:
    """Return the settings as they stand in a header, without any check."""
    words = buffer[: L.ROWS_AT].cast("Q")
    flags = words[L.H_FLAGS]
    return Settings(
        max_entries=words[L.H_MAX_ENTRIES],
        max_bytes=words[L.H_MAX_BYTES],
        ttl_ns=words[L.H_TTL],
        sliding=bool(flags & L.FLAG_SLIDING),
        jitter_ppm=words[L.H_JITTER],
        cleanup_ns=words[L.H_CLEANUP],
        shards=words[L.H_SHARDS],
        persist=bool(flags & L.FLAG_PERSIST),
        codec=_text(buffer, L.CODEC_AT, L.CODEC_SIZE),
    )


def _text(buffer: memoryview, at: int, size: int) -> str:
    return bytes(buffer[at + 1 : at + 1 + min(buffer[at], size - 1)]).decode(
        errors="replace"
    )


def read_header(names: Names, buffer: memoryview) -> Header:
    """Read and check the header of a mapped segment.

    Args:
        names: The names under which the segment was found.
        buffer: The segment.

    Raises:
        SegmentCorrupt: If the header contradicts itself, this version of the format,
            the file's size or the name.
    """

    def corrupt(reason: str) -> SegmentCorrupt:
        return SegmentCorrupt(
            f"{names.segment_path} {reason}; stop its users, if any, and remove it"
            f" with: shmcache unlink {names.cache}"
        )

    # This views only the header, because the size of the file may be no multiple of 8.
    words = buffer[: L.ROWS_AT].cast("Q")
    if words[L.H_MAGIC] != L.MAGIC:
        raise corrupt("is not a segment of this package (no magic word)")
    if words[L.H_FORMAT] != L.FORMAT:
        raise corrupt(
            f"has format {words[L.H_FORMAT]}, and this version of shmcache reads"
            f" format {L.FORMAT}"
        )
    settings = read_settings(buffer)
    if not 1 <= settings.shards <= L.MAX_SHARDS:
        raise corrupt(f"claims {settings.shards} shards")
    geometry = settings.geometry
    written = _sizes_in(words)
    planned = _sizes_of(geometry)
    if written != planned:
        raise corrupt(f"has a damaged geometry ({written} for {planned})")
    if len(buffer) != geometry.size:
        raise corrupt(
            f"has {len(buffer):,} bytes and should have {geometry.size:,}: another"
            " program changed the file"
        )
    name = _text(buffer, L.NAME_AT, L.NAME_SIZE)
    if name != names.cache:
        raise corrupt(f"was made for a cache named {name!r}")
    return Header(
        settings=settings,
        geometry=geometry,
        name=name,
        seed=words[L.H_SEED],
        created_wall_ns=words[L.H_CREATED_WALL],
        created_at_ns=words[L.H_CREATED_AT],
        lock_inode=words[L.H_LOCK_INODE],
    )


def _sizes_in(words: memoryview) -> tuple[int, ...]:
    return (
        words[L.H_SLOTS],
        words[L.H_BLOCKS],
        words[L.H_BLOCK_SIZE],
        words[L.H_STRIDE],
        words[L.H_SIZE],
        words[L.H_ROWS],
    )


def _sizes_of(geometry: L.Geometry) -> tuple[int, ...]:
    return (
        geometry.slots,
        geometry.blocks,
        geometry.block_size,
        geometry.stride,
        geometry.size,
        L.ROWS,
    )
