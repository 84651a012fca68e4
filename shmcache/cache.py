"""The public face: one bounded LRU + TTL map, shared by the processes of a host.

The hot methods - ``get``, ``set``, ``add``, ``incr``, ``delete`` and others - stand in
``_engine/operations.py``, whose class is the base of ``Cache``; here is what
a call can afford: settings, life, iteration, single flight, statistics.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import sys
import threading
import time
import weakref
from bisect import bisect_left
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
from typing import Any, NoReturn, Self

from shmcache._arguments import (
    check_budget,
    check_count,
    check_flag,
    check_ttl,
    parse_size,
    ttl_to_ns,
)
from shmcache._engine import (
    MISSING,
    Engine,
    close_semaphores,
    decode_key,
    decode_tagged,
    encode_key,
    make_codec,
    recency_buffers,
)
from shmcache._format import check as _check
from shmcache._format import layout as L
from shmcache._process.attachment import Attachment, mutex
from shmcache._process.peers import Peers
from shmcache._process.sweeper import sweeper
from shmcache._recipes.memoize import Memoized
from shmcache._recipes.single_flight import Flight
from shmcache._segment.create import Names, Settings
from shmcache.errors import (
    CacheClosed,
    ConfigMismatch,
    SegmentNotFound,
    UnsupportedKey,
    UnsupportedPlatform,
)
from shmcache.stats import Stats

log = logging.getLogger("shmcache")

# A step of sweep, clear or iteration holds a lock for about this many entries:
# some tens of microseconds compiled.
STEP = 64
MIN_CLEANUP, MAX_CLEANUP = 1.0, 300.0


def _plan(
    max_entries: Any,
    max_bytes: Any,
    ttl: Any,
    sliding: Any,
    jitter: Any,
    cleanup_interval: Any,
    shards: Any,
    persist: Any,
    codec: str,
) -> Settings:
    """The settings that a constructor's arguments ask for, checked."""
    check_count(max_entries, "max_entries", 0, L.MAX_INDEX, "0 bounds by bytes alone")
    if max_bytes is None:
        if max_entries == 0:
            raise ValueError(
                "max_entries=0 leaves the bound to the bytes: give max_bytes, for"
                ' example "64 MiB"'
            )
        size = L.default_max_bytes(max_entries)
    else:
        size = parse_size(max_bytes)
    ttl_ns = 0 if ttl is None else ttl_to_ns(ttl)
    number = isinstance(jitter, (int, float)) and not isinstance(jitter, bool)
    if not number or not 0 <= jitter < 1:
        raise (ValueError if number else TypeError)(
            f"jitter must be a number from 0 to below 1, not {jitter!r}: it is the"
            " largest part by which a TTL is shortened, 0.1 for 10 %"
        )
    if cleanup_interval is None:
        seconds = math.inf if ttl is None else ttl / 4
        cleanup_interval = min(MAX_CLEANUP, max(MIN_CLEANUP, seconds))
    if shards is None:
        shards = L.default_shards(max_entries, size)
    else:
        hint = "leave it out to have it follow from max_entries"
        check_count(shards, "shards", 1, L.MAX_SHARDS, hint)
        if max_entries and shards > max_entries:
            raise ValueError(
                f"shards={shards} cannot share {max_entries} entries; {hint}"
            )
    settings = Settings(
        max_entries=max_entries,
        max_bytes=size,
        ttl_ns=ttl_ns,
        sliding=check_flag(sliding, "sliding"),
        jitter_ppm=round(jitter * 1_000_000),
        cleanup_ns=ttl_to_ns(cleanup_interval, "cleanup_interval"),
        shards=shards,
        persist=check_flag(persist, "persist"),
        codec=codec,
    )
    geometry = settings.geometry
    if size < shards * geometry.block_size:
        raise ValueError(
            f"max_bytes of {size} has no room for a block of {geometry.block_size}"
            f" bytes in each of {shards} shards; raise max_bytes or lower shards"
        )
    if geometry.blocks > L.MAX_INDEX:
        raise ValueError(
            f"max_bytes of {size} makes {geometry.blocks} blocks a shard, which is"
            f" over {L.MAX_INDEX}; raise shards, or lower max_bytes"
        )
    return settings


class Cache(Engine):
    """A bounded LRU + TTL map in shared memory, one for all processes of a host.

    ``Cache(name)`` creates the segment of that name, or attaches to it when another
    process of the same user has created it; the settings must agree then.

    - ``max_entries``: how many entries at most; 0, bounded by bytes alone.
    - ``max_bytes``: room for keys and values, an int or a text such as "64 MiB";
      default: 512 bytes an entry, at least 1 MiB.  Bookkeeping, 72 bytes an entry,
      comes on top.  All of it is reserved at creation.
    - ``ttl``: seconds an entry lives by default; None, for ever.
    - ``sliding``: a hit renews the entry's time.
    - ``jitter``: each TTL is shortened by a random part of up to this much, 0 to 1.
    - ``cleanup_interval``: seconds from sweep to sweep in each process; default: a
      quarter of the TTL, from 1 s to 5 min.
    - ``shards``: parts with a lock each; default: 1 up to 16,384 entries, more above.
      Entries and bytes are divided evenly, and LRU order holds within a shard.
    - ``persist``: keep the segment when the last process has gone.
    - ``lock_timeout``: seconds to wait for a lock before LockTimeout.
    - ``codec``: "msgpack", "msgspec", "pickle" (executes code on reading: only where
      all writers are trusted), "raw" (bytes), or an object with dumps and loads.
    - ``clock``: what to use for time: a callable returning nanoseconds as an int or
      seconds as a float, the same in all processes.

    Raises ConfigMismatch, OutOfSharedMemory, SegmentRefused, SegmentCorrupt,
    TooManyWorkers; ValueError and TypeError for arguments that make no sense.
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
        settings = _plan(
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
        """An existing cache, with its own settings; SegmentNotFound otherwise.

        ``codec`` is needed only for one that cannot be made from its name, and to read
        and write what is pickled: the segment's word is not enough for that.
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
        )

    # --- life -----------------------------------------------------------------------

    def _open(
        self,
        name: str,
        settings: Settings | None,
        codec: Any,
        lock_timeout: float,
        clock: Callable[[], float] | None,
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise UnsupportedPlatform(
                f"shmcache needs Linux (record locks, /dev/shm), and this is"
                f" {sys.platform}"
            )
        self.name = name
        self.closed = True
        self._codec = codec
        self._timeout_ns = ttl_to_ns(lock_timeout, "lock_timeout")
        self._given_clock = clock
        self._clock = _nanoseconds(clock)
        self._names = Names.of(name)
        self._attach(settings)

    def _attach(self, settings: Settings | None) -> None:
        now = self._clock() if self._clock else time.monotonic_ns()
        attachment = Attachment.open(self._names, settings, now, self._revive)
        try:
            self._take_up(attachment)
        except BaseException:
            attachment.release()
            raise
        # Leaves also when nobody calls close(), at the latest with the object.
        self._finalizer = weakref.finalize(self, attachment.release)
        self._finalizer.atexit = False

    def _take_up(self, attachment: Attachment) -> None:
        header = attachment.header
        settings = header.settings
        if self._codec is None:
            unasked = settings.codec == "pickle"
            self._codec = _Unasked() if unasked else make_codec(settings.codec)
        elif self._codec.name != settings.codec:
            settings.require_same(
                Settings(**{**vars(settings), "codec": self._codec.name}), self.name
            )
        self._attachment = attachment
        self._settings = settings
        if attachment.touches is None:
            attachment.touches = recency_buffers(settings.shards)
        self.cleanup_interval = settings.cleanup_ns / 1e9
        self._bind(
            attachment.block.view,
            header.geometry,
            header.seed,
            self._codec,
            EngineSettings(
                capacities=settings.capacities(),
                clock=self._clock,
                sliding=settings.sliding,
                ttl_ns=settings.ttl_ns,
                jitter_ppm=settings.jitter_ppm,
                created_at_ns=header.created_at_ns,
                lock_timeout_ns=self._timeout_ns,
            ),
            attachment.touches,
            Peers(self.name, attachment, Cache._enter_process),
        )
        self._heed_log_level()
        opened = self._open_semaphores(
            [self._names.semaphore(shard) for shard in range(settings.shards)]
        )
        # For a cache that is dropped without close(); after close() it does nothing.
        weakref.finalize(self, close_semaphores, opened).atexit = False
        self.closed = False

    def _revive(self, attachment: Attachment) -> None:
        # Under the admin lock, and nobody else is there: the dead may have left any
        # shard in any state, and its bytes may have been changed since.
        self._take_up(attachment)
        self._adopt()
        kept = dropped = 0
        for shard in range(attachment.header.geometry.shards):
            dropped += self._rebuild_shard(shard)
            kept += attachment.words[self._words_of(shard) + L.S_ENTRIES]
        attachment.words[L.H_RECOVERED] = kept
        attachment.words[L.H_LOST] = dropped
        log.info(
            "cache %s is used again: %d entries recovered, %d dropped",
            self.name,
            kept,
            dropped,
            extra={
                "cache": self.name,
                "event": "revived",
                "recovered": kept,
                "dropped": dropped,
            },
        )
        self._unbind()
        self._close_semaphores()
        self.closed = True

    def _words_of(self, shard: int) -> int:
        geometry = self._attachment.header.geometry
        return (geometry.shards_at + shard * geometry.stride) // 8

    def _adopt(self) -> None:
        attachment = self._attachment
        self._join(
            attachment.guard,
            attachment.token,
            attachment.row,
            int.from_bytes(os.urandom(8), "little"),
            attachment.owners,
        )

    def _enter_process(self) -> None:
        if self.closed:
            raise CacheClosed(
                f"cache {self.name!r} was closed in this process; make a new"
                " Cache object to use it again"
            )
        with mutex():
            if self._is_joined():
                return  # another thread was first
            if not self._attachment.entered():
                if not self._attachment.words:
                    self.closed = True
                    self._unbind()
                    raise CacheClosed(
                        f"cache {self.name!r} was closed at the end of this process"
                    )
                try:
                    self._attachment.enter()
                except SegmentNotFound:
                    # Forked from a process that has gone since and took the segment
                    # with it: the forked ones meet in a new one of the same name (as
                    # another user, perhaps, than it was).
                    leave = self._finalizer
                    self._names = Names.of(self.name)
                    self._close_semaphores()
                    self._attach(self._settings)
                    leave()
            self._adopt()
        sweeper().watch(self, self.cleanup_interval)

    def close(self) -> None:
        """Leave the cache in this process.

        The last process to leave removes it, unless ``persist`` was asked for.
        Calling it twice is fine; any other use afterwards raises CacheClosed.
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

    def _flush_quietly(self) -> None:
        # Recency is not worth an error, nor a wait for a stopped holder.
        try:
            if self._is_joined():
                self._flush_recency()
        except Exception as error:  # noqa: BLE001
            log.debug(
                "touches of cache %s lost: %s",
                self.name,
                error,
                extra={"cache": self.name, "event": "touches lost"},
            )

    def unlink(self) -> None:
        """Remove the names of segment and semaphores now.

        Processes that are attached go on with what they have; the next one to ask for
        the name gets a new segment.
        """
        self._require_open()
        self._attachment.unlink()

    def _require_open(self) -> None:
        if self.closed or not self._is_joined():
            self._enter_process()

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

    def _heed_log_level(self) -> None:
        # The evictions of a handle map are logged by the owners of the handles.
        handles = self._settings.codec == L.HANDLES
        self._log_evictions(log.isEnabledFor(logging.DEBUG) and not handles)

    # --- reading and writing, the slower ones ---------------------------------------

    def setdefault(self, key: Any, default: Any = None, ttl: Any = ...) -> Any:
        """The value of a key; ``default`` is stored and returned when it is absent."""
        while True:
            value = self.get(key, MISSING)
            if value is not MISSING:
                return value
            if self.add(key, default, ttl):
                return default

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Store all pairs of a mapping or iterable, and of the keyword arguments."""
        pairs = other.items() if isinstance(other, Mapping) else other
        for key, value in pairs:
            self[key] = value
        for key, value in more.items():
            self[key] = value

    def popitem(self) -> tuple[Any, Any]:
        """Remove the least recently used entry; its key and value.

        With several shards it is the least recently used of one of them.  KeyError
        when the cache is empty.
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

        ``timeout``: seconds to wait for another's result, then LockTimeout; None, as
        long as it takes.
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
        flight = Flight(self, key, threading.get_ident(), timeout)
        with flight.landing():
            for pause in flight.pauses():
                time.sleep(pause)
            if flight.value is MISSING:
                flight.value = factory()
                self.set(key, flight.value, ttl)
        return flight.value

    async def _get_or_await(
        self, key: Any, factory: Callable[[], Any], ttl: Any
    ) -> Any:
        # As get_or_set, for a coroutine function; waiting leaves the loop free.
        import asyncio

        value = self.get(key, MISSING)
        if value is not MISSING:
            return value
        flight = Flight(self, key, asyncio.current_task(), None)
        with flight.landing():
            for pause in flight.pauses():
                await asyncio.sleep(pause)
            if flight.value is MISSING:
                flight.value = await factory()
                self.set(key, flight.value, ttl)
        return flight.value

    def memoize(
        self,
        ttl: Any = ...,
        *,
        key: Callable[..., Any] | None = None,
        typed: bool = False,
    ) -> Callable[[Callable[..., Any]], Any]:
        """A decorator that remembers a function's results in this cache.

        All processes share them, and of callers that miss at once one computes.
        Arguments must be valid keys (str, bytes, int, tuples of them; None, bool and
        float are taken, too), or ``key(*args, **kwargs)`` makes one of them.
        ``typed``: 1, 1.0 and True are different arguments.

        Methods: results belong to the instance, so they are not shared with other
        processes, unless the instance's class has a ``__cache_key__`` attribute (or
        ``key`` is given), which then stands for it.

        The function gets ``cache_key(...)``, ``invalidate(...) -> bool`` and
        ``__wrapped__``.  Coroutine functions do not block their loop.
        """
        if callable(ttl):
            raise TypeError("memoize needs its parentheses: @cache.memoize()")
        check_ttl(ttl)
        if key is not None and not callable(key):
            raise TypeError(
                f"key must be callable, as it makes the key of a call, not {key!r}"
            )

        def decorate(function: Callable[..., Any]) -> Memoized:
            return Memoized(self, function, ttl, key, typed)

        return decorate

    def clear(self, prefix: Any = None) -> int:
        """Remove all entries that are there now, or those whose key has a prefix.

        ``prefix``: a str, bytes, or tuple; of a tuple key the first elements count.
        Returns how many went.  O(buckets) in bounded steps; entries stored meanwhile
        stay.
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
            words[self._words_of(shard) + L.S_SEQUENCE] << 1 | 1
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

    def sweep(self, budget: float | None = None) -> int:
        """Remove what has expired; how many went.

        ``budget``: seconds after which to stop; None, when nothing is left.  O(expired)
        in short holds of one lock.  Each process does this by itself from time to time.
        """
        self._require_open()
        check_budget(budget, "budget")
        started = time.monotonic()
        removed = 0
        for shard in range(self._settings.shards):
            if not self._is_due(shard):
                continue
            while (count := self._step(shard, STEP)) >= 0:
                removed += count
                if budget is not None and time.monotonic() - started > budget:
                    break
        elapsed = time.monotonic() - started
        self._attachment.count(L.R_SWEEPS)
        self._attachment.count(L.R_SWEEP_NS, round(elapsed * 1e9))
        bucket = bisect_left(L.SWEEP_BOUNDS, elapsed)
        if bucket < len(L.SWEEP_BOUNDS):
            self._attachment.count(L.R_SWEEP_BUCKETS + bucket)
        return removed

    def _tend(self, budget: float) -> float:
        # What the sweeper does: expired entries, our noted hits, dead workers' rows.
        self._require_open()
        self._heed_log_level()
        self._flush_recency()
        self.sweep(budget)
        self._attachment.reap()
        behind = any(self._is_due(shard) for shard in range(self._settings.shards))
        return 0.01 if behind else self.cleanup_interval

    # --- as a mapping ---------------------------------------------------------------

    def __len__(self) -> int:
        """How many live entries there are; removes what has expired first."""
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
        """All keys, in no order; what lives throughout is met exactly once.

        Iteration is no use of the entries.  It takes each lock for some dozens of
        entries at a time, so others go on writing.
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
                    kind = meta >> 16 & 15
                    tag = meta >> L.META_TAG_SHIFT & 15
                    yield kind, key, tag, value, expires, stamp

    def keys(self) -> KeysView[Any]:
        """The keys, as a view: ``len``, ``in``, iteration."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        """The values, as a view."""
        return _Values(self)

    def items(self) -> ItemsView[Any, Any]:
        """The pairs of key and value, as a view; each pair was so at one moment."""
        return _Items(self)

    # --- seeing ---------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counts since the segment's creation, over all processes, gone ones included.

        Each shard is read at one moment, without its lock.  O(shards + workers).
        """
        self._require_open()
        attachment = self._attachment
        return Stats.of(
            attachment.header,
            map(self._shard_words, range(self._settings.shards)),
            attachment.counters(),
            recovered=attachment.words[L.H_RECOVERED],
            workers=sum(map(attachment.alive, attachment.tokens())),
        )

    def _shard_words(self, shard: int) -> tuple[int, ...]:
        # The words up to the counters' end as they were at one moment: the epoch is
        # even and the same before and after.  A stopped writer must not keep us.
        base = self._words_of(shard)
        words = self._attachment.words
        data: tuple[int, ...] = ()
        for _ in range(1000):
            epoch = words[base + L.S_SEQ]
            data = struct.unpack(
                f"{L.S_COUNTERS_END}Q", words[base : base + L.S_COUNTERS_END]
            )
            if epoch & 1 == 0 and words[base + L.S_SEQ] == epoch:
                break
        return data

    def _writes(self) -> list[int] | None:
        # The number of writes that each shard has seen; None while one is under way.
        self._require_open()
        words = self._attachment.words
        counts = []
        for shard in range(self._settings.shards):
            base = self._words_of(shard)
            epoch = words[base + L.S_SEQ]
            counts.append(words[base + L.S_SEQUENCE])
            if epoch & 1 or words[base + L.S_SEQ] != epoch:
                return None
        return counts

    def check(self) -> list[str]:
        """What is wrong with the segment, a sentence each; empty when it is sound.

        Reads every record and every list by an independent reader of the format, a
        shard at a time, from a copy made under the shard's lock.  O(size).
        """
        self._require_open()
        geometry = self._attachment.header.geometry
        buffer = self._attachment.block.view
        with mutex(), self._attachment.admin():
            head = bytes(buffer[: geometry.shards_at])
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


@dataclass(frozen=True)
class EngineSettings:
    """What ``Engine._bind`` needs of the settings."""

    capacities: list[int]  # of each shard, in entries
    clock: Callable[[], int] | None  # ns; None: CLOCK_MONOTONIC
    sliding: bool
    ttl_ns: int  # 0: never
    jitter_ppm: int
    created_at_ns: int
    lock_timeout_ns: int


class _Unasked:
    """The codec of those who attach to a cache of pickles without saying so."""

    name = "pickle"

    def encode(self, _: object) -> NoReturn:
        """Refuses."""
        raise ConfigMismatch(
            "this cache has codec 'pickle', which executes code on reading, so it must"
            " be asked for by name: if you trust all who write to the cache, attach"
            " with codec='pickle'"
        )

    decode = encode


class _Values(ValuesView[Any]):
    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __iter__(self) -> Iterator[Any]:
        for _, _, tag, data, *_ in self._cache._entries(values=True):
            yield decode_tagged(self._cache._codec, tag, data)

    def __contains__(self, value: object) -> bool:
        return any(v is value or v == value for v in self)


class _Items(ItemsView[Any, Any]):
    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        codec = self._cache._codec
        for kind, key, tag, data, *_ in self._cache._entries(values=True):
            yield decode_key(kind, key), decode_tagged(codec, tag, data)

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        try:
            found = self._cache.peek(item[0], MISSING)
        except UnsupportedKey:
            return False
        return found is not MISSING and bool(found is item[1] or found == item[1])


MutableMapping.register(Cache)


def _nanoseconds(clock: Callable[[], float] | None) -> Callable[[], int] | None:
    """A clock as the engine wants it: int nanoseconds, or None for CLOCK_MONOTONIC."""
    if clock is None:
        return None
    if not callable(clock):
        raise TypeError(
            f"clock must be callable, such as time.monotonic_ns, not {clock!r}"
        )
    first = clock()
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        raise TypeError(
            f"clock() returned {first!r}; it must return nanoseconds as an int or"
            " seconds as a float"
        )
    if not 0 <= first < math.inf:
        raise ValueError(
            f"clock() returned {first!r}; use one that counts up from 0, such as"
            " time.monotonic_ns"
        )
    if isinstance(first, int):
        return clock  # type: ignore[return-value]
    return lambda: round(clock() * 1e9)


def _attached(
    kind: type[Cache],
    name: str,
    lock_timeout: float,
    clock: Callable[[], float] | None,
    codec: Any,
) -> Cache:
    return kind.attach(name, lock_timeout=lock_timeout, clock=clock, codec=codec)
