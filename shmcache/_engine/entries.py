"""Entries: how they are found, stored, reclaimed and evicted, and who is told.

One rule holds after every single store, and so whenever a process dies: an entry is in
the cache if and only if the version of its record is odd, and then its other fields,
its key and its value are in place.  Therefore

- a writer fills a free record and fresh blocks first, and publishes the entry by
  storing the version (``_store``);
- whoever removes an entry clears its version first (``_unlink``);
- an overwrite publishes a second record, and then unlinks the first.  If the writer
  dies in between, the rebuild keeps the higher version.

Everything else is derived from the records, and ``rebuild.py`` derives it.

All functions here are called with the lock of the shard held.  For that reason they run
no foreign Python code, and allocate no objects that the garbage collector tracks:
otherwise a signal handler, a finalizer or another thread could find the shard half
changed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        CAPACITY,
        EXPIRED,
        F64_EXPIRES,
        F_BLOCK,
        F_CHAIN,
        F_CHECKSUM,
        F_HASH,
        F_LRU_PREV,
        F_META,
        F_STAMP,
        F_TTL,
        F_VALUE_LEN,
        F_WHEEL_NEXT,
        F_WHEEL_PREV,
        LAST_KIND,
        MAILBOX_SIZE,
        MAILBOX_WORDS,
        MASK32,
        MASK64,
        MAX_EXPIRES,
        MAX_VERSION,
        META_FETCHED,
        META_KEY,
        NEVER,
        OWNER_SIZE,
        REPLACED,
        S_AGE_BUCKETS,
        S_AGES,
        S_DUE,
        S_ENTRIES,
        S_GONE,
        S_IN_DOUBT,
        S_MAILBOX,
        S_MAILBOX_HEAD,
        S_REDO_CHECKSUM,
        S_REDO_SLOT,
        S_REDO_VALUE,
        S_REDO_VERSION,
        S_SEQUENCE,
        S_SETS,
        S_TICK,
        S_UNREAD,
        S_WHEEL_HEADS,
        WHEEL_TICK_BITS,
        Index,
        Word,
    )
    from shmcache._engine.wheel import Wheel
    from shmcache._engine.words import Corrupt, bytes_of, word_of
    from shmcache._format.fields import (
        is_live,
        key_len_of,
        kind_of,
        make_meta,
        make_version,
        stamps_between,
        tag_of,
    )


@cython.cclass
class Entries(Wheel):
    """The life of an entry."""

    notify: cython.bint  # entries stand for handles, whose owners must be told
    logs_evictions: cython.bint
    has_news: cython.bint  # one of the two logs has something for peers.report
    # It is a flat list: cause, meta and key bytes of one entry, then of the next.  The
    # garbage collector tracks neither ints nor bytes.
    evicted_log: list
    age_bounds: cython.ulonglong[::1]  # of the histogram, in stamps

    # --- finding --------------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _find(self, b: Index, h32: Word, kind: cython.uint, key: bytes) -> Index:
        # Return the slot of a key, or 0.
        slot: Index = self.w32[self._bucket(b, h32)]
        want: cython.uint = make_meta(len(key), kind, 0)
        r: Index
        steps: Index = 0
        while slot:
            r = 2 * self._record(b, slot)
            if (
                self.w32[r + F_HASH] == h32
                and self.w32[r + F_META] & META_KEY == want
                and self._same_key(b, self.w32[r + F_BLOCK], key)
            ):
                self.in_step = self.w32[r + F_BLOCK] == slot
                return slot
            slot = self.w32[r + F_CHAIN]
            steps += 1
            if steps > self.slots:
                raise Corrupt("hash chain")
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _find_live(
        self, b: Index, h: Word, kind: cython.uint, key: bytes, now: Word
    ) -> Index:
        # Return the slot of a key, or 0.  If the entry has expired, remove it.
        slot: Index = self._find(b, h & MASK32, kind, key)
        if slot and self.w64[self._record(b, slot) + F64_EXPIRES] <= now:
            self._unlink(b, slot, EXPIRED, now)
            return 0
        return slot

    @cython.cfunc
    @cython.final
    def _key(self, b: Index, v: Index) -> bytes:
        # Return the key of a live entry, for callers that do not have it.  The key must
        # have the hash that the record names.
        meta: cython.uint = self.w32[2 * v + F_META]
        kind: cython.uint = kind_of(meta)
        if not is_live(self.w64[v]) or kind > LAST_KIND:
            raise Corrupt("key")
        key: bytes = self._copy_out(b, self.w32[2 * v + F_BLOCK], 0, key_len_of(meta))
        if self._hash(key, kind) & MASK32 != self.w32[2 * v + F_HASH]:
            raise Corrupt("key")
        return key

    @cython.cfunc
    @cython.final
    def _value(self, b: Index, slot: Index, h: Word) -> bytes:
        # Return the value of a live entry.  The value must have the checksum that the
        # record names.
        r: Index = 2 * self._record(b, slot)
        meta: cython.uint = self.w32[r + F_META]
        value_len: Index = self.w32[r + F_VALUE_LEN]
        if self._need(key_len_of(meta), value_len) > self.blocks:
            raise Corrupt("length")
        data: bytes = self._copy_out(
            b, self.w32[r + F_BLOCK], key_len_of(meta), value_len
        )
        if self.w32[r + F_CHECKSUM] != self._checksum(data, h & MASK32, tag_of(meta)):
            raise Corrupt("checksum")
        return data

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _blocks_of(self, b: Index, slot: Index) -> Index:
        # Return how many blocks an entry takes.
        r: Index = 2 * self._record(b, slot)
        return self._need(key_len_of(self.w32[r + F_META]), self.w32[r + F_VALUE_LEN])

    # --- going ----------------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _unlink(self, b: Index, slot: Index, cause: Index, now: Word) -> cython.int:
        # Remove an entry: clear its version first, and then all that refers to it.
        v: Index = self._record(b, slot)
        r: Index = 2 * v
        if not is_live(self.w64[v]):
            raise Corrupt("version")
        self._put_word(v, self.w64[v] - 1)
        self._chain_remove(b, slot)
        self._lru_remove(b, slot)
        self._wheel_remove(b, slot)
        meta: cython.uint = self.w32[r + F_META]
        need: Index = self._need(key_len_of(meta), self.w32[r + F_VALUE_LEN])
        if need > self.blocks or self.w64[b + S_ENTRIES] == 0:
            raise Corrupt("length")
        if self.notify:
            self._post_message(b, r, cause)
        if self.logs_evictions and cause <= CAPACITY:
            self._log_eviction(b, r, cause)
        self._give_blocks(b, self.w32[r + F_BLOCK], need)
        self._give_slot(b, slot)
        if cause != REPLACED:  # the key stays, so the number of entries does
            self.w64[b + S_ENTRIES] -= 1
        self.w64[b + S_GONE + cause] += 1
        if cause <= CAPACITY:
            self._count_age(b, r, now)
            if not meta & META_FETCHED:
                self.w64[b + S_UNREAD] += 1
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _log_eviction(self, b: Index, r: Index, cause: Index) -> cython.int:
        # The lock is held, so the log is written later: see _release in lock.py.
        meta: cython.uint = self.w32[r + F_META]
        key: bytes = self._copy_out(b, self.w32[r + F_BLOCK], 0, key_len_of(meta))
        if cython.compiled:
            self.evicted_log.append(cause)
            self.evicted_log.append(meta)
            self.evicted_log.append(key)
        else:
            # In one step, because another thread may take the list away in between.
            self.evicted_log.extend((cause, meta, key))
        self.has_news = True
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _count_age(self, b: Index, r: Index, now: Word) -> cython.int:
        i: Index
        age: Word = stamps_between(self.w32[r + F_STAMP], self._stamp(now))
        self._count(b + S_AGES, age)
        for i in range(self.age_bounds.shape[0]):
            if age <= self.age_bounds[i]:
                self._count(b + S_AGE_BUCKETS + i, 1)
                break
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _post_message(self, b: Index, r: Index, cause: Index) -> cython.int:
        # Send a message to the owner of the handle that this record stands for.  The
        # head is stored last, so a reader that stops at the head finds only whole
        # messages.
        key_len: Index = key_len_of(self.w32[r + F_META])
        block: Index = self.w32[r + F_BLOCK]
        head: Word = self.w64[b + S_MAILBOX_HEAD]
        at: Index = (
            b
            + S_MAILBOX
            + MAILBOX_WORDS * cython.cast(Index, head & (MAILBOX_SIZE - 1))
        )
        if self.w32[r + F_VALUE_LEN] < OWNER_SIZE:
            raise Corrupt("handle")
        self.w64[at] = word_of(self._copy_out(b, block, key_len, 8))
        self.w64[at + 1] = word_of(self._copy_out(b, block, key_len + 8, 8))
        self.w64[at + 2] = cause
        self._put_word(b + S_MAILBOX_HEAD, (head + 1) & MASK64)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _reclaim(
        self, b: Index, now: Word, limit: Index, thorough: cython.bint
    ) -> Index:
        # Remove entries that have expired, and return how many.  At most ``limit``
        # entries leave their list.  Entries that stay, because they expire later within
        # this tick, do not count if ``thorough``: any number of them may stand before
        # the one that has expired.
        removed: Index = 0
        stays: Index = self.slots if thorough else limit
        cython.declare(later=Word, expires=Word, number=Index, slot=Index, after=Index)
        while limit > 0:
            number = self._turn_wheel(b, now)
            if number == -1:
                return removed
            later = NEVER
            slot = self.w32[2 * (b + S_WHEEL_HEADS) + number]
            if slot == 0:
                raise Corrupt("wheel")
            while slot and limit > 0:
                after = self.w32[2 * self._record(b, slot) + F_WHEEL_NEXT]
                expires = self.w64[self._record(b, slot) + F64_EXPIRES]
                if expires <= now:
                    self._unlink(b, slot, EXPIRED, now)
                    removed += 1
                    limit -= 1
                elif expires > MAX_EXPIRES:
                    raise Corrupt("expires")
                elif number >= 64 or expires >> WHEEL_TICK_BITS > self.w64[b + S_TICK]:
                    self._wheel_remove(b, slot)
                    self._wheel_insert(b, slot, expires, now)
                    limit -= 1
                elif stays:
                    stays -= 1
                    if expires < later:
                        later = expires
                elif thorough:
                    raise Corrupt("wheel")  # a list of more entries than there are
                else:
                    return removed
                slot = after
            if slot == 0 and later != NEVER:
                # Only the list of the current tick keeps entries, and all that are left
                # expire later.
                self.w64[b + S_DUE] = later
                return removed
        return removed

    @cython.cfunc
    @cython.final
    @cython.exceptval(-2)
    def _turn_wheel(self, b: Index, now: Word) -> Index:
        # Turn the wheel to the list that is due first, and return its number.  If none
        # is due, return -1 and set DUE to the time when one may be.
        target: Word = now >> WHEEL_TICK_BITS
        tick: Word = self.w64[b + S_TICK]
        if tick > MAX_EXPIRES >> WHEEL_TICK_BITS:
            raise Corrupt("tick")
        number: Index = self._wheel_next(b)
        if number == -1:
            self.w64[b + S_DUE] = NEVER
            return -1
        shift: cython.uint = cython.cast(cython.uint, 6 * (number >> 6))
        start: Word = ((tick >> (shift + 6)) << (shift + 6)) | (
            cython.cast(Word, number & 63) << shift
        )
        if start > target:
            self.w64[b + S_DUE] = start << WHEEL_TICK_BITS
            if target > tick:
                self.w64[b + S_TICK] = target
            return -1
        if start > tick:
            self.w64[b + S_TICK] = start
        return number

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _evict(self, b: Index, now: Word, keep: Index) -> cython.bint:
        # Remove at least one entry: expired ones, or else the least recently used one
        # that is not ``keep``.  Return False if there is none.  The search for expired
        # entries is bounded; the bound is not below the size of a single shard by
        # default, so there the order of eviction is exact.
        rounds: cython.int = 0
        while now >= self.w64[b + S_DUE] and self.w64[b + S_DUE] and rounds < 256:
            if self._reclaim(b, now, 64, True):
                return True
            rounds += 1
        slot: Index = self.w32[2 * self._record(b, 0) + F_LRU_PREV]
        if slot == keep and slot:
            slot = self.w32[2 * self._record(b, slot) + F_LRU_PREV]
        if slot == 0:
            return False
        self._unlink(b, slot, CAPACITY, now)
        return True

    # --- coming ---------------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _store(
        self,
        s: Index,
        b: Index,
        old: Index,
        h: Word,
        kind: cython.uint,
        key: bytes,
        tag: cython.uint,
        value: bytes,
        checksum32: cython.uint,
        expires: Word,
        ttl: cython.uint,
        now: Word,
    ) -> Word:
        # Make a new record for the key, which replaces ``old`` if that is not 0.
        # Return its version.
        if cython.compiled and old:
            self._fetch_neighbours(b, old)
        key_len: Index = len(key)
        value_len: Index = len(value)
        need: Index = self._need(key_len, value_len)
        is_new: cython.bint = old == 0
        old = self._make_room(s, b, old, need, now)
        slot: Index = self._take_slot(b)
        first: Index = self._take_blocks(b, need)
        self._copy_in(b, first, 0, key)
        self._copy_in(b, first, key_len, value)
        v: Index = self._record(b, slot)
        r: Index = 2 * v
        h32: Word = h & MASK32
        self.w64[v + F64_EXPIRES] = expires
        self.w32[r + F_HASH] = cython.cast(cython.uint, h32)
        self.w32[r + F_BLOCK] = first
        self.w32[r + F_VALUE_LEN] = value_len
        self.w32[r + F_META] = make_meta(key_len, kind, tag)
        self.w32[r + F_TTL] = ttl
        self.w32[r + F_STAMP] = self._stamp(now)
        self.w32[r + F_CHECKSUM] = checksum32
        self.w32[r + F_WHEEL_PREV] = 0
        self.w32[r + F_WHEEL_NEXT] = 0
        sequence: Word = self.w64[b + S_SEQUENCE] + 1
        self.w64[b + S_SEQUENCE] = sequence
        version: Word = make_version(sequence)
        self._put_word(v, version)
        self._chain_insert(b, slot, h32)
        self._lru_front(b, slot)
        if expires != NEVER:
            self._wheel_insert(b, slot, expires, now)
        if old:
            self._unlink(b, old, REPLACED, now)
        # The count is stored last: len() reads it without the lock, and it must never
        # be too high.
        if is_new:
            self.w64[b + S_ENTRIES] += 1
        elif old == 0:
            self._put_word(b + S_IN_DOUBT, 0)
        self.w64[b + S_SETS] += 1
        return version

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _make_room(
        self, s: Index, b: Index, old: Index, need: Index, now: Word
    ) -> Index:
        # Make room for a record of ``need`` blocks.  Return ``old``, or 0 if the old
        # record had to be removed.
        if self.w64[b + S_ENTRIES] > self.capacity[s]:
            raise Corrupt("entries")  # before all entries are evicted for it
        if old == 0:
            while self.w64[b + S_ENTRIES] >= self.capacity[s]:
                if not self._evict(b, now, 0):
                    raise Corrupt("entries")
        while self._blocks_left(b) < need:
            if old and need + self._blocks_of(b, old) > self.blocks:
                # Both can never fit side by side, so for a moment the key has no
                # record.
                doubt: Word = self.w32[2 * self._record(b, old) + F_HASH]
                self._put_word(b + S_IN_DOUBT, doubt | 1 << 32)
                self._unlink(b, old, REPLACED, now)
                old = 0
            elif not self._evict(b, now, old):
                raise Corrupt("blocks")
        return old

    # --- overwriting a number in place ----------------------------------------------
    #
    # Problem: if a counter moved to a new record and block at each step, only because a
    # process may die, a step would cost three times as much.
    # Mechanism: number, version and checksum are written down in the shard's header (a
    # redo record, as in the log of a database) before the entry is touched, so the next
    # holder of the lock can finish an overwrite that was begun.  Readers notice it as
    # they notice any writer: the version is even meanwhile, and has changed afterwards.
    # Death in the middle: the rebuild begins with ``_redo``.  If the death came before
    # REDO_SLOT was stored, nothing of the entry has been changed.

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _begin_rewrite(
        self, b: Index, slot: Index, data: bytes, checksum32: cython.uint
    ) -> Word:
        # Overwrite the eight bytes of the entry's value, and return the new version.
        sequence: Word = self.w64[b + S_SEQUENCE] + 1
        version: Word = make_version(sequence)
        self.w64[b + S_SEQUENCE] = sequence
        self.w64[b + S_REDO_VERSION] = version
        self.w64[b + S_REDO_VALUE] = word_of(data)
        self.w64[b + S_REDO_CHECKSUM] = checksum32
        self._put_word(b + S_REDO_SLOT, slot)
        self._finish_rewrite(b, slot, data)
        return version

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _finish_rewrite(self, b: Index, slot: Index, data: bytes) -> cython.int:
        v: Index = self._record(b, slot)
        key_len: Index = key_len_of(self.w32[2 * v + F_META])
        version: Word = self.w64[b + S_REDO_VERSION]
        checksum32: cython.uint = cython.cast(
            cython.uint, self.w64[b + S_REDO_CHECKSUM] & MASK32
        )
        self._put_word(v, version - 1)
        self._copy_in(b, self.w32[2 * v + F_BLOCK], key_len, data)
        self.w32[2 * v + F_CHECKSUM] = checksum32
        self._put_word(v, version)
        self._put_word(b + S_REDO_SLOT, 0)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _redo(self, b: Index) -> cython.int:
        # Finish what a dead writer began; do nothing if the words make no sense.
        slot: Word = self.w64[b + S_REDO_SLOT]
        version: Word = self.w64[b + S_REDO_VERSION]
        if 0 < slot <= cython.cast(Word, self.slots):
            v: Index = self._record(b, cython.cast(Index, slot))
            # If the record belongs to another entry by now, the checksum will not
            # agree.
            if (
                self.w64[v] < version <= make_version(self.w64[b + S_SEQUENCE])
                and is_live(version)
                and version <= MAX_VERSION
                and self.w32[2 * v + F_VALUE_LEN] == 8
            ):
                try:
                    self._finish_rewrite(
                        b,
                        cython.cast(Index, slot),
                        bytes_of(self.w64[b + S_REDO_VALUE]),
                    )
                except IndexError:
                    pass  # its blocks lead nowhere; the rebuild gives the record up
        if slot:
            self.w64[b + S_REDO_SLOT] = 0
        return 0
