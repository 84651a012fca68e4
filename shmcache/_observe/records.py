"""The records of a mapped segment: each read as it was at one moment, without a lock.

Problem: writers change records while they are read, a writer may be dead or stuck in
the middle of a change, and any byte may be damaged.

Mechanism: a record is an entry if its version is odd (see layout.py).  A copy of the
record and its bytes is good if the version is the same after it, the key agrees with
the hash, and the value with the checksum.  Neither buckets nor lists are needed, so
entries are found in damaged shards, too.  The LRU order is a list, which has no such
proof in each record: it is read under the shard's ``seq`` word, by ``stable_read``.

Death in the middle: a reader writes nothing.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import TYPE_CHECKING

import xxhash

from shmcache._format import layout as L
from shmcache._format.fields import (
    is_live,
    key_len_of,
    kind_of,
    sequence_of,
    shard_of,
    tag_of,
)
from shmcache._format.seqlock import AT_ONCE, PAUSE, stable_read
from shmcache._observe.mapped import MappedSegment

if TYPE_CHECKING:
    from collections.abc import Iterator

# A record is copied at most this often; then the last copy is returned as it is.
ATTEMPTS = 200
# The recent end of the LRU ring is read 10 times a second, so a look may fail.
NEWEST_ATTEMPTS = 10
# Each pass over a shard's records takes up what was written during the pass before.
# A busy writer moves entries all the time, so each pass misses some of them.
PASSES = 40
# After this many seconds there are no more than FEW passes.
ENOUGH = 2.0
FEW = 4


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
    damage: str = ""  # what is inconsistent; if set, key and value are not reliable

    @property
    def key_len(self) -> int:
        """Return the length of the key, in bytes."""
        return int(key_len_of(self.meta))

    @property
    def kind(self) -> int:
        """Return the type that the key had before it became bytes: a ``Kind``."""
        return int(kind_of(self.meta))

    @property
    def tag(self) -> int:
        """Return how the bytes of the value are to be read: a ``Tag``."""
        return int(tag_of(self.meta))

    @property
    def fetched(self) -> bool:
        """Return whether the entry was read since it was written."""
        return bool(self.meta & L.META_FETCHED)


class RecordReader(MappedSegment):
    """A mapped segment whose records can be read."""

    def entries(self, *, values: bool = False) -> Iterator[Entry]:
        """Yield all entries, including expired and damaged ones.  O(slots).

        Args:
            values: Whether the values are copied and checked, too.

        Yields:
            Each entry as it was at one moment.  An entry that is there all the time is
            met exactly once.
        """
        for shard in self.shards:
            yield from self._entries(shard, values, None)

    def find(self, kind: int, key: bytes) -> Entry | None:
        """Return the entry of a key, with its value.  O(slots of a shard).

        Args:
            kind: The ``Kind`` of the key.
            key: The bytes of the key.

        Returns:
            The entry, which may be expired or damaged; None if there is none.
        """
        full = self._hash(kind, key)
        shard = shard_of(full, self.header.geometry.shards)
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
        # An overwrite moves an entry to another slot, possibly to one that this pass
        # has already left behind.  So the next pass looks at what was written during
        # this one.
        found: dict[tuple[int, bytes, int], Entry] = {}
        base, since, started = self.base(shard), 0, time.monotonic()
        for number in range(PASSES):
            sequence = self.w64[base + L.S_SEQUENCE]
            for slot in self._slots(shard, since, wanted):
                entry = self.entry(shard, slot, values=values)
                if entry is None:
                    continue
                place = entry.kind, entry.key, slot if entry.damage else 0
                # If two entries have one key, the later one counts.
                if place not in found or found[place].version < entry.version:
                    found[place] = entry
            if self.w64[base + L.S_SEQUENCE] == sequence:
                break
            if number >= FEW and time.monotonic() - started > ENOUGH:
                break
            since = sequence
        yield from found.values()

    def _slots(self, shard: int, since: int, wanted: int | None) -> list[int]:
        # Return the live records that were written after ``since`` and have the hash
        # ``wanted``; None means any hash.
        versions = self.versions(shard)
        live = [
            slot
            for slot, version in enumerate(versions)
            if is_live(version) and sequence_of(version) > since and slot
        ]
        redone = self.w64[self.base(shard) + L.S_REDO_SLOT]
        if 0 < redone < len(versions) and redone not in live:
            live.append(redone)  # a number that is being overwritten in place
        if wanted is None:
            return live
        hashes = self.column(shard, L.F_HASH)
        return [slot for slot in live if hashes[slot] == wanted]

    # --- one record -----------------------------------------------------------------

    def entry(self, shard: int, slot: int, *, values: bool = True) -> Entry | None:
        """Return the entry in a slot.

        Args:
            shard: The shard, one of ``shards``.
            slot: The slot, from 1 on.
            values: Whether the value is copied and checked, too.

        Returns:
            The entry as it was at one moment; None if the slot holds no entry.  After
            ``ATTEMPTS`` the last copy is returned, with its ``damage`` set.
        """
        # ``stable_read`` cannot be used here.  The shard's ``seq`` changes with a write
        # to any of its keys, so a busy shard would never give a stable copy of one
        # record; and it stays odd when a writer has died inside, though the records are
        # sound.  The record's own version tells whether this record was changed.
        at = self.record_at(shard, slot)
        before = None
        for attempt in range(ATTEMPTS):
            planned = _parsed(shard, slot, self._map[at : at + L.RECORD])
            if not is_live(planned.version):
                if self._is_redone(planned) or planned.version != self.w64[at // 8]:
                    if finished := self._finished(planned):
                        return finished
                    continue
                return None
            places, astray = self.places(planned, values=values)
            # Record and content are copied close together, because a number may be
            # incremented half a million times a second.
            record = self._map[at : at + L.RECORD]
            content = self._content(places)
            version = self.w64[at // 8]
            entry = _parsed(shard, slot, record)
            if entry.version == version and _alike(entry, planned):
                entry = self._filled(entry, content, values, astray)
                # Damage is reported only if a second look finds the same.
                if not entry.damage or entry == before:
                    return entry
                before = entry
            if attempt >= AT_ONCE:
                time.sleep(PAUSE)
        return before

    def places(self, entry: Entry, *, values: bool) -> tuple[list[int], str]:
        """Return the places of the bytes of an entry.

        Args:
            entry: The entry.
            values: Whether the blocks that only the value needs are wanted, too.

        Returns:
            The first byte of each block of its block run, as offsets in the segment;
            and what is wrong with the run, or an empty text.
        """
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
                return places, f"its block run leads to block {block}"
            places.append(start + g.arena_at + block * g.block_size)
            block = self.w32[(start + g.links_at) // 4 + block]
        return places, ""

    def _content(self, places: list[int]) -> bytes:
        size = self.header.geometry.block_size
        return b"".join([self._map[place : place + size] for place in places])

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
        # Return the entry as it will be when the number that is being stored into it is
        # complete.  Its writer is still inside, or died there; in both cases the redo
        # words have the number, and the next holder of the lock puts it in.
        places, astray = self.places(entry, values=False)
        if not self._is_redone(entry) or entry.value_len != 8 or astray:
            return None
        base = self.base(entry.shard)
        value = self.w64[base + L.S_REDO_VALUE].to_bytes(8, "little")
        content = self._content(places)[: entry.key_len] + value
        checksum = self.w64[base + L.S_REDO_CHECKSUM] & L.MASK32
        version = self.w64[base + L.S_REDO_VERSION]
        entry = replace(entry, version=version, checksum=checksum)
        entry = self._filled(entry, content, True, "")
        return None if entry.damage else entry

    # --- order and size -------------------------------------------------------------

    def ring(self, shard: int) -> list[int] | None:
        """Return the LRU order of a shard.  O(slots).

        Returns:
            The slots, the most recently used first; None if no copy of one moment could
            be made.
        """
        copy, stable = stable_read(
            self.w64,
            self.base(shard),
            lambda: (self.column(shard, L.F_LRU_NEXT), self._late_use(shard)),
        )
        if not stable:
            return None
        links, late = copy
        slots = _walk(links)
        if late in slots:
            slots.remove(late)
            slots.insert(0, late)
        return slots

    def newest(self, shard: int, count: int) -> list[int]:
        """Return the slots of a shard that were used most recently.

        Returns:
            At most ``count`` slots, the most recently used first; none if no copy of
            one moment could be made.
        """
        first = self.record_at(shard, 0) // 4 + L.F_LRU_NEXT

        def walk() -> list[int]:
            late = self._late_use(shard)
            slots = [late] if 0 < late <= self.header.geometry.slots else []
            slot = self.w32[first]
            while 0 < slot <= self.header.geometry.slots and len(slots) < count:
                if slot != late:
                    slots.append(slot)
                slot = self.w32[first + slot * L.RECORD_WORDS]
            return slots

        slots, stable = stable_read(
            self.w64, self.base(shard), walk, attempts=NEWEST_ATTEMPTS
        )
        return slots if stable else []

    def _late_use(self, shard: int) -> int:
        # The entry that was used last, if the ring does not say so yet.
        return self.w64[self.base(shard) + L.S_LATE_USE]

    def largest(self, count: int) -> list[Entry]:
        """Return the ``count`` entries with the most bytes, largest first; O(slots)."""
        sized: list[tuple[int, int, int]] = []
        for shard in self.shards:
            meta = self.column(shard, L.F_META)
            length = self.column(shard, L.F_VALUE_LEN)
            sizes = [
                (key_len_of(meta[slot]) + length[slot], shard, slot)
                for slot in self._slots(shard, 0, None)
            ]
            sized = nlargest(count, [*sized, *sizes])
        found = [self.entry(shard, slot, values=False) for _, shard, slot in sized]
        return [entry for entry in found if entry and not entry.damage]


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
    # Return whether key and value are in the same places.
    return (one.block, one.key_len, one.value_len) == (
        other.block,
        other.key_len,
        other.value_len,
    )


def _walk(links: list[int]) -> list[int]:
    # The walk stops where the ring closes.  With damaged links it stops as well: at a
    # link that is no slot, or after as many steps as there are slots.
    slots: list[int] = []
    slot = links[0]
    while 0 < slot < len(links) and len(slots) < len(links):
        slots.append(slot)
        slot = links[slot]
    return slots
