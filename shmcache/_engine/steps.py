"""Steps: pieces of long work, each a short hold of one lock.

Sweeping, iteration and clearing may concern millions of entries.  ``Cache`` does them
in steps of some dozens of entries, so that others get the lock in between.

Death in the middle: between two steps a shard is as sound as between two operations.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        CLEARED,
        CODEC_TAG,
        DELETED,
        EXPIRED,
        F64_EXPIRES,
        F_BLOCK,
        F_CHAIN,
        F_HASH,
        F_LRU_PREV,
        F_META,
        F_STAMP,
        S_DUE,
        S_ENTRIES,
        S_SEQ,
        Index,
        Word,
    )
    from shmcache._engine.words import Corrupt, key_bytes
    from shmcache._engine.writes import Writes
    from shmcache._format.fields import key_len_of, kind_of, tag_of


if cython.compiled:
    from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize


@cython.cclass
class Steps(Writes):
    """The steps that ``Cache`` repeats until a shard is done."""

    def _step(self, s: int, limit: int) -> int:
        """Apply the recency buffer of a shard, and remove what has expired.

        Args:
            s: The shard.
            limit: How many entries may go; with 0 only the buffer is applied.

        Returns:
            How many went; -1 if no more are due.
        """
        now: Word = self._now()
        shard: Index = s
        b: Index = self._base(shard)
        removed: Index = 0
        due: Word
        self._begin(s, b)
        try:
            if self.w64[b + S_ENTRIES] > self.capacity[shard]:
                raise Corrupt("entries")
            due = self.w64[b + S_DUE]
            if limit and due and now >= due:
                removed = self._reclaim(b, now, limit, True)
                due = self.w64[b + S_DUE]
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if removed == 0 and (due == 0 or now < due):
            return -1
        return removed

    def _is_due(self, s: int) -> bool:
        """Return whether a shard may hold something expired; this takes no lock."""
        self._require_joined()  # another thread may have closed the cache
        due: Word = self.w64[self._base(s) + S_DUE]
        return due != 0 and self._now() >= due

    def _flush_recency(self) -> None:
        """Apply the recency buffers of this process to the LRU rings.

        A shard whose holder is stuck is left out, because recency is not worth a long
        wait.
        """
        cython.declare(s=Index, b=Index)
        self._require_joined()
        for s in range(self.recent_count.shape[0]):
            b = self._base(s)
            if self.recent_count[s] and (
                self._try_acquire(s, b)
                or (not self._is_stuck(s, b) and self._wait(s, b, False))
            ):
                self._start(s, b)  # applies the buffer
                self._end(s, b)

    def _scan(self, s: int, bucket: int, limit: int, values: bool) -> Any:
        """Copy about ``limit`` live entries of a shard, from a bucket on.

        Buckets are the stable order: an entry that is overwritten moves to another
        slot, but never to another bucket.

        Returns:
            The next bucket, or -1 at the end; and a flat list of meta, key bytes, value
            bytes (None unless ``values``), expiry (ns) and stamp of each entry.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        bb: Index = bucket
        room: Index = limit
        out: list = [None] * (5 * (limit + 64))  # before the lock is taken
        n: Index = 0
        seen: Index = 0
        cython.declare(steps=Index, v=Index, slot=Index)
        self._begin(s, b)
        try:
            while bb < self.slots and n < room and seen < 64 * room:
                slot = self.w32[2 * b + self.buckets4 + bb]
                bb += 1
                seen += 1
                steps = 0
                while slot:
                    v = self._record(b, slot)
                    if self.w64[v + F64_EXPIRES] > now:
                        if n >= room + 64:
                            raise Corrupt("hash chain")
                        out[5 * n] = self.w32[2 * v + F_META]
                        out[5 * n + 1] = self._key(b, v)
                        if values:
                            out[5 * n + 2] = self._value(
                                b, slot, self.w32[2 * v + F_HASH]
                            )
                        out[5 * n + 3] = self.w64[v + F64_EXPIRES]
                        out[5 * n + 4] = self.w32[2 * v + F_STAMP]
                        n += 1
                    slot = self.w32[2 * v + F_CHAIN]
                    steps += 1
                    if steps > self.slots:
                        raise Corrupt("hash chain")
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        del out[5 * n :]
        return (bb if bb < self.slots else -1), out

    def _clear_step(
        self, s: int, bucket: int, limit: int, newest: int, kind: int, prefix: bytes
    ) -> Any:
        """Clear about ``limit`` entries of a shard, from a bucket on.

        Args:
            s: The shard.
            bucket: Where to begin.
            limit: About how many entries may go.
            newest: Entries with a higher version stay: they were stored meanwhile.
            kind: Only keys of this kind go; 0 means any.
            prefix: Only keys whose bytes begin with it go.

        Returns:
            The next bucket, or -1 at the end; and how many live entries went.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        bb: Index = bucket
        room: Index = limit
        n: Index = 0
        seen: Index = 0
        cython.declare(steps=Index, v=Index, slot=Index, after=Index)
        self._begin(s, b)
        try:
            while bb < self.slots and n < room and seen < 64 * room:
                slot = self.w32[2 * b + self.buckets4 + bb]
                bb += 1
                seen += 1
                steps = 0
                while slot:
                    v = self._record(b, slot)
                    after = self.w32[2 * v + F_CHAIN]
                    if self.w64[v] <= newest and self._has_prefix(b, v, kind, prefix):
                        if self.w64[v + F64_EXPIRES] <= now:
                            self._unlink(b, slot, EXPIRED, now)
                        else:
                            self._unlink(b, slot, CLEARED, now)
                            n += 1
                    slot = after
                    steps += 1
                    if steps > self.slots:
                        raise Corrupt("hash chain")
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return (bb if bb < self.slots else -1), n

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _has_prefix(
        self, b: Index, v: Index, kind: cython.uint, prefix: bytes
    ) -> cython.bint:
        meta: cython.uint = self.w32[2 * v + F_META]
        n: Index = len(prefix)
        if kind == 0:
            return True
        if kind_of(meta) != kind or key_len_of(meta) < n:
            return False
        return self._copy_out(b, self.w32[2 * v + F_BLOCK], 0, n) == prefix

    def _pop_oldest(self, s: int, decoded: int) -> Any:
        """Take the least recently used live entry of a shard.

        What only the codec can decode goes at a second call, as in ``_take``.

        Args:
            s: The shard.
            decoded: The version whose value the caller has decoded; 0: none.

        Returns:
            Kind, key bytes, tag, value bytes, version, and whether the entry has been
            removed; None if the shard is empty.
        """
        now: Word = self._now()
        b: Index = self._base(s)
        key: bytes = b""
        data: bytes = b""
        meta: cython.uint = 0
        slot: Index = 0
        version: Word = 0
        goes: cython.bint = False
        v: Index
        self._begin(s, b)
        try:
            while True:
                slot = self.w32[2 * self._record(b, 0) + F_LRU_PREV]
                if slot == 0:
                    break
                v = self._record(b, slot)
                if self.w64[v + F64_EXPIRES] <= now:
                    self._unlink(b, slot, EXPIRED, now)
                    continue
                meta = self.w32[2 * v + F_META]
                key = self._key(b, v)
                data = self._value(b, slot, self.w32[2 * v + F_HASH])
                version = self.w64[v]
                goes = tag_of(meta) != CODEC_TAG or version == decoded
                if goes:
                    self._unlink(b, slot, DELETED, now)
                break
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return None
        return kind_of(meta), key, tag_of(meta), data, version, goes

    def _rebuild_shard(self, s: int) -> int:
        """Rebuild a shard from its records; return how many entries were given up."""
        b: Index = self._base(s)
        dropped: Index = 0
        self._require_joined()
        self._acquire(s, b)
        try:
            self._put_word(b + S_SEQ, self.w64[b + S_SEQ] + 1)
            dropped = self._rebuild(b)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return dropped

    def _copy_shard(self, s: int, first: int, last: int) -> bytes:
        """Copy the bytes of a shard, from one offset to another, under its lock."""
        b: Index = self._base(s)
        data: bytes = b""
        at: Index = 8 * b + first
        n: Index = last - first
        self._require_joined()
        self._acquire(s, b)
        try:
            if cython.compiled:
                data = PyBytes_FromStringAndSize(
                    cython.cast("const char *", cython.address(self.mem[at])), n
                )
            else:
                data = bytes(self.mem[at : at + n])
        finally:
            self._release(s, b)
        return data

    def _key_hash(self, key: Any) -> Any:
        """Return kind, bytes, hash and shard of a key."""
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, _b=Index)
        kind, h, s, _b = self._place(key, kb)
        return kind, kb, h, s

    def _log_evictions(self, on: bool) -> None:
        """Say whether evictions are to be logged from now on."""
        self.logs_evictions = on
