"""The checker: no finding on a sound segment, and one for every kind of damage.

The segments here are built by hand from the words of ``layout``, so that checker and
engine cannot agree on the same mistake.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import xxhash
from conftest import SHM
from hypothesis import given, settings
from hypothesis import strategies as st

from shmcache._format import check
from shmcache._format import layout as fmt
from shmcache._format.layout import MASK32, NEVER, Kind, Tag

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Clock

    from shmcache import Cache

pytestmark = pytest.mark.once

SEED = 0x0123_4567_89AB_CDEF
GENERATION = 9
TICK = 0o12_34_56_71_23_45_67  # of the wheel: each pair is a digit of it
TOKEN = 5 << 16 | 3  # generation 5 in row 2


@dataclass(frozen=True)
class Entry:
    """What the builder needs to make a live record."""

    key: bytes
    kind: Kind
    value: bytes
    tag: Tag
    expires: int = NEVER
    ttl: int = 0


def key_hash(key: bytes, kind: int) -> int:
    """The 64-bit hash of a key."""
    return xxhash.xxh3_64_intdigest(key, seed=SEED + kind)


def place(due: int) -> int:
    """The number of the wheel list into which an entry due at this tick belongs."""
    due = max(due, TICK)
    level = min(((due ^ TICK) | 1).bit_length() - 1, 6 * fmt.WHEEL_LEVELS - 1) // 6
    return level * fmt.WHEEL_SLOTS + (due >> 6 * level & 63)


@dataclass
class Segment:
    """A segment under construction, and where its words are."""

    shards: int = 2
    max_entries: int = 18
    blocks: int = 40
    block_size: int = 64
    data: bytearray = field(init=False)

    def __post_init__(self) -> None:
        slots = 1 + (-(-self.max_entries // self.shards) or self.blocks)
        self.g = fmt.plan(self.shards, slots, self.blocks, self.block_size)
        self.data = bytearray(self.g.size)
        for word, value in {
            fmt.H_MAGIC: fmt.MAGIC,
            fmt.H_FORMAT: fmt.FORMAT,
            fmt.H_SIZE: self.g.size,
            fmt.H_SEED: SEED,
            fmt.H_CREATED_WALL: 1_700_000_000 * 10**9,
            fmt.H_CREATED_AT: 10**15,
            fmt.H_SHARDS: self.shards,
            fmt.H_SLOTS: slots,
            fmt.H_BLOCKS: self.blocks,
            fmt.H_BLOCK_SIZE: self.block_size,
            fmt.H_STRIDE: self.g.stride,
            fmt.H_ROWS: fmt.ROWS,
            fmt.H_MAX_ENTRIES: self.max_entries,
            fmt.H_MAX_BYTES: self.shards * self.blocks * self.block_size,
            fmt.H_TTL: 60 * 10**9,
            fmt.H_JITTER: 100_000,
            fmt.H_CLEANUP: 15 * 10**9,
            fmt.H_FLAGS: fmt.FLAG_PERSIST | fmt.FLAG_SLIDING,
            fmt.H_GENERATION: GENERATION,
            fmt.H_RETIRED: 1,
            fmt.H_LOCK_INODE: 12_345,
            fmt.H_RECOVERED: self.shards * slots,
            fmt.H_LOST: self.shards * slots,
        }.items():
            self.put64(8 * word, value)
        self.put_text(fmt.CODEC_AT, "msgpack")
        self.put_text(fmt.NAME_AT, "books-1.v2_x")
        retired = fmt.RETIRED_AT + fmt.RETIRED_WORDS
        self.put64(8 * retired, 77)
        self.put64(8 * (retired + fmt.RETIRED_TOKEN), 1 << 16 | 2)
        for row, generation in ((0, 9), (2, 5)):
            at = fmt.ROWS_AT + row * fmt.ROW_SIZE
            self.put64(at, generation << 16 | row + 1)
            self.put64(at + 8 * fmt.R_PID, 4711 + row)
            self.put64(at + 8 * fmt.R_HITS, 10)

    def put64(self, at: int, value: int) -> None:
        """Put a 64-bit word."""
        struct.pack_into("=Q", self.data, at, value)

    def put32(self, at: int, value: int) -> None:
        """Put a 32-bit word."""
        struct.pack_into("=I", self.data, at, value)

    def get64(self, at: int) -> int:
        """The 64-bit word at an offset."""
        return int(struct.unpack_from("=Q", self.data, at)[0])

    def get32(self, at: int) -> int:
        """The 32-bit word at an offset."""
        return int(struct.unpack_from("=I", self.data, at)[0])

    def put_text(self, at: int, text: str) -> None:
        """Put a length byte and UTF-8."""
        raw = text.encode()
        self.data[at : at + 1 + len(raw)] = bytes([len(raw)]) + raw

    def base(self, shard: int) -> int:
        """Where a shard begins."""
        return self.g.shards_at + shard * self.g.stride

    def word(self, number: int, shard: int = 0) -> int:
        """Where one of a shard's words is."""
        return self.base(shard) + 8 * number

    def head(self, number: int, shard: int = 0) -> int:
        """Where the head of a wheel list is."""
        return self.word(fmt.S_WHEEL_HEADS, shard) + 4 * number

    def bucket(self, number: int, shard: int = 0) -> int:
        """Where a bucket is."""
        return self.base(shard) + self.g.buckets_at + 4 * number

    def record(self, slot: int, number: int = 0, shard: int = 0) -> int:
        """Where a field of a record is."""
        return self.base(shard) + self.g.records_at + fmt.RECORD * slot + 4 * number

    def link(self, block: int, shard: int = 0) -> int:
        """Where a block's link is."""
        return self.base(shard) + self.g.links_at + 4 * block

    def arena(self, block: int, shard: int = 0) -> int:
        """Where a block's bytes are."""
        return self.base(shard) + self.g.arena_at + self.g.block_size * block

    def findings(self) -> list[str]:
        """What the checker says."""
        return check.check_segment(self.data)

    def fill(self, shard: int, entries: list[Entry], free: int, used: int) -> None:
        """Make a shard of these entries, with ``free`` slots and ``used`` blocks.

        Slots and blocks are dealt out backwards, so that nothing is in order by
        accident; what is left of the used slots and blocks makes the free lists.
        """
        slots = list(range(1, len(entries) + free + 1))
        blocks = list(range(1, used + 1))
        order: list[int] = []
        lists: dict[int, list[int]] = {}
        buckets: dict[int, list[int]] = {}
        taken = 0
        for sequence, e in enumerate(entries, 1):
            slot = slots.pop()
            order.append(slot)
            content = e.key + e.value
            count = max(1, -(-len(content) // self.block_size))
            chain = [blocks.pop() for _ in range(count)]
            taken += count
            self._chain([*chain, 0], lambda block: self.link(block, shard))
            for n, block in enumerate(chain):
                piece = content[n * self.block_size : (n + 1) * self.block_size]
                at = self.arena(block, shard)
                self.data[at : at + len(piece)] = piece
            low = key_hash(e.key, e.kind) & MASK32
            buckets.setdefault(low * self.g.slots >> 32, []).append(slot)
            if e.expires != NEVER:
                due = e.expires >> fmt.WHEEL_TICK_BITS
                lists.setdefault(place(due), []).append(slot)
            self.put64(self.record(slot, fmt.F_VERSION, shard), sequence << 1 | 1)
            self.put64(self.record(slot, fmt.F_EXPIRES, shard), e.expires)
            for number, value in {
                fmt.F_HASH: low,
                fmt.F_BLOCK: chain[0],
                fmt.F_VALUE_LEN: len(e.value),
                fmt.F_META: len(e.key) | e.kind << 16 | e.tag << 20,
                fmt.F_TTL: e.ttl,
                fmt.F_STAMP: 1000 + sequence,
                fmt.F_CHECKSUM: fmt.checksum(e.value, low, e.tag),
            }.items():
                self.put32(self.record(slot, number, shard), value)

        def next_in_chain(slot: int) -> int:
            return self.record(slot, fmt.F_CHAIN, shard)

        for bucket, members in buckets.items():
            self.put32(self.bucket(bucket, shard), members[0])
            self._chain([*members, 0], next_in_chain)
        self._chain([*slots, 0], next_in_chain)
        self._chain([*blocks, 0], lambda block: self.link(block, shard))
        ring = [0, *order, 0]
        self._chain(ring, lambda slot: self.record(slot, fmt.F_LRU_NEXT, shard))
        self._chain(ring[::-1], lambda slot: self.record(slot, fmt.F_LRU_PREV, shard))
        for number, members in lists.items():
            self._wheel_list(shard, number, members)
        for number, value in {
            fmt.S_SEQ: 34,
            fmt.S_ACQUISITIONS: 40,
            fmt.S_SEQUENCE: len(entries),
            fmt.S_ENTRIES: len(entries),
            fmt.S_BLOCKS_USED: taken,
            fmt.S_FREE_SLOT: (slots or [0])[0],
            fmt.S_FRESH_SLOT: len(entries) + free,
            fmt.S_FREE_BLOCK: (blocks or [0])[0],
            fmt.S_FRESH_BLOCK: used,
            fmt.S_TICK: TICK,
            fmt.S_DUE: min((e.expires for e in entries), default=NEVER),
            fmt.S_SETS: 20,
            fmt.S_GONE + fmt.Cause.CAPACITY: 3,
            fmt.S_UNREAD: 2,
            fmt.S_IN_FLIGHT + 6: 0xFEED_FACE_CAFE_BEEF,
            fmt.S_IN_FLIGHT + 7: TOKEN,
        }.items():
            self.put64(self.word(number, shard), value)

    def _chain(self, members: list[int], at: Callable[[int], int]) -> None:
        for one, following in pairwise(members):
            self.put32(at(one), following)

    def _wheel_list(self, shard: int, number: int, members: list[int]) -> None:
        level, index = divmod(number, fmt.WHEEL_SLOTS)
        bits = self.word(fmt.S_WHEEL_BITS + level, shard)
        self.put64(bits, self.get64(bits) | 1 << index)
        self.put32(self.head(number, shard), members[0])
        self._chain(
            [*members, 0], lambda slot: self.record(slot, fmt.F_WHEEL_NEXT, shard)
        )
        back = fmt.WHEEL_FIRST | number
        for slot in members:
            self.put32(self.record(slot, fmt.F_WHEEL_PREV, shard), back)
            back = slot


def at_tick(tick: int) -> int:
    """A time within a tick of the wheel, ns."""
    return (tick << fmt.WHEEL_TICK_BITS) + 12_345


def entries_of(shard: int, shards: int) -> list[Entry]:
    """Eight entries of a shard: all tags, several kinds, sizes and levels."""

    def key(n: int, kind: Kind, length: int) -> bytes:
        for salt in range(1000):
            made = f"{shard}-{n}-{salt}".encode().ljust(length, b"k")
            if (key_hash(made, kind) >> 32) * shards >> 32 == shard:
                return made
        raise AssertionError

    made: list[tuple[Kind, int, bytes, Tag, int | None]] = [
        (Kind.STR, 10, b"v" * 150, Tag.CODEC, None),
        (Kind.BYTES, 9, b"", Tag.BYTES, None),
        # overdue, and due now: both in the list at the wheel's own place
        (Kind.STR, 11, b"\xc3\xa4" * 40, Tag.STR, -9),
        (Kind.INT, 8, b"\x07" * 8, Tag.INT, 0),
        # two in one list, then one of the next level, and one of the last
        (Kind.TUPLE, 70, b"\x08" * 8, Tag.FLOAT, 5),
        (Kind.STR, 12, b"", Tag.NONE, 5),
        (Kind.STR, 13, b"", Tag.TRUE, 500),
        (Kind.STR, 14, b"", Tag.FALSE, 5 << 36),
    ]
    entries = []
    for n, (kind, length, value, tag, ticks) in enumerate(made):
        entry = Entry(key(n, kind, length), kind, value, tag)
        if ticks is not None:
            ttl = fmt.pack_ttl(10**9)
            entry = replace(entry, expires=at_tick(TICK + ticks), ttl=ttl)
        entries.append(entry)
    return entries


def sound(shards: int = 2) -> Segment:
    """A sound segment in which every structure of the format occurs."""
    segment = Segment(shards=shards, max_entries=9 * shards)
    for shard in range(shards):
        segment.fill(shard, entries_of(shard, shards), free=1, used=20)
    return segment


# In every shard of ``sound()`` the slot of the n-th entry is SLOT - n.
SLOT = 9
FREE_SLOT = 1
OVERDUE, NOW, PAIR, PAIR2, MINUTE, FAR = (SLOT - n for n in range(2, 8))


# --- what is sound --------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_sound(shards: int) -> None:
    """A sound segment has no findings."""
    assert sound(shards).findings() == []


def test_empty() -> None:
    """A header before zero-filled shards is a sound segment."""
    assert Segment().findings() == []


def test_bounded_by_bytes_alone() -> None:
    """Without max_entries a shard may hold an entry in each block."""
    entries = [Entry(str(n).encode(), Kind.STR, b"", Tag.NONE) for n in range(40)]
    segment = Segment(shards=1, max_entries=0)
    segment.fill(0, entries, free=0, used=40)

    assert segment.findings() == []


def test_empty_key_and_value() -> None:
    """An entry without any bytes has one block."""
    segment = Segment(shards=1)
    segment.fill(0, [Entry(b"", Kind.STR, b"", Tag.STR)], free=0, used=1)

    assert segment.findings() == []


def test_extended_by_a_reader() -> None:
    """An entry may expire long after its list is due."""
    segment = sound()
    at = segment.record(PAIR, fmt.F_EXPIRES)
    segment.put64(at, at_tick(TICK + (40 << 30)))

    assert segment.findings() == []


@pytest.mark.parametrize("level", range(fmt.WHEEL_LEVELS))
def test_unfinished_cascade(level: int) -> None:
    """The list at the wheel's own digit of any level may still hold entries."""
    segment = Segment(shards=1)
    soon = Entry(b"key", Kind.STR, b"", Tag.NONE, at_tick(TICK), fmt.pack_ttl(1))
    segment.fill(0, [soon], free=0, used=1)
    number = place(TICK)
    segment.put64(segment.word(fmt.S_WHEEL_BITS), 0)
    segment.put32(segment.head(number), 0)
    segment._wheel_list(0, level * 64 + (TICK >> 6 * level & 63), [1])

    assert segment.findings() == []


def test_beyond_the_wheel() -> None:
    """An entry due more than a round of the wheel later is in its last level."""
    segment = Segment(shards=1)
    due = TICK + (1 << 42) - (3 << 36)
    far = Entry(b"key", Kind.STR, b"", Tag.NONE, at_tick(due), fmt.pack_ttl(1))
    segment.fill(0, [far], free=0, used=1)

    assert place(due) // 64 == fmt.WHEEL_LEVELS - 1
    assert segment.findings() == []


def test_fetched() -> None:
    """An entry may have been read."""
    segment = sound()
    at = segment.record(SLOT, fmt.F_META)
    segment.put32(at, segment.get32(at) | fmt.META_FETCHED)

    assert segment.findings() == []


def test_last_tick() -> None:
    """The wheel may stand at the last tick that a time can be in."""
    segment = Segment()
    segment.put64(segment.word(fmt.S_TICK), NEVER >> fmt.WHEEL_TICK_BITS)

    assert segment.findings() == []


def test_due_not_set() -> None:
    """DUE may not have been set yet."""
    segment = sound()
    segment.put64(segment.word(fmt.S_DUE), 0)

    assert segment.findings() == []


def shard_copy(segment: Segment, shard: int) -> bytes:
    """Return the copy of a shard that ``check_shard`` takes."""
    at = segment.base(shard)
    return bytes(segment.data[at : at + segment.g.stride])


def test_holder_checks_itself() -> None:
    """The holder of a lock may check a shard while it is inside."""
    segment = sound()
    header = check.read_header(segment.data)
    segment.put64(segment.word(fmt.S_SEQ, 1), 35)
    segment.put64(segment.word(fmt.S_HOLDER, 1), (GENERATION + 1) << 16 | 5)
    copy = shard_copy(segment, 1)

    assert check.check_shard(copy, header, 1, quiescent=False) == []
    assert len(check.check_shard(copy, header, 1)) >= 2


def test_parts_and_views() -> None:
    """Header and shards can be checked one by one, in any kind of buffer."""
    segment = sound()
    header = check.read_header(memoryview(segment.data))

    assert check.check_header(bytes(segment.data[: check.HEADER_SIZE])) == []
    for shard in range(2):
        copy = shard_copy(segment, shard)
        assert check.check_shard(copy, header, shard) == []
        assert check.check_shard(memoryview(copy).cast("Q"), header, shard) == []


# --- the bytes of a shard ---------------------------------------------------------


def test_accounting() -> None:
    """Used and free bytes of a sound shard are all its bytes."""
    segment = sound()
    header = check.read_header(segment.data)
    # 10 + 150 bytes, 11 + 80 and 70 + 8 take 3, 2 and 2 blocks, the others 1.
    expected = check.Accounting(capacity=40 * 64, used=12 * 64, free=28 * 64, lost=0)

    assert expected == check.account_shard(shard_copy(segment, 0), header)


def test_lost_blocks() -> None:
    """Blocks that nothing leads to are counted as lost, and are a finding."""
    segment = sound()
    header = check.read_header(segment.data)
    head = segment.get64(segment.word(fmt.S_FREE_BLOCK))
    segment.put32(segment.link(segment.get32(segment.link(head))), 0)
    accounting = check.account_shard(shard_copy(segment, 0), header)
    listed = ", ".join(map(str, (3, 4, 5, 6)))

    assert check.Accounting(40 * 64, 12 * 64, 22 * 64, 6 * 64) == accounting
    assert [
        f"shard 0: blocks {listed} and 2 more: lost, 384 bytes neither used nor free"
    ] == segment.findings()


# --- damage, one by one -----------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A value put into a word of ``sound()``, and what the checker finds then."""

    at: Callable[[Segment], int]
    value: int
    where: str
    says: str
    size: int = 64

    def do(self, segment: Segment) -> None:
        """Put the value."""
        put = segment.put64 if self.size == 64 else segment.put32
        put(self.at(segment), self.value)


def header(word: int, value: int, says: str) -> Damage:
    """Damage to a word of the header."""
    return Damage(lambda _: 8 * word, value, "", says)


def row(number: int, word: int, value: int, says: str) -> Damage:
    """Damage to a word of a worker row."""
    at = fmt.ROWS_AT + number * fmt.ROW_SIZE + 8 * word
    return Damage(lambda _: at, value, "", says)


def shard(word: int, value: int, says: str) -> Damage:
    """Damage to one of the words at the beginning of shard 0."""
    return Damage(lambda s: s.word(word), value, "shard 0: ", says)


def record(slot: int, field: int, value: int, says: str) -> Damage:
    """Damage to a 32-bit field of a record of shard 0."""
    return Damage(lambda s: s.record(slot, field), value, "shard 0: ", says, 32)


def record64(slot: int, field: int, value: int, says: str) -> Damage:
    """Damage to a 64-bit field of a record of shard 0."""
    return Damage(lambda s: s.record(slot, field), value, "shard 0: ", says)


def link(block: int, value: int, says: str) -> Damage:
    """Damage to a block's link in shard 0."""
    return Damage(lambda s: s.link(block), value, "shard 0: ", says, 32)


HUGE = 1 << 63
LAST_ROW = fmt.ROWS - 1

# The blocks of ``sound``: 20, 19, 18 for the first entry, 17 for the second, then
# 16 and 15, 14, 13 and 12, 11, 10, 9; free are 1 to 8.
DAMAGES = [
    # the header
    header(fmt.H_MAGIC, 0, "header: magic is 0x0000000000000000, not 0x"),
    header(fmt.H_FORMAT, 1, "header: format is 1, not 2"),
    header(fmt.H_SIZE, 4096, "header: size is 4096, but planned is"),
    header(fmt.H_SEED, SEED + 1, "slot 9: hash is"),
    header(fmt.H_CREATED_WALL, 0, "header: created_wall is 0"),
    header(fmt.H_CREATED_AT, HUGE, "header: created_at is"),
    header(fmt.H_SHARDS, 0, "header: shards is 0, not from 1 to 256"),
    header(fmt.H_SHARDS, 257, "header: shards is 257, not from 1 to 256"),
    header(fmt.H_SHARDS, 3, "header: size is"),
    header(fmt.H_SLOTS, 1, "header: slots is 1, not from 2 to"),
    header(fmt.H_SLOTS, 1 << 31, "header: slots is 2147483648, not from"),
    header(fmt.H_SLOTS, 11, "header: slots is 11, but max_entries 18 makes it 10"),
    header(fmt.H_BLOCKS, 0, "header: blocks is 0, not from 1 to"),
    header(fmt.H_BLOCKS, 41, "header: blocks is 41, but max_bytes 5120 makes it 40"),
    header(fmt.H_BLOCK_SIZE, 0, "header: block_size is 0, not from 64 to 4096"),
    header(fmt.H_BLOCK_SIZE, 96, "header: block_size is 96, not a power of two"),
    header(fmt.H_STRIDE, 0, "header: stride is 0, but planned is"),
    header(fmt.H_ROWS, 1023, "header: rows is 1023, but planned is 1024"),
    header(fmt.H_MAX_ENTRIES, 4, "8 records are live, over the shard's share of 2"),
    header(fmt.H_MAX_ENTRIES, 0, "header: slots is 10, but max_entries 0 makes it 41"),
    header(fmt.H_MAX_BYTES, 100, "header: blocks is 40, but max_bytes 100 makes it 1"),
    header(fmt.H_TTL, fmt.MAX_TTL_NS + 1, "header: ttl is"),
    header(fmt.H_JITTER, 1_000_001, "header: jitter is 1000001, over 1000000"),
    header(fmt.H_CLEANUP, HUGE, "header: cleanup is"),
    header(fmt.H_FLAGS, 5, "header: flags have unknown bits 0x4"),
    header(fmt.H_GENERATION, 1 << 48, "header: generation is"),
    header(fmt.H_GENERATION, 8, "row 0: token 0x90001 has generation 9"),
    header(fmt.H_RETIRED, 2, "header: retired is 2, over 1"),
    header(fmt.H_LOCK_INODE, 0, "header: lock_inode is 0"),
    header(fmt.H_RECOVERED, 21, "header: recovered is 21, but there are 20 records"),
    header(fmt.H_LOST, 21, "header: lost is 21, but there are 20 records"),
    header(fmt.CODEC_AT // 8, 0, "header: codec has length 0, not from 1 to 63"),
    header(fmt.CODEC_AT // 8, MASK32, "header: codec has length 255"),
    header(fmt.CODEC_AT // 8, 0xFF01, "header: codec is not UTF-8"),
    header(fmt.CODEC_AT // 8, 0x0A01, "header: codec '\\n' has characters"),
    header(fmt.NAME_AT // 8, 0, "header: name has length 0, not from 1 to 191"),
    header(fmt.NAME_AT // 8, 192, "header: name has length 192"),
    header(fmt.NAME_AT // 8, 0x2F01, "header: name '/' has characters"),
    # the retired counters
    header(fmt.RETIRED_AT, HUGE, "retired counters 0: counter 0 is"),
    header(
        fmt.RETIRED_AT + fmt.RETIRED_TOKEN,
        1,
        "retired counters 0: token 0x1 has generation 0",
    ),
    header(
        fmt.RETIRED_AT + fmt.RETIRED_WORDS + fmt.RETIRED_TOKEN,
        0,
        "retired counters 1: count 77 of no worker",
    ),
    # the rows
    row(1, fmt.R_TOKEN, 8 << 16, "row 1: token 0x80000 names row -1 of 1024"),
    row(1, fmt.R_TOKEN, 8 << 16 | 1025, "row 1: token 0x80401 names row 1024 of 1024"),
    row(1, fmt.R_TOKEN, 8 << 16 | 1, "row 1: token 0x80001 names row 0"),
    row(1, fmt.R_TOKEN, 2, "row 1: token 0x2 has generation 0, the newest is 9"),
    row(1, fmt.R_TOKEN, 10 << 16 | 2, "row 1: token 0xa0002 has generation 10"),
    row(1, fmt.R_TOKEN, 9 << 16 | 2, "row 1: generation 9 is also in row 0"),
    row(0, fmt.R_PID, 1 << 23, "row 0: pid is 8388608"),
    row(0, fmt.R_STARTED, HUGE, "row 0: started is"),
    row(LAST_ROW, fmt.R_MISSES, HUGE, "row 1023: misses is"),
    row(LAST_ROW, fmt.ROW_WORDS - 1, HUGE, "row 1023: word 31 is"),
    # the words of a shard
    shard(fmt.S_SEQ, 35, "seq is 35, odd, with no writer inside"),
    shard(fmt.S_HOLDER, TOKEN, "holder is 0x50003, with no writer inside"),
    shard(fmt.S_HOLDER, MASK32, "holder: token 0xffffffff names row 65534 of 1024"),
    shard(fmt.S_ACQUISITIONS, HUGE, "acquisitions is"),
    shard(fmt.S_SEQUENCE, 7, "slot 2: written by write 8, the last was 7"),
    shard(fmt.S_SEQUENCE, HUGE, "sequence is"),
    shard(fmt.S_ENTRIES, 7, "entries is 7, but 8 records are live"),
    shard(fmt.S_BLOCKS_USED, 11, "blocks used is 11, but block runs have 12"),
    shard(fmt.S_FREE_SLOT, 0, "slot 1: neither live nor reached in the free list"),
    shard(fmt.S_FREE_SLOT, 10, "free slots: lead to slot 10, fresh slot is 9"),
    shard(fmt.S_FREE_SLOT, 4, "slot 4: live, and in the list of free slots"),
    shard(fmt.S_FRESH_SLOT, 8, "slot 9: live, but beyond fresh slot 8"),
    shard(fmt.S_FRESH_SLOT, 10, "slot 10: neither live nor reached in the free"),
    shard(fmt.S_FRESH_SLOT, 11, "fresh slot is 11 of 10"),
    shard(fmt.S_FREE_BLOCK, 0, "blocks 1, 2, 3, 4 and 4 more: lost, 512 bytes"),
    shard(fmt.S_FREE_BLOCK, 21, "free blocks: lead to 21, fresh block is 20"),
    shard(fmt.S_FREE_BLOCK, 9, "free blocks: lead to 9, in the block run of slot 2"),
    shard(fmt.S_FRESH_BLOCK, 19, "slot 9: block 1 of the 3 of its run is 20 of 19"),
    shard(fmt.S_FRESH_BLOCK, 21, "block 21: lost, 64 bytes neither used nor free"),
    shard(fmt.S_FRESH_BLOCK, 41, "fresh block is 41 of 40"),
    shard(fmt.S_TICK, TICK + (1 << 36), "due at tick"),
    shard(fmt.S_TICK, TICK + 6, "which the wheel has passed"),
    shard(fmt.S_TICK, 1 << 44, "tick is 17592186044416, later than any time"),
    shard(fmt.S_DUE, at_tick(TICK - 9) + 1, "slot 7: expires before due"),
    shard(fmt.S_DUE, NEVER, "slots 2, 3, 4, 5 and 2 more: expires before due"),
    shard(fmt.S_REDO_SLOT, 3, "a number of slot 3 is being overwritten"),
    shard(fmt.S_LATE_USE, 10, "late use names slot 10, which holds no entry"),
    shard(fmt.S_LATE_USE, HUGE, f"late use names slot {HUGE}, which holds no entry"),
    shard(fmt.S_HITS, HUGE, "hits is"),
    shard(fmt.S_GONE + 7, 1, "word 35 counts 1 entries gone for no known cause"),
    shard(fmt.S_UNREAD, 4, "4 entries evicted unread, of 3 evicted"),
    shard(fmt.S_DROPPED, HUGE, "dropped is"),
    shard(fmt.S_WHEEL_BITS + 3, 2, "wheel list 193: its bit is 1, its head is 0"),
    shard(fmt.S_WHEEL_BITS, 0, "its bit is 0, its head is 7"),
    shard(fmt.S_IN_FLIGHT, 1, "in-flight 0: token 0x0 names row -1 of 1024"),
    shard(fmt.S_IN_FLIGHT + 1, 1, "in-flight 0: token 0x1 has generation 0"),
    shard(
        fmt.S_IN_FLIGHT + 7,
        10 << 16 | 1,
        "in-flight 3: token 0xa0001 has generation 10",
    ),
    # records
    record64(0, fmt.F_VERSION, 3, "slot 0: the sentinel's version is 3, live"),
    record64(SLOT, fmt.F_VERSION, 2, "entries is 8, but 7 records are live"),
    record64(SLOT, fmt.F_VERSION, 1, "slot 9: written by write 0, the last was 8"),
    record64(SLOT, fmt.F_VERSION, 19, "slot 9: written by write 9, the last was 8"),
    record64(SLOT, fmt.F_VERSION, 5, "slot 9: written by write 2, as slot 8 is"),
    record64(FREE_SLOT, fmt.F_VERSION, 3, "entries is 8, but 9 records are live"),
    record64(10, fmt.F_VERSION, 3, "slot 10: live, but beyond fresh slot 9"),
    record64(SLOT, fmt.F_EXPIRES, at_tick(TICK), "slot 9: expires, but is not reached"),
    record64(SLOT, fmt.F_EXPIRES, 0, "slot 9: expires before due"),
    record64(FAR, fmt.F_EXPIRES, NEVER, "slot 2: in wheel list 399, but never expires"),
    record64(FAR, fmt.F_EXPIRES, at_tick(TICK + 1), "slot 2: due at tick"),
    record64(OVERDUE, fmt.F_EXPIRES, 1, "slot 7: expires before due"),
    record(SLOT, fmt.F_HASH, 1, "slot 9: hash is 0x1, but its key's is 0x"),
    record(SLOT, fmt.F_CHAIN, 11, "its hash chain leads to slot 11 of 10"),
    record(SLOT, fmt.F_CHAIN, 10, "its hash chain leads to slot 10, which is not live"),
    record(SLOT, fmt.F_CHAIN, SLOT, "its hash chain leads to slot 9 a second time"),
    record(FREE_SLOT, fmt.F_CHAIN, FREE_SLOT, "free slots: lead to slot 1 a second"),
    record(0, fmt.F_LRU_NEXT, 0, "slots 2, 3, 4, 5 and 4 more: live, but not reached"),
    record(0, fmt.F_LRU_PREV, SLOT, "slot 0: lru_prev is 9, not 2"),
    record(SLOT, fmt.F_LRU_NEXT, 11, "slot 9: lru_next is 11 of 10 slots"),
    record(SLOT, fmt.F_LRU_NEXT, FREE_SLOT, "slot 1: in the LRU ring, but not live"),
    record(5, fmt.F_LRU_NEXT, 7, "slot 5: lru_next is 7, which the ring has passed"),
    record(5, fmt.F_LRU_PREV, 7, "slot 5: lru_prev is 7, not 6"),
    record(SLOT, fmt.F_WHEEL_PREV, 1, "slot 9: never expires, but wheel_prev and"),
    record(SLOT, fmt.F_WHEEL_NEXT, 1, "slot 9: never expires, but wheel_prev and"),
    record(OVERDUE, fmt.F_WHEEL_PREV, 0, "slot 7: wheel_prev is 0x0, not 0x8000"),
    record(OVERDUE, fmt.F_WHEEL_NEXT, 0, "slot 6: expires, but is not reached"),
    record(OVERDUE, fmt.F_WHEEL_NEXT, OVERDUE, "leads to slot 7 a second time"),
    record(NOW, fmt.F_WHEEL_NEXT, 11, "leads to slot 11 of 10"),
    record(NOW, fmt.F_WHEEL_NEXT, FREE_SLOT, "slot 1: in wheel list 55, but not live"),
    record(NOW, fmt.F_WHEEL_NEXT, SLOT, "slot 9: in wheel list 55, but never expires"),
    record(SLOT, fmt.F_BLOCK, 0, "slot 9: block 1 of the 3 of its run is 0 of 20"),
    record(SLOT, fmt.F_BLOCK, 21, "slot 9: block 1 of the 3 of its run is 21 of 20"),
    record(SLOT, fmt.F_BLOCK, 8, "free blocks: lead to 8, in the block run of slot 9"),
    record(SLOT, fmt.F_BLOCK, 17, "leads to 17, in the block run of slot 8"),
    record(SLOT, fmt.F_VALUE_LEN, 149, "slot 9: checksum is"),
    record(SLOT, fmt.F_VALUE_LEN, 40, "slot 9: its run of 1 blocks goes on to 19"),
    record(SLOT, fmt.F_VALUE_LEN, MASK32, "slot 9: block 4 of the 67108865 of its"),
    record(NOW, fmt.F_VALUE_LEN, 7, "slot 6: value_len is 7, but tag 3 has 8"),
    record(PAIR, fmt.F_VALUE_LEN, 9, "slot 5: value_len is 9, but tag 4 has 8"),
    record(FAR, fmt.F_VALUE_LEN, 1, "slot 2: value_len is 1, but tag 7 has 0"),
    record(SLOT, fmt.F_META, 11 | 1 << 16, "slot 9: hash is"),
    record(SLOT, fmt.F_META, 10 | 2 << 16, "slot 9: hash is"),
    record(SLOT, fmt.F_META, 10 | 5 << 16, "slot 9: key kind is 5"),
    record(SLOT, fmt.F_META, 10, "slot 9: key kind is 0"),
    record(SLOT, fmt.F_META, 10 | 1 << 16 | 1 << 20, "slot 9: checksum is"),
    record(SLOT, fmt.F_META, 10 | 1 << 16 | 8 << 20, "slot 9: value tag is 8"),
    record(SLOT, fmt.F_META, 10 | 1 << 16 | 2 << 24, "slot 9: flags are 0x2"),
    record(FAR, fmt.F_TTL, 1 << 30 | 9, "slot 2: ttl 0x40000009 is not in the finest"),
    record(SLOT, fmt.F_CHECKSUM, 0, "slot 9: checksum is 0x0, but its value's is 0x"),
    # links
    link(20, 0, "slot 9: block 2 of the 3 of its run is 0 of 20"),
    link(20, 8, "free blocks: lead to 8, in the block run of slot 9"),
    link(20, 20, "slot 9: its block run leads to 20, in the block run of slot 9"),
    link(18, 1, "slot 9: its run of 3 blocks goes on to 1"),
    link(3, 1, "free blocks: lead to 1, in the free list"),
    link(1, 0, "blocks 2, 3, 4, 5 and 3 more: lost, 448 bytes"),
    link(8, MASK32, "free blocks: lead to 4294967295, fresh block is 20"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=[d.says for d in DAMAGES])
def test_damage(damage: Damage) -> None:
    """The checker says what is wrong with a damaged word."""
    segment = sound()
    damage.do(segment)

    assert [
        line
        for line in segment.findings()
        if line.startswith(damage.where) and damage.says in line
    ]


def test_head() -> None:
    """The checker says where a wheel list begins wrongly."""
    empty, stray, wild = sound(), sound(), sound()
    number = place(TICK + 5)
    empty.put32(empty.head(number), 0)
    stray.put32(stray.head(number), PAIR2)
    wild.put32(wild.head(number), 11)

    assert (
        f"shard 0: wheel list {number}: its bit is 1, its head is 0" in empty.findings()
    )
    assert "shard 0: slot 5: expires, but is not reached" in str(stray.findings())
    assert f"shard 0: wheel list {number}: leads to slot 11 of 10" in wild.findings()


def test_bucket() -> None:
    """The checker says where a bucket's hash chain begins wrongly."""
    segment = sound()
    low = segment.get32(segment.record(SLOT, fmt.F_HASH))
    bucket = low * segment.g.slots >> 32
    segment.put32(segment.bucket(bucket), 0)
    segment.put32(segment.bucket((bucket + 1) % 10), SLOT)
    findings = segment.findings()

    assert (
        f"shard 0: slot 9: in bucket {(bucket + 1) % 10}, but its hash says {bucket}"
        in findings
    )


def test_missing_from_bucket() -> None:
    """The checker names the live records that no bucket leads to."""
    segment = sound()
    for bucket in range(10):
        segment.put32(segment.bucket(bucket), 0)

    assert segment.findings() == [
        "shard 0: slots 2, 3, 4, 5 and 4 more: live, but in no bucket's hash chain"
    ]


@pytest.mark.parametrize("level", range(fmt.WHEEL_LEVELS))
def test_passed_by_the_wheel(level: int) -> None:
    """A list at a place that the wheel has passed would be late: a finding."""
    segment = Segment(shards=1)
    due = TICK - (1 << 6 * level)
    late = Entry(b"key", Kind.STR, b"", Tag.NONE, at_tick(due), fmt.pack_ttl(1))
    segment.fill(0, [late], free=0, used=1)
    segment.put64(segment.word(fmt.S_WHEEL_BITS), 0)
    segment.put32(segment.head(place(TICK)), 0)
    number = level * 64 + (due >> 6 * level & 63)
    segment._wheel_list(0, number, [1])

    where = f"in wheel list {number}, which the wheel has passed"
    assert segment.findings() == [f"shard 0: slot 1: {where} at tick {TICK}"]


def test_same_key_in_flight_twice() -> None:
    """Two workers that compute the value of one key are a finding."""
    segment = sound()
    at = segment.word(fmt.S_IN_FLIGHT + 2)
    segment.put64(at, 0xFEED_FACE_CAFE_BEEF)
    segment.put64(at + 8, TOKEN)

    assert segment.findings() == [
        "shard 0: in-flight 1 and 3: both are for hash 0xfeedfacecafebeef"
    ]


def test_same_key_twice() -> None:
    """Two live records of one key are a finding."""
    segment = Segment(shards=1)
    one = Entry(b"key", Kind.STR, b"1", Tag.BYTES)
    segment.fill(0, [one, replace(one, value=b"2")], free=0, used=2)

    assert segment.findings() == ["shard 0: slots 1 and 2: live with the same key"]


def test_same_bytes_other_kind() -> None:
    """Two keys with the same bytes and different kinds are different keys."""
    segment = Segment(shards=1)
    one = Entry(b"key", Kind.STR, b"1", Tag.BYTES)
    segment.fill(0, [one, replace(one, kind=Kind.BYTES)], free=0, used=2)

    assert segment.findings() == []


def test_foreign_shard() -> None:
    """An entry in another shard than that of its key is a finding."""
    segment = Segment()
    entries = [replace(e, expires=NEVER, ttl=0) for e in entries_of(1, 2)]
    segment.fill(0, entries, free=0, used=20)

    assert [
        f"shard 0: slot {slot}: its key belongs to shard 1" for slot in range(1, 9)
    ] == segment.findings()


def test_not_utf8() -> None:
    """A str that is not UTF-8 is a finding, although its checksum is right."""
    segment = Segment(shards=1)
    segment.fill(0, [Entry(b"k", Kind.STR, b"\xff", Tag.STR)], free=0, used=1)

    assert segment.findings() == ["shard 0: slot 1: value is a str, but not UTF-8"]


def test_over_capacity() -> None:
    """One entry more than the shard's share is a finding, although a slot is there."""
    segment = Segment(shards=1, max_entries=3)
    entries = [Entry(bytes([n]), Kind.STR, b"", Tag.NONE) for n in range(4)]
    segment.fill(0, entries, free=0, used=4)

    assert segment.findings() == [
        "shard 0: 4 records are live, over the shard's share of 3"
    ]


def test_wrong_shard_and_size() -> None:
    """A shard that does not exist, or is incomplete, is a finding."""
    segment = sound()
    header = check.read_header(segment.data)
    copy = shard_copy(segment, 0)
    short = f"shard 1: {len(copy) - 1} bytes, but the stride is {len(copy)}"
    nowhere = "shard 2: there is no such shard in the header's geometry"

    assert [short] == check.check_shard(copy[1:], header, 1)
    assert [nowhere] == check.check_shard(copy, header, 2)


@pytest.mark.parametrize("size", [0, 1, 7, 4096, check.HEADER_SIZE - 1])
def test_truncated_header(size: int) -> None:
    """A segment that ends within its header is a finding of every function."""
    data = bytes(sound().data[:size])
    finding = f"header: {size} bytes, fewer than the {check.HEADER_SIZE} of it"

    assert [finding] == check.check_header(data) == check.check_segment(data)
    assert check.read_header(data).usable == (size >= 4096)


def test_truncated_shards() -> None:
    """If a segment is too short, the shards that it has are checked."""
    segment = sound()
    size = segment.base(1) + 5
    segment.put64(segment.word(fmt.S_ENTRIES), 7)

    assert [
        f"segment: {size} bytes, but its plan has {segment.g.size}",
        "shard 0: entries is 7, but 8 records are live",
    ] == check.check_segment(segment.data[:size])


def test_unusable_geometry() -> None:
    """If the geometry makes no sense, no shard is checked."""
    segment = sound()
    segment.put64(8 * fmt.H_BLOCK_SIZE, 0)
    header = check.read_header(segment.data)
    copy = shard_copy(segment, 0)

    assert check.Accounting(0, 0, 0, 0) == check.account_shard(copy, header)
    assert len(check.check_shard(copy, header, 0)) == 1


# --- damage to every bit ----------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A place in a segment, and what stands there."""

    name: str
    at: int
    size: int  # bytes


def unnoticed(
    data: bytearray, words: list[Word], findings: Callable[[], list[str]]
) -> set[str]:
    """Return the names of the words in which some bit can flip without a finding."""
    names = set()
    for word in words:
        for bit in range(8 * word.size):
            at, mask = word.at + bit // 8, 1 << bit % 8
            data[at] ^= mask
            if not findings():
                names.add(word.name)
            data[at] ^= mask
    return names


def named(prefix: str, before: int) -> dict[int, str]:
    """Return the words of ``layout`` below ``before`` whose names begin so."""
    names: dict[int, str] = {}
    for name, number in vars(fmt).items():
        if name.startswith(prefix) and number < before:
            names.setdefault(number, name)
    return names


@pytest.mark.slow
def test_every_bit_of_the_header() -> None:
    """Every flipped bit of the header is noticed, unless all values are possible."""
    data = sound().data
    names = named("H_", fmt.RETIRED_AT)
    words = [Word(name, 8 * number, 8) for number, name in names.items()]
    words += [Word("length", at, 1) for at in (fmt.CODEC_AT, fmt.NAME_AT)]
    words += [Word("text", at + 1, 7) for at in (fmt.CODEC_AT, fmt.NAME_AT)]
    for copy in range(2):
        at = 8 * (fmt.RETIRED_AT + copy * fmt.RETIRED_WORDS)
        words += [Word("retired counter", at + 8 * n, 8) for n in range(13)]
        words.append(Word(f"retired token {copy}", at + 8 * fmt.RETIRED_TOKEN, 8))
    for number in (0, 1, 2, LAST_ROW):
        at = fmt.ROWS_AT + number * fmt.ROW_SIZE
        words.append(Word(f"token of row {number}", at, 8))
    small = data[: check.HEADER_SIZE]

    assert unnoticed(small, words, lambda: check.check_header(small)) == {
        "H_SEED",  # seen in the shards
        *("H_CREATED_WALL", "H_CREATED_AT", "H_LOCK_INODE", "H_GENERATION"),
        *("H_MAX_BYTES", "H_TTL", "H_JITTER", "H_CLEANUP", "H_FLAGS", "H_RETIRED"),
        *("H_RECOVERED", "H_LOST", "H_FREED"),
        *("length", "text", "retired counter"),
        # An older worker's token, or another row's, may have been there.
        *("retired token 1", "token of row 0", "token of row 2"),
    }


def shard_findings(
    segment: Segment, number: int
) -> tuple[bytearray, Callable[[], list[str]]]:
    """Return a copy of a shard, to be damaged, and a function that checks it."""
    copy = bytearray(shard_copy(segment, number))
    known = check.read_header(segment.data)
    return copy, lambda: check.check_shard(copy, known, number)


def test_every_bit_of_the_shard_words() -> None:
    """Every flipped bit is noticed, except in counters and mere limits."""
    copy, findings = shard_findings(sound(), 1)
    names = named("S_", fmt.S_WHEEL_BITS)
    words = [Word(name, 8 * number, 8) for number, name in names.items()]
    gone = range(fmt.S_GONE, fmt.S_UNREAD)
    words += [Word("S_GONE", 8 * n, 8) for n in gone[1 : len(fmt.Cause)]]
    words += [Word("no cause", 8 * n, 8) for n in gone[len(fmt.Cause) :]]
    words += [Word("bits", 8 * (fmt.S_WHEEL_BITS + n), 8) for n in range(7)]
    words += [Word("free in-flight", 8 * fmt.S_IN_FLIGHT, 16)]
    words += [Word("in-flight hash", 8 * (fmt.S_IN_FLIGHT + 6), 8)]
    words += [Word("in-flight token", 8 * (fmt.S_IN_FLIGHT + 7), 8)]
    counters = {name for n, name in names.items() if n >= fmt.S_COUNTERS}

    assert unnoticed(copy, words, findings) == {
        *counters,
        *("S_SEQ", "S_ACQUISITIONS", "S_SEQUENCE", "S_TICK", "S_DUE"),
        *("S_REDO_VERSION", "S_REDO_VALUE", "S_REDO_CHECKSUM"),
        *("S_LATE_USE", "in-flight hash", "in-flight token"),
    }


def test_every_bit_of_the_heads() -> None:
    """Every flipped bit of a wheel's heads is noticed."""
    copy, findings = shard_findings(sound(), 1)
    lists = {place(TICK + n) for n in (0, 5, 500, 5 << 36)}
    heads = [*lists, *range(0, fmt.WHEEL_LEVELS * fmt.WHEEL_SLOTS, 29), 447]
    words = [Word("head", 8 * fmt.S_WHEEL_HEADS + 4 * n, 4) for n in heads]

    assert unnoticed(copy, words, findings) == set()


def test_every_bit_of_buckets_and_links() -> None:
    """Every flipped bit of a bucket, or of the link of a used block, is noticed."""
    segment = sound()
    copy, findings = shard_findings(segment, 1)
    words = [Word("bucket", segment.g.buckets_at + 4 * n, 4) for n in range(10)]
    for block in range(41):
        name = "link" if 1 <= block <= 20 else "link of no used block"
        words.append(Word(name, segment.g.links_at + 4 * block, 4))

    assert unnoticed(copy, words, findings) == {"link of no used block"}


@pytest.mark.slow
def test_every_bit_of_the_records() -> None:
    """Every flipped bit of a live record is noticed, except where it may change."""
    segment = sound()
    copy, findings = shard_findings(segment, 1)
    fields = {**named("F_", fmt.RECORD_WORDS), 1: "F_VERSION", 3: "F_EXPIRES"}

    def words(kind: str, slots: list[int]) -> list[Word]:
        at = segment.g.records_at
        return [
            Word(f"{kind} {fields[n]}", at + fmt.RECORD * slot + 4 * n, 4)
            for slot in slots
            for n in range(fmt.RECORD_WORDS)
        ]

    chosen = words("never", [9, 8]) + words("expires", [7, 6, 5, 4, 3, 2])
    assert unnoticed(copy, chosen, findings) == {
        # It may have been read, written at another time, or with another TTL.
        *("never F_META", "never F_STAMP", "never F_TTL"),
        *("expires F_META", "expires F_STAMP", "expires F_TTL"),
        "expires F_EXPIRES",  # extended by a reader
    }
    chosen = words("sentinel", [0]) + words("free", [1]) + words("unused", [10])
    assert {word.name for word in chosen} - unnoticed(copy, chosen, findings) == {
        *("sentinel F_LRU_NEXT", "sentinel F_LRU_PREV"),
        "free F_CHAIN",
    }


def test_every_byte_of_the_arena() -> None:
    """Every damaged byte of a key or a value is noticed."""
    segment = sound()
    copy, findings = shard_findings(segment, 1)
    sizes = [len(e.key) + len(e.value) for e in entries_of(1, 2)]
    blocks = iter(range(20, 0, -1))
    noticed = {}
    for size in sizes:
        for start in range(0, size, 64):
            at = segment.g.arena_at + 64 * next(blocks)
            for n in range(64):
                copy[at + n] ^= 1 << n % 8
                noticed[at + n] = start + n < size, bool(findings())
                copy[at + n] ^= 1 << n % 8

    assert {(True, True), (False, False)} == set(noticed.values())
    assert len(noticed) == 12 * 64


# --- any bytes whatever -----------------------------------------------------------


def check_everything(data: bytearray, segment: Segment) -> list[str]:
    """Return the findings of all functions about a segment with a sound magic word."""
    header = check.read_header(segment.data)
    findings = check.check_header(data)
    for number in range(segment.shards):
        at = segment.base(number)
        copy = data[at : at + segment.g.stride]
        a = check.account_shard(copy, header)
        assert a.capacity == a.used + a.free + a.lost
        assert min(a.used, a.free, a.lost) >= 0
        for quiescent in (True, False):
            found = check.check_shard(copy, header, number, quiescent=quiescent)
            assert len(found) <= 101
            findings += found
    return findings + check.check_segment(data)


OVERWRITTEN = st.tuples(
    st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(OVERWRITTEN, min_size=1, max_size=8))
def test_overwritten(ranges: list[tuple[float, bytes]]) -> None:
    """The checker never fails, whatever overwrites a part of the segment."""
    segment = sound()
    data = bytearray(segment.data)
    meaningful = interesting(segment)
    for where, damage in ranges:
        at = meaningful[int(where * len(meaningful))]
        data[at : at + len(damage)] = damage
    del data[segment.g.size :]
    findings = check_everything(data, segment)

    assert all(isinstance(finding, str) for finding in findings)


def interesting(segment: Segment) -> list[int]:
    """Return the places where damage has an effect: not in the free rows."""
    ranges = [range(0, fmt.ROWS_AT + 4 * fmt.ROW_SIZE, 4)]
    for number in range(segment.shards):
        at = segment.base(number)
        ranges.append(range(at, at + segment.g.stride, 4))
    return [at for places in ranges for at in places]


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes(seed: int) -> None:
    """The checker survives random bytes in any part and mostly finds them."""
    rng = random.Random(seed)
    segment = sound()
    silent = 0
    for _ in range(50):
        data = bytearray(segment.data)
        for _ in range(rng.randint(1, 3)):
            first = rng.choice((8 * fmt.H_SIZE, segment.base(0), segment.base(1)))
            at = rng.randrange(first, segment.g.size)
            size = min(1 << rng.randrange(16), segment.g.size - at)
            data[at : at + size] = rng.randbytes(size)
        silent += not check_everything(data, segment)

    assert silent < 40


@pytest.mark.parametrize("values", ["any", "small", "live"])
def test_all_random(values: str) -> None:
    """The checker survives a shard of garbage, also of plausible garbage."""
    rng = random.Random(values)
    segment = Segment(shards=1, max_entries=300, blocks=600)
    start = segment.base(0)
    end = start + segment.g.stride
    for _ in range(20):
        if values == "any":
            segment.data[start:end] = rng.randbytes(segment.g.stride)
        else:
            for at in range(start, end, 4):
                segment.put32(at, rng.randrange(310))
        if values == "live":
            for slot in range(1, 301):
                segment.put64(segment.record(slot), rng.randrange(300) << 1 | 1)
        findings = check_everything(segment.data, segment)

        assert len(findings) > 100


def test_everything_leads_in_circles() -> None:
    """The checker ends soon on a shard in which every walk would be endless."""
    slots = 20_000
    segment = Segment(shards=1, max_entries=slots - 1, blocks=slots)
    for slot in range(1, slots + 1):
        segment.put64(segment.record(slot), slot << 1 | 1)
        segment.put32(segment.bucket(slot - 1), 1)
        for number in range(fmt.F_CHAIN, fmt.RECORD_WORDS):
            segment.put32(segment.record(slot, number), slot % 7 + 1)
        segment.put32(segment.record(slot, fmt.F_VALUE_LEN), MASK32)
        segment.put32(segment.link(slot), slot % 7 + 1)
    for head in range(fmt.WHEEL_LEVELS * fmt.WHEEL_SLOTS):
        segment.put32(segment.head(head), head % 7 + 1)
    for number in (fmt.S_FREE_SLOT, fmt.S_FREE_BLOCK, fmt.S_WHEEL_BITS):
        segment.put64(segment.word(number), 1)
    for number in (fmt.S_FRESH_SLOT, fmt.S_FRESH_BLOCK):
        segment.put64(segment.word(number), slots)
    findings = segment.findings()

    assert len(findings) == 101


def test_too_many_findings() -> None:
    """Findings after the hundredth are counted, not listed."""
    segment = sound()
    for number in range(fmt.ROWS):
        segment.put64(fmt.ROWS_AT + number * fmt.ROW_SIZE, 0xFFFF)
    findings = segment.findings()

    assert len(findings) == 101
    assert f"and {fmt.ROWS - 100} more findings" == findings[-1]


# --- a cache of the engine's ------------------------------------------------------


def read_shm(cache: Cache) -> bytes:
    """The bytes of a cache's segment."""
    return (SHM / f"shmcache-{os.getuid()}-{cache.name}").read_bytes()


def test_used_cache(make_cache: Callable[..., Cache], clock: Clock) -> None:
    """A cache in which all operations were used is a sound segment."""
    cache = make_cache(max_entries=60, shards=2, sliding=True, clock=clock)
    rng = random.Random(1)
    for n in range(2000):
        key = rng.choice((str, int, lambda n: (n, "t")))(rng.randrange(90))
        match rng.randrange(6):
            case 0:
                cache.delete(key)
            case 1:
                cache.get(key)
            case 2:
                cache.touch(key, rng.choice((None, 5)))
            case _:
                value = rng.choice((None, True, n, 0.5, "\xe4" * n, b"b" * n))
                cache.set(key, value, rng.choice((None, 0.001, 1, 1e4, 1e7)))
        clock.advance(10 ** rng.uniform(-6, rng.choice((0, 1, 4))))
        if n % 50 == 0:
            assert cache.check() == []
    data = read_shm(cache)
    header = check.read_header(data)
    g = header.geometry
    used = 0
    for number in range(2):
        at = g.shards_at + number * g.stride
        accounting = check.account_shard(data[at : at + g.stride], header)
        used += accounting.used
        assert accounting.lost == 0
        assert accounting.used + accounting.free == accounting.capacity

    assert check.check_segment(data) == []
    assert cache.stats().bytes_used == used > 0


def test_check_sees_the_segment(make_cache: Callable[..., Cache]) -> None:
    """``Cache.check()`` finds what is wrong in the header and in every shard."""
    cache = make_cache(max_entries=60, shards=2)
    g = check.read_header(read_shm(cache)).geometry
    path = SHM / f"shmcache-{os.getuid()}-{cache.name}"
    places = {
        8 * fmt.H_FLAGS: "header: flags",
        fmt.ROWS_AT + LAST_ROW * fmt.ROW_SIZE: "row 1023: ",
        g.shards_at + 8 * fmt.S_ENTRIES: "shard 0: entries",
        g.shards_at + g.stride + 8 * fmt.S_ENTRIES: "shard 1: entries",
    }
    with path.open("r+b") as file, mmap.mmap(file.fileno(), g.size) as data:
        for at, beginning in places.items():
            before = data[at : at + 8]
            data[at : at + 8] = b"\x10" + 7 * b"\0"
            findings = cache.check()
            data[at : at + 8] = before

            assert [line.startswith(beginning) for line in findings] == [True]
    assert cache.check() == []
