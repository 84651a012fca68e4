"""What the storm of self-checking values is made of: values, scenes, the ledger.

A value carries its key, its writer, the writer's sequence number, a mark and a checksum
over all of that.  A scene is a geometry, a mix of operations, and what must hold in it.
The ledger is where processes note what they mean to do, and what they have done, in
memory that outlives them.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import shmcache


class Violation(Exception):
    """The cache has broken one of its promises."""


# --- values that prove themselves -------------------------------------------------

HEAD = struct.Struct("<HHQQ")  # length of the key, writer, sequence number, mark
FILLING = random.Random(0).randbytes(1 << 20)


class Proof(NamedTuple):
    """What a value says about itself.

    The mark is the earliest moment (ns) at which the value may expire, or how many
    values ``cas`` has stored before it.
    """

    writer: int
    sequence: int
    mark: int


def make_value(key: str, proof: Proof, size: int) -> Any:
    """A value with a filling of so many bytes; one of four values is a list."""
    name = key.encode()
    start = proof.sequence * 8191 % (len(FILLING) - size)
    head = HEAD.pack(len(name), *proof)
    body = head + name + FILLING[start : start + size]
    value = crc32(body).to_bytes(4, "little") + body
    return [value] if proof.sequence % 4 == 0 else value


def prove(key: str, value: Any) -> Proof:
    """What a value of a key says; Violation if it is torn or of another key."""
    data = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(data, bytes) or len(data) < 4 + HEAD.size:
        raise Violation(f"{key}: found {value!r:.80}, which nobody has stored")
    length, *said = HEAD.unpack_from(data, 4)
    proof = Proof(*said)
    name = data[4 + HEAD.size :][:length]
    if crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "little"):
        raise Violation(
            f"{key}: a torn value of {len(data)} bytes: it says {name!r}, {proof},"
            " and its checksum disagrees"
        )
    if name != key.encode():
        raise Violation(f"{key}: found the value of {name!r}, {proof}")
    return proof


# --- scenes -----------------------------------------------------------------------

OWN = 4  # keys of each process, which only it writes
MORTAL = 4  # keys that all write, and that live for some milliseconds
SHARED, LASTING, NUMBERS, CHAINS, QUEUES = 12, 6, 3, 2, 2
READS = {"look_at_shared": 4, "look_at_own": 4, "look_at_mortal": 2, "iterate": 0.2}
WRITES = {"change_shared": 6, "change_own": 4, "change_mortal": 3, "clear": 0.05}
LOOKS = {"look_at_lasting": 1, "look_at_chain": 1, "look_at_queue": 1}
CERTAIN = {"overwrite": 3, "hammer": 1, "count": 4, "chain": 2, "offer": 1, "take": 1}
CHANGES = {"reopen": 0.05, "sweep": 0.1, "look_at_ages": 0.2}
MIXED = {**READS, **WRITES, **CHANGES}


@dataclass(frozen=True)
class Scene:
    """A geometry, a mix of operations, and what must hold.

    Attributes:
        settings: The settings of the cache.
        acts: Names of methods of ``Worker``, and how often each is called.
        lasting: Keys that are always there: never deleted, never expired, never
            evicted.
        looks: What the conductor calls while a process is stopped.
        roomy: Whether nothing is ever evicted.
        kills: Whether processes are killed; otherwise they are only stopped.
        largest: The largest filling, as a part of a shard's room.
        fixed: Whether the number of entries never changes.
        filled: How many entries there are that nobody ever uses.
    """

    settings: dict[str, Any]
    acts: dict[str, float]
    lasting: tuple[str, ...] = ()
    looks: tuple[str, ...] = ("look_at_lasting",)
    roomy: bool = False
    kills: bool = True
    largest: float = 0.98
    fixed: bool = False
    filled: int = 0


def _keys(kind: str, number: int) -> tuple[str, ...]:
    return tuple(f"{kind}{i}" for i in range(number))


def _roomy(shards: int) -> Scene:
    # A shard has room for all keys, each with the largest value, twice.
    size = {"max_entries": 400 * shards, "max_bytes": shards << 23, "shards": shards}
    lasting = _keys("e", LASTING) + _keys("n", NUMBERS) + _keys("c", CHAINS)
    acts = {**MIXED, **CERTAIN, **LOOKS}
    return Scene(size, acts, lasting=lasting, roomy=True, largest=1 / 300)


def _tight(entries: int, size: int, shards: int) -> Scene:
    settings = {"max_entries": entries, "max_bytes": size, "shards": shards}
    return Scene(
        settings, {**MIXED, "pop_oldest": 1, "count": 1}, looks=("look_at_shared",)
    )


SCENES: dict[str, Scene] = {
    "roomy": _roomy(1),
    "roomy, 2 shards": _roomy(2),
    "roomy, 8 shards": _roomy(8),
    "tight": _tight(40, 300_000, 1),
    "tight, 8 shards": _tight(64, 1 << 20, 8),
    "tiny": _tight(4, 64 * 40, 1),
    "bounded by bytes": _tight(0, 1 << 18, 2),
    "large values": Scene(
        {"max_entries": 16, "max_bytes": 1 << 17, "shards": 1},
        {"replace_large": 3, "look_at_lasting": 2, "count": 1, "reopen": 0.02},
        lasting=("b0", *_keys("n", NUMBERS)),
        # A death between the old value and the new one costs the key, by its nature.
        kills=False,
    ),
    "overwrites": Scene(
        {"max_entries": 200, "max_bytes": 1 << 22, "shards": 2},
        {"overwrite": 3, "hammer": 3, "count": 3, "look_at_length": 2},
        lasting=_keys("e", LASTING) + _keys("n", NUMBERS),
        looks=("look_at_length", "look_at_lasting"),
        roomy=True,
        largest=1 / 100,
        fixed=True,
    ),
    # Whoever takes over from a dead process rebuilds for so long that it can be stopped
    # meanwhile.
    "long rebuilds": Scene(
        {"max_entries": 30_000 if shmcache.compiled else 800, "shards": 1},
        {"hammer": 3, "overwrite": 1, "look_at_lasting": 1, "look_at_idle": 1},
        lasting=_keys("e", LASTING),
        looks=("look_at_idle", "look_at_lasting"),
        roomy=True,
        largest=1 / 300,
        filled=20_000 if shmcache.compiled else 500,
    ),
    "numbers": Scene(
        {"max_entries": 100, "shards": 1},
        {"count": 6, "look_at_lasting": 1, "reopen": 0.02},
        lasting=_keys("n", NUMBERS),
        roomy=True,
        largest=0,
    ),
    "flood": Scene(
        {"max_entries": 100, "max_bytes": 1 << 22, "shards": 1},
        {"flood_and_count": 6, "look_at_lasting": 1, **CHANGES},
        lasting=_keys("n", NUMBERS),
        largest=1 / 300,
    ),
    "sliding": Scene(
        {"max_entries": 100, "ttl": 3600, "sliding": True, "shards": 1},
        {"cut_short": 3, "look_at_sliding": 6, "reopen": 0.02},
        looks=("look_at_sliding",),
        roomy=True,
        largest=0,
    ),
    "key in use": Scene(
        {"max_entries": 100, "shards": 1, "cleanup_interval": 3600},
        {},
        largest=1 / 300,
    ),
}


# --- the ledger -------------------------------------------------------------------

# What is counted: increments of each number, values stored by cas, added and popped.
TALLIES = NUMBERS + CHAINS + 2 * QUEUES
CHAIN_TALLY, ADDED_TALLY = NUMBERS, NUMBERS + CHAINS
POPPED_TALLY = ADDED_TALLY + QUEUES

PID, OPERATIONS, ASKED, SEQUENCE = range(4)
# Of each key of its own: what the process is about to do and what it has done, as
# sequence number * 2 + whether the key is there; and when it may expire.
INTENT, DONE, UNTIL = (4 + i * OWN for i in range(3))
# Of each key that may expire: the last value stored, and by when it has expired.
EXPIRING = 4 + 3 * OWN
EXPIRED_BY = EXPIRING + OWN + MORTAL
MEANT = EXPIRED_BY + OWN + MORTAL
SURE = MEANT + TALLIES
PAGE = SURE + TALLIES


class Ledger:
    """What the processes note, in memory that outlives them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        size = 8 * (PAGE * slots + TALLIES + 2)
        self.words = memoryview(mmap.mmap(-1, size)).cast("Q")
        self.pages = [self.words[i * PAGE : (i + 1) * PAGE] for i in range(slots)]
        # Of each tally, what was under way in processes that were killed; whether all
        # shall end; and how many were killed.
        self.doubts = self.words[PAGE * slots :][:TALLIES]
        self.ending = self.words[PAGE * slots + TALLIES :][:1]
        self.kills = self.words[PAGE * slots + TALLIES + 1 :][:1]

    def sure(self, tally: int) -> int:
        """What has certainly been done; ask before the look that it is compared
        with."""
        return sum(page[SURE + tally] for page in self.pages)

    def meant(self, tally: int) -> int:
        """What may have been done at most; ask after the look."""
        meant = sum(page[MEANT + tally] for page in self.pages)
        # The conductor raises the doubt first, and lowers what was meant afterwards.
        return meant + self.doubts[tally]

    def settle(self, slot: int) -> None:
        """Note that a process was killed."""
        page = self.pages[slot]
        page[PID] = page[ASKED] = 0
        for tally in range(TALLIES):
            self.doubts[tally] += page[MEANT + tally] - page[SURE + tally]
            page[MEANT + tally] = page[SURE + tally]


@dataclass
class Stage:
    """What all processes of a round have in common."""

    name: str
    scene: Scene
    ledger: Ledger
    settings: dict[str, Any]
    block: int
    room: int
    verdict: int  # the descriptor that a violation is written to
    born: int = field(default_factory=time.monotonic_ns)
    conductor: int = field(default_factory=os.getpid)
