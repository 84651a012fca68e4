"""Delivery: how the owner of a handle learns that its entry has gone, exactly once.

Problem: any process may remove the entry of a handle, but only its owner can close the
handle, and it must do so once and only once.

Mechanism: the process that unlinks the entry writes a message (token, number, cause)
into the shard's eviction mailbox before it gives back the lock.  Each owner reads the
mailboxes from where it stopped the last time, so the cost depends on the number of
evictions, and not on the number of its handles.  The number in the message leads to the
handle's record in the process's table.

At most once: only the thread that moves a number out of the table may run the callback,
and numbers are never used twice.  A message with a number that is not in the table is
ignored.

At least once: an owner may have missed messages.  Either the mailbox was overwritten
since the owner's last look, or a process died after it unlinked an entry and before it
wrote the message; rebuilding the shard then advances the mailbox by more than its size.
In both cases the owner compares its whole table with the shared map.

An exception that a signal handler raises may strike between any two steps, so every
step may be repeated.  The order makes that safe: a record enters ``gone`` before its
number leaves the table, and it enters the queue before it leaves ``gone``; the queue
runs a record once, even if the record was queued twice.

Callbacks run in a few threads of their own and under no lock, so they may use the map.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from shmcache._arguments import shown
from shmcache._format import layout as L
from shmcache._format.layout import Cause
from shmcache._process.callbacks import Callbacks
from shmcache.errors import ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache._handles.registry import Registry

log = logging.getLogger("shmcache")


class Record:
    """One registered handle of this process."""

    __slots__ = (
        *("cause", "handle", "key", "leases", "number", "on_evict", "shared", "taken"),
    )

    def __init__(
        self, key: Any, shared: bytes, handle: Any, number: int, on_evict: Any
    ) -> None:
        self.key = key
        self.shared = shared  # the key of its entry in the shared map
        self.handle = handle
        self.number = number
        self.on_evict = on_evict
        self.leases = 0
        self.cause: Cause | None = None  # why the entry has gone; None if it is there
        self.taken = False  # True: a thread runs the callback, or has run it


class Table:
    """The handles of one process: those that are registered, and those that have gone.

    Changes are made with ``lock`` held.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.handles: dict[bytes, Record] = {}  # by shared key
        self.numbers: dict[int, Record] = {}
        self.gone: dict[int, Record] = {}  # by number; not yet queued for a callback


class Delivery:
    """Moves handles whose entry has gone out of a table, and runs their callbacks.

    Args:
        registry: The shared part of the map.
        token: The token of this process; 0 as long as it has not used the map.
        table: The handles of this process.
        on_evict: The callback of handles that have none of their own, or None.
        threads: How many callbacks may run at once.
    """

    def __init__(
        self,
        registry: Registry,
        token: int,
        table: Table,
        on_evict: Callable[[Any, Any, Cause], object] | None,
        threads: int,
    ) -> None:
        self._registry = registry
        self._token = token
        self._table = table
        self._on_evict = on_evict
        self.callbacks = Callbacks(self._call_back, threads)
        # The number of the first unread message, for each shard.
        self.read = registry.mailbox_heads() if token else []

    def deliver(self) -> None:
        """Read the messages that have come, and hand over the handles that have gone.

        It is O(shards) if nothing has come.  A leased handle stays in ``gone`` until
        its last lease ends.
        """
        lost = False
        for shard in self._registry.shards_with_mail(self.read):
            if not self._read_mailbox(shard):
                lost = True
        if lost:
            self._compare()
        self._hand_over_gone()

    def _read_mailbox(self, shard: int) -> bool:
        # It is False if messages are lost.
        table = self._table
        with table.lock:
            head, messages = self._registry.read_mailbox(shard, self.read[shard])
            if messages is None:
                return False
            for i in range(0, len(messages), 3):
                owner, number, cause = messages[i : i + 3]
                if owner == self._token and number in table.numbers:
                    self.take_out(table.numbers[number], _cause(cause))
            # This is stored last: if the loop is interrupted, the messages are read
            # again.
            self.read[shard] = head
        return True

    def _compare(self) -> None:
        # Messages are lost, so each handle's entry is looked up.  The causes are lost,
        # too; CAPACITY, the most frequent one, is assumed.  The heads are read before
        # the entries, so that the message of an entry that goes meanwhile is read
        # later.
        table, registry = self._table, self._registry
        with table.lock:
            heads = registry.mailbox_heads()
            for record in list(table.numbers.values()):
                if registry.number_of(record.shared) != record.number:
                    self.take_out(record, Cause.CAPACITY)
            self.read[:] = heads

    def take_out(self, record: Record, cause: Cause) -> None:
        """Move a record out of the table, because its entry has gone."""
        table = self._table
        with table.lock:
            record.cause = cause
            table.gone[record.number] = record
            if table.handles.get(record.shared) is record:
                del table.handles[record.shared]
            table.numbers.pop(record.number, None)

    def _hand_over_gone(self) -> None:
        for record in list(self._table.gone.values()):
            if record.leases == 0:
                self.hand_over(record)

    def hand_over(self, record: Record) -> None:
        """Queue a record that has gone for its callback, unless it is leased."""
        table = self._table
        with table.lock:
            if record.leases == 0 and record.number in table.gone:
                self.callbacks.add(record)
                table.gone.pop(record.number, None)
        self.callbacks.start()

    def close_unregistered(self, record: Record) -> None:
        """Run the callback (CLOSED) of a handle that could not be registered."""
        record.cause = Cause.CLOSED
        self._registry.count_if_joined(L.R_OPENED)
        self.callbacks.add(record)
        self.callbacks.start()

    def close_all(self) -> None:
        """Remove the entries of this process's handles, and close all handles (CLOSED).

        A handle whose entry went before for another reason keeps that cause.
        """
        table = self._table
        for record in list(table.numbers.values()):
            self._discard_quietly(record)
        try:
            self.deliver()
        except ShmCacheError as error:
            log.debug(
                "mailboxes of map %s not read: %s",
                self._registry.name,
                error,
                extra={"cache": self._registry.name, "event": "mailboxes not read"},
            )
        for record in list(table.numbers.values()):
            self.take_out(record, Cause.CLOSED)
        self._hand_over_gone()

    def _discard_quietly(self, record: Record) -> None:
        # Removing may fail if the holder of the lock is stopped.  The entry then stays,
        # and other workers reap it after this process has freed its row.
        try:
            self._registry.discard(record.shared, record.number, Cause.CLOSED)
        except ShmCacheError as error:
            log.debug(
                "entry of %r stays behind: %s",
                record.key,
                error,
                extra={
                    "cache": self._registry.name,
                    "event": "entry left behind",
                    "key": repr(record.key),
                },
            )

    def findings(self) -> list[str]:
        """Return a sentence for each open handle whose entry went without a message."""
        table, registry = self._table, self._registry
        found = []
        with table.lock:
            for record in table.numbers.values():
                number = registry.number_of(record.shared)
                if number == record.number:
                    continue
                if number is None and self._may_have_expired(record):
                    continue
                if registry.shards_with_mail(self.read):
                    continue  # its message may be among the unread ones
                found.append(
                    f"handle {shown(record.key)} is open, and its entry has gone"
                    " without a message"
                )
        return found

    def _may_have_expired(self, record: Record) -> bool:
        # An expired entry is not found; the next sweep removes it and writes a message.
        return self._registry.expires_by_default or record.cause is not None

    def _call_back(self, record: Record) -> None:
        # This runs once for each record, in a thread of the callbacks.
        registry = self._registry
        on_evict: Any = record.on_evict or self._on_evict
        cause = record.cause
        shown = "" if cause is None else cause.name
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "map %s evicted %r (%s)",
                registry.name,
                record.key,
                shown,
                extra=self._extra("evicted", record, shown),
            )
        try:
            if on_evict is not None:
                on_evict(record.key, record.handle, cause)
        except BaseException:
            registry.count_if_joined(L.R_CALLBACK_FAILURES)
            log.exception(
                "on_evict of map %s failed for key %r (%s)",
                registry.name,
                record.key,
                shown,
                extra=self._extra("callback failed", record, shown),
            )
        finally:
            record.handle = None
            if on_evict is not None:
                registry.count_if_joined(L.R_CALLBACKS)
            registry.count_if_joined(L.R_CLOSED)

    def _extra(self, event: str, record: Record, cause: str) -> dict[str, str]:
        return {
            "cache": self._registry.name,
            "event": event,
            "key": repr(record.key),
            "cause": cause,
        }


def _cause(number: int) -> Cause:
    # A damaged message has no valid cause; CAPACITY, the most frequent one, is assumed.
    return Cause(number) if number < len(Cause) else Cause.CAPACITY
