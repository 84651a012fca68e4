"""``Member``: how a cache joins its segment in this process, and leaves it.

Problem: one Cache object lives through forks, through the end of its segment, and
through threads that close it in the middle of a call; and the engine must never touch
memory that is not mapped, nor act as the worker of another process.

Mechanism: an attachment (``_process/attachment.py``) has the mapping and the worker
row; all Cache objects of a process that are on one segment share it.  The engine
compares its token with the guard word at each call.  They differ before the first call
in a process, after a fork, and after ``close()``; then the engine calls
``_enter_process``, which takes a worker row and joins, or raises CacheClosed.

Death in the middle: see ``_process/attachment.py`` and ``_engine/rebuild.py``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from shmcache._arguments import check_budget, clock_in_ns, ttl_to_ns
from shmcache._engine import Engine, close_semaphores, make_codec, recency_buffers
from shmcache._format import layout as L
from shmcache._process.attachment import Attachment
from shmcache._process.lockfile import mutex
from shmcache._process.peers import Peers
from shmcache._process.sweeper import sweeper
from shmcache._segment.names import Names
from shmcache._segment.settings import Settings
from shmcache.errors import (
    CacheClosed,
    ConfigMismatch,
    SegmentNotFound,
    UnsupportedPlatform,
)

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("shmcache")

# A step of sweep, clear or iteration holds a lock for about this many entries, which is
# some tens of microseconds compiled.
STEP = 64


@dataclass(frozen=True)
class EngineSettings:
    """The settings that ``Engine._bind`` needs."""

    capacities: list[int]  # of each shard, in entries
    clock: Callable[[], int] | None  # ns; None: CLOCK_MONOTONIC
    sliding: bool
    ttl_ns: int  # 0: never
    jitter_ppm: int
    created_at_ns: int
    first_sequence: int
    lock_timeout_ns: int


class _Unasked:
    """The codec of a cache of pickles that was attached to without codec="pickle"."""

    name = "pickle"

    def encode(self, _: object) -> NoReturn:
        """Refuse to encode, and say why."""
        raise ConfigMismatch(
            "this cache has codec 'pickle', which executes code on reading, so it must"
            " be asked for by name: if you trust all who write to the cache, attach"
            " with codec='pickle'"
        )

    decode = encode


class Member(Engine):
    """The engine of one segment, as this process and its children use it."""

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
        self._clock = clock_in_ns(clock)
        self._names = Names.of(name)
        self._attach(settings)

    def _attach(self, settings: Settings | None) -> None:
        now = self._clock() if self._clock else time.monotonic_ns()
        attachment = Attachment.open(self._names, settings, now, self._rebuild_all)
        try:
            self._take_up(attachment)
        except BaseException:
            attachment.release()
            raise
        # This leaves the segment even if nobody calls close(), at the latest when the
        # object is finalized.
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
        if attachment.recency is None:
            attachment.recency = recency_buffers(settings.shards)
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
                first_sequence=header.first_sequence,
                lock_timeout_ns=self._timeout_ns,
            ),
            attachment.recency,
            Peers(self.name, attachment, Member._enter_process),
        )
        self._heed_log_level()
        opened = self._open_semaphores(
            [self._names.semaphore(shard) for shard in range(settings.shards)]
        )
        # This is for a cache that is dropped without close(); after close() it does
        # nothing.
        weakref.finalize(self, close_semaphores, opened).atexit = False
        self.closed = False

    def _rebuild_all(self, attachment: Attachment) -> None:
        # This runs under the admin lock, while nobody else uses the segment.  Dead
        # processes may have left any shard in any state, and its bytes may have been
        # changed since.
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
                "event": "rebuilt",
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

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise CacheClosed(
                f"cache {self.name!r} was closed in this process; make a new"
                " Cache object to use it again"
            )

    def _enter_process(self) -> None:
        self._raise_if_closed()
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
                    # The process that forked this one has ended and removed the
                    # segment.  Its children share a new segment of the same name
                    # (perhaps as another user than before).
                    leave = self._finalizer
                    self._names = Names.of(self.name)
                    self._close_semaphores()
                    self._attach(self._settings)
                    leave()
            self._adopt()
        sweeper().watch(self, Member._tend, self.cleanup_interval)

    def _flush_quietly(self) -> None:
        # Lost recency is not worth an error, nor a wait for a stopped holder.
        try:
            if self._is_joined():
                self._flush_recency()
        except Exception as error:  # noqa: BLE001
            log.debug(
                "recency of cache %s lost: %s",
                self.name,
                error,
                extra={"cache": self.name, "event": "recency lost"},
            )

    def _require_open(self) -> None:
        if self.closed or not self._is_joined():
            self._enter_process()

    def _heed_log_level(self) -> None:
        # The owners of handles log the evictions of a handle map themselves.
        handles = self._settings.codec == L.HANDLES
        self._log_evictions(log.isEnabledFor(logging.DEBUG) and not handles)

    # --- a member's duty ------------------------------------------------------------

    def sweep(self, budget: float | None = None) -> int:
        """Remove expired entries; each process does this by itself from time to time.

        O(expired), in short holds of one lock.

        Args:
            budget: Seconds after which to stop; None means to stop when nothing is
                left.

        Returns:
            How many entries were removed.
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
        # The sweeper's thread calls this from time to time.  It removes expired
        # entries, applies the recency buffer, and reaps the rows of dead workers.
        self._require_open()
        self._heed_log_level()
        self._flush_recency()
        self.sweep(budget)
        self._attachment.reap()
        behind = any(self._is_due(shard) for shard in range(self._settings.shards))
        return 0.01 if behind else self.cleanup_interval
