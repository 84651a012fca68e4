"""The cache against a plain model: an OrderedDict, a fake clock, and arithmetic.

The model knows nothing of slots, wheels or recency buffers.  It knows that an entry
takes whole blocks, that what has expired is not there, and which entry goes when room
is needed.  Hypothesis writes the histories; after each step the independent checker
looks at the segment.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import shmcache
from shmcache import Cache
from shmcache._format import layout as fmt

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Clock

STEPS = 50

LEFT_OUT: Any = ...
MISSING = object()

KEYS: list[Any] = ["", "a", "b", "c", "k" * 100, b"a", 1, 2, 3, ("t", 1), ("t", 2)]
# Values are drawn by name, so that a failing history is short.
VALUES: dict[str, Any] = {
    **{repr(value): value for value in (None, 0, 7, -1, 1.5, "", "text", b"")},
    **{f"{n} bytes": b"x" * n for n in (50, 60, 300, 600, 1500, 3000)},
}
# Each is a whole number of the units in which a record keeps it, so renewals are exact.
TTLS: list[Any] = [LEFT_OUT, LEFT_OUT, None, 1e-9, 0.001, 0.05, 1, 100.0, 1e6]

keys = st.sampled_from(KEYS)
values = st.sampled_from(list(VALUES))
ttls = st.sampled_from(TTLS)


def key_size(key: Any) -> int:
    """Bytes of a key in the arena."""
    if isinstance(key, tuple):
        return sum(3 + key_size(part) for part in key)
    return 1 if isinstance(key, int) else len(key)


def value_size(value: Any) -> int:
    """Bytes of one of VALUES in the arena."""
    if value is None:
        return 0
    return 8 if isinstance(value, (int, float)) else len(value)


def ttl_ns(ttl: float | None) -> int:
    """A TTL in ns, 0 for "never"."""
    return 0 if ttl is None else round(ttl * 1e9)


@dataclass
class Entry:
    """The state of an entry, as the model knows it."""

    value: Any
    blocks: int
    expires: int | None
    ttl: int
    serial: int  # of its version


@dataclass
class Config:
    """The settings of a cache, and what follows from them."""

    max_entries: int
    max_bytes: int
    ttl: float | None
    sliding: bool
    shards: int = 1

    @property
    def geometry(self) -> fmt.Geometry:
        """The plan of the segment, which the engine follows."""
        return fmt.plan_for(self.max_entries, self.max_bytes, self.shards)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of ``Cache``."""
        return {**vars(self), "persist": True, "cleanup_interval": 3600}


class Model:
    """A bounded LRU + TTL map, as plain as possible."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.entries: OrderedDict[Any, Entry] = OrderedDict()
        self.serial = 0
        self.blocks = config.geometry.blocks
        self.block_size = config.geometry.block_size
        self.capacity = config.max_entries or self.blocks
        self.count = dict.fromkeys(
            ["hits", "misses", "sets", "too_large", "CAPACITY", "DELETED", "REPLACED"],
            0,
        )

    def purge(self) -> None:
        """Drop entries that have expired."""
        for key, entry in list(self.entries.items()):
            if entry.expires is not None and entry.expires <= self.clock.ns:
                del self.entries[key]

    def look(self, key: Any) -> Any:
        """The value of a key, without using it."""
        self.purge()
        return self.entries[key].value if key in self.entries else MISSING

    def use(self, key: Any) -> Any:
        """The value of a key, counted, moved to the front, renewed if sliding."""
        value = self.look(key)
        if value is MISSING:
            self.count["misses"] += 1
        else:
            self.count["hits"] += 1
            self.entries.move_to_end(key)
            self.renew(key)
        return value

    def renew(self, key: Any) -> None:
        """In a sliding cache, give an entry its TTL anew."""
        entry = self.entries[key]
        if self.config.sliding and entry.expires is not None:
            entry.expires = max(entry.expires, self.clock.ns + entry.ttl)

    def expiry(self, ttl: float | None) -> tuple[int | None, int]:
        """The expiry of an entry that is written now with a TTL, and the TTL in ns."""
        ns = ttl_ns(self.config.ttl if ttl is LEFT_OUT else ttl)
        return (self.clock.ns + ns if ns else None), ns

    def need(self, key: Any, value: Any) -> int:
        """The number of blocks that an entry needs."""
        return max(1, -(-(key_size(key) + value_size(value)) // self.block_size))

    def fits(self, key: Any, value: Any, *, count: int = 1) -> bool:
        """Whether an entry can be stored at all; a refusal is counted."""
        if self.need(key, value) <= self.blocks:
            return True
        self.count["too_large"] += count
        return False

    def store(
        self,
        key: Any,
        value: Any,
        expires: int | None,
        ttl: int,
        *,
        in_place: bool = False,
    ) -> None:
        """Store what fits, making room as the cache should."""
        self.purge()
        need = self.need(key, value)
        if not in_place:
            self.make_room(key, need)
        if self.entries.pop(key, None):
            self.count["REPLACED"] += 1
        self.serial += 1
        self.entries[key] = Entry(value, need, expires, ttl, self.serial)
        self.count["sets"] += 1

    def make_room(self, key: Any, need: int) -> None:
        """Evict until old and new fit together, if they can at all."""
        if key not in self.entries:
            while len(self.entries) >= self.capacity:
                self.evict(key)
        while self.used + need > self.blocks:
            if key in self.entries and self.entries[key].blocks + need > self.blocks:
                del self.entries[key]
                self.count["REPLACED"] += 1
            else:
                self.evict(key)

    def evict(self, keep: Any) -> None:
        """Evict the least recently used entry, but not the one that is overwritten."""
        del self.entries[next(key for key in self.entries if key != keep)]
        self.count["CAPACITY"] += 1

    @property
    def used(self) -> int:
        """The number of blocks in use."""
        return sum(entry.blocks for entry in self.entries.values())

    def drop(self, key: Any) -> Any:
        """Take an entry out and return its value."""
        value = self.look(key)
        if value is not MISSING:
            del self.entries[key]
            self.count["DELETED"] += 1
        return value


CONFIGS = st.builds(
    Config,
    max_entries=st.sampled_from([1, 3, 6]),
    max_bytes=st.sampled_from([640, 1 << 16]),
    ttl=st.sampled_from([None, 0.05, 100.0]),
    sliding=st.booleans(),
) | st.builds(
    Config,
    max_entries=st.just(0),
    max_bytes=st.sampled_from([256, 1024, 2560]),
    ttl=st.sampled_from([None, 0.05, 100.0]),
    sliding=st.booleans(),
)


class OneShard(RuleBasedStateMachine):
    """All operations on one shard, where everything is known, also the order of use."""

    configs: ClassVar[st.SearchStrategy[Config]] = CONFIGS
    new_name: ClassVar[Callable[[], str]]
    new_clock: ClassVar[Callable[[], Clock]]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Make a cache, twice in this process, and a model of it."""
        self.clock = type(self).new_clock()
        config = data.draw(self.configs, "config")
        self.model = Model(config, self.clock)
        self.name = type(self).new_name()
        self.handles = self.open()
        self.cache = self.handles[0]
        self.tokens: list[tuple[Any, int, int]] = []

    def open(self) -> list[Cache]:
        """Open two Cache objects on the same segment."""
        settings = self.model.config.settings
        return [Cache(self.name, clock=self.clock, **settings) for _ in range(2)]

    def teardown(self) -> None:
        """Take out what is left, in the order of use; then remove everything."""
        if not hasattr(self, "handles"):
            return
        try:
            if not self.cache.closed:
                self.in_the_end()
                self.cache.unlink()
        finally:
            for cache in self.handles:
                cache.close()

    def in_the_end(self) -> None:
        """After a sweep the sizes are exact, and popitem() goes by age."""
        self.model.purge()
        self.cache.sweep()
        stats = self.cache.stats()
        assert stats.entries == len(self.model.entries)
        assert stats.bytes_used == self.model.used * self.model.block_size
        popped = [self.cache.popitem() for _ in range(stats.entries)]
        assert popped == [(k, e.value) for k, e in self.model.entries.items()]

    # --- what must hold after each step ---

    @invariant()
    def is_sound(self) -> None:
        """The checker finds nothing, and bounds and counts hold."""
        assert self.cache.check() == []
        stats = self.cache.stats()
        assert stats.entries <= self.model.capacity
        assert stats.recoveries == 0
        counted = {"hits": stats.hits, "misses": stats.misses, "sets": stats.sets}
        counted["too_large"] = stats.too_large
        for cause in ("CAPACITY", "DELETED", "REPLACED"):
            counted[cause] = stats.removed[cause]
        assert counted == self.model.count
        gone = sum(stats.removed.values())
        assert stats.entries == stats.sets - gone

    def settle(self) -> None:
        """Called after whatever may have evicted something."""

    # --- time, and Cache objects ---

    @rule(ns=st.sampled_from([1, 10**3, 1 << 20, 50 * 10**6, 10**9, 10**11, 10**15]))
    def time_goes_by(self, ns: int) -> None:
        """Move the clock on."""
        self.clock.ns += ns

    @rule(before=st.sampled_from([0, 0, 1]))
    def time_goes_by_to_an_expiry(self, before: int) -> None:
        """Move the clock to the moment at which an entry expires, or just before it."""
        self.model.purge()
        due = [e.expires for e in self.model.entries.values() if e.expires is not None]
        if due:
            self.clock.ns = max(self.clock.ns, min(due) - before)

    @rule()
    def switch(self) -> None:
        """Go on with the other Cache object of the same name."""
        self.cache = self.handles[self.cache is self.handles[0]]

    @rule()
    def restart(self) -> None:
        """Close all; the segment persists, and is repaired when it is found again."""
        for cache in self.handles:
            cache.close()
        self.handles = self.open()
        self.cache = self.handles[0]

    # --- reading ---

    @rule(key=keys)
    def get(self, key: Any) -> None:
        """A hit gives the value, a miss the default."""
        assert self.cache.get(key, MISSING) == self.model.use(key)

    @rule(key=keys, times=st.integers(2, 100))
    def get_often(self, key: Any, times: int) -> None:
        """Hit two entries in turn, more often than a recency buffer holds."""
        for i in range(times):
            each = key if i % 2 else "a"
            assert self.cache.get(each, MISSING) == self.model.use(each)

    @rule(some=st.lists(keys, max_size=6))
    def get_many(self, some: list[Any]) -> None:
        """A dict of what is there."""
        expected = {}
        for key in some:
            value = self.model.use(key)
            if value is not MISSING:
                expected[key] = value
        assert self.cache.get_many(some) == expected

    @rule(key=keys)
    def gets(self, key: Any) -> None:
        """The value is returned, with a token to keep."""
        value, token = self.cache.gets(key)
        expected = self.model.use(key)
        if expected is MISSING:
            assert (value, token) == (None, None)
        else:
            assert value == expected
            assert token is not None
            self.tokens.append((key, token, self.model.entries[key].serial))

    @rule(key=keys)
    def look(self, key: Any) -> None:
        """Peek, ``in`` and ttl agree with the model, and change nothing."""
        expected = self.model.look(key)
        assert self.cache.peek(key, MISSING) == expected
        assert (key in self.cache) == (expected is not MISSING)
        if expected is MISSING:
            with pytest.raises(KeyError):
                self.cache.ttl(key)
            return
        expires = self.model.entries[key].expires
        left = None if expires is None else (expires - self.clock.ns) / 1e9
        assert self.cache.ttl(key) == left

    @rule()
    def look_at_all(self) -> None:
        """Iteration meets each live entry once."""
        self.model.purge()
        expected = [(k, e.value) for k, e in self.model.entries.items()]
        assert sorted(self.cache.items(), key=repr) == sorted(expected, key=repr)
        assert len(list(self.cache)) == len(expected)
        assert len(self.cache) == len(expected)

    # --- writing ---

    def stored(self, call: Callable[[], Any], key: Any, value: Any, ttl: Any) -> Any:
        """The result of a call that stores; MISSING if it is refused as too large."""
        if not self.model.fits(key, value):
            with pytest.raises(shmcache.EntryTooLarge):
                call()
            return MISSING
        self.model.store(key, value, *self.model.expiry(ttl))
        result = call()
        self.settle()
        return result

    @rule(key=keys, value=values, ttl=ttls)
    def set(self, key: Any, value: str, ttl: Any) -> None:
        """The value is stored, whatever is there."""
        new = VALUES[value]
        self.stored(lambda: self.cache.set(key, new, ttl), key, new, ttl)

    @rule(key=keys, value=values, ttl=ttls)
    def add(self, key: Any, value: str, ttl: Any) -> None:
        """The value is stored if nothing was there."""
        good = self.model.look(key) is MISSING
        self.store_if(good, lambda new: self.cache.add(key, new, ttl), key, value, ttl)

    @rule(key=keys, value=values, ttl=ttls)
    def replace(self, key: Any, value: str, ttl: Any) -> None:
        """The value is stored if something was there."""
        good = self.model.look(key) is not MISSING
        self.store_if(
            good, lambda new: self.cache.replace(key, new, ttl), key, value, ttl
        )

    @rule(which=st.integers(0, 100), value=values, ttl=ttls)
    def cas(self, which: int, value: str, ttl: Any) -> None:
        """The value is stored if the version is still that of the token."""
        if not self.tokens:
            return
        key, token, serial = self.tokens[which % len(self.tokens)]
        self.model.purge()
        entry = self.model.entries.get(key)
        good = entry is not None and entry.serial == serial
        self.store_if(
            good, lambda new: self.cache.cas(key, new, token, ttl), key, value, ttl
        )

    def store_if(
        self, good: bool, call: Callable[[Any], bool], key: Any, value: str, ttl: Any
    ) -> None:
        """Store what may be stored, or be told that it was not."""
        new = VALUES[value]
        if good or self.model.need(key, new) > self.model.blocks:
            assert self.stored(lambda: call(new), key, new, ttl) in (True, MISSING)
        else:
            assert call(new) is False

    @rule(some=st.dictionaries(keys, values, max_size=5), ttl=ttls)
    def set_many(self, some: dict[Any, str], ttl: Any) -> None:
        """All entries that fit are stored, one after the other."""
        pairs = {key: VALUES[value] for key, value in some.items()}
        pairs = {k: v for k, v in pairs.items() if self.model.fits(k, v, count=0)}
        for key, value in pairs.items():
            self.model.store(key, value, *self.model.expiry(ttl))
        self.cache.set_many(pairs, ttl)
        self.settle()

    @rule(key=keys, value=values, ttl=ttls, how=st.sampled_from(["get_or", "default"]))
    def get_or_set(self, key: Any, value: str, ttl: Any, how: str) -> None:
        """The value that is there is returned, or else the new one is stored."""
        present, new = self.model.use(key), VALUES[value]

        def call() -> Any:
            if how == "default":
                return self.cache.setdefault(key, new, ttl)
            return self.cache.get_or_set(key, lambda: new, ttl)

        if present is MISSING:
            assert self.stored(call, key, new, ttl) in (new, MISSING)
        else:
            assert call() == present

    @rule(
        key=keys,
        delta=st.sampled_from([1, -5, 0.5]),
        initial=st.sampled_from([None, 10]),
        ttl=ttls,
    )
    def incr(self, key: Any, delta: Any, initial: Any, ttl: Any) -> None:
        """Numbers grow, an absent one begins, and other values are refused."""

        def call() -> Any:
            return self.cache.incr(key, delta, initial=initial, ttl=ttl)

        old = self.model.look(key)
        if not self.model.fits(key, 0):
            with pytest.raises(shmcache.EntryTooLarge):
                call()
        elif old is MISSING and initial is None:
            with pytest.raises(KeyError):
                call()
        elif old is not MISSING and type(old) not in (int, float):
            with pytest.raises(TypeError):
                call()
        else:
            new = (initial if old is MISSING else old) + delta
            expires, ns = self.model.expiry(ttl)
            entry = self.model.entries.get(key)
            times = entry and (entry.expires, entry.ttl)
            if ttl is LEFT_OUT and entry is not None:
                self.model.renew(key)
                expires, ns = entry.expires, entry.ttl
            in_place = type(new) is type(old) and times == (expires, ns)
            self.model.store(key, new, expires, ns, in_place=in_place)
            assert call() == new
            self.settle()

    @rule(key=keys, ttl=ttls)
    def touch(self, key: Any, ttl: Any) -> None:
        """The entry gets a new expiry, and counts as used."""
        self.model.purge()
        there = key in self.model.entries
        assert self.cache.touch(key, ttl) is there
        if there:
            entry = self.model.entries[key]
            entry.expires, entry.ttl = self.model.expiry(ttl)
            self.model.entries.move_to_end(key)

    # --- removing ---

    @rule(key=keys, how=st.sampled_from(["delete", "pop", "del", "many"]))
    def remove(self, key: Any, how: str) -> None:
        """The entry is removed once."""
        value = self.model.drop(key)
        there = value is not MISSING
        if how == "delete":
            assert self.cache.delete(key) is there
        elif how == "pop":
            assert self.cache.pop(key, MISSING) == value
        elif how == "many":
            assert self.cache.delete_many([key, key]) == there
        elif there:
            del self.cache[key]
        else:
            with pytest.raises(KeyError):
                del self.cache[key]

    @rule()
    def popitem(self) -> None:
        """The oldest entry is removed."""
        self.model.purge()
        if not self.model.entries:
            with pytest.raises(KeyError):
                self.cache.popitem()
            return
        key = self.oldest()
        assert self.popped == (key, self.model.drop(key))

    def oldest(self) -> Any:
        """The key that popitem should give; pops."""
        key = next(iter(self.model.entries))
        self.popped = self.cache.popitem()
        return key

    @rule(prefix=st.sampled_from([None, "", "k", "a", b"", (), ("t",), ("t", 2)]))
    def clear(self, prefix: Any) -> None:
        """All entries are removed, or those whose key begins with the prefix."""
        self.model.purge()
        gone = [
            key
            for key in self.model.entries
            if prefix is None
            or (type(key) is type(prefix) and key[: len(prefix)] == prefix)
        ]
        for key in gone:
            del self.model.entries[key]
        assert self.cache.clear(prefix) == len(gone)

    @rule()
    def sweep(self) -> None:
        """Nothing that has expired is left, and nothing else is removed."""
        self.model.purge()
        self.cache.sweep()
        stats = self.cache.stats()
        assert stats.entries == len(self.model.entries)
        assert stats.bytes_used == self.model.used * self.model.block_size


class ManyShards(OneShard):
    """All operations on several shards, where the model asks the cache which entries
    went."""

    configs: ClassVar[st.SearchStrategy[Config]] = st.builds(
        Config,
        max_entries=st.sampled_from([0, 6, 12]),
        max_bytes=st.sampled_from([4096, 1 << 16]),
        ttl=st.sampled_from([None, 0.05, 100.0]),
        sliding=st.booleans(),
        shards=st.sampled_from([2, 3]),
    )

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """The model has room for all."""
        super().begin(data)
        self.model.make_room = lambda *_: None  # type: ignore[method-assign]
        self.model.capacity *= self.model.config.shards

    def settle(self) -> None:
        """What is not there any more was evicted; the invariant counts them."""
        self.model.purge()
        for key in set(self.model.entries) - set(self.cache):
            del self.model.entries[key]
            self.model.count["CAPACITY"] += 1
        replaced = self.cache.stats().removed["REPLACED"]
        evicted = self.cache.stats().removed["CAPACITY"]
        # In a batch an entry may be evicted before it is overwritten.
        assert replaced <= self.model.count["REPLACED"]
        assert replaced + evicted == (
            self.model.count["REPLACED"] + self.model.count["CAPACITY"]
        )
        self.model.count["REPLACED"], self.model.count["CAPACITY"] = replaced, evicted

    def oldest(self) -> Any:
        """Any key will do."""
        self.popped = self.cache.popitem()
        return self.popped[0]

    def in_the_end(self) -> None:
        """After a sweep all entries come out, in any order."""
        self.sweep()
        popped = [self.cache.popitem() for _ in range(len(self.cache))]
        expected = [(k, e.value) for k, e in self.model.entries.items()]
        assert sorted(popped, key=repr) == sorted(expected, key=repr)


def run(
    machine: type[OneShard],
    new_name: Callable[[], str],
    new_clock: Callable[[], Clock],
    examples: int,
) -> None:
    """Have Hypothesis write histories for a machine."""

    class Machine(machine):  # type: ignore[misc, valid-type]
        pass

    Machine.new_name = staticmethod(new_name)
    Machine.new_clock = staticmethod(new_clock)
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=examples, stateful_step_count=STEPS),
    )
