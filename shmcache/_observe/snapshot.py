"""A segment seen from outside: counts, workers, locks, keys and values.

The read-only commands use this.  ``MappedSegment`` maps the file, ``RecordReader``
reads the records, ``Segment`` adds the rest.

Problem: a shard's counts belong together only while no writer is inside the shard, and
a writer that is stuck or dead never leaves it.

Mechanism: the counts are copied under the shard's ``seq`` word, by ``stable_read``.  If
no copy of one moment can be made, the last one is shown, and ``SegmentStats`` names the
shard.  The kernel's locks on the lock file say which workers live.  The kernel does not
show a process its own locks, so this process is recognised by its token.

Death in the middle: a reader writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcache._engine import HandleCodec, MsgpackCodec, decode_key, decode_tagged
from shmcache._format import layout as L
from shmcache._format.fields import generation_of, row_of, stamps_between
from shmcache._format.seqlock import stable_read
from shmcache._observe.records import Entry, RecordReader
from shmcache._process.attachment import of_this_process
from shmcache._process.lockfile import LockFile
from shmcache._process.rows import sum_counters
from shmcache._segment.names import open_own
from shmcache.errors import SegmentCorrupt, SegmentRefused
from shmcache.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator

# The key of a handle's entry begins with the owner's token and the kind of the user's
# key; the user's key follows.
_OWNER = struct.Struct(">QB")
# glibc and musl count the threads that sleep on a semaphore in its second 32-bit word.
_SEMAPHORE_SLEEPERS = slice(4, 8)


class Undecoded(NamedTuple):
    """Bytes of a key or value that were not or could not be decoded."""

    data: bytes
    reason: str


class SegmentStats(NamedTuple):
    """The statistics of a cache, and which of these numbers are not of one moment."""

    stats: Stats
    # These shards had a writer inside for the whole time of the look, so their words
    # may be half changed.
    unstable: tuple[int, ...]
    # This says whether the sums over the workers are exact.  If not, rows were retired
    # all the time, and a worker may be missing or counted twice.
    exact: bool


class Worker(NamedTuple):
    """A worker row in use."""

    token: int
    pid: int  # as this process sees it; 0 if the worker is in another PID namespace
    wrote: int  # the PID that the worker wrote down
    alive: bool
    age: float  # seconds
    hits: int
    misses: int


class Inside(NamedTuple):
    """The holder of a shard's lock, and how many threads wait for the lock."""

    shard: int
    writing: bool  # the shard is half changed
    token: int  # of the holder; 0 if HOLDER is empty
    waiting: int


class Segment(RecordReader):
    """One cache's segment as the read-only commands see it; a context manager.

    ``trouble`` says what is wrong with the header or with the lock file; it is empty if
    both are sound.

    Args:
        name: The name of the cache.

    Raises:
        SegmentNotFound: There is no cache with this name.
        SegmentRefused: The file is not safely ours.
        SegmentCorrupt: The bytes give no geometry, so nothing can be read.
    """

    def __init__(self, name: str) -> None:
        self._lock_file: LockFile | None = None
        super().__init__(name)
        try:
            self._lock_file, self._ours = self._open_lock_file()
        except BaseException:
            self.close()
            raise

    def _open_lock_file(self) -> tuple[LockFile | None, int]:
        # This returns the token of this process as well, or 0 if it is not attached.
        try:
            lock_file = LockFile.open(self.names, self, create=False)
        except FileNotFoundError:
            return None, 0
        except SegmentRefused as error:
            self.trouble = self.trouble or str(error)
            return None, 0
        attachment = of_this_process(self.names)
        return lock_file, attachment.token if attachment else 0

    def close(self) -> None:
        """Release the mapping and the lock file."""
        super().close()
        if self._lock_file is not None:
            self._lock_file.close(self)

    # --- counts ---------------------------------------------------------------------

    def stats(self) -> SegmentStats:
        """Return the same counts as ``Cache.stats()``.  O(shards + workers).

        ``compiled`` refers to this process, as the segment does not know it.
        """
        copies = [self._shard_words(shard) for shard in self.shards]
        counters, exact = sum_counters(self.w64)
        unstable = [shard for shard, (_, stable) in enumerate(copies) if not stable]
        stats = Stats.of(
            self.header,
            [words for words, _ in copies],
            counters,
            recovered=self.w64[L.H_RECOVERED],
            workers=sum(worker.alive for worker in self.workers()),
            unstable_shards=len(unstable),
        )
        return SegmentStats(stats, tuple(unstable), exact)

    def _shard_words(self, shard: int) -> tuple[tuple[int, ...], bool]:
        # Return the words up to the counters' end, and whether they are of one moment.
        base = self.base(shard)
        return stable_read(
            self.w64, base, lambda: tuple(self.w64[base : base + L.S_COUNTERS_END])
        )

    # --- workers and locks ----------------------------------------------------------

    def workers(self) -> list[Worker]:
        """Return all worker rows in use, the oldest first, dead workers included."""
        found = []
        now = time.time_ns()
        first, last = L.row_at(0), L.row_at(L.ROWS)
        tokens = self.w64[first + L.R_TOKEN : last : L.ROW_WORDS].tolist()
        for row in [row for row, token in enumerate(tokens) if token]:
            at = L.row_at(row)
            words = self.w64[at : at + L.R_SWEEPS].tolist()
            pid = self._process_in(row)
            found.append(
                Worker(
                    token=words[L.R_TOKEN],
                    pid=pid or 0,
                    wrote=words[L.R_PID],
                    alive=pid is not None,
                    age=max(0, now - words[L.R_STARTED]) / 1e9,
                    hits=words[L.R_HITS],
                    misses=words[L.R_MISSES],
                )
            )
        return sorted(found, key=lambda worker: generation_of(worker.token))

    def _process_in(self, row: int) -> int | None:
        # Return the PID of the process that lives in a row, None if it is dead.
        if self._ours and row_of(self._ours) == row:
            return os.getpid()
        if self._lock_file is None:
            return None
        return self._lock_file.row_holder(row)

    def inside(self) -> Iterator[Inside]:
        """Yield the shards with a writer inside, or with waiters at the lock."""
        for shard in self.shards:
            base = self.base(shard)
            writing = bool(self.w64[base + L.S_SEQ] & 1)
            token = self.w64[base + L.S_HOLDER]
            waiting = self._waiting(shard)
            if writing or token or waiting:
                yield Inside(shard, writing, token, waiting)

    def _waiting(self, shard: int) -> int:
        # Return how many threads sleep on a shard's semaphore; 0 if that is unknown.
        with contextlib.suppress(OSError, SegmentRefused):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = open_own(self.names.semaphore_path(shard), flags)
            try:
                data = os.pread(fd, 8, 0)
            finally:
                os.close(fd)
            sleepers = int.from_bytes(data[_SEMAPHORE_SLEEPERS], "little")
            return min(sleepers, 0xFFFF)  # a damaged word may be any number
        return 0

    # --- times ----------------------------------------------------------------------

    def age(self, entry: Entry) -> float:
        """Return the seconds since an entry was written, to within 0.07 s."""
        now = (self.now() - self.header.created_at_ns) >> L.STAMP_SHIFT
        age: int = stamps_between(entry.stamp, now & L.MASK32)
        return (age << L.STAMP_SHIFT) / 1e9

    def left(self, entry: Entry) -> float | None:
        """Return the seconds until an entry expires, or None if it never does."""
        if entry.expires == L.NEVER:
            return None
        return max(0, entry.expires - self.now()) / 1e9

    def expired(self, entry: Entry) -> bool:
        """Return whether an entry has expired."""
        return entry.expires != L.NEVER and entry.expires <= self.now()

    # --- keys and values ------------------------------------------------------------

    def owner(self, entry: Entry) -> int:
        """Return the token of the worker whose handle an entry stands for, or 0."""
        return owner_of(entry.key) if self.holds_handles else 0

    def own_key(self, entry: Entry) -> tuple[int, bytes]:
        """Return the kind and bytes of the key that the user gave.

        The key of a handle's entry has the owner before it, which is left out here.
        """
        if not self.owner(entry):
            return entry.kind, entry.key
        return _OWNER.unpack_from(entry.key)[1], entry.key[_OWNER.size :]

    def key(self, entry: Entry) -> Any:
        """Return an entry's key as the user gave it, or ``Undecoded``."""
        if entry.damage:
            return Undecoded(entry.key, entry.damage)
        kind, data = self.own_key(entry)
        try:
            return decode_key(kind, data)
        except SegmentCorrupt as error:
            return Undecoded(data, str(error))

    def value(self, entry: Entry) -> Any:
        """Return an entry's value, if this package can read it, else ``Undecoded``.

        A pickled value is not decoded, because that would run code.  The value of a
        handle is the one that its owner published with it.
        """
        data = entry.value or b""
        if entry.damage:
            return Undecoded(data, entry.damage)
        codec = self._reader()
        if entry.tag == L.Tag.CODEC and codec is None:
            reason = f"of codec {self.codec!r}, which only its program can decode"
            if self.codec == "pickle":
                reason = "of codec 'pickle', not decoded as that would run code"
            return Undecoded(data, reason)
        try:
            value = decode_tagged(codec, entry.tag, data)
        except SegmentCorrupt as error:
            return Undecoded(data, str(error))
        return value[2] if self.holds_handles and entry.tag == L.Tag.CODEC else value

    def _reader(self) -> Any:
        # Return a codec that reads the values; None if this package has none.
        if self.holds_handles:
            return HandleCodec()
        if self.codec.partition(":")[0] in {"msgpack", "msgspec"}:
            return MsgpackCodec()
        return None


def owner_of(key: bytes) -> int:
    """Return the token of the owner at the start of a handle's key, or 0."""
    return int(_OWNER.unpack_from(key)[0]) if len(key) >= _OWNER.size else 0
