"""The segment as a file: its names, its settings, creation, opening, removal.

Creation happens under the admin lock (see _workers.py) and stores the magic word
last, so nobody sees half a segment; one whose creator was killed has no magic word
and is replaced by the next process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

import posix_ipc

from shmcache._format import layout as L
from shmcache.errors import (
    CacheClosed,
    ConfigMismatch,
    OutOfSharedMemory,
    SegmentCorrupt,
    SegmentRefused,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._segment.block import Block

log = logging.getLogger("shmcache")

SHM_DIR = "/dev/shm"  # noqa: S108 - where Linux keeps POSIX shared memory
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True)
class Names:
    """The names in /dev/shm of one user's cache."""

    cache: str
    segment: str  # as shared_memory knows it

    @classmethod
    def of(cls, name: str, uid: int | None = None) -> Names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"cache name {name!r} is not 1 to 100 letters, digits, '.', '_' or '-';"
                " choose such a name"
            )
        if name.endswith(".lease"):
            raise ValueError(
                f"cache name {name!r} would be that of another cache's lease file;"
                " choose one that does not end in .lease"
            )
        return cls(name, f"shmcache-{os.geteuid() if uid is None else uid}-{name}")

    @property
    def segment_path(self) -> str:
        return f"{SHM_DIR}/{self.segment}"

    @property
    def lock_path(self) -> str:
        return f"{SHM_DIR}/{self.segment}.lease"

    def semaphore(self, shard: int) -> str:
        return f"/{self.segment}.{shard}"

    def semaphore_path(self, shard: int) -> str:
        return f"{SHM_DIR}/sem.{self.segment}.{shard}"


@dataclass(frozen=True)
class Settings:
    """What all processes that share a segment must agree on."""

    max_entries: int
    max_bytes: int
    ttl_ns: int  # 0: never
    sliding: bool
    jitter_ppm: int
    cleanup_ns: int
    shards: int
    persist: bool
    codec: str

    @property
    def geometry(self) -> L.Geometry:
        return L.plan_for(self.max_entries, self.max_bytes, self.shards)

    def capacities(self) -> list[int]:
        """How many entries each shard may hold."""
        blocks = self.geometry.blocks
        return [
            L.shard_capacity(self.max_entries, self.shards, shard, blocks)
            for shard in range(self.shards)
        ]

    def require_same(self, wanted: Settings, name: str) -> None:
        """Raise ConfigMismatch naming every setting in which ``wanted`` differs."""
        different = [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(wanted, field.name)
        ]
        differences = [
            f"{_shown(setting, getattr(self, setting))}"
            f" but asked for {_shown(setting, getattr(wanted, setting), '')}"
            for setting in different
        ]
        if differences:
            log.warning(
                "cache %s exists with other settings: %s",
                name,
                "; ".join(differences),
                extra={
                    "cache": name,
                    "event": "config mismatch",
                    "exists": {each: getattr(self, each) for each in different},
                    "asked": {each: getattr(wanted, each) for each in different},
                },
            )
            raise ConfigMismatch(
                f"cache {name!r} exists with other settings: {'; '.join(differences)}."
                " Ask for the same in all processes, use Cache.attach() to take what"
                f" is there, or remove it with: shmcache unlink {name}"
            )


_SHOWN: dict[str, tuple[str, Callable[[Any], object]]] = {
    "ttl_ns": ("ttl", lambda v: f"{v / 1e9:g} s" if v else None),
    "jitter_ppm": ("jitter", lambda v: v / 1e6),
    "cleanup_ns": ("cleanup_interval", lambda v: f"{v / 1e9:g} s"),
}


def _shown(field: str, value: object, between: str = " is ") -> str:
    name, show = _SHOWN.get(field, (field, repr))
    return f"{name if between else ''}{between}{show(value)}"


@dataclass(frozen=True)
class Header:
    """A segment's header, checked."""

    settings: Settings
    geometry: L.Geometry
    name: str
    seed: int
    created_wall_ns: int  # wall clock
    created_at_ns: int  # the cache's clock
    lock_inode: int


class Gone:
    """What stands where a closed cache had its memory: any use tells."""

    def __len__(self) -> int:
        """Zero, so it is false."""
        return 0

    def __getitem__(self, _: object) -> NoReturn:
        raise CacheClosed(
            "the cache was closed, by another thread or a signal handler, while this"
            " call used it; let all threads end their work before close()"
        )

    def __setitem__(self, index: object, _: object) -> None:
        self[index]


def identity(file: str | int) -> tuple[int, int] | None:
    """What tells a file, by path or descriptor, from all others; None if there is none.

    A link is one by itself.
    """
    try:
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_own(path: str, flags: int) -> int:
    """A descriptor of a regular file that is ours and that only we can open."""
    try:
        # Not waiting for somebody to write into a pipe that has the name.
        fd = os.open(path, flags | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.EACCES, errno.ENXIO):
            raise
        raise SegmentRefused(
            f"{path} is no file of ours ({os.strerror(error.errno or 0)}):"
            " find out who put it there, and remove it or choose another cache name"
        ) from error
    found = os.fstat(fd)
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = "is not a regular file"
    elif found.st_uid != os.geteuid():
        reason = f"belongs to user {found.st_uid}, and we are user {os.geteuid()}"
    elif found.st_mode & 0o077:
        reason = f"has mode {stat.S_IMODE(found.st_mode):o}, so others can open it"
    if reason:
        os.close(fd)
        raise SegmentRefused(
            f"{path} {reason}; a cache's files belong to its user with mode 600:"
            " remove the file, or choose another cache name"
        )
    return fd


def create(names: Names, settings: Settings, lock_inode: int, now: int) -> Block:
    """A new, empty segment with its semaphores; the caller holds the admin lock."""
    from shmcache._segment.block import Block

    geometry = settings.geometry
    block = Block(names, geometry.size)
    try:
        try:
            make_semaphores(names, geometry.shards)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise no_room(names, geometry.shards * L.PAGE, "semaphores") from error
        buffer = block.view
        words = buffer.cast("Q")
        flags = L.FLAG_PERSIST * settings.persist | L.FLAG_SLIDING * settings.sliding
        for word, value in {
            L.H_FORMAT: L.FORMAT,
            L.H_SIZE: geometry.size,
            L.H_SEED: int.from_bytes(os.urandom(8)),
            L.H_CREATED_WALL: time.time_ns(),
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
        _put_text(buffer, L.CODEC_AT, L.CODEC_SIZE, settings.codec)
        _put_text(buffer, L.NAME_AT, L.NAME_SIZE, names.cache)
        words[L.H_MAGIC] = L.MAGIC
    except BaseException:
        remove(names, geometry.shards)
        block.close()
        raise
    return block


def no_room(names: Names, size: int, what: str) -> OutOfSharedMemory:
    """The error that tells what there is no room for."""
    free = os.statvfs(SHM_DIR)
    return OutOfSharedMemory(
        f"cache {names.cache!r} needs {size:,} bytes of shared memory for its {what},"
        f" and {SHM_DIR} has {free.f_bavail * free.f_frsize:,} free;"
        " lower max_bytes or max_entries, or give it more room (docker:"
        " --shm-size, Kubernetes: an emptyDir of medium Memory on /dev/shm)"
    )


def _put_text(buffer: memoryview, at: int, size: int, text: str) -> None:
    data = text.encode()
    if len(data) >= size:
        raise ValueError(
            f"{text!r} takes {len(data)} bytes of UTF-8; the segment has room for"
            f" {size - 1}: choose a shorter name"
        )
    buffer[at] = len(data)
    buffer[at + 1 : at + 1 + len(data)] = data


def _text(buffer: memoryview, at: int, size: int) -> str:
    return bytes(buffer[at + 1 : at + 1 + min(buffer[at], size - 1)]).decode(
        errors="replace"
    )


def read_settings(buffer: memoryview) -> Settings:
    """The settings in a header, as they are."""
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


def read_header(names: Names, buffer: memoryview) -> Header:
    """The header of a mapped segment, or SegmentCorrupt."""

    def corrupt(reason: str) -> SegmentCorrupt:
        return SegmentCorrupt(
            f"{names.segment_path} {reason}; stop its users, if any, and remove it"
            f" with: shmcache unlink {names.cache}"
        )

    words = buffer[: L.ROWS_AT].cast("Q")  # the size of all may be any number
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
    written = (
        words[L.H_SLOTS],
        words[L.H_BLOCKS],
        words[L.H_BLOCK_SIZE],
        words[L.H_STRIDE],
        words[L.H_SIZE],
        words[L.H_ROWS],
    )
    planned = (
        geometry.slots,
        geometry.blocks,
        geometry.block_size,
        geometry.stride,
        geometry.size,
        L.ROWS,
    )
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


def reset_semaphores(names: Names, shards: int) -> None:
    """The semaphores that are there with one permit each; nobody uses them now.

    They stay the same ones: a process that was forked from a user who died may not
    have used the cache yet, and has them open.
    """
    for shard in range(shards):
        name = names.semaphore(shard)
        try:
            semaphore = posix_ipc.Semaphore(name)
        except (posix_ipc.Error, OSError):
            _make_semaphore(name)
            continue
        permits = semaphore.value
        if permits == 0:
            semaphore.release()
        elif permits > 1:
            _make_semaphore(name)  # spare ones are rare, and so many are damage
        semaphore.close()


def make_semaphores(names: Names, shards: int) -> None:
    """New semaphores with one permit each, in place of any that were left."""
    for shard in range(shards):
        _make_semaphore(names.semaphore(shard))


def _make_semaphore(name: str) -> None:
    _unlink_semaphore(name)
    posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=1).close()


def _unlink_semaphore(name: str) -> None:
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError as error:
        raise PermissionError(f"semaphore {name}: {error}") from error


def remove(names: Names, shards: int | None = None) -> None:
    """Remove a segment and its semaphores; the lease file is the caller's.

    The segment first: found without its semaphores it would be of no use to newcomers,
    while semaphores without a segment are replaced when the next one is made.  Without
    ``shards`` the directory tells which there are.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(names.segment_path)
    if shards is None:
        prefix = f"sem.{names.segment}."
        left = [
            entry.removeprefix("sem.")
            for entry in os.listdir(SHM_DIR)
            if entry.startswith(prefix) and entry[len(prefix) :].isdigit()
        ]
    else:
        left = [names.semaphore(shard)[1:] for shard in range(shards)]
    for name in left:
        _unlink_semaphore("/" + name)
