"""What must add up in a segment, counted from copies by a reader of its own.

Blocks and slots: each is used, free or was never used; none is lost.

Entries: what was stored is there or has gone for a cause.  An entry that a process
dies over may be there without having been counted, or the other way round: one for
each takeover from a dead holder.

Handles, worker by worker: opened - closed is how many it has open, in the map, or gone
from it and waiting for their callback.  A worker that ends in good order leaves none; a
killed one takes those with it, and nobody closes them.  So at the end, over all workers
that ever were, opened = closed + died, exactly, where "died" is the sum of what each
killed worker had open at the instant of its death.  To know that, the soak stops a
worker (SIGSTOP), reads its row, and then kills it: a reader of its entries after its
death would miss what was evicted meanwhile, which is removed for CAPACITY, not for
OWNER_DIED.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcache._format import check as _check
from shmcache._format import layout as L

if TYPE_CHECKING:
    from shmcache import Cache, Stats


@dataclass(frozen=True)
class Account:
    """Used, free and lost of one thing; in sum the capacity."""

    capacity: int
    used: int
    free: int

    @property
    def lost(self) -> int:
        """What is in no place where it should be."""
        return self.capacity - self.used - self.free

    def __add__(self, other: Account) -> Account:
        """Of two shards together."""
        return Account(
            self.capacity + other.capacity,
            self.used + other.used,
            self.free + other.free,
        )


@dataclass(frozen=True)
class Books:
    """A segment's accounts; each shard's were read at one moment, under its lock."""

    bytes: Account  # in blocks
    slots: Account
    sets: int
    entries: int
    gone: int
    dropped: int
    recoveries: int

    def findings(self, name: str) -> list[str]:
        """What does not add up."""
        found = []
        for what, account in (("bytes", self.bytes), ("slots", self.slots)):
            if account.lost:
                found.append(f"{name}: {account.lost} {what} are lost: {account}")
        excess = self.entries + self.gone + self.dropped - self.sets
        if abs(excess) > self.recoveries:
            found.append(
                f"{name}: {self.sets} entries were stored, but {self.entries} are"
                f" there, {self.gone} have gone and {self.dropped} were dropped in"
                f" {self.recoveries} recoveries"
            )
        return found


def read_books(cache: Cache) -> Books:
    """Take a copy of each shard under its lock, and count.  O(size)."""
    geometry = cache._attachment.header.geometry
    head = bytes(cache._attachment.block.view[: geometry.shards_at])
    header = _check.read_header(head)
    space, slots = Account(0, 0, 0), Account(0, 0, 0)
    sums = [0] * L.S_COUNTERS_END
    for shard in range(geometry.shards):
        data = cache._copy_shard(shard, 0, geometry.stride)
        blocks = _check.account_shard(data, header)
        space += Account(blocks.capacity, blocks.used, blocks.free)
        slots += count_slots(data, geometry)
        words = memoryview(data)[: 8 * L.S_COUNTERS_END].cast("Q")
        sums = [a + b for a, b in zip(sums, words, strict=True)]
    return Books(
        bytes=space,
        slots=slots,
        sets=sums[L.S_SETS],
        entries=sums[L.S_ENTRIES],
        gone=sum(sums[L.S_GONE + cause] for cause in L.Cause),
        dropped=sums[L.S_DROPPED],
        recoveries=sums[L.S_RECOVERIES],
    )


def count_slots(data: bytes, geometry: L.Geometry) -> Account:
    """The slots of a shard's copy: live, on the free list, or never used."""
    view = memoryview(data)
    words = view[: L.SHARD_HEADER].cast("Q")
    end = geometry.records_at + L.RECORD * (geometry.slots + 1)
    records = view[geometry.records_at : end].cast("I")
    versions = records[L.F_VERSION :: L.RECORD_WORDS]  # the low half tells
    chains = records[L.F_CHAIN :: L.RECORD_WORDS]
    live = sum(versions[slot] & 1 for slot in range(1, geometry.slots + 1))
    fresh = words[L.S_FRESH_SLOT]
    free, slot = geometry.slots - fresh, words[L.S_FREE_SLOT]
    passed: set[int] = set()
    while 0 < slot <= geometry.slots and slot not in passed and not versions[slot] & 1:
        passed.add(slot)
        free += 1
        slot = chains[slot]
    return Account(geometry.slots, live, free)


@dataclass(frozen=True)
class Row:
    """What a worker's row says of its handles."""

    pid: int
    token: int
    opened: int
    closed: int

    @property
    def open(self) -> int:
        """Handles that it has not closed yet."""
        return self.opened - self.closed


def read_rows(cache: Cache) -> dict[int, Row]:
    """The rows of the workers by PID; those without handles included."""
    words = cache._attachment.words
    rows = {}
    for row in range(L.ROWS):
        at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
        if token := words[at + L.R_TOKEN]:
            # In this order, as a handle is opened before it is closed.
            closed, opened = words[at + L.R_CLOSED], words[at + L.R_OPENED]
            if words[at + L.R_TOKEN] == token:
                found = Row(words[at + L.R_PID], token, opened, closed)
                rows[found.pid] = found
    return rows


def owners(cache: Cache) -> Counter[int]:
    """How many entries of a map each owner has, by token.  O(entries)."""
    return Counter(
        int.from_bytes(key[:8], "big")
        for kind, key, *_ in cache._entries(values=False)
        if kind == L.Kind.BYTES
    )


def final_findings(stats: Stats, died: int, uncertain: int) -> list[str]:
    """What does not add up of the handles after the last worker has gone.

    ``died``: open handles of killed workers; ``uncertain``: workers that died without
    our doing, so that nobody knows what they had open.
    """
    opened, closed = stats.handles_opened, stats.handles_closed
    account = f"{opened} handles were opened, {closed} closed, {died} died"
    left = opened - closed - died
    if left < 0 or (left and not uncertain):
        return [f"{stats.name}: {account} with killed workers: {left} are missing"]
    if stats.callback_failures:
        return [f"{stats.name}: {stats.callback_failures} callbacks failed"]
    return []
