"""Listeners of a ``ConfigCache``: how a worker learns of a change and calls them.

Problem: any worker may change a configuration, and then the callbacks of all workers
must be called, each in its own process.

Mechanism: the callbacks of one worker for one key form a group, and groups are handles
in a ``HandleMap``, which bounds them over the host.  Each worker that has groups looks
every ``LOOK`` seconds whether anything was written to the cache, which costs O(shards).
Only then it looks for the versions of the keys it listens to.  So no worker sends
notifications, and none can be lost: as long as a version is the newest, each look finds
it.  A version that came and was replaced between two looks is left out.

Order: the callbacks of one group run in one thread at a time, and a version is handed
out only if its number is higher than the last one's.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcache._arguments import shown
from shmcache._format.layout import Cause
from shmcache._process.callbacks import Callbacks
from shmcache._process.sweeper import sweeper
from shmcache._process.uwsgi import threads_run
from shmcache.errors import CacheClosed
from shmcache.handles import IDLE, LOOK, HandleMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache.cache import Cache

log = logging.getLogger("shmcache")


@dataclass(frozen=True)
class Version:
    """One stored state of a configuration; the higher number is the newer one."""

    number: int
    value: Any


class WorkerHandles(HandleMap):
    """A handle map that knows at no cost whether this worker has handles in it."""

    @property
    def has_any(self) -> bool:
        """Return whether this worker had handles at the last look at the mailboxes."""
        return bool(self._process.handles)

    def use(self, key: Any) -> None:
        """Count a use of this worker's handle of a key, if it has one."""
        if self._process.handles:
            self.get(key)


class _Member:
    """One callback of a group."""

    def __init__(self, callback: Any, seen: Version | None, on_end: Any) -> None:
        self.callback = callback
        self.seen = seen  # the version that it was told last
        self.on_end = on_end
        self.active = True


class Subscription:
    """One callback of this worker that is told when a configuration changes.

    It ends by ``cancel()``, with the cache's ``close()``, or when its group is evicted
    because it was unused for too long or because room was needed.  After an eviction
    ``on_end(key)`` is called, if it was given.

    Attributes:
        key: The key of the configuration.
    """

    def __init__(self, group: Group, member: _Member) -> None:
        self._group = group
        self._member = member
        self.key = group.key

    @property
    def active(self) -> bool:
        """Return whether the subscription has not ended."""
        return self._member.active

    def cancel(self) -> bool:
        """End the subscription; a call that is under way is not stopped.

        Returns:
            Whether it was active.
        """
        return self._group.listeners.cancel(self._group, self._member)

    def __repr__(self) -> str:
        state = "active" if self.active else "ended"
        return f"<shmcache.Subscription to {shown(self.key)} {state}>"


class Group:
    """The callbacks of one worker for one key: a handle in the map of groups."""

    def __init__(self, listeners: Listeners, key: Any) -> None:
        self.listeners = listeners
        self.key = key
        self.lock = threading.Lock()
        self.members: list[_Member] = []
        self.told = 0  # the highest number that all members have been told
        self.ended = False
        self.running = False  # a thread runs through the group, or is about to
        self.again = False  # it must run once more

    def add(self, member: _Member) -> bool:
        """Add a callback; return False if the group has ended."""
        with self.lock:
            if not self.ended:
                self.members.append(member)
                self.told = 0
            return not self.ended

    def remove(self, member: _Member) -> bool:
        """Remove a callback; return False if it was not active."""
        with self.lock:
            was_active, member.active = member.active, False
            if was_active:
                self.members.remove(member)
            return was_active

    def end(self) -> list[_Member]:
        """End the group, and return its callbacks."""
        with self.lock:
            self.ended = True
            members, self.members = self.members, []
            for member in members:
                member.active = False
            return members


def end_group(key: Any, group: Group, cause: Cause) -> None:
    """End a group: this is the ``on_evict`` of the map of groups."""
    members = group.end()
    if not members or cause is Cause.CLOSED:
        return
    name = group.listeners.name
    log.info(
        "listeners of %r in %s ended: %s",
        key,
        name,
        cause.name,
        extra={
            "cache": name,
            "event": "listeners ended",
            "key": repr(key),
            "cause": cause.name,
        },
    )
    for member in members:
        if member.on_end is not None:
            member.on_end(key)


class _Job:
    """One run through a group, as the callback threads take it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.taken = False


class _ProcessState:
    """The listeners in one process; a forked child begins with a new state."""

    def __init__(self, run: Callable[[Any], None]) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.calls = Callbacks(run, 2)
        self.moment: list[int] | None = None  # of the cache at the last look
        self.asked = 0  # how often a look was requested, whatever the moment
        self.told = self.failures = 0


class Listeners:
    """The listeners of one worker.

    Args:
        name: The name of the config cache, for logs.
        configs: The cache with the configurations.
        groups: The map of groups.
        version: ``version(key)`` returns the newest version of a key, or None.  It is a
            method of the ``ConfigCache``, which so lives as long as it has listeners.
    """

    def __init__(
        self,
        name: str,
        configs: Cache,
        groups: WorkerHandles,
        version: Callable[[Any], Version | None],
    ) -> None:
        self.name = name
        self._configs = configs
        self._groups = groups
        self._version = version
        self._process = _ProcessState(self._run)

    def _state(self) -> _ProcessState:
        state = self._process
        if state.pid != os.getpid():
            self._process = state = _ProcessState(self._run)
        return state

    @property
    def closed(self) -> bool:
        """Return whether the cache or the map of groups was closed in this process."""
        return self._configs.closed or self._groups.closed

    def subscribe(self, key: Any, callback: Any, on_end: Any) -> Subscription:
        """Add a callback to this worker's group of a key; make the group if need be.

        Args:
            key: The key of the configuration.
            callback: ``callback(key, old, new)``.
            on_end: ``on_end(key)``, or None.
        """
        state = self._state()
        seen = self._version(key)
        with state.lock:
            while True:
                group: Group = self._groups.get_or_create(
                    key, functools.partial(Group, self, key)
                )
                member = _Member(callback, seen, on_end)
                if group.add(member):
                    break
            # Otherwise the next look might find the cache as it was at the last one.
            state.asked += 1
        sweeper().watch(self, Listeners._tend, 0.0)
        return Subscription(group, member)

    def cancel(self, group: Group, member: _Member) -> bool:
        """Remove a callback, and a group without callbacks; False if it had ended."""
        if not group.remove(member):
            return False
        # With this lock held, no thread of this process registers another group.
        with self._state().lock, suppress(CacheClosed):
            if not group.members and self._groups.get(group.key) is group:
                self._groups.discard(group.key)
        return True

    def counts(self) -> tuple[int, int]:
        """Return how many callbacks this worker has called, and how many raised."""
        state = self._state()
        return state.told, state.failures

    def forget(self) -> None:
        """Stop looking for changes."""
        sweeper().forget(self)

    def wait(self, timeout: float) -> bool:
        """Wait until no callback runs; return False after ``timeout`` seconds."""
        return self._state().calls.wait(timeout)

    # --- looking ----------------------------------------------------------------------

    def _tend(self, _: float) -> float:
        # The sweeper's thread calls this again and again.
        if self._process.pid != os.getpid():
            return IDLE  # this process was forked, and has not listened yet
        self._look(self._process)
        return LOOK if self._groups.has_any else IDLE

    def look_without_sweeper(self) -> None:
        """Look now, in a process where threads do not run."""
        if not threads_run():
            self._look(self._state())

    def _look(self, state: _ProcessState) -> None:
        moment = self.moment(state.asked)
        if moment is not None and moment == state.moment:
            return
        # It is unset meanwhile: if this look is interrupted, the next one starts again.
        state.moment = None
        for key, group in self._groups.items():
            _, number = self._configs.gets(key)
            if number is not None and number > group.told:
                self._schedule(state, group)
        state.moment = moment

    def moment(self, asked: int) -> list[int] | None:
        """Return a value that is equal at two looks only if nothing changed between.

        Args:
            asked: How often a look was requested.

        Returns:
            That number, and the number of writes of each shard; None while a shard is
            being written to.
        """
        counts = self._configs.internals.writes()
        return None if counts is None else [asked, *counts]

    # --- telling ----------------------------------------------------------------------

    def _schedule(self, state: _ProcessState, group: Group) -> None:
        with group.lock:
            group.again = True
            if group.running:
                return
            group.running = True
        state.calls.add(_Job(group))
        state.calls.start()

    def _run(self, job: _Job) -> None:
        # This runs in a thread of the callbacks, in one at a time for a group.
        group, state = job.group, self._process
        while True:
            with group.lock:
                if not group.again:
                    group.running = False
                    return
                group.again = False
                members = list(group.members)
            try:
                version = self._version(group.key)
                if members and version is not None:
                    self._groups.get(group.key)  # a use
                    self._tell_all(state, group, members, version)
            except Exception:  # perhaps a holder was stopped, or this worker is closing
                if not self.closed:
                    log.exception(
                        "version of %r in %s not read",
                        group.key,
                        self.name,
                        extra=self._extra("version not read", group.key),
                    )
                    with state.lock:
                        state.asked += 1  # the next look tries again

    def _tell_all(
        self,
        state: _ProcessState,
        group: Group,
        members: list[_Member],
        version: Version,
    ) -> None:
        for member in members:
            old = member.seen
            if not member.active or (old and old.number >= version.number):
                continue
            member.seen = version
            failed = self._tell(group.key, member, old, version)
            with state.lock:
                state.told += 1
                state.failures += failed
        with group.lock:
            # A member that was added meanwhile has not been told.
            if members == group.members:
                group.told = version.number

    def _tell(
        self, key: Any, member: _Member, old: Version | None, version: Version
    ) -> bool:
        # Call a callback; return whether it raised.
        try:
            member.callback(key, old, version)
        except BaseException:
            log.exception(
                "listener of %r in %s failed",
                key,
                self.name,
                extra=self._extra("listener failed", key),
            )
            return True
        return False

    def _extra(self, event: str, key: Any) -> dict[str, str]:
        return {"cache": self.name, "event": event, "key": repr(key)}
