"""Writes: storing, removing and renewing one entry, each a short hold of one lock.

Before the lock is taken, all arguments are checked, and all Python code is run (it
encodes the value, and asks a user's clock).  Each function has the same shape:
``_begin``, the work in a ``try`` whose failure goes to ``_abort``, and ``_end``.

Death in the middle: see ``entries.py`` for the order of stores.
"""

from typing import TYPE_CHECKING, Any

from shmcache.errors import EntryTooLarge

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        ADD,
        ANY,
        BYTES_TAG,
        CAS,
        CODEC_TAG,
        DELETED,
        EXPIRED_PER_INSERT,
        F64_EXPIRES,
        F_META,
        F_TTL,
        LONGEST_KEY,
        MASK32,
        MASK64,
        NEVER,
        REPLACE,
        S_DUE,
        S_TOO_LARGE,
        SHARDS,
        Index,
        Word,
    )
    from shmcache._engine.lookup import Lookup
    from shmcache._engine.words import ABSENT, key_bytes, pack_ttl, ttl_ns
    from shmcache._format.fields import tag_of
    from shmcache._format.values import decode_tagged


@cython.cclass
class Writes(Lookup):
    """Writing one entry."""

    encode: Any
    fast_tags: cython.bint  # bytes need no codec
    raw_only: cython.bint
    default_ttl: Word  # ns; 0: never
    jitter: Word  # parts per million

    # --- arguments ------------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _ttl(self, ttl: Any) -> Word:
        # Return a ttl argument in ns, 0 for "never"; an Ellipsis means that it was left
        # out.
        if ttl is ...:
            return self.default_ttl
        if ttl is None:
            return 0
        return ttl_ns(ttl)

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _shorten(self, ns: Word) -> Word:
        # Shorten a TTL by a random part of at most ``jitter``; the generator is
        # xorshift64.
        if self.jitter == 0 or ns == 0:
            return ns
        x: Word = self.random
        x = (x ^ (x << 13)) & MASK64
        x ^= x >> 7
        x = (x ^ (x << 17)) & MASK64
        self.random = x
        cut: Word = ns // 1_000_000 * (x % (self.jitter + 1))
        if cut == 0:
            cut = ns * (x % (self.jitter + 1)) // 1_000_000
        return ns - cut if cut < ns else 1

    @cython.cfunc
    @cython.final
    @cython.inline
    @cython.exceptval(-1)
    def _require_fits(
        self, s: Index, b: Index, key_len: Index, value_len: Index
    ) -> cython.int:
        # Refuse an entry that could not be stored even if the shard were empty.
        if (
            self._need(key_len, value_len) > self.blocks
            or key_len > LONGEST_KEY
            or cython.cast(Word, value_len) > MASK32
        ):
            self._refuse(s, b, key_len, value_len)
        return 0

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _refuse(
        self, s: Index, b: Index, key_len: Index, value_len: Index
    ) -> cython.int:
        self._begin(s, b)
        self._count(b + S_TOO_LARGE, 1)
        self._end(s, b)
        if key_len > LONGEST_KEY:
            raise EntryTooLarge(
                f"a key of {key_len:,} bytes is over the limit of {LONGEST_KEY:,};"
                " use a digest of it as the key"
            )
        if cython.cast(Word, value_len) > MASK32:
            raise EntryTooLarge(
                f"a value of {value_len:,} bytes is over the limit of {MASK32:,};"
                " store it in parts"
            )
        room = self.blocks * self.block_size
        raise EntryTooLarge(
            f"key ({key_len:,} bytes) and value ({value_len:,} bytes) can never fit:"
            f" a shard holds {room:,} bytes; raise max_bytes"
            + (", or lower shards" if self.shards > 1 else "")
        )

    # --- one entry ------------------------------------------------------------------

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _put(
        self, key: Any, value: Any, ttl: Any, mode: cython.int, token: Word
    ) -> Word:
        # Store a value, and return the new version, or 0 if the mode forbids it.  For
        # CAS, ``token`` is the token that the entry must have.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        if cython.compiled:
            self._fetch_record(b, h & MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        tag: cython.uint
        data: bytes
        if type(value) is bytes and (self.fast_tags or self.raw_only):
            tag = BYTES_TAG
            data = value
        else:
            pair: tuple = self.encode(value)
            tag = pair[0]
            data = pair[1]
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        expires: Word = now + ns if ns else NEVER
        version: Word = 0
        slot: Index
        self._require_fits(s, b, len(kb), len(data))
        checksum32: cython.uint = self._checksum(data, h & MASK32, tag)
        self._begin(s, b)
        try:
            if now >= self.w64[b + S_DUE] and self.w64[b + S_DUE]:
                self._reclaim(b, now, EXPIRED_PER_INSERT, False)
            slot = self._find_live(b, h, kind, kb, now)
            if (
                mode == ANY
                or (mode == ADD and slot == 0)
                or (mode == REPLACE and slot)
                or (mode == CAS and slot and self._token_of(s, b, slot) == token)
            ):
                version = self._store(
                    s,
                    b,
                    slot,
                    h,
                    kind,
                    kb,
                    tag,
                    data,
                    checksum32,
                    expires,
                    pack_ttl(ns),
                    now,
                )
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return version

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _remove(self, key: Any) -> cython.bint:
        # Remove an entry, and return whether it was there.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        if cython.compiled:
            self._fetch_record(b, h & MASK32)
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        slot: Index
        self._begin(s, b)
        try:
            slot = self._find_live(b, h, kind, kb, now)
            if slot:
                self._unlink(b, slot, DELETED, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return slot != 0

    @cython.cfunc
    @cython.final
    def _take(self, key: Any) -> Any:
        # Remove an entry, and return its value, or ABSENT.  The codec may refuse the
        # bytes, and then the entry must stay.  So what only the codec can decode is
        # removed under a second hold of the lock, if its version is still the one that
        # was decoded.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index, slot=Index)
        now: Word
        value: Any = ABSENT
        data: bytes = b""
        tag: cython.uint = 0
        version: Word = 0
        decoded: Word = 0
        goes: cython.bint = False
        while not goes:
            now = self._now()
            kind, h, s, b = self._place(key, kb)
            self._begin(s, b)
            try:
                slot = self._find_live(b, h, kind, kb, now)
                if slot:
                    version = self.w64[self._record(b, slot)]
                    tag = tag_of(self.w32[2 * self._record(b, slot) + F_META])
                    if version != decoded:
                        data = self._value(b, slot, h)
                    goes = tag != CODEC_TAG or version == decoded
                    if goes:
                        self._unlink(b, slot, DELETED, now)
            except BaseException as error:
                self._abort(s, b, error)
                raise
            self._end(s, b)
            if slot == 0:
                return ABSENT
            if version != decoded:
                value = decode_tagged(self.codec, tag, data)
                decoded = version
        return value

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _renew_ttl(self, key: Any, ttl: Any) -> cython.bint:
        # Give an entry a new time to live, which is a use, too.  Return whether it was
        # there.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        if cython.compiled:
            self._fetch_record(b, h & MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        cython.declare(v=Index, slot=Index)
        self._begin(s, b)
        try:
            slot = self._find_live(b, h, kind, kb, now)
            if slot:
                v = self._record(b, slot)
                self._wheel_remove(b, slot)
                # A reader that renews a sliding entry reads the expiry, then the TTL,
                # and replaces the expiry if it has not changed.  The TTL is stored
                # first, so a reader of the new expiry never renews by the old TTL.
                self.w32[2 * v + F_TTL] = pack_ttl(ns)
                self._put_word(v + F64_EXPIRES, now + ns if ns else NEVER)
                if ns:
                    self._wheel_insert(b, slot, now + ns, now)
                self._use(b, slot)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return slot != 0

    @cython.cfunc
    @cython.final
    def _read_versioned(self, key: Any) -> tuple:
        # Use an entry, and return its value and token, or (None, None) if it is absent.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        if cython.compiled:
            self._fetch_record(b, h & MASK32)
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        data: bytes = b""
        tag: cython.uint = 0
        token: Word = 0
        slot: Index
        self._begin(s, b)
        try:
            slot = self._find_live(b, h, kind, kb, now)
            if slot:
                data = self._value(b, slot, h)
                tag = tag_of(self.w32[2 * self._record(b, slot) + F_META])
                token = self._token_of(s, b, slot)
            self._count_lookup(b, slot, now)
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if slot == 0:
            return None, None
        return decode_tagged(self.codec, tag, data), token

    @cython.cfunc
    @cython.final
    @cython.exceptval(check=False)
    def _token_of(self, s: Index, b: Index, slot: Index) -> Word:
        # Return the token of a live entry.  Each shard counts its own versions, so the
        # shard is part of it.
        return (self.w64[self._record(b, slot)] * SHARDS + s) & MASK64

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _expiry(self, key: Any) -> Word:
        # Return when an entry expires (ns, or NEVER), or 0 if it is absent.
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        expires: Word = 0
        slot: Index
        self._begin(s, b)
        try:
            slot = self._find(b, h & MASK32, kind, kb)
            if slot:
                expires = self.w64[self._record(b, slot) + F64_EXPIRES]
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        return expires
