"""The shared part of a handle map: a ``Cache`` whose entries stand for handles.

A handle is an object of one process, so the shared map holds only an entry for it.  The
entry's key is the token of the owner and the user's key; its value is the owner's
token, a number that the owner never uses twice, and a small value that every worker may
read.  ``Registry`` offers what the other parts do with such entries.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any

from shmcache._engine import MISSING, decode_key, encode_key
from shmcache._format import layout as L
from shmcache._format.layout import Cause
from shmcache.cache import Cache
from shmcache.errors import ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger("shmcache")

# The first bytes of a shared key hold the token of its owner.
_TOKEN_BYTES = 8


class Registry(Cache):
    """The entries of a handle map, for the modules of this package."""

    # --- this process -----------------------------------------------------------------

    def join(self) -> int:
        """Return the token of this process, which first joins the segment if need be.

        Raises:
            CacheClosed: ``close`` was called in this process.
        """
        # This is ``_require_open``, inlined because each call of a map begins here.
        if self.closed or not self._is_joined():
            self._enter_process()
        return self._attachment.token

    @property
    def attached_token(self) -> int:
        """Return the token that the attachment has now, without joining.

        In a forked child it is the parent's token until the child joins.
        """
        return self._attachment.token

    def count(self, word: int) -> None:
        """Add one to a counter in this worker's row; raises when the map is closed."""
        self._attachment.count(word)

    def count_if_joined(self, word: int) -> None:
        """Add one to a counter in this worker's row, if the process has a row.

        A callback may run after the map was closed; then there is no counter any more.
        """
        try:
            if self._attachment.entered():
                self._attachment.count(word)
        except ShmCacheError:
            pass  # closed just now

    @property
    def expires_by_default(self) -> bool:
        """Return whether an entry expires when no time to live is given."""
        return bool(self._settings.ttl_ns)

    def apply_uses(self) -> None:
        """Apply the uses that this process has noted, so that others see its recency.

        LRU order holds for the whole host, so the sweeper calls this often.
        """
        self._flush_recency()

    # --- entries ----------------------------------------------------------------------

    @staticmethod
    def owned_key(token: int, key: Any) -> bytes:
        """Return the key of a shared entry: bytes, which are fast to encode.

        Args:
            token: The token of the handle's owner.
            key: The user's key.

        Raises:
            UnsupportedKey: The user's key cannot be a key of a ``Cache``.
        """
        kind, data = encode_key(key)
        return token.to_bytes(_TOKEN_BYTES, "big") + bytes((kind,)) + data

    def renew(self, shared: bytes) -> bool:
        """Count a use of an entry; False if the entry is not there.  O(1)."""
        return self._renew(shared)

    def discard(self, shared: bytes, number: int, cause: Cause) -> bool:
        """Remove an entry if it has this number, and write a message to its owner.

        Args:
            shared: The key, as from ``owned_key``.
            number: The number of the handle; 0 stands for any.
            cause: The cause that the message names.

        Returns:
            Whether the entry was removed.
        """
        return self._discard(shared, _owner_of(shared), number, cause)

    def number_of(self, shared: bytes) -> int | None:
        """Return the number in an entry, or None, without using the entry."""
        entry = self.peek(shared, MISSING)
        return None if entry is MISSING else entry[1]

    def host_entries(self) -> Iterator[tuple[Any, int, float, float | None, Any]]:
        """Yield key, PID, age (s), time left (s or None) and value of all handles.

        O(entries) in short holds of one lock.  An entry is left out if its owner is
        dead and its row belongs to another worker already.
        """
        self._require_open()
        attachment = self._attachment
        now = (self._clock or time.monotonic_ns)()
        created_at = attachment.header.created_at_ns
        for _, shared, _, data, expires, stamp in self._entries(values=True):
            pid = attachment.pid(_owner_of(shared))
            if pid == 0:
                continue
            _, _, value = self._codec.decode(data)
            written = created_at + (stamp << L.STAMP_SHIFT)
            yield (
                decode_key(shared[_TOKEN_BYTES], shared[_TOKEN_BYTES + 1 :]),
                pid,
                max(0.0, (now - written) / 1e9),
                None if expires == L.NEVER else (expires - now) / 1e9,
                value,
            )

    def owners_of(self, key: Any) -> list[tuple[int, Any]]:
        """Return PID and value of living workers with a handle of a key; O(workers)."""
        self._require_open()
        attachment = self._attachment
        unowned = self.owned_key(0, key)[_TOKEN_BYTES:]
        found = []
        for token in attachment.tokens():
            shared = token.to_bytes(_TOKEN_BYTES, "big") + unowned
            entry = self.peek(shared, MISSING)
            if entry is not MISSING and attachment.alive(token):
                found.append((attachment.pid(token), entry[2]))
        return found

    def reap_handles(self, seen: int) -> tuple[int, int]:
        """Remove the entries of owners that have died (OWNER_DIED).

        O(workers), and O(entries) if a worker has gone since the last call.

        Args:
            seen: The second number that the last call returned; -1 at first.

        Returns:
            How many entries were removed, and how many rows have been freed so far.
        """
        attachment = self._attachment
        gone = any(not attachment.alive(token) for token in attachment.tokens())
        attachment.reap()
        # The number is read before the walk: rows that are freed during the walk make
        # the next call walk again.
        freed = attachment.words[L.H_FREED]
        if not gone and freed == seen:
            return 0, seen
        removed = 0
        dead: dict[int, bool] = {}
        for kind, key, *_ in self._entries(values=False):
            owner = _owner_of(key)
            if owner not in dead:
                dead[owner] = not attachment.alive(owner)
            if dead[owner] and kind == L.Kind.BYTES:
                removed += self.discard(key, 0, Cause.OWNER_DIED)
        if removed:
            log.info(
                "removed %d handles of dead workers from map %s",
                removed,
                self.name,
                extra={"cache": self.name, "event": "handles reaped", "count": removed},
            )
        return removed, freed

    # --- eviction mailboxes -----------------------------------------------------------

    def mailbox_heads(self) -> list[int]:
        """Return the number of the next message of each shard's mailbox."""
        return [
            self._read_mailbox(shard, 0)[0] for shard in range(self._settings.shards)
        ]

    def shards_with_mail(self, read: Sequence[int]) -> list[int]:
        """Return the shards whose mailbox has moved since it was read.  O(shards).

        Args:
            read: The number of the first unread message, for each shard.
        """
        words, heads_at = self._attachment.words, self._mailbox_heads_at
        return [
            shard
            for shard, next_message in enumerate(read)
            if words[heads_at[shard]] != next_message
        ]

    @functools.cached_property
    def _mailbox_heads_at(self) -> list[int]:
        # If the segment was replaced meanwhile, the new one has the same geometry.
        geometry = self._attachment.header.geometry
        return [
            geometry.shard_at(shard) + L.S_MAILBOX_HEAD
            for shard in range(geometry.shards)
        ]

    def read_mailbox(self, shard: int, since: int) -> tuple[int, list[int] | None]:
        """Return the messages of a shard's mailbox from a number on, without the lock.

        Returns:
            The number of the next message, and a flat list of owner, number and cause
            of each.  None stands for the list when messages have been overwritten, or
            may have been.
        """
        head, messages = self._read_mailbox(shard, since)
        return head, messages


def _owner_of(shared: bytes) -> int:
    return int.from_bytes(shared[:_TOKEN_BYTES], "big")
