"""``Peers``: what the engine asks of the processes and threads around it.

The engine knows words and locks.  It asks this one collaborator whether the process
that holds a lock is alive, which process that is, and what to log.  All calls are rare:
at the first use in a process, during a long wait for a lock, and after a lock was given
back if there is something to log.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from shmcache._engine import decode_key, is_compiled
from shmcache._format import layout as L
from shmcache._format.fields import generation_of
from shmcache.errors import ReentrantCall, SegmentCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

    from shmcache._process.attachment import Attachment

log = logging.getLogger("shmcache")


class Peers:
    """The processes and threads that share one segment with an engine.

    Args:
        name: The name of the cache, for messages.
        attachment: How this process is attached to the segment.
        enter: Called with the engine if its process has not joined, or has left.  It
            makes the engine a worker, or raises CacheClosed.
    """

    def __init__(
        self, name: str, attachment: Attachment, enter: Callable[[Any], None]
    ) -> None:
        self._name = name
        self._attachment = attachment
        self.enter = enter

    def is_dead(self, shard: int, holder: int) -> bool:
        """Return whether the holder of a shard's lock will never give it back."""
        attachment = self._attachment
        if holder != attachment.token:
            return not attachment.alive(holder)
        if is_compiled:
            return False  # another thread of ours, which cannot lose the lock
        # In the interpreted engine, an exception from a signal handler may strike
        # between any two bytecodes, so the thread may have left without giving up the
        # lock.
        owner = attachment.owners.get(shard)
        if owner == threading.get_ident():
            return True  # this is not a nested call: check_reentry has excluded that
        frame = sys._current_frames().get(owner or 0)  # noqa: SLF001
        return not any(map(_in_engine, _frames(frame)))

    def check_reentry(self, shard: int) -> None:
        """Raise ReentrantCall if this thread waits for a lock that it holds itself."""
        if self._attachment.owners.get(shard) != threading.get_ident():
            return
        frames = _frames(sys._getframe())  # noqa: SLF001
        if any(map(_in_engine, _callers(frames))):
            raise ReentrantCall(
                f"cache {self._name!r} was called from a signal handler, or a"
                " finalizer, that interrupted an operation on the same shard; note the"
                " event in the handler and use the cache after it (the compiled engine"
                " allows this: install a C compiler, then reinstall shmcache)"
            )

    def recovery(self, shard: int) -> AbstractContextManager[bool]:
        """Let only one thread become a shard's holder, for an engine without CAS.

        The block gets False if another thread does not make way.
        """
        return self._attachment.recovery(shard)

    def end_recoveries(self) -> None:
        """Release what an exception has left taken by ``recovery`` in this thread."""
        me = threading.get_ident()
        for shard, owner in list(self._attachment.recovering.items()):
            if owner == me:
                self._attachment.end_recovery(shard)

    def describe_wait(self, shard: int, holder: int, waited: int) -> str:
        """Say, for LockTimeout, who holds a shard's lock; ``waited`` is in ns."""
        attachment = self._attachment
        if holder == attachment.token:
            who = f"another thread of this process ({os.getpid()})"
        elif holder:
            state = "which lives" if attachment.alive(holder) else "which has died"
            who = f"process {attachment.pid(holder)}, {state}"
        else:
            who = "changing holders"
        return (
            f"shard {shard} of cache {self._name!r} was not to be had in"
            f" {waited / 1e9:.1f} s: it is held by {who}; see whether that process is"
            " stopped or starved, or raise lock_timeout"
        )

    def report(
        self,
        repairs: Iterable[tuple[int, int, bool, int, int]],
        evictions: Iterable[tuple[int, int, bytes]],
    ) -> None:
        """Log what happened while a lock was held.

        Args:
            repairs: Shard, token of the dead holder (0: none died), whether the lists
                were rebuilt, entries dropped, and ns, of each rebuild.
            evictions: Cause, kind and bytes of the key, of each evicted entry.
        """
        for shard, dead, rebuilt, dropped, ns in repairs:
            pid = self._attachment.pid(dead) if dead else 0
            lost = dead != 0 and not generation_of(dead)  # nobody has signed as holder
            log.log(
                logging.INFO if lost and not self._any_dead() else logging.WARNING,
                "shard %d of cache %s: %s; %s, %d entries dropped, in %.1f ms",
                shard,
                self._name,
                _what_happened(dead, pid),
                "lists rebuilt" if rebuilt else "nothing was half done",
                dropped,
                ns / 1e6,
                extra={
                    "cache": self._name,
                    "event": "recovered",
                    "shard": shard,
                    "dead_pid": pid,
                    "rebuilt": bool(rebuilt),
                    "dropped": dropped,
                    "seconds": ns / 1e9,
                },
            )
        for cause, kind, data in evictions:
            key = _shown_key(kind, data)
            log.debug(
                "cache %s evicted %s (%s)",
                self._name,
                key,
                L.Cause(cause).name,
                extra={
                    "cache": self._name,
                    "event": "evicted",
                    "key": key,
                    "cause": L.Cause(cause).name,
                },
            )

    def _any_dead(self) -> bool:
        attachment = self._attachment
        return not all(map(attachment.alive, attachment.tokens()))


def _shown_key(kind: int, data: bytes) -> str:
    try:
        return repr(decode_key(kind, data))
    except SegmentCorrupt:
        return repr(data)


def _what_happened(dead: int, pid: int) -> str:
    if not dead:
        return "damage was met"
    if not generation_of(dead):
        # A process that does not get to run between taking the permit and signing as
        # holder looks the same as one that has died there.
        return "the permit of its lock was missing, of a process that died or stopped"
    return f"process {pid or 'unknown'} died holding its lock"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _callers(frames: Iterator[FrameType]) -> Iterator[FrameType]:
    # Skip the frames of the call into this package that is being made.
    for frame in frames:
        if not frame.f_globals.get("__name__", "").startswith("shmcache."):
            break
    return frames


def _in_engine(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith("shmcache._engine.")
