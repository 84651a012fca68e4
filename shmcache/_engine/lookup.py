"""Looking up: a read takes no lock, unless only the lock gives a certain answer.

Problem: a lock around every read makes readers wait for readers.

Mechanism: a compiled reader takes no lock.  It walks the hash chain, which may change
under it (so every index is checked and the steps are counted), copies the value, and
then looks at the record's version once more.  If the version is odd and unchanged, the
copy is of one live entry, whatever happened to other entries meanwhile.  "Not found"
holds only if the shard's SEQ was even and is unchanged.

After a few vain attempts the reader takes the lock like a writer, unless the writer
inside the shard is alive but stuck: it was stopped, or the host is overloaded.  Then
``_read_stuck`` reads what the stuck writer has left.  A writer leaves everything else
as it was, and what it was about to do is known: an entry whose version it has cleared
has gone; a number that it overwrites in place has the value of the redo record; and a
key that has no record for a moment, as in a rebuild, is named by IN_DOUBT.  Of such a
key the reader says nothing: it waits for the lock, and in the end raises LockTimeout.

Death in the middle: readers write only ``expires`` of sliding entries to the shard, by
one compare-and-swap.

The interpreted engine has no memory fences, so it takes the lock for every read.
"""

from time import sleep
from typing import TYPE_CHECKING, Any

from msgpack import unpackb

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        ALL_IN_DOUBT,
        ATTEMPTS,
        BYTES_TAG,
        CODEC_TAG,
        COUNTS_AS_USE,
        F64_EXPIRES,
        F_BLOCK,
        F_CHAIN,
        F_CHECKSUM,
        F_HASH,
        F_LRU_PREV,
        F_META,
        F_TTL,
        F_VALUE_LEN,
        MASK32,
        META_FETCHED,
        META_KEY,
        NEVER,
        R_HITS,
        R_MISSES,
        RECENCY,
        RICH_BYTE,
        S_HITS,
        S_IN_DOUBT,
        S_LATE_USE,
        S_MISSES,
        S_REDO_CHECKSUM,
        S_REDO_SLOT,
        S_REDO_VALUE,
        S_REDO_VERSION,
        S_SEQ,
        STUCK_PAUSE,
        WANTS_VALUE,
        Index,
        Word,
    )
    from shmcache._engine.lock import Lock
    from shmcache._engine.words import (
        ABSENT,
        MOVED,
        UNSURE,
        bytes_of,
        key_bytes,
        unpack_ttl,
    )
    from shmcache._format.fields import is_live, make_meta, shard_of, tag_of
    from shmcache._format.values import decode_tagged


if cython.compiled:
    from cython.cimports.shmcache._engine.memory import cas, pause


@cython.cclass
class Lookup(Lock):
    """Reading one entry."""

    codec: Any
    decode: Any
    fast_unpack: cython.bint  # plain values can go to msgpack directly
    sliding: cython.bint

    @cython.cfunc
    @cython.final
    def _lookup(self, key: Any, mode: cython.int) -> Any:
        # Return the value of a key (True if the value is not wanted), or ABSENT.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        if cython.compiled:
            return self._read_optimistic(s, b, h, kind, kb, mode)
        return self._read_locked(s, b, h, kind, kb, mode)

    # --- without the lock -----------------------------------------------------------

    @cython.cfunc
    @cython.final
    def _read_optimistic(
        self,
        s: Index,
        b: Index,
        h: Word,
        kind: cython.uint,
        kb: bytes,
        mode: cython.int,
    ) -> Any:
        # Read under the lock only if the shard is too busy, if the entry has expired
        # and must be removed, or if there is damage.
        cython.declare(_attempt=cython.int, slot=Index, version=Word)
        try:
            for _attempt in range(ATTEMPTS):
                slot, version = self._walk_optimistic(b, h & MASK32, kind, kb)
                if slot == 0:
                    if mode & COUNTS_AS_USE:
                        self.w64[self.row + R_MISSES] += 1
                    return ABSENT
                if slot > 0:
                    value = self._take_copy(s, b, h & MASK32, kb, slot, version, mode)
                    if value is UNSURE:
                        break
                    if value is not MOVED:
                        return value
                elif cython.compiled:
                    pause()
        except IndexError:
            self._require_joined()  # another thread may have closed the cache
        return self._read_locked(s, b, h, kind, kb, mode)

    @cython.cfunc
    @cython.final
    @cython.inline
    def _walk_optimistic(
        self, b: Index, h32: Word, kind: cython.uint, kb: bytes
    ) -> tuple[Index, Word]:
        # Return the slot of a key and the version of its record.  Slot 0 means that the
        # key is certainly absent, and -1 that this walk cannot tell.
        want: cython.uint = make_meta(len(kb), kind, 0)
        seq: Word = self._get_word(b + S_SEQ)
        slot: Index = self.w32[self._bucket(b, h32)]
        if cython.compiled and slot:
            self._fetch_block(b, slot)
        steps: Index = 0
        cython.declare(v=Index, r=Index, version=Word, block=Index)
        while slot:
            v = self._record(b, slot)
            r = 2 * v
            version = self._get_word(v)
            if (
                self.w32[r + F_HASH] == h32
                and self.w32[r + F_META] & META_KEY == want
                and is_live(version)
            ):
                block = self.w32[r + F_BLOCK]
                if self._same_key(b, block, kb):
                    self.in_step = block == slot
                    return slot, version
            slot = self.w32[r + F_CHAIN]
            steps += 1
            if steps > self.slots:
                return -1, 0
        self._read_fence()
        if seq & 1 == 0 and seq == self._get_word(b + S_SEQ):
            return 0, 0
        return -1, 0

    @cython.cfunc
    @cython.final
    @cython.inline
    def _take_copy(
        self,
        s: Index,
        b: Index,
        h32: Word,
        kb: bytes,
        slot: Index,
        version: Word,
        mode: cython.int,
    ) -> Any:
        # Return what _lookup returns for the entry in a slot.  Return MOVED if its
        # version has changed, and UNSURE if the caller must read under the lock.
        v: Index = self._record(b, slot)
        r: Index = 2 * v
        value_len: Index = self.w32[r + F_VALUE_LEN]
        expires: Word = self.w64[v + F64_EXPIRES]
        block: Index = self.w32[r + F_BLOCK]
        tag: cython.uint = tag_of(self.w32[r + F_META])
        checksum32: cython.uint = self.w32[r + F_CHECKSUM]
        data: bytes = b""
        self._read_fence()
        if version != self._get_word(v):
            return MOVED
        if mode & WANTS_VALUE:
            # The version was unchanged, so the length is that of the entry.
            if self._need(len(kb), value_len) > self.blocks:
                return UNSURE
            data = self._copy_out(b, block, len(kb), value_len)
            self._read_fence()
            if version != self._get_word(v):
                return MOVED
            if checksum32 != self._checksum(data, h32, tag):
                return UNSURE
        if expires != NEVER and not self._is_alive(v, expires, self._now(), mode):
            return UNSURE
        if mode & COUNTS_AS_USE:
            self.w64[self.row + R_HITS] += 1
            self._remember_use(s, b, slot, version)
        if not mode & WANTS_VALUE:
            return True
        if tag == CODEC_TAG:
            return self._decode(data)
        if tag == BYTES_TAG:
            return data
        return decode_tagged(self.codec, tag, data)

    @cython.cfunc
    @cython.final
    def _decode(self, data: bytes) -> Any:
        # Decode a value; most values go directly to msgpack.
        if self.fast_unpack and len(data) and data[0] != RICH_BYTE:
            try:
                return unpackb(data)
            except Exception:  # noqa: BLE001, S110 - the codec knows what to say
                pass
        return self.decode(data)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _is_alive(
        self, v: Index, expires: Word, now: Word, mode: cython.int
    ) -> cython.bint:
        # Return whether an entry with an expiry is alive.  In a sliding cache a use
        # renews it.  The caller has asked the clock, because it may hold the lock.
        if expires <= now:
            return False
        cython.declare(ttl=cython.uint, later=Word)
        if self.sliding and mode & COUNTS_AS_USE:
            ttl = self.w32[2 * v + F_TTL]
            later = now + unpack_ttl(ttl)
            if ttl and later > expires:
                if cython.compiled:
                    # If the record belongs to another entry by now, this fails, unless
                    # that entry expires at the same nanosecond.
                    cas(cython.address(self.w64[v + F64_EXPIRES]), expires, later)
                else:
                    self.w64[v + F64_EXPIRES] = later
        return True

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _remember_use(
        self, s: Index, b: Index, slot: Index, version: Word
    ) -> cython.int:
        # Put a hit into the recency buffer.  A full buffer is applied if the lock is
        # free; else its oldest quarter is dropped, and the lock is tried again when the
        # buffer is full again.
        at: Index = s * RECENCY
        n: Index = self.recent_count[s]
        r: Index = 2 * self._record(b, slot)
        cython.declare(i=Index, dropped=Index)
        if (
            n == 0
            and self.w32[r + F_LRU_PREV] == 0
            and self.w32[r + F_META] & META_FETCHED
            and self.w64[b + S_LATE_USE] == 0
        ):
            # It is the most recently used entry already.  So processes that read one
            # key all the time do not take its lock again and again.
            return 0
        if n == self.recency_limit:
            if self._try_acquire(s, b):
                self._start(s, b)  # applies the buffer
                self._end(s, b)
                n = 0
            else:
                dropped = (n + 3) // 4
                n -= dropped
                for i in range(n):
                    self.recent_slot[at + i] = self.recent_slot[at + dropped + i]
                    self.recent_version[at + i] = self.recent_version[at + dropped + i]
        self.recent_slot[at + n] = slot
        self.recent_version[at + n] = version
        self.recent_count[s] = n + 1
        return 0

    # --- under the lock -------------------------------------------------------------

    @cython.cfunc
    @cython.final
    def _read_locked(
        self,
        s: Index,
        b: Index,
        h: Word,
        kind: cython.uint,
        kb: bytes,
        mode: cython.int,
    ) -> Any:
        # Do the same as _read_optimistic, but always with a certain answer.
        visit: Word = self.visit
        now: Word = self._now()
        data: bytes = b""
        tag: cython.uint = 0
        slot: Index
        if visit != self.visit:  # the clock has forked
            h = self._hash(kb, kind)
            s = shard_of(h, self.shards)
            b = self._base(s)
        if not self._try_acquire(s, b) and (
            self._is_stuck(s, b) or not self._wait(s, b, False)
        ):
            if not cython.compiled:
                # A use would renew a sliding entry, which needs compare-and-swap here.
                mode &= ~COUNTS_AS_USE
            value = self._read_stuck(s, b, h, kind, kb, mode)
            if value is not UNSURE:
                return value
            self._wait(s, b, True)
        self._start(s, b)
        try:
            slot = self._find_live(b, h, kind, kb, now)
            if slot and mode & WANTS_VALUE:
                data = self._value(b, slot, h)
                tag = tag_of(self.w32[2 * self._record(b, slot) + F_META])
            if mode & COUNTS_AS_USE:
                self._count_lookup(b, slot, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return ABSENT
        if not mode & WANTS_VALUE:
            return True
        return decode_tagged(self.codec, tag, data)

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _count_lookup(self, b: Index, slot: Index, now: Word) -> cython.int:
        # Count a hit and use the entry, or count a miss if the slot is 0; the lock is
        # held.
        v: Index
        if slot == 0:
            self.w64[b + S_MISSES] += 1
            return 0
        v = self._record(b, slot)
        self.w64[b + S_HITS] += 1
        self._use(b, slot)
        if self.w64[v + F64_EXPIRES] != NEVER:
            self._is_alive(v, self.w64[v + F64_EXPIRES], now, COUNTS_AS_USE)
        return 0

    # --- beside a stuck holder ------------------------------------------------------

    @cython.cfunc
    @cython.final
    def _read_stuck(
        self,
        s: Index,
        b: Index,
        h: Word,
        kind: cython.uint,
        kb: bytes,
        mode: cython.int,
    ) -> Any:
        # Do the same as _read_locked while the holder of the lock is stuck, or return
        # UNSURE.  The holder may go on at any moment, so an entry counts only if its
        # version is the same after the copy, and "not found" only if a second walk,
        # some time later, finds nothing either and SEQ has not changed: a section of
        # the holder ends within that time, if the holder runs.
        seq: Word = self._get_word(b + S_SEQ)
        _walk: cython.int
        try:
            for _walk in range(2):
                slot: Index = self._find(b, h & MASK32, kind, kb)
                if slot:
                    value = self._copy_stuck(s, b, h & MASK32, kb, slot, mode)
                    if value is not ABSENT:
                        return value
                if self._is_in_doubt(b, h & MASK32):
                    return UNSURE
                sleep(STUCK_PAUSE)
            self._read_fence()
            if seq != self._get_word(b + S_SEQ):
                return UNSURE
        except IndexError:
            self._require_joined()
            return UNSURE
        if mode & COUNTS_AS_USE:
            self.w64[self.row + R_MISSES] += 1
        return ABSENT

    @cython.cfunc
    @cython.final
    def _copy_stuck(
        self, s: Index, b: Index, h32: Word, kb: bytes, slot: Index, mode: cython.int
    ) -> Any:
        # Return what _lookup returns for a record of this hash and key, whose other
        # fields may be half written, or UNSURE.
        v: Index = self._record(b, slot)
        version: Word = self._get_word(v)
        value_len: Index = self.w32[2 * v + F_VALUE_LEN]
        expires: Word = self.w64[v + F64_EXPIRES]
        tag: cython.uint = tag_of(self.w32[2 * v + F_META])
        checksum32: Word = self.w32[2 * v + F_CHECKSUM]
        data: bytes
        if is_live(version):
            if self._need(len(kb), value_len) > self.blocks:
                return UNSURE
            data = self._copy_out(b, self.w32[2 * v + F_BLOCK], len(kb), value_len)
        elif self._get_word(b + S_REDO_SLOT) != cython.cast(Word, slot):
            return ABSENT  # its version was cleared, because it goes
        elif self.w64[b + S_REDO_VERSION] == version + 1:
            # A number is being overwritten in place.
            data = bytes_of(self.w64[b + S_REDO_VALUE])
            checksum32 = self.w64[b + S_REDO_CHECKSUM]
        else:
            return UNSURE
        self._read_fence()
        if version != self._get_word(v):
            return UNSURE
        if checksum32 != self._checksum(data, h32, tag):
            return UNSURE
        if expires != NEVER and not self._is_alive(v, expires, self._now(), mode):
            return ABSENT
        if mode & COUNTS_AS_USE:
            self.w64[self.row + R_HITS] += 1
            # An overwrite ends with the version that is live.
            self._remember_use(s, b, slot, version | 1)
        return decode_tagged(self.codec, tag, data) if mode & WANTS_VALUE else True

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _is_in_doubt(self, b: Index, h32: Word) -> cython.bint:
        # Return whether a live key of this hash may have no record just now.
        doubt: Word = self._get_word(b + S_IN_DOUBT)
        return doubt != 0 and (doubt == ALL_IN_DOUBT or doubt & MASK32 == h32)
