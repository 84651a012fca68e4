"""What must add up in a segment, counted in copies by a reader of its own.

Problem: a lost block, slot or handle does not show in any answer of the cache.

Mechanism: three balances.

- Blocks and slots: each one is used, free, or was never used; none may be lost.
- Entries: each entry that was stored is there, or was removed for a cause.  If a
  process dies while it stores or removes an entry, the entry and its count may differ
  by one.  So a difference of one is allowed for each takeover of a dead holder's lock.
- Handles: for each worker, opened - closed is the number of handles that it has open.
  They are in the map, or have been removed and wait for their callback.  A worker that
  ends in good order leaves none.  The handles of a killed worker are closed by nobody.
  So at the end, over all workers that ever ran, opened = closed + died, exactly.

Here "died" is the sum of what each killed worker had open at the instant of its death.
To know it, the soak stops a worker (SIGSTOP), reads its row, and then kills it.  It
would be too late to count the entries after the death: those evicted in the meantime
are removed for CAPACITY, not for OWNER_DIED.

Death in the middle: all that is read here are copies made under a shard's lock, or a
row of a worker that stands still.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._format.fields import is_live
from shmcache._observe.snapshot import owner_of

if TYPE_CHECKING:
    from shmcache import Cache, Stats


@dataclass(frozen=True)
class Account:
    """How many of one thing are used, free and lost; together they are the capacity."""

    capacity: int
    used: int
    free: int

    @property
    def lost(self) -> int:
        """How many are neither used nor free."""
        return self.capacity - self.used - self.free

    def __add__(self, other: Account) -> Account:
        """The account of two shards together."""
        return Account(
            self.capacity + other.capacity,
            self.used + other.used,
            self.free + other.free,
        )


@dataclass(frozen=True)
class Books:
    """The accounts of a segment; each shard was read at one moment, under its lock."""

    bytes: Account  # in whole blocks
    slots: Account
    sets: int
    entries: int
    gone: int
    dropped: int
    recoveries: int

    def findings(self, name: str) -> list[str]:
        """What does not add up, a sentence each; ``name`` is that of the cache."""
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
    """Copy each shard under its lock, and count what is in the copies.  O(size)."""
    internals = cache.internals
    attachment = internals.attachment
    geometry = attachment.header.geometry
    head = bytes(attachment.block.view[: geometry.shards_at])
    header = _check.read_header(head)
    space, slots = Account(0, 0, 0), Account(0, 0, 0)
    sums = [0] * L.S_COUNTERS_END
    for shard in range(geometry.shards):
        data = internals.snapshot(shard, 0, geometry.stride)
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
    """The account of the slots in a copy of a shard.

    A slot is used if its record is live; it is free if it is on the free list, or was
    never used.
    """
    view = memoryview(data)
    words = view[: L.SHARD_HEADER].cast("Q")
    end = geometry.records_at + L.RECORD * (geometry.slots + 1)
    records = view[geometry.records_at : end].cast("I")
    # The lower half of a version tells whether the record is live.
    versions = records[L.F_VERSION :: L.RECORD_WORDS]
    chains = records[L.F_CHAIN :: L.RECORD_WORDS]
    live = sum(bool(is_live(versions[slot])) for slot in range(1, geometry.slots + 1))
    fresh = words[L.S_FRESH_SLOT]
    free, slot = geometry.slots - fresh, words[L.S_FREE_SLOT]
    passed: set[int] = set()
    while (
        0 < slot <= geometry.slots
        and slot not in passed
        and not is_live(versions[slot])
    ):
        passed.add(slot)
        free += 1
        slot = chains[slot]
    return Account(geometry.slots, live, free)


@dataclass(frozen=True)
class Row:
    """What a worker's row says about its handles."""

    pid: int
    token: int
    opened: int
    closed: int

    @property
    def open(self) -> int:
        """How many handles the worker has not closed yet."""
        return self.opened - self.closed


def read_rows(cache: Cache) -> dict[int, Row]:
    """The rows of all workers, with or without handles, by PID."""
    words = cache.internals.attachment.words
    rows = {}
    for row in range(L.ROWS):
        at = L.row_at(row)
        if token := words[at + L.R_TOKEN]:
            # ``closed`` is read first: a handle is opened before it is closed, so the
            # difference cannot be negative.
            closed, opened = words[at + L.R_CLOSED], words[at + L.R_OPENED]
            if words[at + L.R_TOKEN] == token:
                found = Row(words[at + L.R_PID], token, opened, closed)
                rows[found.pid] = found
    return rows


def owners(cache: Cache) -> Counter[int]:
    """How many entries of a map each owner has, by token.  O(entries)."""
    return Counter(
        owner_of(key)
        for kind, key, *_ in cache.internals.entries(values=False)
        if kind == L.Kind.BYTES
    )


def final_findings(stats: Stats, died: int, uncertain: int) -> list[str]:
    """What does not add up of the handles after the last worker has ended.

    Args:
        stats: The statistics of the map.
        died: How many handles the killed workers had open.
        uncertain: How many workers died without having been killed by the soak, so that
            nobody knows how many handles they had open.
    """
    opened, closed = stats.handles_opened, stats.handles_closed
    account = f"{opened} handles were opened, {closed} closed, {died} died"
    left = opened - closed - died
    if left < 0 or (left and not uncertain):
        return [f"{stats.name}: {account} with killed workers: {left} are missing"]
    if stats.callback_failures:
        return [f"{stats.name}: {stats.callback_failures} callbacks failed"]
    return []
