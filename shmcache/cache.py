"""The public face: one bounded LRU + TTL map, shared by the processes of a host.

The hot methods - ``get``, ``set``, ``add``, ``incr``, ``delete`` and others - stand in
``_engine/operations.py``, whose class is the base of ``Cache``; here is what
a call can afford: settings, life, iteration, single flight, statistics.
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

from shmcache._arguments import check_budget, check_ttl
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

    The methods that must be fast are inherited from ``Engine``, and stand with their
    docstrings in ``shmcache/_engine/operations.py``: ``get``, ``peek``, ``get_many``,
    ``gets``, ``ttl``, ``in``, ``[key]``; ``set``, ``set_many``, ``add``, ``replace``,
    ``cas``, ``touch``, ``incr``, ``decr``, ``[key] = value``; ``delete``,
    ``delete_many``, ``pop``, ``del [key]``.  ``sweep`` stands in
    ``shmcache/_member.py``, and all other methods stand here.  All of them are safe to
    use from any thread and process.

    Args:
        name: 1 to 100 letters, digits, ".", "_" or "-".
        max_entries: How many entries there are at most; 0: the bytes alone are bounded.
        max_bytes: Room for keys and values, an int or a text such as "64 MiB".  The
            default is 512 bytes an entry, at least 1 MiB.  Bookkeeping, 72 bytes an
            entry, comes on top.  All of it is reserved at creation.
        ttl: Seconds that an entry lives by default; None: for ever.
        sliding: Whether a hit renews the time of its entry.
        jitter: Each TTL is shortened by a random part of up to this much, 0 to 1.
        cleanup_interval: Seconds from sweep to sweep in each process.  The default is a
            quarter of the TTL, from 1 s to 5 min.
        shards: Parts with a lock each.  The default is 1 up to 16,384 entries, and more
            above.  Entries and bytes are divided evenly, and LRU order holds within a
            shard.
        persist: Whether the segment stays when the last process has gone.
        lock_timeout: Seconds to wait for a lock before LockTimeout.
        codec: "msgpack", "msgspec", "pickle" (executes code on reading, so use it only
            where all writers are trusted), "raw" (bytes), or an object with ``dumps``
            and ``loads``.
        clock: What to use for time: a callable that returns nanoseconds as an int or
            seconds as a float, the same in all processes.

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
            name: As of ``Cache``; so are ``lock_timeout`` and ``clock``.
            lock_timeout: Seconds.
            codec: Is needed only for a codec that cannot be made from its name, and to
                read and write what is pickled: the segment's word is not enough for
                that.
            clock: The one that the other processes use.

        Raises:
            SegmentNotFound: Nobody has created the cache, or all its users have gone.
        """
        self = cls.__new__(cls)
        chosen = None if codec is None else make_codec(codec)
        self._given_codec = codec
        self._open(name, None, chosen, lock_timeout, clock)
        return self

    @property
    def internals(self) -> Internals:
        """What other modules of this package build on; not a public interface."""
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
            if self._attachment.entered() and self._attachment.words:
                self._flush_quietly()
            self.closed = True
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
        """Pickles as its name: the other process attaches to the same segment."""
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
        """Return the value of a key; store ``default`` when it is absent.  O(1)."""
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

        With several shards it is the least recently used entry of one of them.

        Raises:
            KeyError: The cache is empty.
        """
        self._require_open()
        for shard in range(self._settings.shards):
            found = self._pop_oldest(shard)
            if found:
                kind, key, tag, data = found
                return decode_key(kind, key), decode_tagged(self._codec, tag, data)
        raise KeyError("the cache is empty")

    def get_or_set(
        self,
        key: Any,
        factory: Callable[[], Any],
        ttl: Any = ...,
        *,
        timeout: float | None = None,
    ) -> Any:
        """The value of a key; ``factory()`` computes and stores it when it is absent.

        Over all processes of the host one caller computes, and the others wait for its
        result.  What the factory raises reaches its own caller, and the next one in the
        queue computes; if the computing process dies, another takes over.

        Args:
            key: The key.
            factory: Computes the value.  Asking it for the same key again is refused.
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
        # Refused before the work is done.
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
        # As get_or_set, for a coroutine function; waiting leaves the loop free.
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
        """A decorator that remembers a function's results in this cache.

        All processes share the results, and of callers that miss at once one computes.
        Arguments must be valid keys (str, bytes, int, tuples of them; None, bool and
        float are taken, too), or ``key`` makes a key of them.

        The result of a method belongs to its instance, and so it is not shared with
        other processes, unless the instance's class has a ``__cache_key__`` attribute
        (or ``key`` is given), which then stands for the instance.

        The function gets ``cache_key(...)``, ``invalidate(...) -> bool`` and
        ``__wrapped__``.  Coroutine functions do not block their loop.

        Args:
            ttl: Seconds a result lives; None: for ever; left out: the cache's default.
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
            prefix: A str, bytes or tuple; of a tuple key the first elements count.

        Returns:
            How many entries went.
        """
        self._require_open()
        kind, data = 0, b""
        if prefix is not None:
            kind, data = encode_key(prefix)
            if kind == L.Kind.INT:
                raise UnsupportedKey(
                    f"a prefix must be str, bytes or tuple, not {prefix!r};"
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
        """The number of live entries; removes what has expired first."""
        self._require_open()
        for shard in range(self._settings.shards):
            while self._is_due(shard) and self._step(shard, STEP) >= 0:
                pass
        words = self._attachment.words
        total = 0
        for shard in range(self._settings.shards):
            at = self._words_of(shard) + L.S_ENTRIES
            if words[at] > self._attachment.header.geometry.slots:
                self._step(shard, 0)  # raises, and has the count repaired
            total += words[at]
        return total

    def __bool__(self) -> bool:
        """True: a cache is not nothing because it is empty."""
        return True

    def __iter__(self) -> Iterator[Any]:
        """Iterate over all keys, in no order.

        An entry that lives throughout is met exactly once.  Iteration is no use of the
        entries.  It holds a lock for some dozens of entries at a time, so others go on
        writing.
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
        """The keys, as a view: ``len``, ``in``, iteration."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        """The values, as a view."""
        return Values(self, self._iter_values)

    def items(self) -> ItemsView[Any, Any]:
        """The pairs of key and value, as a view; each pair was so at one moment."""
        return Items(self, self._iter_items)

    # --- seeing ---------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return counts since the segment's creation, over all processes.

        Processes that have gone are included.  Each shard is read at one moment,
        without its lock; ``unstable_shards`` says for how many that failed.  O(shards +
        workers).
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
        # The words up to the counters' end, and whether they are of one moment.
        base = self._words_of(shard)
        words = self._attachment.words
        form = f"{L.S_COUNTERS_END}Q"
        return stable_read(
            words,
            base,
            lambda: struct.unpack(form, words[base : base + L.S_COUNTERS_END]),
        )

    def _writes(self) -> list[int] | None:
        # The number of writes that each shard has seen; None while one is under way.
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
        """Say what is wrong with the segment, a sentence each; empty when it is sound.

        An independent reader of the format reads every record and every list, a shard
        at a time, from a copy made under the shard's lock.  O(size).
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
    """What modules of this package may use of a cache beyond its public methods.

    A new object for each use, so that it keeps no cache alive.
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
    # What single flight uses of this cache.
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
