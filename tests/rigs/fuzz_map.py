"""A map that does what the documentation of a cache says: the model of fuzz_model.py.

It shares nothing with ``model.py``.  It knows that an entry takes whole blocks of one
shard, what is evicted for what, when entries expire, which version a token stands for,
and what is counted.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from fuzz_values import Fragile, Rotten, encoded, is_number, plain, size_of
from xxhash import xxh3_64_intdigest

from shmcache import EntryTooLarge, SegmentCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache.stats import Stats

LEFT_OUT: Any = ...
NEVER = 1 << 64
BEGINNING = 1_000_000_000_000  # ns of the clock
BUFFER = 64  # hits of a process that others may not see yet
STAMP = 26  # a stamp counts units of 2**26 ns, in 32 bits
AGE_BOUNDS = (1, 10, 60, 600, 3600, 21_600, 86_400, 604_800)  # s, of the histogram


# --- what is counted ------------------------------------------------------------


@dataclass(eq=False)
class Entry:
    """What the model knows of an entry."""

    key: Any
    value: Any
    number: bool
    blocks: int
    expires: int
    ttl: int  # ns; 0: never
    stamp: int
    serial: int  # of its version
    read: int = 0  # 2: it was read; 1: perhaps, or it was used otherwise
    # In lock-step: the entry was last used at this tick or later, others may have seen
    # uses up to another tick, and so many of its hits need not be seen yet.
    used: int = 0
    seen: int = 0
    unseen: int = 0


@dataclass
class Range:
    """A count that is known to lie between two numbers."""

    low: int = 0
    high: int = 0

    def add(self, low: int, high: int) -> None:
        """Add what lies between two numbers."""
        self.low += low
        self.high += high

    def require(self, actual: int, what: str) -> None:
        """Refuse a number outside."""
        assert self.low <= actual <= self.high, f"{what}: {actual}, not in {self}"


class Counts:
    """What ``stats()`` of one segment must say.

    When an expired entry is removed is not laid down, so until the next sweep it is a
    ghost, which may have been counted or not.
    """

    def __init__(self) -> None:
        self.exact: Counter[str] = Counter()
        self.expired = 0
        self.too_large = Range()
        self.unread = Range()
        self.ages = Range()
        self.younger = [Range() for _ in AGE_BOUNDS]  # than each of the bounds
        self.ghosts: list[tuple[Entry, int]] = []  # and the stamp of their expiry

    def evicted(self, entry: Entry, stamp: int) -> None:
        """Count an entry that was removed to make room."""
        self.exact["CAPACITY"] += 1
        self._gone(entry, stamp, stamp)

    def swept(self, stamp: int) -> None:
        """Count the ghosts: all of them have been removed by now."""
        self.expired += len(self.ghosts)
        for entry, since in self.ghosts:
            self._gone(entry, since, stamp)
        self.ghosts.clear()

    def _gone(self, entry: Entry, first: int, last: int) -> None:
        self.unread.add(entry.read == 0, entry.read < 2)
        low, high = ages(entry, first, last)
        self.ages.add(low, high)
        for bound, younger in zip(AGE_BOUNDS, self.younger, strict=True):
            limit = bound * 10**9 >> STAMP
            younger.add(high <= limit, low <= limit)

    def compare(self, stats: Stats, live: list[Entry], stamp: int, block: int) -> None:
        """Compare with what the cache says."""
        names = {name: getattr(stats, name) for name in ("hits", "misses", "sets")}
        names |= {name: stats.removed[name] for name in stats.removed}
        names |= {"sweeps": stats.sweeps}
        expired = names.pop("EXPIRED")
        exact = {name: self.exact[name] for name in names}
        assert names == exact, f"counts: {names}, not {exact}"
        ghosts = [(entry, *ages(entry, since, stamp)) for entry, since in self.ghosts]
        counted = expired - self.expired
        assert 0 <= counted <= len(ghosts), f"{expired} expired"
        entries = len(live) + len(ghosts) - counted
        assert stats.entries == entries, f"{stats.entries} entries, not {entries}"
        used = sum(entry.blocks for entry in live)
        more = sum(entry.blocks for entry, *_ in ghosts)
        Range(used * block, (used + more) * block).require(stats.bytes_used, "bytes")
        self.too_large.require(stats.too_large, "too large")
        unread = Range(self.unread.low, self.unread.high)
        unread.add(0, sum(entry.read < 2 for entry, *_ in ghosts))
        unread.require(stats.unread, "unread")
        summed = Range(self.ages.low, self.ages.high)
        summed.add(0, sum(high for _, _, high in ghosts))
        units = round(stats.eviction_age_seconds * 1e9 / (1 << STAMP))
        summed.require(units, "sum of the eviction ages")
        below = 0
        buckets = stats.eviction_age_buckets
        for bound, n, known in zip(AGE_BOUNDS, buckets, self.younger, strict=False):
            below += n
            limit = bound * 10**9 >> STAMP
            younger = Range(known.low, known.high)
            younger.add(0, sum(low <= limit for _, low, _ in ghosts))
            younger.require(below, f"eviction ages up to {bound} s")
        gone = stats.expired + stats.evicted
        assert sum(buckets) == gone, f"ages: {buckets}, but {gone} are gone"
        broken = stats.recoveries, stats.dropped, stats.lock_timeouts
        assert broken == (0, 0, 0), f"recoveries, dropped, timeouts: {broken}"


def ages(entry: Entry, first: int, last: int) -> tuple[int, int]:
    """The bounds of the age at which an entry went; in stamps.

    A stamp has 32 bits, so an age of more than half their range may be taken for an
    entry from the future.
    """
    low, high = max(0, first - entry.stamp), max(0, last - entry.stamp)
    return (0 if high >= 1 << 31 else min(low, high)), high


# --- the model ------------------------------------------------------------------


@dataclass
class Geometry:
    """The settings of a cache, and what the documentation says follows from them."""

    max_entries: int
    max_bytes: int
    shards: int
    ttl: float | None
    sliding: bool
    persist: bool
    codec: str

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of ``Cache``."""
        codec = Fragile() if self.codec == "fragile" else self.codec
        return {**vars(self), "codec": codec, "cleanup_interval": 1e6}

    @property
    def block(self) -> int:
        """Bytes of a block: a quarter of an entry's share, a power of two."""
        if not self.max_entries:
            return 256
        share = max(1, self.max_bytes // self.max_entries // 4)
        return min(4096, max(64, 1 << share.bit_length() - 1))

    @property
    def blocks(self) -> int:
        """The number of blocks of a shard."""
        return max(1, self.max_bytes // self.shards // self.block)

    def capacity(self, shard: int) -> int:
        """The number of entries that a shard may hold."""
        if not self.max_entries:
            return self.blocks
        return self.max_entries // self.shards + (
            shard < self.max_entries % self.shards
        )


class Shard:
    """The entries of a shard, the least recently used one first."""

    def __init__(self, number: int, geometry: Geometry) -> None:
        self.number = number
        self.entries: OrderedDict[tuple[int, bytes], Entry] = OrderedDict()
        self.capacity = geometry.capacity(number)
        self.free = geometry.blocks
        # In lock-step: the hits of each process that the other need not have seen.
        self.unseen: dict[int, deque[tuple[Entry, int]]] = {0: deque(), 1: deque()}


class Clock:
    """A clock that stands still until it is told to move; ns."""

    def __init__(self, ns: int = BEGINNING) -> None:
        self.ns = ns

    def __call__(self) -> int:
        """The time, in ns."""
        return self.ns


def ttl_ns(ttl: float | None) -> int:
    """A time to live in ns, 0 for "never"."""
    return 0 if ttl is None else max(1, round(ttl * 10**9))


def kept_ttl(ns: int) -> int:
    """The time to live that a record keeps: 30 bits of the finest unit that fits."""
    unit = 1
    while -(-ns // unit) >= 1 << 30:
        unit *= 1000
    return -(-ns // unit) * unit


Outcome = tuple[str, Any]  # "returned" or "raised", and what


class Model:
    """What a cache must do; its methods have the names of those of ``Cache``."""

    def __init__(self, geometry: Geometry, clock: Clock) -> None:
        self.geometry = geometry
        self.clock = clock
        self.serials = count(1)
        self.told: Outcome = ("", None)  # what the cache did, where it has a choice
        self.who = 0  # the process that acts
        self.tick = 0
        self.swept_at_once = False  # after each move of the clock
        self.observe: Callable[[], set[tuple[int, bytes]]] | None = None

    def begin(self, seed: int) -> None:
        """Know nothing of an earlier segment; this one hashes keys with a seed."""
        self.seed = seed
        self.created = self.clock.ns
        numbers = range(self.geometry.shards)
        self.shards = [Shard(number, self.geometry) for number in numbers]
        self.counts = Counts()
        self.due: list[tuple[int, int, tuple[int, bytes], Entry]] = []

    # --- entries ---

    @property
    def stamp(self) -> int:
        """The present time, as stamps count it."""
        return (self.clock.ns - self.created) >> STAMP

    def live(self) -> list[Entry]:
        """All entries that have not expired."""
        self.expire()
        return [entry for shard in self.shards for entry in shard.entries.values()]

    def shard_of(self, code: tuple[int, bytes]) -> Shard:
        """The shard of a key."""
        if len(self.shards) == 1:
            return self.shards[0]
        kind, data = code
        upper = xxh3_64_intdigest(data, (self.seed + kind) % (1 << 64)) >> 32
        return self.shards[upper * len(self.shards) >> 32]

    def find(self, key: Any) -> tuple[tuple[int, bytes], Shard, Entry | None]:
        """The place of a key, and its entry if there is one."""
        self.expire()
        self.tick += 1
        code = encoded(key)
        shard = self.shard_of(code)
        return code, shard, shard.entries.get(code)

    def expire(self) -> None:
        """Make ghosts of the entries whose time is over."""
        while self.due and self.due[0][0] <= self.clock.ns:
            _, serial, code, entry = heapq.heappop(self.due)
            shard = self.shard_of(code)
            if shard.entries.get(code) is not entry:
                continue
            if entry.expires <= self.clock.ns:
                self.remove(shard, code)
                self.counts.ghosts.append((entry, self.stamp))
            elif entry.expires != NEVER:
                heapq.heappush(self.due, (entry.expires, serial, code, entry))

    def remove(self, shard: Shard, code: tuple[int, bytes], cause: str = "") -> None:
        """Take an entry out."""
        entry = shard.entries.pop(code)
        shard.free += entry.blocks
        if cause:
            self.counts.exact[cause] += 1

    def give_time(self, code: tuple[int, bytes], entry: Entry, ns: int) -> None:
        """Let an entry live for so long from now on; 0 means for ever."""
        before, entry.expires = entry.expires, self.clock.ns + ns if ns else NEVER
        entry.ttl = kept_ttl(ns)
        if entry.expires < before:
            heapq.heappush(self.due, (entry.expires, next(self.serials), code, entry))

    def renewed(self, entry: Entry) -> int:
        """When an entry expires after a hit."""
        if self.geometry.sliding and entry.ttl and entry.expires != NEVER:
            return max(entry.expires, self.clock.ns + entry.ttl)
        return entry.expires

    def default(self, ttl: Any) -> int:
        """A time to live in ns, that of the cache if it was left out."""
        return ttl_ns(self.geometry.ttl if ttl is LEFT_OUT else ttl)

    # --- use ---

    def hit(self, key: Any) -> Entry | None:
        """The entry of a key, which counts as a hit, or as a miss if there is none."""
        code, shard, entry = self.find(key)
        self.counts.exact["misses" if entry is None else "hits"] += 1
        if entry is not None:
            entry.expires = self.renewed(entry)
            if self.observe:
                entry.read = max(entry.read, 1)
                entry.unseen += 1
                unseen = shard.unseen[self.who]
                unseen.append((entry, self.tick))
                while len(unseen) > BUFFER:
                    self.become_seen(*unseen.popleft())
            else:
                entry.read = 2
                shard.entries.move_to_end(code)
        return entry

    def become_seen(self, entry: Entry, tick: int) -> None:
        """A hit has been seen by all, at some time since it was."""
        entry.unseen -= 1
        entry.used = max(entry.used, tick)
        entry.seen = max(entry.seen, self.tick)

    def written(self, shard: Shard) -> None:
        """A process writes to a shard, and so others see its hits."""
        unseen = shard.unseen[self.who]
        while unseen:
            self.become_seen(*unseen.popleft())

    def use(self, shard: Shard, code: tuple[int, bytes]) -> None:
        """Make an entry the most recently used one, for all processes at once."""
        self.written(shard)
        shard.entries.move_to_end(code)
        entry = shard.entries[code]
        entry.used = entry.seen = self.tick

    def may_be_oldest(self, entry: Entry, others: list[Entry]) -> bool:
        """Whether no other entry is certain to have been used before this one."""
        return all(
            other.unseen or entry.used <= max(other.used, other.seen)
            for other in others
            if other is not entry
        )

    # --- storing ---

    def need(self, code: tuple[int, bytes], size: int) -> int:
        """The number of blocks of an entry; one that can never fit is refused."""
        blocks = max(1, -(-(len(code[1]) + size) // self.geometry.block))
        if blocks > self.geometry.blocks:
            self.counts.too_large.add(1, 1)
            raise EntryTooLarge
        return blocks

    def put(self, key: Any, value: Any, ttl: Any, good: Callable[[Any], bool]) -> bool:
        """Store a value if the entry that is there is good for it."""
        code, shard, entry = self.find(key)
        blocks = self.need(code, size_of(value, self.geometry.codec))
        if not good(entry):
            return False
        number = is_number(value) and self.geometry.codec != "fragile"
        new = Entry(plain(key), value, number, blocks, NEVER, 0, 0, 0)
        self.store(shard, code, new, self.default(ttl))
        return True

    def store(self, shard: Shard, code: tuple[int, bytes], new: Entry, ns: int) -> None:
        """Store an entry that fits, in place of the one that is there."""
        self.written(shard)
        self.make_room(shard, code, new.blocks)
        if code in shard.entries:
            self.remove(shard, code, "REPLACED")
        new.stamp = self.stamp
        new.serial = next(self.serials)
        self.give_time(code, new, ns)
        shard.entries[code] = new
        shard.free -= new.blocks
        self.counts.exact["sets"] += 1
        self.use(shard, code)

    def make_room(self, shard: Shard, code: tuple[int, bytes], need: int) -> None:
        """Evict until an entry fits beside the one that it replaces, if both can."""
        while not self.fits(shard, code, need):
            old = shard.entries.get(code)
            if old and old.blocks + need > self.geometry.blocks:
                self.remove(shard, code, "REPLACED")
            elif self.observe:
                self.see_evictions(shard, code, need)
                return
            else:
                victim = next(each for each in shard.entries if each != code)
                self.counts.evicted(shard.entries[victim], self.stamp)
                self.remove(shard, victim)

    def fits(
        self, shard: Shard, code: tuple[int, bytes], need: int, more: int = 0
    ) -> bool:
        """Whether there is room, if some entries with so many blocks were there."""
        full = len(shard.entries) + (more > 0) >= shard.capacity
        return shard.free - more >= need and (code in shard.entries or not full)

    def see_evictions(self, shard: Shard, code: tuple[int, bytes], need: int) -> None:
        """Learn what has been evicted, and say whether it was right."""
        assert self.observe
        there = self.observe()
        gone = [c for c in shard.entries if c != code and c not in there]
        stay = [e for c, e in shard.entries.items() if c != code and c in there]
        for victim in gone:
            entry = shard.entries[victim]
            assert self.may_be_oldest(entry, stay), (
                f"{entry.key!r} was evicted, but others were used before it"
            )
            self.counts.evicted(entry, self.stamp)
        blocks = [shard.entries[victim].blocks for victim in gone]
        for victim in gone:
            self.remove(shard, victim)
        assert self.fits(shard, code, need), "too few entries were evicted"
        assert not all(self.fits(shard, code, need, each) for each in blocks), (
            "too many entries were evicted"
        )

    # --- the methods of a cache: reading ---

    def value(self, entry: Entry) -> Any:
        """The value of an entry, or the error of the codec."""
        error = self.error(entry)
        if error:
            raise error
        return entry.value

    def error(self, entry: Entry) -> type[Exception] | None:
        """What the codec raises for an entry: MemoryError is passed on as it is."""
        if type(entry.value) is not Rotten:
            return None
        memory = entry.value.error is MemoryError
        return MemoryError if memory else SegmentCorrupt

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a cache; so are all methods below."""
        entry = self.hit(key)
        return default if entry is None else self.value(entry)

    def __getitem__(self, key: Any) -> Any:
        entry = self.hit(key)
        if entry is None:
            raise KeyError(key)
        return self.value(entry)

    def gets(self, key: Any) -> Any:
        """The serial number of the version stands for the token."""
        entry = self.hit(key)
        return (None, None) if entry is None else (self.value(entry), entry.serial)

    def get_many(self, keys: Any) -> Any:
        """In the order of the keys, until one cannot be read."""
        found = {}
        for key in keys:
            entry = self.hit(key)
            if entry is not None:
                found[key] = self.value(entry)
        return found

    def peek(self, key: Any, default: Any = None) -> Any:
        """No use, and no hit."""
        entry = self.find(key)[2]
        return default if entry is None else self.value(entry)

    def __contains__(self, key: Any) -> bool:
        return self.find(key)[2] is not None

    def ttl(self, key: Any) -> float | None:
        """The seconds that are left."""
        entry = self.find(key)[2]
        if entry is None:
            raise KeyError(key)
        return None if entry.expires == NEVER else (entry.expires - self.clock.ns) / 1e9

    def __len__(self) -> int:
        return len(self.live())

    def __iter__(self) -> Iterator[Any]:
        return iter([entry.key for entry in self.live()])

    keys = __iter__

    def values(self) -> list[Any]:
        """All values."""
        return [value for _, value in self.items()]

    def items(self) -> list[Any]:
        """All pairs; of several that cannot be read, the cache meets any one first."""
        entries = self.live()
        errors = {self.error(entry) for entry in entries} - {None}
        how, what = self.told
        if how == "raised" and what in errors:
            raise what
        return [(entry.key, self.value(entry)) for entry in entries]

    # --- writing ---

    def set(self, key: Any, value: Any, ttl: Any = LEFT_OUT) -> None:
        """Whatever is there."""
        self.put(key, value, ttl, lambda _: True)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def add(self, key: Any, value: Any, ttl: Any = LEFT_OUT) -> bool:
        """If nothing is there."""
        return self.put(key, value, ttl, lambda entry: entry is None)

    def replace(self, key: Any, value: Any, ttl: Any) -> bool:
        """If something is there."""
        return self.put(key, value, ttl, lambda entry: entry is not None)

    def cas(self, key: Any, value: Any, token: Any, ttl: Any) -> bool:
        """If the version is that of the token."""
        if token is None:
            return self.add(key, value, ttl)
        return self.put(
            key, value, ttl, lambda entry: entry is not None and entry.serial == token
        )

    def set_many(self, mapping: Any, ttl: Any = LEFT_OUT) -> None:
        """One after the other, until one is refused."""
        for key, value in mapping.items():
            self.set(key, value, ttl)

    update = set_many

    def setdefault(self, key: Any, value: Any, ttl: Any) -> Any:
        """A hit, or else a miss and a set."""
        entry = self.hit(key)
        if entry is not None:
            return self.value(entry)
        self.set(key, value, ttl)
        return value

    def get_or_set(self, key: Any, factory: Callable[[], Any], ttl: Any) -> Any:
        """The same for a value that is made."""
        return self.setdefault(key, factory(), ttl)

    def touch(self, key: Any, ttl: Any) -> bool:
        """A use, which changes the time and not the version."""
        code, shard, entry = self.find(key)
        if entry is None:
            return False
        self.give_time(code, entry, self.default(ttl))
        entry.read = max(entry.read, 1)
        self.use(shard, code)
        return True

    def decr(self, key: Any, delta: Any, *, initial: Any, ttl: Any) -> Any:
        """The reverse of ``incr``."""
        return self.incr(key, -delta, initial=initial, ttl=ttl)

    def incr(self, key: Any, delta: Any, *, initial: Any, ttl: Any) -> Any:
        """In place if neither type nor time changes."""
        code, shard, entry = self.find(key)
        blocks = self.need(code, 8)
        if entry is None and initial is None:
            raise KeyError(key)
        if entry is not None and not entry.number:
            raise TypeError
        old = initial if entry is None else entry.value
        new = Entry(plain(key), old + delta, True, blocks, NEVER, 0, 0, 0)
        if not is_number(new.value):
            raise OverflowError
        ns = self.default(ttl)
        if entry is None:
            self.store(shard, code, new, ns)
            return new.value
        time = (self.clock.ns + ns if ns else NEVER), kept_ttl(ns)
        if ttl is LEFT_OUT:
            time = self.renewed(entry), entry.ttl
        if type(old) is type(new.value) and time == (entry.expires, entry.ttl):
            self.overwrite(shard, code, entry, new.value)
        else:
            self.store(shard, code, new, time[0] - self.clock.ns if time[1] else 0)
            new.ttl = time[1]
        return new.value

    def overwrite(
        self, shard: Shard, code: tuple[int, bytes], entry: Entry, value: Any
    ) -> None:
        """Give a number another value in its place: a new version, and a use."""
        entry.value = value
        entry.stamp = self.stamp
        entry.serial = next(self.serials)
        entry.read = max(entry.read, 1)
        self.counts.exact["sets"] += 1
        self.counts.exact["REPLACED"] += 1
        self.use(shard, code)

    # --- removing ---

    def delete(self, key: Any) -> bool:
        """Whether it was there."""
        code, shard, entry = self.find(key)
        if entry is None:
            return False
        self.written(shard)
        self.remove(shard, code, "DELETED")
        return True

    def __delitem__(self, key: Any) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def delete_many(self, keys: Any) -> int:
        """How many were there."""
        return sum(self.delete(key) for key in keys)

    def pop(self, key: Any, *default: Any) -> Any:
        """What cannot be read stays, and its rank and time do, too."""
        entry = self.find(key)[2]
        if entry is None and not default:
            raise KeyError(key)
        value = default[0] if entry is None else self.value(entry)
        self.delete(key)
        return value

    def popitem(self) -> tuple[Any, Any]:
        """The least recently used entry of any shard: the cache has said which."""
        if not self.live():
            raise KeyError
        how, what = self.told
        oldest = [next(iter(s.entries.values())) for s in self.shards if s.entries]
        if how == "raised":
            rotten = self.live() if self.observe else oldest
            assert any(self.error(entry) is what for entry in rotten), what
            raise what
        code, shard, entry = self.find(what[0])
        assert entry is not None, f"popitem() gave {what[0]!r}"
        if self.observe:
            self.written(shard)
            others = list(shard.entries.values())
            assert self.may_be_oldest(entry, others), f"popitem() gave {what[0]!r}"
        else:
            assert entry in oldest, f"popitem() gave {what[0]!r}, not from {oldest}"
        self.remove(shard, code, "DELETED")
        return entry.key, self.value(entry)

    def clear(self, prefix: Any) -> int:
        """All entries, or those whose key begins with the prefix."""
        self.expire()
        if prefix is None:
            kind, data = 0, b""
        else:
            kind, data = encoded(prefix)
        removed = 0
        for shard in self.shards:
            for code in list(shard.entries):
                if kind in (0, code[0]) and code[1].startswith(data):
                    self.remove(shard, code, "CLEARED")
                    removed += 1
        return removed

    def sweep(self) -> int:
        """All that has expired goes; part of it had gone before."""
        self.expire()
        self.counts.exact["sweeps"] += 1
        how, removed = self.told
        assert how == "returned"
        ghosts = len(self.counts.ghosts)
        least = ghosts if self.swept_at_once else 0
        assert least <= removed <= ghosts, f"{removed} swept of {ghosts}"
        self.counts.swept(self.stamp)
        return int(removed)
