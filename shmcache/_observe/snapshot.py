"""A segment seen from outside: what the read-only commands know.

The file is mapped for reading alone.  Whoever looks takes no lock and no worker row,
so nothing changes: no LRU order, no statistics, not a byte; and nobody waits for it,
nor it for anybody.

What is read is of one moment nevertheless.  An entry is in the cache if its version is
odd (see _layout.py), and a copy of it is good if the key agrees with the hash and the
value with the checksum.  Buckets and lists are not needed, so entries are found in
damaged shards, too, and beside a writer who died or stands still.  Of counts and LRU
order the shard's epoch tells, which is odd as long as a writer is inside; behind one
who does not come out, what is there is shown.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import xxhash

from shmcache._engine import HandleCodec, MsgpackCodec, decode_key, decode_tagged
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process.attachment import of_this_process
from shmcache._process.lockfile import LockFile
from shmcache._process.rows import sum_counters
from shmcache._segment.header import Header, read_header, read_settings
from shmcache._segment.names import Names, open_own
from shmcache.errors import SegmentCorrupt, SegmentNotFound, SegmentRefused
from shmcache.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator

# Looks at a record, or at a shard's words, before what is there is taken as it is.
ATTEMPTS = 200
# A pass over a shard's records takes up what was written during the one before.  With
# a busy writer each one misses some part of the keys, which are moved meanwhile.
PASSES = 40
# Seconds after which there are only a few of them.
ENOUGH = 2.0
FEW = 4

_OWNER = struct.Struct(">QB")  # what a handle's key begins with: token, kind


class Undecoded(NamedTuple):
    """Bytes of a key or value that are not, or cannot be, decoded."""

    data: bytes
    reason: str


@dataclass(frozen=True)
class Entry:
    """One record with its key and, if asked for, its value."""

    shard: int
    slot: int
    version: int
    expires: int
    hash: int
    block: int
    value_len: int
    meta: int
    ttl: int
    stamp: int
    checksum: int
    blocks: int = 0
    key: bytes = b""
    value: bytes | None = None
    damage: str = ""  # what does not agree; then key and value are not to be believed

    @property
    def key_len(self) -> int:
        return self.meta & 0xFFFF

    @property
    def kind(self) -> int:
        return self.meta >> 16 & 15

    @property
    def tag(self) -> int:
        return self.meta >> L.META_TAG_SHIFT & 15

    @property
    def fetched(self) -> bool:
        """Whether it was read since it was written."""
        return bool(self.meta & L.META_FETCHED)


class Worker(NamedTuple):
    """A worker row in use."""

    token: int
    pid: int  # as we can see it; 0 if it is in a PID namespace of its own
    wrote: int  # the PID that it wrote down
    alive: bool
    age: float
    hits: int
    misses: int


class Inside(NamedTuple):
    """Who holds, and who waits for, the lock of a shard."""

    shard: int
    writing: bool  # the shard is half changed
    token: int  # of the holder; 0: nobody has signed
    waiting: int


class Segment:
    """One cache's segment, mapped for reading; a context manager.

    ``trouble`` says what is wrong with the header, or is empty.  Raises
    SegmentNotFound, SegmentRefused, and SegmentCorrupt if there is no telling what the
    bytes are.
    """

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
        self.w64 = self.bytes[: self.size & ~7].cast("Q")
        self.w32 = self.bytes[: self.size & ~7].cast("I")
        self._lease: LockFile | None = None
        try:
            self.header, self.trouble = self._read_header()
            self._lease, self._ours = self._open_lease()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[Header, str]:
        try:
            return read_header(self.names, self.bytes), ""
        except SegmentCorrupt as error:
            # Shards can be read by the four numbers that a geometry follows from.
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

    def _open_lease(self) -> tuple[LockFile | None, int]:
        # And the token of this process if it is attached: its locks it cannot see.
        ours = of_this_process(self.names)
        try:
            lease = LockFile.open(self.names, self, create=False)
            return lease, ours.token if ours else 0
        except FileNotFoundError:
            return None, 0
        except SegmentRefused as error:
            self.trouble = self.trouble or str(error)
            return None, 0

    def close(self) -> None:
        """Let go of the mapping."""
        for view in (self.w32, self.w64, self.bytes):
            view.release()
        with contextlib.suppress(BufferError):  # an exception's frames still have views
            self._map.close()
        if self._lease is not None:
            self._lease.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the whole ------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.names.cache

    @property
    def codec(self) -> str:
        return self.header.settings.codec

    @property
    def holds_handles(self) -> bool:
        return self.codec == L.HANDLES

    @property
    def shards(self) -> range:
        """The shards that are within the file."""
        g = self.header.geometry
        return range(min(g.shards, max(0, self.size - g.shards_at) // g.stride))

    def base(self, shard: int) -> int:
        """A shard's first 64-bit word."""
        g = self.header.geometry
        return (g.shards_at + shard * g.stride) // 8

    def shard_words(self, shard: int) -> tuple[int, ...]:
        """A shard's words up to the counters' end, of one moment if that can be had."""
        base = self.base(shard)
        for attempt in range(ATTEMPTS):
            epoch = self.w64[base + L.S_SEQ]
            words = tuple(self.w64[base : base + L.S_COUNTERS_END])
            if not epoch & 1 and self.w64[base + L.S_SEQ] == epoch:
                break
            time.sleep(0.0001 * (attempt > 20))
        return words

    def stats(self) -> Stats:
        """What ``Cache.stats()`` says; ``compiled`` is of this process, though."""
        return Stats.of(
            self.header,
            map(self.shard_words, self.shards),
            sum_counters(self.w64)[0],  # exact unless workers end all the time
            recovered=self.w64[L.H_RECOVERED],
            workers=sum(worker.alive for worker in self.workers()),
        )

    def workers(self) -> list[Worker]:
        """All rows in use, the oldest worker first; those of the dead, too."""
        found = []
        now = time.time_ns()
        first, last = L.ROWS_AT // 8, L.ROWS_AT // 8 + L.ROWS * L.ROW_WORDS
        tokens = self.w64[first + L.R_TOKEN : last : L.ROW_WORDS].tolist()
        for row in [row for row, token in enumerate(tokens) if token]:
            at = first + row * L.ROW_WORDS
            words = self.w64[at : at + L.R_SWEEPS].tolist()
            pid = self._leaseholder(row)
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
        return sorted(found, key=lambda worker: worker.token >> 16)

    def _leaseholder(self, row: int) -> int | None:
        # The process that lives in a row, None if it is dead.
        if self._ours and (self._ours & 0xFFFF) - 1 == row:
            return os.getpid()
        if self._lease is None:
            return None
        return self._lease.row_holder(row)

    def inside(self) -> Iterator[Inside]:
        """The shards in which somebody writes, or for which somebody waits."""
        for shard in self.shards:
            base = self.base(shard)
            writing = bool(self.w64[base + L.S_SEQ] & 1)
            token = self.w64[base + L.S_HOLDER]
            waiting = self._waiting(shard)
            if writing or token or waiting:
                yield Inside(shard, writing, token, waiting)

    def _waiting(self, shard: int) -> int:
        # glibc and musl count who sleeps on a semaphore in its second word.
        with contextlib.suppress(OSError, SegmentRefused):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = open_own(self.names.semaphore_path(shard), flags)
            try:
                data = os.pread(fd, 8, 0)
            finally:
                os.close(fd)
            return int.from_bytes(data[4:], "little") & 0xFFFF
        return 0

    # --- time -----------------------------------------------------------------------

    def now(self) -> int:
        """The cache's clock, ns: CLOCK_MONOTONIC, unless it was created later.

        One with a clock of its own is taken to run as the wall clock does.
        """
        monotonic = time.monotonic_ns()
        epoch = self.header.created_at_ns
        if epoch <= monotonic:
            return monotonic
        return epoch + max(0, time.time_ns() - self.header.created_wall_ns)

    def age(self, entry: Entry) -> float:
        """Seconds since an entry was written, to 0.07 s."""
        now = (self.now() - self.header.created_at_ns) >> L.STAMP_SHIFT
        age = (now - entry.stamp) & L.MASK32
        return 0.0 if age >> 31 else (age << L.STAMP_SHIFT) / 1e9

    def left(self, entry: Entry) -> float | None:
        """Seconds that an entry has to live, 0 if it has expired; None: for ever."""
        if entry.expires == L.NEVER:
            return None
        return max(0, entry.expires - self.now()) / 1e9

    def expired(self, entry: Entry) -> bool:
        return entry.expires != L.NEVER and entry.expires <= self.now()

    # --- entries --------------------------------------------------------------------

    def entries(self, *, values: bool = False) -> Iterator[Entry]:
        """All entries, expired and damaged ones too; each is as it was at one moment.

        One that was there all the time is met exactly once.
        """
        for shard in self.shards:
            yield from self._entries(shard, values, None)

    def find(self, kind: int, key: bytes) -> Entry | None:
        """The entry of a key, with its value; expired or damaged as it may be."""
        full = self._hash(kind, key)
        shard = (full >> 32) * self.header.geometry.shards >> 32
        if shard not in self.shards:
            return None
        for entry in self._entries(shard, True, full & L.MASK32):
            if entry.kind == kind and entry.key == key:
                return entry
        return None

    def _hash(self, kind: int, key: bytes) -> int:
        seed = (self.header.seed + kind) & L.MASK64
        return xxhash.xxh3_64_intdigest(key, seed=seed)

    def _entries(self, shard: int, values: bool, wanted: int | None) -> Iterator[Entry]:
        # An overwrite moves an entry to another slot, maybe one that was passed: what
        # was written during a pass is looked at in the next.
        found: dict[tuple[int, bytes, int], Entry] = {}
        base, since, started = self.base(shard), 0, time.monotonic()
        for number in range(PASSES):
            sequence = self.w64[base + L.S_SEQUENCE]
            for slot in self._slots(shard, since, wanted):
                entry = self.entry(shard, slot, values=values)
                if entry is None:
                    continue
                place = entry.kind, entry.key, slot if entry.damage else 0
                # Of two with one key the later counts.
                if place not in found or found[place].version < entry.version:
                    found[place] = entry
            if self.w64[base + L.S_SEQUENCE] == sequence:
                break
            if number >= FEW and time.monotonic() - started > ENOUGH:
                break
            since = sequence
        yield from found.values()

    def _slots(self, shard: int, since: int, wanted: int | None) -> list[int]:
        # Of live records that were written after ``since`` and have the hash wanted.
        versions = self._column(self.w64, shard, L.F_VERSION // 2)
        live = [
            slot
            for slot, version in enumerate(versions)
            if version & 1 and version >> 1 > since and slot
        ]
        redone = self.w64[self.base(shard) + L.S_REDO_SLOT]
        if 0 < redone < len(versions) and redone not in live:
            live.append(redone)  # a number that is being overwritten in its place
        if wanted is None:
            return live
        hashes = self._column(self.w32, shard, L.F_HASH)
        return [slot for slot in live if hashes[slot] == wanted]

    def _column(self, words: memoryview, shard: int, field: int) -> list[int]:
        g = self.header.geometry
        width = L.RECORD // words.itemsize
        first = (8 * self.base(shard) + g.records_at) // words.itemsize + field
        last = first + width * (g.slots + 1)
        return list(words[first:last:width].tolist())

    def entry(self, shard: int, slot: int, *, values: bool = True) -> Entry | None:
        """What a slot holds, at one moment; None if it holds no entry."""
        at = 8 * self.base(shard) + self.header.geometry.records_at + L.RECORD * slot
        before = None
        for attempt in range(ATTEMPTS):
            planned = _parsed(shard, slot, self._map[at : at + L.RECORD])
            if planned.version & 1 == 0:
                if self._is_redone(planned) or planned.version != self.w64[at // 8]:
                    if finished := self._finished(planned):
                        return finished
                    continue
                return None
            places, astray = self._places(planned, values)
            size = self.header.geometry.block_size
            # Record and content close together: a number may be counted up half a
            # million times a second.
            record = self._map[at : at + L.RECORD]
            content = b"".join([self._map[place : place + size] for place in places])
            version = self.w64[at // 8]
            entry = _parsed(shard, slot, record)
            if entry.version == version and _alike(entry, planned):
                entry = self._filled(entry, content, values, astray)
                # Damage is believed that is there at a second look, too.
                if not entry.damage or entry == before:
                    return entry
                before = entry
            time.sleep(0.0001 * (attempt > 20))
        return before

    def _places(self, entry: Entry, values: bool) -> tuple[list[int], str]:
        # Where the blocks of key and value are, and what is wrong with their chain.
        g = self.header.geometry
        start = 8 * self.base(entry.shard)
        places: list[int] = []
        block = entry.block
        needed = g.blocks_of(entry.key_len + entry.value_len)
        if needed > g.blocks:
            return [], f"{needed} blocks, and the shard has {g.blocks}"
        if not values:
            needed = g.blocks_of(entry.key_len)
        for _ in range(needed):
            if not 1 <= block <= g.blocks:
                return places, f"its chain leads to block {block}"
            places.append(start + g.arena_at + block * g.block_size)
            block = self.w32[(start + g.links_at) // 4 + block]
        return places, ""

    def _filled(self, entry: Entry, content: bytes, values: bool, astray: str) -> Entry:
        end = entry.key_len + entry.value_len
        key = content[: entry.key_len]
        value = content[entry.key_len : end] if values else None
        return replace(
            entry,
            blocks=self.header.geometry.blocks_of(end),
            key=key,
            value=value,
            damage=astray or self._damage(entry, key, value),
        )

    def _damage(self, entry: Entry, key: bytes, value: bytes | None) -> str:
        full = self._hash(entry.kind, key)
        if full & L.MASK32 != entry.hash:
            return "the key's bytes are not those that were written"
        if value is None or entry.checksum == L.checksum(value, entry.hash, entry.tag):
            return ""
        return "the value's bytes are not those that were written"

    def _is_redone(self, entry: Entry) -> bool:
        redone: int = self.w64[self.base(entry.shard) + L.S_REDO_SLOT]
        return redone == entry.slot

    def _finished(self, entry: Entry) -> Entry | None:
        # With the number that a writer who is still inside, or died there, puts in.
        places, astray = self._places(entry, values=False)
        if not self._is_redone(entry) or entry.value_len != 8 or astray:
            return None
        size = self.header.geometry.block_size
        key = b"".join([self._map[place : place + size] for place in places])
        base = self.base(entry.shard)
        value = self.w64[base + L.S_REDO_VALUE].to_bytes(8, "little")
        content = key[: entry.key_len] + value
        checksum = self.w64[base + L.S_REDO_CHECKSUM] & L.MASK32
        version = self.w64[base + L.S_REDO_VERSION]
        entry = replace(entry, version=version, checksum=checksum)
        entry = self._filled(entry, content, True, "")
        return None if entry.damage else entry

    # --- LRU order ------------------------------------------------------------------

    def ring(self, shard: int) -> list[int] | None:
        """A shard's slots, the most recently used first; None if none can be had."""
        base = self.base(shard)
        for attempt in range(ATTEMPTS):
            epoch = self.w64[base + L.S_SEQ]
            links = self._column(self.w32, shard, L.F_LRU_NEXT)
            if not epoch & 1 and self.w64[base + L.S_SEQ] == epoch:
                return _walk(links)
            time.sleep(0.0001 * (attempt > 20))
        return None

    def newest(self, shard: int, count: int) -> list[int]:
        """The slots at the recent end of a shard's ring; empty while it changes."""
        base = self.base(shard)
        first = (8 * base + self.header.geometry.records_at) // 4 + L.F_LRU_NEXT
        for _ in range(10):
            epoch = self.w64[base + L.S_SEQ]
            slots: list[int] = []
            slot = self.w32[first]
            while 0 < slot <= self.header.geometry.slots and len(slots) < count:
                slots.append(slot)
                slot = self.w32[first + slot * L.RECORD_WORDS]
            if not epoch & 1 and self.w64[base + L.S_SEQ] == epoch:
                return slots
        return []

    def largest(self, count: int) -> list[Entry]:
        """The entries with the most bytes; O(slots)."""
        from heapq import nlargest

        sized: list[tuple[int, int, int]] = []
        for shard in self.shards:
            meta = self._column(self.w32, shard, L.F_META)
            length = self._column(self.w32, shard, L.F_VALUE_LEN)
            sizes = (
                ((meta[slot] & 0xFFFF) + length[slot], shard, slot)
                for slot in self._slots(shard, 0, None)
            )
            sized = nlargest(count, [*sized, *nlargest(count, sizes)])
        found = [self.entry(shard, slot, values=False) for _, shard, slot in sized]
        return [entry for entry in found if entry and not entry.damage]

    # --- keys and values ------------------------------------------------------------

    def owner(self, entry: Entry) -> int:
        """The token of the worker whose handle an entry stands for; 0: none."""
        if not self.holds_handles or len(entry.key) < _OWNER.size:
            return 0
        return int(_OWNER.unpack_from(entry.key)[0])

    def own_key(self, entry: Entry) -> tuple[int, bytes]:
        """Kind and bytes of the user's key: of handles, without the owner."""
        if not self.owner(entry):
            return entry.kind, entry.key
        return _OWNER.unpack_from(entry.key)[1], entry.key[_OWNER.size :]

    def key(self, entry: Entry) -> Any:
        """An entry's key, as the user gave it, or Undecoded."""
        if entry.damage:
            return Undecoded(entry.key, entry.damage)
        kind, data = self.own_key(entry)
        try:
            return decode_key(kind, data)
        except SegmentCorrupt as error:
            return Undecoded(data, str(error))

    def value(self, entry: Entry) -> Any:
        """An entry's value as far as this package can read it, else Undecoded.

        What is pickled is not: it would run code.  Of a handle, the part for all.
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
        if self.holds_handles:
            return HandleCodec()
        if self.codec.partition(":")[0] in {"msgpack", "msgspec"}:
            return MsgpackCodec()
        return None


def _parsed(shard: int, slot: int, record: bytes) -> Entry:
    version, expires = struct.unpack_from("=QQ", record)
    narrow = struct.unpack_from("=12I", record, 4 * L.F_HASH)
    fields = dict(enumerate(narrow, L.F_HASH))
    return Entry(
        shard=shard,
        slot=slot,
        version=version,
        expires=expires,
        hash=fields[L.F_HASH],
        block=fields[L.F_BLOCK],
        value_len=fields[L.F_VALUE_LEN],
        meta=fields[L.F_META],
        ttl=fields[L.F_TTL],
        stamp=fields[L.F_STAMP],
        checksum=fields[L.F_CHECKSUM],
    )


def _alike(one: Entry, other: Entry) -> bool:
    # Whether key and value are in the same places.
    return (one.block, one.key_len, one.value_len) == (
        other.block,
        other.key_len,
        other.value_len,
    )


def _walk(links: list[int]) -> list[int]:
    # Stops where the ring closes, and where damage leads astray or round and round.
    slots: list[int] = []
    slot = links[0]
    while 0 < slot < len(links) and len(slots) < len(links):
        slots.append(slot)
        slot = links[slot]
    return slots
