"""The independent reader of the format: what a sound segment is, as findings.

The checker shares only the layout and its packed fields with the engine, and is never
compiled, so neither can hide the other's mistakes.  It reads copies and trusts no byte
of them.  Whatever the bytes are, it ends soon and raises nothing: it compares an index
before it uses it, and a walk marks what it passes and stops at a mark.  So all walks
together visit a slot or a block a few times at most.

The caller takes the copies: the header's under the admin lock, a shard's under the
shard's lock.  A finding is one sentence with the place and the values in it; no
findings mean a sound segment.

The comments, from top to bottom in the order of the drawing in ``layout``, say what a
sound segment is.  To be read as a whole it is one file, although a long one.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import xxhash

from shmcache._format import fields
from shmcache._format import layout as fmt
from shmcache._format.layout import MASK32, MASK64, NEVER, Geometry, Kind, Tag

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Data = bytes | bytearray | memoryview

MAX_FINDINGS = 100  # more do not help to understand what happened
HEADER_SIZE = fmt.ROWS_AT + fmt.ROWS * fmt.ROW_SIZE

_COUNTER_END = 1 << 63  # a counter that starts at zero never gets there
_PID_MAX = 1 << 22  # the limit of Linux
_NAME_CHARACTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
)
_KINDS = frozenset(Kind)
_TAGS = frozenset(Tag)
_VALUE_LENGTHS = {Tag.INT: 8, Tag.FLOAT: 8, Tag.NONE: 0, Tag.TRUE: 0, Tag.FALSE: 0}
_FREE = MASK32  # as the owner of a block: the free list; no slot has this number


def _names(prefix: str) -> dict[int, str]:
    """Return names by word number, for findings; the first name of a word counts."""
    found: dict[int, str] = {}
    for name, number in vars(fmt).items():
        if name.startswith(prefix):
            found.setdefault(number, name.removeprefix(prefix).lower())
    return found


_ROW_WORDS = _names("R_")
_SHARD_WORDS = _names("S_")


@dataclass(frozen=True)
class Header:
    """The numbers of the header that are needed to read a shard."""

    geometry: Geometry
    seed: int
    max_entries: int
    generation: int  # of the newest worker

    @property
    def usable(self) -> bool:
        """True if the geometry makes sense, so that shards can be read by it."""
        return not _geometry_faults(self.geometry)


@dataclass(frozen=True)
class Accounting:
    """Where the bytes of a shard's arena are: used + free + lost == capacity."""

    capacity: int
    used: int  # in block runs of live records, rounded up to blocks
    free: int  # in the free list, or never used
    lost: int  # in neither; 0 in a sound shard


def read_header(data: Data) -> Header:
    """Read the header's numbers.

    Args:
        data: The first bytes of a segment; bytes that are missing read as 0.

    Returns:
        The numbers, whether they are sound or not.
    """
    words = _header_words(_bytes_view(data))
    return Header(
        geometry=_geometry(words),
        seed=words[fmt.H_SEED],
        max_entries=words[fmt.H_MAX_ENTRIES],
        generation=words[fmt.H_GENERATION],
    )


def check_header(data: Data) -> list[str]:
    """Check the header, the retired counters and the worker rows.

    Args:
        data: A copy of at least the first HEADER_SIZE bytes of a segment, taken under
            the admin lock: otherwise a row may be newer than the header's generation.

    Returns:
        The findings.
    """
    found = _Findings()
    _check_header(_bytes_view(data), found)
    return found.report()


def check_shard(
    data: Data, header: Header, shard: int, *, quiescent: bool = True
) -> list[str]:
    """Check one shard.

    Args:
        data: A copy of its ``stride`` bytes.
        header: What ``read_header`` returned.
        shard: The number of the shard.
        quiescent: True if no process was inside.  Otherwise the holder of the lock
            itself took the copy, between two operations, and workers that are newer
            than ``header`` may have left their tokens.  Everything else must hold in
            both cases.

    Returns:
        The findings.
    """
    found = _Findings()
    _check_shard(_bytes_view(data), header, shard, found, quiescent=quiescent)
    return found.report()


def check_segment(data: Data) -> list[str]:
    """Check a whole segment.

    Args:
        data: A copy of it, taken when no process wrote to it.

    Returns:
        The findings.
    """
    found = _Findings()
    view = _bytes_view(data)
    if _check_header(view, found):
        header = read_header(view)
        g = header.geometry
        if len(view) != g.size:
            found.add(f"segment: {len(view)} bytes, but its plan has {g.size}")
        for shard in range(g.shards):
            at = g.shards_at + shard * g.stride
            if at + g.stride <= len(view):
                _check_shard(view[at : at + g.stride], header, shard, found)
    return found.report()


def account_shard(data: Data, header: Header) -> Accounting:
    """Count the used, free and lost bytes of a shard.

    Args:
        data: A copy of its ``stride`` bytes.
        header: What ``read_header`` returned.

    Returns:
        The sums; all are zero if the header's geometry makes no sense.
    """
    view = _bytes_view(data)
    if not header.usable or len(view) != header.geometry.stride:
        return Accounting(0, 0, 0, 0)
    reader = _Reader(view, header, 0, _Findings())
    return _Blocks(reader).accounting()


def _bytes_view(data: Data) -> memoryview:
    return memoryview(data).cast("B")


class _Findings:
    """Collects the first MAX_FINDINGS findings and counts the others."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, line: str) -> None:
        self._count += 1
        if self._count <= MAX_FINDINGS:
            self._lines.append(line)

    def report(self) -> list[str]:
        more = self._count - len(self._lines)
        return self._lines + [f"and {more} more findings"] * (more > 0)


# --- the header -----------------------------------------------------------------


def _header_words(data: memoryview) -> list[int]:
    """Return the 64-bit words before the rows; bytes that are missing read as 0."""
    head = bytes(data[: fmt.ROWS_AT]).ljust(fmt.ROWS_AT, b"\0")
    return memoryview(head).cast("Q").tolist()


def _check_header(data: memoryview, found: _Findings) -> bool:
    """Check the header; return whether its geometry allows to read the shards."""
    if len(data) < HEADER_SIZE:
        found.add(f"header: {len(data)} bytes, fewer than the {HEADER_SIZE} of it")
        return False
    words = _header_words(data)
    # Without the right magic word and format, the other words mean something else.
    magic = words[fmt.H_MAGIC]
    if magic != fmt.MAGIC:
        found.add(f"header: magic is {magic:#018x}, not {fmt.MAGIC:#018x}")
        return False
    if words[fmt.H_FORMAT] != fmt.FORMAT:
        found.add(f"header: format is {words[fmt.H_FORMAT]}, not {fmt.FORMAT}")
        return False
    sound = _check_geometry(words, found)
    _check_settings(words, found)
    _check_text(data, "codec", fmt.CODEC_AT, fmt.CODEC_SIZE, found)
    _check_text(data, "name", fmt.NAME_AT, fmt.NAME_SIZE, found)
    _check_retired(words, found)
    _check_rows(data, words[fmt.H_GENERATION], found)
    return sound


def _geometry(words: Sequence[int]) -> Geometry:
    """Return the geometry that the header's four determining numbers make."""
    determining = fmt.H_SHARDS, fmt.H_SLOTS, fmt.H_BLOCKS, fmt.H_BLOCK_SIZE
    return fmt.plan(*(words[n] for n in determining))


def _geometry_faults(g: Geometry) -> list[str]:
    """Return which of the four determining numbers make no sense."""
    faults = []
    ranges = {
        "shards": (g.shards, 1, fmt.MAX_SHARDS),
        "slots": (g.slots, 2, fmt.MAX_INDEX),  # at least one entry and the spare slot
        "blocks": (g.blocks, 1, fmt.MAX_INDEX),
        "block_size": (g.block_size, fmt.MIN_BLOCK, fmt.MAX_BLOCK),
    }
    for name, (number, low, high) in ranges.items():
        if not low <= number <= high:
            faults.append(f"{name} is {number}, not from {low} to {high}")
    if g.block_size & (g.block_size - 1):
        faults.append(f"block_size is {g.block_size}, not a power of two")
    return faults


def _check_geometry(words: Sequence[int], found: _Findings) -> bool:
    g = _geometry(words)
    # The four numbers that determine the geometry are in their ranges.
    faults = _geometry_faults(g)
    for fault in faults:
        found.add(f"header: {fault}")
    if faults:
        return False
    # The numbers that follow from these four are the planned ones.
    for name, number, planned in (
        ("stride", words[fmt.H_STRIDE], g.stride),
        ("size", words[fmt.H_SIZE], g.size),
        ("rows", words[fmt.H_ROWS], fmt.ROWS),
    ):
        if number != planned:
            found.add(f"header: {name} is {number}, but planned is {planned}")
    # A shard has slots for its share of max_entries, or one for each block if only
    # bytes are limited; and a spare one.
    max_entries = words[fmt.H_MAX_ENTRIES]
    slots = 1 + (-(-max_entries // g.shards) if max_entries else g.blocks)
    if g.slots != slots:
        why = f"max_entries {max_entries} makes it {slots}"
        found.add(f"header: slots is {g.slots}, but {why}")
    # There are as many blocks as fit into max_bytes.
    max_bytes = words[fmt.H_MAX_BYTES]
    blocks = max(1, max_bytes // g.shards // g.block_size)
    if g.blocks != blocks:
        why = f"max_bytes {max_bytes} makes it {blocks}"
        found.add(f"header: blocks is {g.blocks}, but {why}")
    # No more entries were recovered, or given up, than there are records.
    records = g.shards * g.slots
    for name, at in (("recovered", fmt.H_RECOVERED), ("lost", fmt.H_LOST)):
        if words[at] > records:
            found.add(f"header: {name} is {words[at]}, but there are {records} records")
    return True


def _check_settings(words: Sequence[int], found: _Findings) -> None:
    # Times and shares are in the ranges that Cache() accepts.
    for name, number, high in (
        ("ttl", words[fmt.H_TTL], fmt.MAX_TTL_NS),
        ("jitter", words[fmt.H_JITTER], 1_000_000),
        ("cleanup", words[fmt.H_CLEANUP], _COUNTER_END - 1),
        ("created_at", words[fmt.H_CREATED_AT], _COUNTER_END - 1),
        ("created_wall", words[fmt.H_CREATED_WALL], _COUNTER_END - 1),
        # A token has 48 bits for the generation.
        ("generation", words[fmt.H_GENERATION], (1 << 48) - 1),
        # There are two copies of the retired counters.
        ("retired", words[fmt.H_RETIRED], 1),
    ):
        if number > high:
            found.add(f"header: {name} is {number}, over {high}")
    # A segment was created at some time, with some lock file.
    for name, at in (
        ("created_wall", fmt.H_CREATED_WALL),
        ("lock_inode", fmt.H_LOCK_INODE),
    ):
        if not words[at]:
            found.add(f"header: {name} is 0")
    # Only known flags are set.
    unknown = words[fmt.H_FLAGS] & ~(fmt.FLAG_PERSIST | fmt.FLAG_SLIDING)
    if unknown:
        found.add(f"header: flags have unknown bits {unknown:#x}")


def _check_text(
    data: memoryview, what: str, at: int, size: int, found: _Findings
) -> None:
    field = bytes(data[at : at + size])
    # The field is a length byte and as many bytes of UTF-8, at least one.
    length = field[0]
    if not 1 <= length < size:
        found.add(f"header: {what} has length {length}, not from 1 to {size - 1}")
        return
    try:
        text = field[1 : length + 1].decode()
    except UnicodeDecodeError as e:
        found.add(f"header: {what} is not UTF-8: {e.reason} at {e.start}")
        return
    # A cache's name can be part of a file name; a codec's name is printable.
    good = _NAME_CHARACTERS.issuperset(text) if what == "name" else text.isprintable()
    if not good:
        found.add(f"header: {what} {text!r} has characters it may not have")


def _token_fault(token: int, newest: int) -> str | None:
    """Return what is wrong with a worker's token, or None."""
    row, generation = fields.row_of(token), fields.generation_of(token)
    if not 0 <= row < fmt.ROWS:
        return f"token {token:#x} names row {row} of {fmt.ROWS}"
    if not 1 <= generation <= newest:
        return f"token {token:#x} has generation {generation}, the newest is {newest}"
    return None


def _check_retired(words: Sequence[int], found: _Findings) -> None:
    for copy in range(2):
        at = fmt.RETIRED_AT + copy * fmt.RETIRED_WORDS
        counters = words[at : at + fmt.ROW_WORDS - fmt.R_COUNTERS]
        token = words[at + fmt.RETIRED_TOKEN]
        # A copy names the worker that was added last; if it names none, it counts
        # nothing.  (The copy that is not valid may be half written, by a process that
        # died.)
        fault = token and _token_fault(token, words[fmt.H_GENERATION])
        if fault:
            found.add(f"retired counters {copy}: {fault}")
        if not token and any(counters) and copy == words[fmt.H_RETIRED]:
            total = sum(counters)
            found.add(f"retired counters {copy}: count {total} of no worker")
        for n, counter in enumerate(counters):
            if counter >= _COUNTER_END:
                found.add(f"retired counters {copy}: counter {n} is {counter}")


def _check_rows(data: memoryview, newest: int, found: _Findings) -> None:
    words = data[fmt.ROWS_AT : HEADER_SIZE].cast("Q")
    rows_of: dict[int, int] = {}
    for row, token in enumerate(_column(words, "Q", fmt.R_TOKEN, fmt.ROW_WORDS)):
        if not token:
            continue
        # The token in a row names that row, and a worker that was given it.
        fault = _token_fault(token, newest)
        if fault:
            found.add(f"row {row}: {fault}")
            continue
        if fields.row_of(token) != row:
            named = fields.row_of(token)
            found.add(f"row {row}: token {token:#x} names row {named}")
        # Each generation is given to one worker.
        generation = fields.generation_of(token)
        other = rows_of.setdefault(generation, row)
        if other != row:
            found.add(f"row {row}: generation {generation} is also in row {other}")
    for n in range(fmt.R_PID, fmt.ROW_WORDS):
        # A PID is within the limit; times and counters are far from their end.
        end = _PID_MAX + 1 if n == fmt.R_PID else _COUNTER_END
        for row, number in enumerate(_column(words, "Q", n, fmt.ROW_WORDS)):
            if number >= end:
                name = _ROW_WORDS.get(n, f"word {n}")
                found.add(f"row {row}: {name} is {number}, not below {end}")


# --- a shard --------------------------------------------------------------------


def _column(
    words: memoryview[int], kind: Literal["I", "Q"], first: int, step: int
) -> array[int]:
    column = array(kind)
    column.frombytes(words[first::step].tobytes())
    return column


class _Reader:
    """The copy of a shard, taken apart: its words, and a column for each field."""

    def __init__(
        self, data: memoryview, header: Header, shard: int, found: _Findings
    ) -> None:
        g = header.geometry
        self.header, self.geometry, self.shard, self._found = header, g, shard, found
        self.slots, self.blocks, self.block_size = g.slots, g.blocks, g.block_size
        self.words = data[: fmt.SHARD_HEADER].cast("Q").tolist()
        heads = data[8 * fmt.S_WHEEL_HEADS : 8 * fmt.S_IN_FLIGHT].cast("I")
        self.heads = heads[: fmt.WHEEL_LEVELS * fmt.WHEEL_SLOTS].tolist()
        buckets = data[g.buckets_at : g.buckets_at + 4 * g.slots].cast("I")
        self.buckets = _column(buckets, "I", 0, 1)
        records = data[g.records_at : g.records_at + fmt.RECORD * (g.slots + 1)]
        wide, narrow = records.cast("Q"), records.cast("I")

        def field(number: int) -> array[int]:
            return _column(narrow, "I", number, fmt.RECORD_WORDS)

        self.version = _column(wide, "Q", fmt.F64_VERSION, fmt.RECORD_WORDS64)
        self.expires = _column(wide, "Q", fmt.F64_EXPIRES, fmt.RECORD_WORDS64)
        self.hash, self.chain = field(fmt.F_HASH), field(fmt.F_CHAIN)
        self.lru_prev = field(fmt.F_LRU_PREV)
        self.lru_next = field(fmt.F_LRU_NEXT)
        self.wheel_prev = field(fmt.F_WHEEL_PREV)
        self.wheel_next = field(fmt.F_WHEEL_NEXT)
        self.block, self.value_len = field(fmt.F_BLOCK), field(fmt.F_VALUE_LEN)
        self.meta, self.ttl = field(fmt.F_META), field(fmt.F_TTL)
        self.checksum = field(fmt.F_CHECKSUM)
        links = data[g.links_at : g.links_at + 4 * (g.blocks + 1)].cast("I")
        self.links = _column(links, "I", 0, 1)
        self.arena = data[g.arena_at : g.arena_at + g.block_size * (g.blocks + 1)]

        # Whether a record is an entry is told by its version; the sentinel is none.
        self.is_live = bytearray(fields.is_live(version) for version in self.version)
        self.is_live[0] = 0
        self.live = [slot for slot, live in enumerate(self.is_live) if live]
        # These limit the walks; _check_counts compares the words themselves.
        self.fresh_slot = min(self.words[fmt.S_FRESH_SLOT], g.slots)
        self.fresh_block = min(self.words[fmt.S_FRESH_BLOCK], g.blocks)

    def say(self, finding: str) -> None:
        self._found.add(f"shard {self.shard}: {finding}")

    def key_len(self, slot: int) -> int:
        length: int = fields.key_len_of(self.meta[slot])
        return length

    def kind(self, slot: int) -> int:
        kind: int = fields.kind_of(self.meta[slot])
        return kind

    def tag(self, slot: int) -> int:
        tag: int = fields.tag_of(self.meta[slot])
        return tag


def _some(what: str, numbers: Iterable[int]) -> str:
    """Return a few of the numbers, and how many more there are, as text."""
    listed = list(numbers)
    if len(listed) == 1:
        return f"{what} {listed[0]}"
    text = f"{what}s " + ", ".join(map(str, listed[:4]))
    return text + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _check_shard(
    data: memoryview,
    header: Header,
    shard: int,
    found: _Findings,
    *,
    quiescent: bool = True,
) -> None:
    g = header.geometry
    if not header.usable or not 0 <= shard < g.shards:
        found.add(f"shard {shard}: there is no such shard in the header's geometry")
        return
    if len(data) != g.stride:
        found.add(f"shard {shard}: {len(data)} bytes, but the stride is {g.stride}")
        return
    s = _Reader(data, header, shard, found)
    _check_lock_line(s, quiescent=quiescent)
    _check_counts(s)
    _check_counters(s)
    _check_in_flight(s, quiescent=quiescent)
    _check_versions(s)
    _check_buckets(s)
    _check_ring(s)
    _check_wheel(s)
    _check_free_slots(s)
    blocks = _Blocks(s)
    _check_blocks(s, blocks)
    for slot in s.live:
        _check_record(s, slot)
    _check_content(s, blocks)


def _check_lock_line(s: _Reader, *, quiescent: bool) -> None:
    seq, holder = s.words[fmt.S_SEQ], s.words[fmt.S_HOLDER]
    # If no process is inside, seq is even and the lock has no holder.
    if quiescent and seq & 1:
        s.say(f"seq is {seq}, odd, with no writer inside")
    if quiescent and holder:
        s.say(f"holder is {holder:#x}, with no writer inside")
    # The holder is a worker.
    fault = holder and _token_fault(holder, MASK64)
    if fault:
        s.say(f"holder: {fault}")


def _check_counts(s: _Reader) -> None:
    words, entries = s.words, s.words[fmt.S_ENTRIES]
    # The count of entries is right and within the shard's share of max_entries.
    if entries != len(s.live):
        s.say(f"entries is {entries}, but {len(s.live)} records are live")
    capacity = fmt.shard_capacity(
        s.header.max_entries, s.geometry.shards, s.shard, s.blocks
    )
    if len(s.live) > capacity:
        s.say(f"{len(s.live)} records are live, over the shard's share of {capacity}")
    # Slots and blocks up to these numbers have been used, so there are that many.
    if words[fmt.S_FRESH_SLOT] > s.slots:
        s.say(f"fresh slot is {words[fmt.S_FRESH_SLOT]} of {s.slots}")
    if words[fmt.S_FRESH_BLOCK] > s.blocks:
        s.say(f"fresh block is {words[fmt.S_FRESH_BLOCK]} of {s.blocks}")
    # A holder that leaves has finished to overwrite a number in place.
    if words[fmt.S_REDO_SLOT]:
        s.say(f"a number of slot {words[fmt.S_REDO_SLOT]} is being overwritten")
    # A holder that leaves has put every live key into its chain.
    if words[fmt.S_IN_DOUBT]:
        s.say(f"in doubt is {words[fmt.S_IN_DOUBT]:#x}, but nobody writes")
    # The entry that the next holder moves to the front is still there.
    late = words[fmt.S_LATE_USE]
    if late and (late >= len(s.is_live) or not s.is_live[late]):
        s.say(f"late use names slot {late}, which holds no entry")
    # A slot that was never used holds no entry.
    beyond = [slot for slot in s.live if slot > s.fresh_slot]
    if beyond:
        s.say(f"{_some('slot', beyond)}: live, but beyond fresh slot {s.fresh_slot}")


def _check_counters(s: _Reader) -> None:
    # Acquisitions and sequence only count up, like the counters.
    counters = range(fmt.S_COUNTERS, fmt.S_COUNTERS_END)
    for n in (fmt.S_ACQUISITIONS, fmt.S_SEQUENCE, *counters):
        if s.words[n] >= _COUNTER_END:
            name = _SHARD_WORDS.get(n, f"word {n}")
            s.say(f"{name} is {s.words[n]}, more than can be counted")
    # Entries go only for causes that exist.
    for n in range(fmt.S_GONE + len(fmt.Cause), fmt.S_UNREAD):
        if s.words[n]:
            s.say(f"word {n} counts {s.words[n]} entries gone for no known cause")
    # The entries that were evicted unread are among those that were evicted.
    evicted = sum(s.words[fmt.S_GONE + cause] for cause in fmt.Cause if cause.evicted)
    if s.words[fmt.S_UNREAD] > evicted:
        s.say(f"{s.words[fmt.S_UNREAD]} entries evicted unread, of {evicted} evicted")


def _check_in_flight(s: _Reader, *, quiescent: bool) -> None:
    newest = s.header.generation if quiescent else MASK64
    places: dict[int, int] = {}
    for n in range(fmt.IN_FLIGHT):
        key_hash, token = s.words[fmt.S_IN_FLIGHT + 2 * n : fmt.S_IN_FLIGHT + 2 * n + 2]
        if not key_hash and not token:
            continue
        # A worker computes the value.
        fault = _token_fault(token, newest)
        if fault:
            s.say(f"in-flight {n}: {fault}")
        # Only one worker computes the value of a key.
        other = places.setdefault(key_hash, n)
        if other != n:
            s.say(f"in-flight {other} and {n}: both are for hash {key_hash:#x}")


def _check_versions(s: _Reader) -> None:
    # The sentinel is no entry.
    if fields.is_live(s.version[0]):
        s.say(f"slot 0: the sentinel's version is {s.version[0]}, live")
    sequence = s.words[fmt.S_SEQUENCE]
    writer: dict[int, int] = {}
    for slot in s.live:
        # An entry was written by one of the writes so far.
        number = fields.sequence_of(s.version[slot])
        if not 1 <= number <= sequence:
            s.say(f"slot {slot}: written by write {number}, the last was {sequence}")
        # Each write makes only one entry.
        other = writer.setdefault(number, slot)
        if other != slot:
            s.say(f"slot {slot}: written by write {number}, as slot {other} is")


def _check_buckets(s: _Reader) -> None:
    """Check that each live record is once in a hash chain: that of its bucket."""
    reached = bytearray(s.slots + 1)
    for bucket, first in enumerate(s.buckets):
        slot = first
        while slot:
            step = f"bucket {bucket}: its hash chain leads to slot {slot}"
            # A hash chain leads to slots.
            if slot > s.slots:
                s.say(f"{step} of {s.slots}")
                break
            # The ``chain`` of a record that is not live belongs to the free list.
            if not s.is_live[slot]:
                s.say(f"{step}, which is not live")
                break
            # Hash chains end, and no two of them meet.
            if reached[slot]:
                s.say(f"{step} a second time")
                break
            reached[slot] = 1
            # An entry is in the bucket of its hash.
            right = fields.bucket_of(s.hash[slot], s.slots)
            if right != bucket:
                s.say(f"slot {slot}: in bucket {bucket}, but its hash says {right}")
            slot = s.chain[slot]
    missing = [slot for slot in s.live if not reached[slot]]
    if missing:
        s.say(f"{_some('slot', missing)}: live, but in no bucket's hash chain")


def _check_ring(s: _Reader) -> None:
    """Check that the LRU ring leads from the sentinel to all live records and back."""
    reached = bytearray(s.slots + 1)
    before, slot = 0, s.lru_next[0]
    while True:
        # The ring leads to slots.
        if slot > s.slots:
            s.say(f"slot {before}: lru_next is {slot} of {s.slots} slots")
            break
        # The ring closes at the sentinel and nowhere else.
        if reached[slot]:
            s.say(f"slot {before}: lru_next is {slot}, which the ring has passed")
            break
        # The ring leads back the way it came.
        if s.lru_prev[slot] != before:
            s.say(f"slot {slot}: lru_prev is {s.lru_prev[slot]}, not {before}")
        if not slot:
            break
        # The ring has only live records.
        if not s.is_live[slot]:
            s.say(f"slot {slot}: in the LRU ring, but not live")
        reached[slot] = 1
        before, slot = slot, s.lru_next[slot]
    # The ring has all live records.
    missing = [slot for slot in s.live if not reached[slot]]
    if missing:
        s.say(f"{_some('slot', missing)}: live, but not reached in the LRU ring")


def _check_wheel(s: _Reader) -> None:
    """Check that each entry that expires is in one list of the wheel, due in time.

    The list of an entry is given by the highest 6-bit digit in which its tick differs
    from the wheel's: the place of the digit is the level, the digit is the index.  A
    list is due when the wheel reaches its start, which is made of the wheel's digits
    above the level, the index, and zeros.  Lists that are due are emptied before the
    wheel passes them.
    """
    tick = s.words[fmt.S_TICK]
    reached = bytearray(s.slots + 1)
    for head, first in enumerate(s.heads):
        level, index = divmod(head, fmt.WHEEL_SLOTS)
        # The occupancy bits tell which lists have entries.
        bit = s.words[fmt.S_WHEEL_BITS + level] >> index & 1
        if bit != (first != 0):
            s.say(f"wheel list {head}: its bit is {bit}, its head is {first}")
        if first:
            _check_wheel_list(s, head, tick, reached)
    never = [slot for slot in s.live if s.expires[slot] == NEVER]
    mortal = [slot for slot in s.live if s.expires[slot] != NEVER]
    # Entries that expire are in the wheel.
    missing = [slot for slot in mortal if not reached[slot]]
    if missing:
        s.say(f"{_some('slot', missing)}: expires, but is not reached in a wheel list")
    # Entries that never expire are in no list, and their links tell so.
    for slot in never:
        links = s.wheel_prev[slot], s.wheel_next[slot]
        if links != (0, 0):
            s.say(f"slot {slot}: never expires, but wheel_prev and _next are {links}")
    # No entry expires before DUE, because a sweep has no work until then.
    due = s.words[fmt.S_DUE]
    early = [slot for slot in mortal if s.expires[slot] < due]
    if early:
        s.say(f"{_some('slot', early)}: expires before due, {due}")
    # The tick of the wheel is a possible time.
    if tick > NEVER >> fmt.WHEEL_TICK_BITS:
        s.say(f"tick is {tick}, later than any time")


def _check_wheel_list(s: _Reader, head: int, tick: int, reached: bytearray) -> None:
    level, index = divmod(head, fmt.WHEEL_SLOTS)
    low, high = 6 * level, 6 * (level + 1)
    start = tick >> high << high | index << low
    past = index < (tick >> low & 63)
    back, slot = fmt.WHEEL_FIRST | head, s.heads[head]
    while slot:
        # A wheel list leads to slots.
        if slot > s.slots:
            s.say(f"wheel list {head}: leads to slot {slot} of {s.slots}")
            return
        # Wheel lists end, and no two of them meet.
        if reached[slot]:
            s.say(f"wheel list {head}: leads to slot {slot} a second time")
            return
        reached[slot] = 1
        # The list leads back the way it came, at its first entry to its own number.
        if s.wheel_prev[slot] != back:
            s.say(f"slot {slot}: wheel_prev is {s.wheel_prev[slot]:#x}, not {back:#x}")
        # The list has only live records that expire.
        due = s.expires[slot] >> fmt.WHEEL_TICK_BITS
        if not s.is_live[slot]:
            s.say(f"slot {slot}: in wheel list {head}, but not live")
        elif s.expires[slot] == NEVER:
            s.say(f"slot {slot}: in wheel list {head}, but never expires")
        # The list is due no later than the entry.  It may be due earlier, because
        # readers of a sliding cache change ``expires`` and leave the entry where it is.
        elif start > max(due, tick):
            place = f"its wheel list {head} only at {start}"
            s.say(f"slot {slot}: due at tick {due}, but {place}")
        # The wheel has not passed the list: it would reach it only a round later.  That
        # is right only for an entry that is due more than a round of all levels later.
        elif past and (level < fmt.WHEEL_LEVELS - 1 or due >> high <= tick >> high):
            place = f"in wheel list {head}, which the wheel has passed"
            s.say(f"slot {slot}: {place} at tick {tick}")
        back, slot = slot, s.wheel_next[slot]


def _check_free_slots(s: _Reader) -> None:
    """Check that the free list has the slots that were used and are not live, once."""
    reached = bytearray(s.slots + 1)
    slot = s.words[fmt.S_FREE_SLOT]
    while slot:
        # The free list leads to slots that were used.
        if slot > s.fresh_slot:
            s.say(f"free slots: lead to slot {slot}, fresh slot is {s.fresh_slot}")
            break
        # The ``chain`` of a live record belongs to a hash chain.
        if s.is_live[slot]:
            s.say(f"slot {slot}: live, and in the list of free slots")
            break
        # The free list ends.
        if reached[slot]:
            s.say(f"free slots: lead to slot {slot} a second time")
            break
        reached[slot] = 1
        slot = s.chain[slot]
    # No slot is lost.
    used = range(1, s.fresh_slot + 1)
    lost = [slot for slot in used if not (s.is_live[slot] or reached[slot])]
    if lost:
        s.say(f"{_some('slot', lost)}: neither live nor reached in the free list")


class _Blocks:
    """The owner of each block: a live record's slot, _FREE, or none (0)."""

    def __init__(self, s: _Reader) -> None:
        self._s = s
        self._owner = array("I", bytes(4 * (s.blocks + 1)))
        # Only whole runs: a broken one tells nothing about the content.
        self.runs: dict[int, list[int]] = {}
        self.used = self.free = 0
        for slot in s.live:
            self._walk_run(slot)
        self._walk_free()

    def accounting(self) -> Accounting:
        s = self._s
        free = self.free + s.blocks - s.fresh_block
        lost = s.blocks - self.used - free
        blocks = s.blocks, self.used, free, lost
        return Accounting(*(n * s.block_size for n in blocks))

    def lost(self) -> list[int]:
        return [b for b in range(1, self._s.fresh_block + 1) if not self._owner[b]]

    def _place(self, block: int) -> str:
        owner = self._owner[block]
        return "the free list" if owner == _FREE else f"the block run of slot {owner}"

    def _walk_run(self, slot: int) -> None:
        s = self._s
        size = s.key_len(slot) + s.value_len[slot]
        # An entry without any bytes has a block, too.
        needed = s.geometry.blocks_of(size)
        run: list[int] = []
        block = s.block[slot]
        # Each step takes a block that had no owner, so a cycle ends as two runs that
        # meet do.
        while len(run) < needed:
            # A run is long enough for key and value, and leads to used blocks.
            if not 1 <= block <= s.fresh_block:
                place = f"block {len(run) + 1} of the {needed} of its run"
                s.say(f"slot {slot}: {place} is {block} of {s.fresh_block} used")
                return
            # No block is in two places.
            if self._owner[block]:
                place = self._place(block)
                s.say(f"slot {slot}: its block run leads to {block}, in {place}")
                return
            self._owner[block] = slot
            self.used += 1
            run.append(block)
            block = s.links[block]
        # A run is no longer than key and value need.
        if block:
            s.say(f"slot {slot}: its run of {needed} blocks goes on to {block}")
        self.runs[slot] = run

    def _walk_free(self) -> None:
        s = self._s
        block = s.words[fmt.S_FREE_BLOCK]
        while block:
            # The free list leads to used blocks.
            if block > s.fresh_block:
                s.say(f"free blocks: lead to {block}, fresh block is {s.fresh_block}")
                return
            # No block is in two places, and the free list ends.
            if self._owner[block]:
                s.say(f"free blocks: lead to {block}, in {self._place(block)}")
                return
            self._owner[block] = _FREE
            self.free += 1
            block = s.links[block]


def _check_blocks(s: _Reader, blocks: _Blocks) -> None:
    # Every used block is in the run of a live record or in the free list.
    lost = blocks.lost()
    if lost:
        count = blocks.accounting().lost
        s.say(f"{_some('block', lost)}: lost, {count} bytes neither used nor free")
    # The count of blocks in runs is right.
    counted = s.words[fmt.S_BLOCKS_USED]
    if counted != blocks.used:
        s.say(f"blocks used is {counted}, but block runs have {blocks.used}")


def _check_record(s: _Reader, slot: int) -> None:
    kind, tag, flags = s.kind(slot), s.tag(slot), s.meta[slot] >> 24
    # The kind of the key, the tag of the value and the flags are known ones.
    if kind not in _KINDS:
        s.say(f"slot {slot}: key kind is {kind}")
    if tag not in _TAGS:
        s.say(f"slot {slot}: value tag is {tag}")
    if flags & ~(fmt.META_FETCHED >> 24):
        s.say(f"slot {slot}: flags are {flags:#x}")
    # The values of some tags have a fixed length.
    length = s.value_len[slot]
    expected = _VALUE_LENGTHS.get(tag, length)  # type: ignore[call-overload]
    if length != expected:
        s.say(f"slot {slot}: value_len is {length}, but tag {tag} has {expected}")
    # The TTL is in the finest unit in which it fits.
    ttl = s.ttl[slot]
    if ttl >> 30 and (ttl & fmt.TTL_VALUE) * 1000 <= fmt.TTL_VALUE:
        s.say(f"slot {slot}: ttl {ttl:#x} is not in the finest unit possible")


def _check_content(s: _Reader, blocks: _Blocks) -> None:
    """Check that keys are where their hash says, once, and values are unchanged."""
    size, shards = s.block_size, s.geometry.shards
    slot_of: dict[tuple[int, bytes], int] = {}
    for slot, run in blocks.runs.items():
        content = b"".join([s.arena[b * size : b * size + size] for b in run])
        split = s.key_len(slot)
        key, value = content[:split], content[split : split + s.value_len[slot]]
        kind, tag = s.kind(slot), s.tag(slot)
        full = xxhash.xxh3_64_intdigest(key, seed=(s.header.seed + kind) & MASK64)
        # The record has the low half of the key's hash; the high half gives the shard.
        if s.hash[slot] != full & MASK32:
            s.say(f"slot {slot}: hash is {s.hash[slot]:#x}, but its key's is {full:#x}")
        elif fields.shard_of(full, shards) != s.shard:
            right = fields.shard_of(full, shards)
            s.say(f"slot {slot}: its key belongs to shard {right}")
        # No two live records have the same key.
        other = slot_of.setdefault((kind, key), slot)
        if other != slot:
            s.say(f"slots {other} and {slot}: live with the same key")
        # The value is the one that was written.
        stored, right = s.checksum[slot], fmt.checksum(value, full & MASK32, tag)
        if stored != right:
            why = f"its value's is {right:#x}"
            s.say(f"slot {slot}: checksum is {stored:#x}, but {why}")
        # The bytes of a str are UTF-8.
        if tag == Tag.STR and not _is_utf8(value):
            s.say(f"slot {slot}: value is a str, but not UTF-8")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
