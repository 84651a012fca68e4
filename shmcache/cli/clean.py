"""What caches have left in shared memory: finding it, looking at it, removing it.

For the command line.  Nothing here attaches to a segment or believes its header, so
damaged ones are dealt with, too.  Whether a cache is in use is what the kernel's locks
on its lease file say (see _workers.py), and removal happens under the admin lock, as
creation does: a cache that is just being made is in use.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process import attachment as _workers
from shmcache._segment import create as _segment
from shmcache._segment.create import SHM_DIR, Names
from shmcache.errors import SegmentNotFound, SegmentRefused, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Looks at a shard that is written to, before the check of it is given up.
ATTEMPTS = 500


@dataclass(frozen=True)
class Found:
    """What there is in shared memory under the name of one cache."""

    name: str
    files: tuple[str, ...]
    bytes: int
    in_use: bool
    persist: bool
    trouble: str  # why it is not to be touched, or empty


def survey() -> list[Found]:
    """All caches of this user, in use or not, by name."""
    files: dict[str, list[str]] = {}
    for entry in sorted(os.listdir(SHM_DIR)):
        if name := _cache_of(entry):
            files.setdefault(name, []).append(entry)
    return [_look(name, files[name]) for name in sorted(files)]


def _cache_of(entry: str) -> str:
    # The cache to which a file in /dev/shm belongs, empty if to none.
    ours = f"shmcache-{os.geteuid()}-"
    name = ""
    if entry.startswith(f"sem.{ours}"):
        head, _, shard = entry.removeprefix(f"sem.{ours}").rpartition(".")
        name = head if shard.isdecimal() else ""
    elif entry.startswith(ours):
        name = entry.removeprefix(ours).removesuffix(".lease")
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
    # Also while somebody creates it, or takes it into use again.
    try:
        with _workers.Lease.opened(names, create=False) as lease:
            return lease.in_use() or lease.holder(_workers._ADMIN) is not None
    except FileNotFoundError:
        return False


def _persists(names: Names) -> bool:
    try:
        fd = _segment.open_own(names.segment_path, os.O_RDONLY | os.O_NOFOLLOW)
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


def remove(name: str, *, force: bool = False) -> bool:
    """Remove the files of a cache unless it is in use; whether that was done.

    ``force`` removes them also then: those who are attached go on with what they have.
    Raises SegmentRefused for files that are not safely ours.
    """
    names = Names.of(name)
    with _workers.mutex(), _workers.Lease.opened(names) as lease:
        if force:
            lease.wait(_workers._ADMIN, f"cache {name!r}")
        elif not lease.try_lock(_workers._ADMIN):
            return False
        try:
            # Not current: somebody else has removed it, and it may be a new one by now.
            if not lease.current() or (lease.in_use() and not force):
                return False
            _segment.remove(names)
            os.unlink(names.lock_path)
        except IsADirectoryError as error:
            raise SegmentRefused(
                f"{names.segment_path} is a directory and so none of a cache's files:"
                " find out who put it there, and remove it"
            ) from error
        finally:
            lease.unlock(_workers._ADMIN)
    return True


def check(name: str) -> list[str]:
    """What is wrong with a segment, from a copy, without attaching; a sentence each."""
    names = Names.of(name)
    try:
        fd = _segment.open_own(names.segment_path, os.O_RDONLY | os.O_NOFOLLOW)
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
        return findings  # so there is no telling where the shards are
    if size != g.size:
        return [f"segment: {size} bytes, but its plan has {g.size}"]
    for shard, copied in _shards(memory, g):
        data = copied or _locked_copy(name, shard, g.stride)
        if data is None:
            findings.append(
                f"shard {shard}: its writer is in the midst of a write for too long to"
                " get a copy; it is busy, stopped, or dead and not yet noticed"
            )
        else:
            findings += _check.check_shard(data, header, shard, quiescent=False)
    return findings


def _locked_copy(name: str, shard: int, size: int) -> bytes | None:
    # Of a shard that is written to all the time there is no moment without a writer:
    # as one of its users we have a copy made under the lock.  None of the dead's.
    from shmcache.cache import Cache

    with _workers.Lease.opened(Names.of(name), create=False) as lease:
        if not lease.in_use():
            return None
        try:
            with Cache.attach(name, lock_timeout=2) as cache:
                data: bytes = cache._copy_shard(shard, 0, size)
                return data
        except (ShmCacheError, ValueError):  # a stopped writer; a codec not known here
            return None


def _shards(memory: mmap.mmap, g: L.Geometry) -> Iterator[tuple[int, bytes | None]]:
    # A copy is of one moment if the epoch was even before it and is the same after.
    for shard in range(g.shards):
        at = g.shards_at + shard * g.stride
        epoch = slice(at + 8 * L.S_SEQ, at + 8 * L.S_SEQ + 8)
        for _ in range(ATTEMPTS):
            before = memory[epoch]
            data = memory[at : at + g.stride]
            if memory[epoch] == before and not int.from_bytes(before, "little") & 1:
                yield shard, data
                break
            time.sleep(0.001)
        else:
            yield shard, None
