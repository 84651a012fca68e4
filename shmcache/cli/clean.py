"""The files that caches have in shared memory: found, checked, removed.

Problem: crashes leave files behind.  These must be distinguished from the files
of caches in use, and from files that are not safely ours, whatever their contents.

Mechanism: nothing here attaches to a segment or trusts its header.  A cache is in use
if a process holds a lock on its lock file (see _process/lockfile.py).  Files are
removed under the admin lock, which a creator holds as well: so a cache that is just
being created counts as in use.

Death in the middle: the kernel drops the admin lock, and the files that are left are
found by the next survey.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass

from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._format.seqlock import stable_read
from shmcache._process.lockfile import LockFile, mutex
from shmcache._segment.create import remove as remove_segment
from shmcache._segment.names import LOCK_SUFFIX, SHM_DIR, Names, open_own
from shmcache.errors import (
    LockTimeout,
    SegmentNotFound,
    SegmentRefused,
    ShmCacheError,
)

# Attempts to copy a shard that is written to, and seconds between two of them.
ATTEMPTS = 500
PAUSE = 0.001


@dataclass(frozen=True)
class Found:
    """What there is in shared memory under the name of one cache."""

    name: str
    files: tuple[str, ...]  # names in /dev/shm
    bytes: int  # of all files together
    in_use: bool
    persist: bool
    trouble: str  # why the files must not be touched; empty if they may be


# --- finding ----------------------------------------------------------------------


def survey() -> list[Found]:
    """All caches of this user, in use or not, sorted by name."""
    files: dict[str, list[str]] = {}
    for entry in sorted(os.listdir(SHM_DIR)):
        if name := _cache_of(entry):
            files.setdefault(name, []).append(entry)
    return [_look(name, files[name]) for name in sorted(files)]


def _cache_of(entry: str) -> str:
    # The name of the cache that a file in /dev/shm belongs to; empty if to none.
    ours = f"shmcache-{os.geteuid()}-"
    name = ""
    if entry.startswith(f"sem.{ours}"):
        head, _, shard = entry.removeprefix(f"sem.{ours}").rpartition(".")
        name = head if shard.isdecimal() else ""
    elif entry.startswith(ours):
        name = entry.removeprefix(ours).removesuffix(LOCK_SUFFIX)
    try:
        return Names.of(name).cache
    except ValueError:
        return ""


def _look(name: str, files: list[str]) -> Found:
    names = Names.of(name)
    size, persist, in_use, trouble = 0, False, False, ""
    for file in files:
        with contextlib.suppress(OSError):
            size += os.stat(f"{SHM_DIR}/{file}", follow_symlinks=False).st_size
    try:
        in_use = _in_use(names)
        persist = _persists(names)
    except SegmentRefused as error:
        trouble = str(error)
    return Found(name, tuple(files), size, in_use, persist, trouble)


def _in_use(names: Names) -> bool:
    # The holder of the admin lock may be creating the cache, so that counts as well.
    try:
        with LockFile.opened(names, create=False) as lock_file:
            return lock_file.in_use() or lock_file.admin_held()
    except FileNotFoundError:
        return False


def _persists(names: Names) -> bool:
    try:
        fd = open_own(names.segment_path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        head = os.pread(fd, L.PAGE, 0)
    finally:
        os.close(fd)
    if len(head) < L.PAGE:
        return False
    words = memoryview(head).cast("Q")
    return words[L.H_MAGIC] == L.MAGIC and bool(words[L.H_FLAGS] & L.FLAG_PERSIST)


# --- removing ---------------------------------------------------------------------


def remove(name: str, *, force: bool = False) -> bool:
    """Remove the files of a cache unless it is in use.

    Args:
        name: The name of the cache.
        force: Remove the files even if the cache is in use.  The processes that are
            attached keep what they have.

    Returns:
        Whether the files were removed.

    Raises:
        SegmentRefused: The files are not safely ours.
        LockTimeout: With ``force``, another process held the admin lock for too long.
    """
    names = Names.of(name)
    try:
        with (
            mutex(),
            LockFile.opened(names) as lock_file,
            lock_file.admin(f"cache {name!r}", timeout=None if force else 0),
        ):
            # If the file no longer has the name, another process has removed the cache
            # since, and may have created a new one.
            if not lock_file.current() or (lock_file.in_use() and not force):
                return False
            remove_segment(names)
            os.unlink(names.lock_path)
    except LockTimeout:
        if force:
            raise
        return False
    except IsADirectoryError as error:
        raise SegmentRefused(
            f"{names.segment_path} is a directory and so none of a cache's files:"
            " find out who put it there, and remove it"
        ) from error
    return True


# --- checking ---------------------------------------------------------------------


def check(name: str) -> list[str]:
    """What is wrong with a segment, found in a copy and without attaching.  O(size).

    Args:
        name: The name of the cache.

    Returns:
        A sentence for each finding; none if the segment is sound.

    Raises:
        SegmentNotFound: There is no cache with this name.
        SegmentRefused: The file is not safely ours.
    """
    names = Names.of(name)
    try:
        fd = open_own(names.segment_path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise SegmentNotFound(
            f"there is no cache named {name!r} of user {os.geteuid()}; shmcache ls"
            " lists what there is"
        ) from None
    try:
        size = os.fstat(fd).st_size
        if size < _check.HEADER_SIZE:
            return [f"segment: {size} bytes, fewer than a header has"]
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
            return _findings(memory, size, name)
    finally:
        os.close(fd)


def _findings(memory: mmap.mmap, size: int, name: str) -> list[str]:
    head = memory[: _check.HEADER_SIZE]
    findings = _check.check_header(head)
    header = _check.read_header(head)
    g = header.geometry
    if findings:
        return findings  # with a damaged header the places of the shards are unknown
    if size != g.size:
        return [f"segment: {size} bytes, but its plan has {g.size}"]
    with memoryview(memory) as view, view.cast("Q") as words:
        for shard in range(g.shards):
            data = _copy(view, words, g, shard) or _locked_copy(name, shard, g.stride)
            if data is None:
                findings.append(
                    f"shard {shard}: its writer is in the midst of a write for too long"
                    " to get a copy; it is busy, stopped, or dead and not yet noticed"
                )
            else:
                findings += _check.check_shard(data, header, shard, quiescent=False)
    return findings


def _copy(
    view: memoryview, words: memoryview, g: L.Geometry, shard: int
) -> bytes | None:
    # A shard's bytes as they were at one moment; None if no such copy could be made.
    base = g.shard_at(shard)
    start, end = 8 * base, 8 * base + g.stride
    data, stable = stable_read(
        words, base, lambda: bytes(view[start:end]), attempts=ATTEMPTS, pause=PAUSE
    )
    return data if stable else None


def _locked_copy(name: str, shard: int, size: int) -> bytes | None:
    # A shard that is written to all the time is never without a writer.  Then this
    # process attaches and makes the copy under the shard's lock.  It does not attach to
    # what the dead have left, because that would take the cache into use.
    from shmcache.cache import Cache

    with LockFile.opened(Names.of(name), create=False) as lock_file:
        if not lock_file.in_use():
            return None
        try:
            with Cache.attach(name, lock_timeout=2) as cache:
                return cache.internals.snapshot(shard, 0, size)
        except (ShmCacheError, ValueError):  # a stopped writer; a codec not known here
            return None
