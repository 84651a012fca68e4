"""The eviction mailbox: how the owner of a handle learns that its entry has gone.

Problem: any process may evict the entry of a handle, but only its owner can close it.

Mechanism: each shard has a ring of messages (token of the owner, number of the handle,
cause).  ``_unlink`` posts one under the lock (``_post_message`` in ``entries.py``);
each owner reads on from the last message that it has read, without the lock.  If
messages were overwritten before an owner read them, the owner is told so, and compares
its handles with the map.

Death in the middle: the head is stored after the message, so no half-written message is
read.  A death between unlinking and posting leaves SEQ odd, and the rebuild moves the
head by more than one turn of the ring: every owner finds that messages are lost.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        COUNTS_AS_USE,
        MAILBOX_SIZE,
        MAILBOX_WORDS,
        MASK32,
        OWNER_SIZE,
        S_MAILBOX,
        S_MAILBOX_HEAD,
        Index,
        Word,
    )
    from shmcache._engine.in_flight import InFlight
    from shmcache._engine.words import ABSENT, Corrupt, key_bytes, word_of


@cython.cclass
class Mailbox(InFlight):
    """What ``HandleMap`` needs of the engine."""

    def _read_mailbox(self, s: int, since: int) -> Any:
        """Read the messages of a shard from a number on, without the lock.

        O(messages).

        Returns:
            The number of the next message, and a flat list of token, number and cause
            of each; None in place of the list if some of them have been overwritten, or
            may have been.
        """
        b: Index = self._base(s)
        first: Word = since
        head: Word = self._get_word(b + S_MAILBOX_HEAD)
        n: Word = first
        at: Index
        out: list = []
        if head - first >= MAILBOX_SIZE or head < first:
            return head, None
        while n < head:
            at = (
                b
                + S_MAILBOX
                + MAILBOX_WORDS * cython.cast(Index, n & (MAILBOX_SIZE - 1))
            )
            out += (self.w64[at], self.w64[at + 1], self.w64[at + 2])
            n += 1
        self._read_fence()
        if self._get_word(b + S_MAILBOX_HEAD) - first >= MAILBOX_SIZE:
            return head, None
        return head, out

    def _renew(self, key: Any) -> bool:
        """Use an entry without reading its value; return whether it is there.  O(1)."""
        return self._lookup(key, COUNTS_AS_USE) is not ABSENT

    def _discard(self, key: Any, owner: int, number: int, cause: int) -> bool:
        """Remove the entry of a handle if it belongs to this owner.  O(1).

        Args:
            key: The key of the entry.
            owner: The token that the entry must have.
            number: The number of the handle that the entry must have; 0 means any.
            cause: The cause to tell the owner.

        Returns:
            Whether the entry was there and was removed.
        """
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        data: bytes
        mine: cython.bint = False
        slot: Index
        self._begin(s, b)
        try:
            slot = self._find(b, h & MASK32, kind, kb)
            if slot:
                data = self._value(b, slot, h)
                if len(data) < OWNER_SIZE:
                    raise Corrupt("handle")
                mine = word_of(data[:8]) == owner and (
                    number == 0 or word_of(data[8:16]) == number
                )
                if mine:
                    self._unlink(b, slot, cause, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return mine
