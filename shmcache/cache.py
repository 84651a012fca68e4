"""The public face: one bounded LRU + TTL map, shared by the processes of a host.

The methods that must be fast - ``get``, ``set``, ``add``, ``incr``, ``delete`` and
others - stand in ``_engine/operations.py``, whose class ``Engine`` is a base of
``Cache``.  Here stands what may take longer: settings, coming and going, iteration,
single flight, statistics.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from shmcache._arguments import check_budget, check_ttl, shown
from shmcache._engine import (
    MISSING,
    decode_key,
    decode_tagged,
    encode_key,
    make_codec,
)
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._format.fields import kind_of, make_version, tag_of
from shmcache._format.seqlock import stable_read
from shmcache._member import STEP, Member
from shmcache._process.lockfile import mutex
from shmcache._process.sweeper import sweeper
from shmcache._recipes.memoize import Memoized, Results
from shmcache._recipes.single_flight import Flight, InFlightTable
from shmcache._segment.settings import plan_settings
from shmcache._views import Items, Values
from shmcache.errors import UnsupportedKey
from shmcache.stats import Stats

if TYPE_CHECKING:
    from shmcache._process.attachment import Attachment
    from shmcache._segment.settings import Settings

log = logging.getLogger("shmcache")


class Cache(Member):
    """A bounded LRU + TTL map in shared memory, one for all processes of a host.

    ``Cache(name)`` creates the segment of that name, or attaches to it if another
    process of the same user has created it; the settings must agree then.

    All methods are safe to call from any thread and any process:

    - ``get``, ``cache[key]`` and ``get_many`` read; ``gets`` reads with a token for
      ``cas``; ``peek``, ``key in cache`` and ``ttl`` look without counting as a use.
    - ``set``, ``cache[key] = value`` and ``set_many`` store; ``add`` stores only if the
      key is absent, ``replace`` only if it is there, ``cas`` only if it is unchanged.
    - ``incr`` and ``decr`` change a number; ``touch`` renews the time to live.
    - ``delete``, ``del cache[key]``, ``delete_many`` and ``pop`` remove.
    - ``get_or_set`` and ``memoize`` compute what is missing, once for the whole host.
    - ``clear`` removes all entries, or those with a prefix; ``popitem`` removes the
      least recently used one; ``setdefault``, ``update``, ``keys``, ``values``,
      ``items``, ``len`` and iteration work as with a dict.
    - ``sweep`` removes what has expired; ``stats`` counts; ``check`` looks for damage.
    - ``close`` leaves the cache, ``unlink`` removes its names, and ``Cache.attach``
      opens a cache that exists.

    The methods of the first four points must be fast.  They are inherited from
    ``Engine``, so ``help`` shows them after the others, and their code stands in
    ``shmcache/_engine/operations.py``.

    Args:
        name: 1 to 100 letters, digits, ".", "_" or "-".
        max_entries: The largest number of entries; 0: only bytes bound the cache.
        max_bytes: Room for keys and values, an int or a text such as "64 MiB".  The
            default is 512 bytes an entry, at least 1 MiB.  Bookkeeping comes
            on top: 68 bytes an entry and 4 bytes a block.  All is reserved at creation.
        ttl: Seconds that an entry lives by default; None: for ever.
        sliding: Whether a hit renews the time of its entry.
        jitter: Each TTL is shortened by a random part of up to this much, 0 to 1.
        cleanup_interval: Seconds from sweep to sweep in each process.  The default is a
            quarter of the TTL, from 1 s to 5 min.
        shards: Parts with a lock each.  The default is 1 for up to 16,384 entries, and
            more for larger caches.  Entries and bytes are divided evenly, and LRU order
            holds within a shard.
        persist: Whether the segment stays when the last process has left it.
        lock_timeout: Seconds to wait for a lock before LockTimeout.
        codec: "msgpack", "msgspec", "pickle" (executes code on reading, so use it only
            where all writers are trusted), "raw" (bytes), or an object with ``dumps``
            and ``loads``.
        clock: The source of time: a callable that returns nanoseconds as an int or
            seconds as a float, the same in all processes.  The default is
            CLOCK_MONOTONIC.

    Raises:
        ConfigMismatch: The segment exists with other settings.
        OutOfSharedMemory: /dev/shm has no room for the segment.
        SegmentRefused: A file under the name is not safely ours.
        SegmentCorrupt: The bytes of the segment make no sense.
        TooManyWorkers: 1024 processes are attached already.
        ValueError: An argument is out of its range.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        name: str,
        *,
        max_entries: int = 10_000,
        max_bytes: int | str | None = None,
        ttl: float | None = None,
        sliding: bool = False,
        jitter: float = 0.0,
        cleanup_interval: float | None = None,
        shards: int | None = None,
        persist: bool = False,
        lock_timeout: float = 5.0,
        codec: Any = "msgpack",
        clock: Callable[[], float] | None = None,
    ) -> None:
        chosen = make_codec(codec)
        settings = plan_settings(
            max_entries,
            max_bytes,
            ttl,
            sliding,
            jitter,
            cleanup_interval,
            shards,
            persist,
            chosen.name,
        )
        self._given_codec = codec
        self._open(name, settings, chosen, lock_timeout, clock)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        lock_timeout: float = 5.0,
        codec: Any = None,
        clock: Callable[[], float] | None = None,
    ) -> Self:
        """Attach to an existing cache, with its own settings.

        Args:
            name: The name of the cache.
            lock_timeout: Seconds to wait for a lock before LockTimeout.
            codec: It is needed only for a codec that cannot be made from its name, and
                for "pickle", which is never used only because the segment names it.
            clock: The clock that the other processes use.

        Raises:
            SegmentNotFound: Nobody has created the cache, or all its users have left
                it.
        """
        self = cls.__new__(cls)
        chosen = None if codec is None else make_codec(codec)
        self._given_codec = codec
        self._open(name, None, chosen, lock_timeout, clock)
        return self

    @property
    def internals(self) -> Internals:
        """Return what other modules of this package use; it is not public."""
        return Internals(
            attachment=self._attachment,
            settings=self._settings,
            codec=self._codec,
            entries=self._entries,
            snapshot=self._copy_shard,
            writes=self._writes,
            in_flight=self._in_flight(),
        )

    # --- life -----------------------------------------------------------------------

    def close(self) -> None:
        """Leave the cache in this process.

        The last process to leave removes it, unless ``persist`` was asked for.  A
        second call does nothing; any other use afterwards raises CacheClosed.
        """
        with mutex():
            if self.closed:
                return
            joined = self._attachment.entered() and bool(self._attachment.words)
            if joined:
                self._flush_quietly()
            deadline = time.monotonic_ns() + self._timeout_ns
            self.closed = True
            try:
                while joined and self._is_inside_elsewhere():
                    if time.monotonic_ns() > deadline:
                        break
                    time.sleep(0.000_1)
            finally:
                self._unbind()
                self._close_semaphores()
                self._finalizer()
        sweeper().forget(self)

    def unlink(self) -> None:
        """Remove the names of segment and semaphores now.

        Processes that are attached go on with what they have; the next one that asks
        for the name gets a new segment.
        """
        self._require_open()
        with mutex():
            self._raise_if_closed()  # another thread may have been first
            self._attachment.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """Pickle the cache as its name, by which the other process attaches to it."""
        return _attached, (
            type(self),
            self.name,
            self._timeout_ns / 1e9,
            self._given_clock,
            self._given_codec,
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"max_entries={self._settings.max_entries}"
        return f"<shmcache.Cache {self.name!r} {state}>"

    # --- reading and writing, the slower ones ---------------------------------------

    def setdefault(self, key: Any, default: Any = None, ttl: Any = ...) -> Any:
        """Return the value of a key; store ``default`` if it is absent.  O(1)."""
        while True:
            value = self.get(key, MISSING)
            if value is not MISSING:
                return value
            if self.add(key, default, ttl):
                return default

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Store all pairs of a mapping or iterable, and the keyword arguments."""
        pairs = other.items() if isinstance(other, Mapping) else other
        for key, value in pairs:
            self[key] = value
        for key, value in more.items():
            self[key] = value

    def popitem(self) -> tuple[Any, Any]:
        """Remove the least recently used entry, and return its key and value.

        If there are several shards, it is the least recently used entry of one of them.

        If the codec refuses the bytes, its exception is raised and the entry stays.

        Raises:
            KeyError: The cache is empty.
        """
        self._require_open()
        for shard in range(self._settings.shards):
            pair: tuple[Any, Any] | None = None
            decoded = 0
            while found := self._pop_oldest(shard, decoded):
                kind, key, tag, data, version, gone = found
                if pair is None or version != decoded:
                    value = decode_tagged(self._codec, tag, data)
                    pair, decoded = (decode_key(kind, key), value), version
                if gone:
                    return pair
        raise KeyError("the cache is empty")

    def get_or_set(
        self,
        key: Any,
        factory: Callable[[], Any],
        ttl: Any = ...,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Return the value of a key; if it is absent, compute and store it.

        If several callers on the host miss a key, one computes and stores the value,
        and the others wait for it.  If the factory raises, its caller gets the
        exception, and another caller computes; if the computing process dies, another
        one takes over.

        Args:
            key: The key.
            factory: Computes the value.  It must not ask for the same key.
            ttl: Seconds to live; None: for ever; left out: the cache's default.
            timeout: Seconds to wait for another caller's result; None: as long as it
                takes.

        Raises:
            LockTimeout: The result did not come within ``timeout``.
            ReentrantCall: The factory asks for the key that it computes.
        """
        value = self.get(key, MISSING)
        if value is not MISSING:
            return value
        # Bad arguments are refused before the work is done.
        if not callable(factory):
            raise TypeError(
                f"factory must be callable, not {factory!r}; for a value that is"
                " there already use setdefault()"
            )
        check_ttl(ttl)
        check_budget(timeout, "timeout")
        me = threading.get_ident()
        flight = Flight(self._in_flight(), key, me, timeout)
        try:
            with flight:
                for pause in flight.pauses():
                    time.sleep(pause)
                if flight.value is MISSING:
                    flight.value = factory()
                    self.set(key, flight.value, ttl)
        finally:
            flight.end()
        return flight.value

    async def _get_or_await(
        self, key: Any, factory: Callable[[], Any], ttl: Any
    ) -> Any:
        # Do as get_or_set, for a coroutine function; waiting does not block the loop.
        import asyncio

        value = self.get(key, MISSING)
        if value is not MISSING:
            return value
        me = asyncio.current_task()
        flight = Flight(self._in_flight(), key, me, None)
        try:
            with flight:
                for pause in flight.pauses():
                    await asyncio.sleep(pause)
                if flight.value is MISSING:
                    flight.value = await factory()
                    self.set(key, flight.value, ttl)
        finally:
            flight.end()
        return flight.value

    def _in_flight(self) -> InFlightTable:
        return InFlightTable(
            self._attachment,
            self._key_hash,
            self._enter_flight,
            self._leave_flight,
            self._free_flights,
            self._fliers,
            self.peek,
        )

    def memoize(
        self,
        ttl: Any = ...,
        *,
        key: Callable[..., Any] | None = None,
        typed: bool = False,
    ) -> Callable[[Callable[..., Any]], Any]:
        """Return a decorator that remembers a function's results in this cache.

        All processes share the results.  If several callers miss at once, one computes.
        Arguments must be valid keys (str, bytes, int, tuples of them; None, bool and
        float are accepted, too), or ``key`` must make a key of them.

        The result of a method belongs to its instance, and so it is not shared with
        other processes, unless the instance's class has a ``__cache_key__`` attribute
        (or ``key`` is given), which then stands for the instance.

        The function gets ``cache_key(...)``, ``invalidate(...) -> bool`` and
        ``__wrapped__``.  Coroutine functions do not block their loop.

        Args:
            ttl: Seconds that a result lives.  None means for ever; if left out, the
                cache's default applies.
            key: ``key(*args, **kwargs)`` makes the key of a call.
            typed: Whether 1, 1.0 and True are different arguments.
        """
        if callable(ttl):
            raise TypeError("memoize needs its parentheses: @cache.memoize()")
        check_ttl(ttl)
        if key is not None and not callable(key):
            raise TypeError(
                f"key must be callable, as it makes the key of a call, not {key!r}"
            )

        def decorate(function: Callable[..., Any]) -> Memoized:
            results = Results(self.get_or_set, self._get_or_await, self.delete)
            return Memoized(results, function, ttl, key, typed)

        return decorate

    def clear(self, prefix: Any = None) -> int:
        """Remove all entries that are there now, or those whose key has a prefix.

        Entries that are stored meanwhile stay.  O(buckets), in short holds of one lock.

        Args:
            prefix: A str, bytes or tuple.  A tuple is a prefix of all tuples that begin
                with its elements.

        Returns:
            How many entries were removed.
        """
        self._require_open()
        kind, data = 0, b""
        if prefix is not None:
            kind, data = encode_key(prefix)
            if kind == L.Kind.INT:
                raise UnsupportedKey(
                    f"a prefix must be str, bytes or tuple, not {shown(prefix)};"
                    " delete() removes a single key"
                )
        removed = 0
        words = self._attachment.words
        newest = [
            make_version(words[self._words_of(shard) + L.S_SEQUENCE])
            for shard in range(self._settings.shards)
        ]
        for shard, version in enumerate(newest):
            bucket = 0
            while bucket >= 0:
                bucket, count = self._clear_step(
                    shard, bucket, STEP, version, kind, data
                )
                removed += count
        return removed

    # --- as a mapping ---------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of live entries, after removing what has expired."""
        self._require_open()
        for shard in range(self._settings.shards):
            while self._is_due(shard) and self._step(shard, STEP) >= 0:
                pass
        words = self._attachment.words
        total = 0
        for shard in range(self._settings.shards):
            at = self._words_of(shard) + L.S_ENTRIES
            if words[at] > self._attachment.header.geometry.slots:
                self._step(shard, 0)  # raises, and rebuilds the count
            total += words[at]
        return total

    def __bool__(self) -> bool:
        """Return True: an empty cache is true, too."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """Iterate over all keys, in no order.

        An entry that lives throughout is met exactly once.  Iteration does not count
        as a use of the entries.  It holds a lock for some dozens of entries at a time,
        so others go on writing.
        """
        for kind, key, *_ in self._entries(values=False):
            yield decode_key(kind, key)

    def _entries(
        self, *, values: bool
    ) -> Iterator[tuple[int, bytes, int, bytes, int, int]]:
        # Kind, key, tag, value, expiry (ns) and stamp of each.
        self._require_open()
        for shard in range(self._settings.shards):
            bucket = 0
            while bucket >= 0:
                self._require_open()
                bucket, flat = self._scan(shard, bucket, STEP, values)
                for i in range(0, len(flat), 5):
                    meta, key, value, expires, stamp = flat[i : i + 5]
                    yield kind_of(meta), key, tag_of(meta), value, expires, stamp

    def _iter_values(self) -> Iterator[Any]:
        for _, _, tag, data, *_ in self._entries(values=True):
            yield decode_tagged(self._codec, tag, data)

    def _iter_items(self) -> Iterator[tuple[Any, Any]]:
        for kind, key, tag, data, *_ in self._entries(values=True):
            yield decode_key(kind, key), decode_tagged(self._codec, tag, data)

    def keys(self) -> KeysView[Any]:
        """Return a view of the keys, with ``len``, ``in`` and iteration."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        """Return a view of the values."""
        return Values(self, self._iter_values)

    def items(self) -> ItemsView[Any, Any]:
        """Return a view of the pairs of key and value; each pair is of one moment."""
        return Items(self, self._iter_items)

    # --- seeing ---------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return counts since the segment's creation, over all processes.

        Processes that have left are included.  Each shard is read at one moment,
        without its lock; ``unstable_shards`` says for how many shards that failed.
        O(shards + workers).
        """
        self._require_open()
        attachment = self._attachment
        copies = [self._shard_words(shard) for shard in range(self._settings.shards)]
        return Stats.of(
            attachment.header,
            [words for words, _ in copies],
            attachment.counters(),
            recovered=attachment.words[L.H_RECOVERED],
            workers=sum(map(attachment.alive, attachment.tokens())),
            unstable_shards=sum(not stable for _, stable in copies),
        )

    def _shard_words(self, shard: int) -> tuple[tuple[int, ...], bool]:
        # Return the words up to the counters' end, and whether they are of one moment.
        base = self._words_of(shard)
        words = self._attachment.words
        form = f"{L.S_COUNTERS_END}Q"
        return stable_read(
            words,
            base,
            lambda: struct.unpack(form, words[base : base + L.S_COUNTERS_END]),
        )

    def _writes(self) -> list[int] | None:
        # Return how many writes each shard has seen; None while one is under way.
        self._require_open()
        words = self._attachment.words
        counts = []
        for shard in range(self._settings.shards):
            base = self._words_of(shard)
            count, stable = stable_read(
                words, base, partial(words.__getitem__, base + L.S_SEQUENCE), attempts=1
            )
            if not stable:
                return None
            counts.append(count)
        return counts

    def check(self) -> list[str]:
        """Return what is wrong with the segment, as sentences; [] when it is sound.

        An independent reader of the format checks every record and every list, a shard
        at a time, in a copy made under the shard's lock.  Each finding is one sentence.
        O(size).
        """
        self._require_open()
        geometry = self._attachment.header.geometry
        with mutex():
            self._raise_if_closed()  # another thread may have been first
            with self._attachment.admin():
                head = bytes(self._attachment.block.view[: geometry.shards_at])
        findings = _check.check_header(head)
        header = _check.read_header(head)
        for shard in range(geometry.shards):
            data = self._copy_shard(shard, 0, geometry.stride)
            findings += _check.check_shard(data, header, shard, quiescent=False)
        return findings


@dataclass(frozen=True)
class Internals:
    """The methods beyond the public ones that modules of this package may use.

    A new object is made for each use, so that it keeps no cache alive.
    """

    attachment: Attachment
    settings: Settings
    codec: Any
    # Kind, key, tag, value, expiry (ns) and stamp of each entry; ``values=`` says
    # whether values are copied.
    entries: Callable[..., Iterator[tuple[int, bytes, int, bytes, int, int]]]
    # A copy of the bytes of a shard from one offset to another, made under its lock.
    snapshot: Callable[[int, int, int], bytes]
    # How many writes each shard has seen; None while one is under way.
    writes: Callable[[], list[int] | None]
    # The in-flight table of this cache, for single flight.
    in_flight: InFlightTable


MutableMapping.register(Cache)


def _attached(
    kind: type[Cache],
    name: str,
    lock_timeout: float,
    clock: Callable[[], float] | None,
    codec: Any,
) -> Cache:
    return kind.attach(name, lock_timeout=lock_timeout, clock=clock, codec=codec)
