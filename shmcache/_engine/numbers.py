"""Numbers: ``incr``, which reads, adds and stores under one hold of the lock.

A number of 64 bits that keeps its type and its expiry is overwritten in place (see
``entries.py``); any other number becomes a new record, like every value.

Death in the middle: the redo record finishes an overwrite in place; a new record is
published like any other.
"""

import struct
from typing import TYPE_CHECKING, Any

from shmcache._arguments import shown
from shmcache.errors import UnsupportedValue

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        F64_EXPIRES,
        F_META,
        F_STAMP,
        F_TTL,
        FLOAT_TAG,
        INT_TAG,
        MASK32,
        NEVER,
        REPLACED,
        S_GONE,
        S_SETS,
        Index,
        Word,
    )
    from shmcache._engine.mailbox import Mailbox
    from shmcache._engine.words import key_bytes, pack_ttl, unpack_ttl
    from shmcache._format.fields import tag_of
    from shmcache._format.values import FLOAT64, INT64


if cython.compiled:
    from cython.cimports.cpython.bytes import (
        PyBytes_AS_STRING,
        PyBytes_FromStringAndSize,
    )


@cython.cfunc
@cython.exceptval(-1)
def is_far(number: Any) -> cython.bint:
    # Return whether an int has more than 64 bits, so that no sum with a 64-bit int fits
    # into 64 bits.
    if type(number) is not int:
        return False
    if cython.compiled:
        word: cython.longlong
        try:
            word = number
        except OverflowError:
            pass
        else:
            return word == 0 and number != 0
    return number.bit_length() > 64


@cython.cfunc
def number_bytes(number: Any) -> Any:
    # Return an int or float as eight bytes; None if an int needs more.
    if cython.compiled:
        word: cython.longlong
        real: cython.double
        if type(number) is float:
            real = number
            return PyBytes_FromStringAndSize(
                cython.cast("const char *", cython.address(real)), 8
            )
        try:
            word = number
        except OverflowError:
            return None
        return PyBytes_FromStringAndSize(
            cython.cast("const char *", cython.address(word)), 8
        )
    if type(number) is float:
        return FLOAT64.pack(number)
    try:
        return INT64.pack(number)
    except struct.error:
        return None


@cython.cfunc
def number_of(data: bytes, tag: cython.uint) -> Any:
    # Return eight bytes as an int or float: the reverse of number_bytes.
    if cython.compiled:
        if tag == INT_TAG:
            return cython.cast(
                cython.p_longlong, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
            )[0]
        return cython.cast(
            cython.p_double, cython.cast(cython.p_void, PyBytes_AS_STRING(data))
        )[0]
    return (INT64 if tag == INT_TAG else FLOAT64).unpack(data)[0]


@cython.cfunc
def sum_of(number: Any, delta: Any) -> Any:
    # Return the sum of two numbers, each an int or a float.  Both are made floats if
    # one is, because Cython 3.3 adds a float and the int 0 by a short cut, whose result
    # is -0.0 for -0.0.
    if type(number) is not type(delta):
        return float(number) + float(delta)
    return number + delta


@cython.cclass
class Numbers(Mailbox):
    """Adding to a number."""

    @cython.cfunc
    @cython.final
    def _add(self, key: Any, delta: Any, initial: Any, ttl: Any) -> Any:
        # Add to a number, and return the sum; see incr in operations.py.
        self._require_numbers(delta, initial)
        kb: bytes = key_bytes(key)
        cython.declare(kind=cython.uint, h=Word, s=Index, b=Index)
        kind, h, s, b = self._place(key, kb)
        visit: Word = self.visit
        if cython.compiled:
            self._fetch_record(b, h & MASK32)
        ns: Word = self._shorten(self._ttl(ttl))
        number = None if initial is None else sum_of(initial, delta)
        data = None if number is None else number_bytes(number)
        now: Word = self._now()
        if visit != self.visit:
            kind, h, s, b = self._place(key, kb)
        slot: Index
        self._require_fits(s, b, len(kb), 8)
        self._begin(s, b)
        try:
            slot = self._find_live(b, h, kind, kb, now)
            if slot:
                number = self._number_at(b, slot, h)
                data = None
                if number is not None:
                    number = sum_of(number, delta)
                    data = number_bytes(number)
            if data is not None:
                self._put_number(
                    s, b, slot, h, kind, kb, number, data, ns, ttl is ..., now
                )
        except BaseException as error:
            self._abort(s, b, error)
            raise
        self._end(s, b)
        if data is None:
            self._refuse_number(key, slot, number)
        return number

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _require_numbers(self, delta: Any, initial: Any) -> cython.int:
        if self.raw_only:
            raise UnsupportedValue(
                'codec "raw" holds bytes only, so incr() has no number to add to;'
                " use another codec for counters"
            )
        if type(delta) not in (int, float) or (
            initial is not None and type(initial) not in (int, float)
        ):
            raise TypeError(
                f"delta and initial must be int or float, not {delta!r} and {initial!r}"
            )
        if is_far(delta) or is_far(initial):
            raise OverflowError(
                "delta or initial is so far beyond 64 bits that no sum with it fits;"
                " use smaller numbers"
            )
        return 0

    def _refuse_number(self, key: Any, slot: int, number: Any) -> None:
        if number is None:
            if slot == 0:
                raise KeyError(key)
            raise TypeError(
                f"the value of {shown(key)} is not an int of 64 bits or a float, so"
                " nothing can be added to it; set() a number first"
            )
        raise OverflowError(
            f"{number} does not fit into 64 bits; set() a smaller number first"
        )

    @cython.cfunc
    @cython.final
    def _number_at(self, b: Index, slot: Index, h: Word) -> Any:
        # Return the number that an entry holds, or None if it holds none.
        tag: cython.uint = tag_of(self.w32[2 * self._record(b, slot) + F_META])
        data: bytes = self._value(b, slot, h)  # its checksum vouches for the tag
        if (tag == INT_TAG or tag == FLOAT_TAG) and len(data) == 8:
            return number_of(data, tag)
        return None

    @cython.cfunc
    @cython.final
    @cython.exceptval(-1)
    def _put_number(
        self,
        s: Index,
        b: Index,
        slot: Index,
        h: Word,
        kind: cython.uint,
        kb: bytes,
        number: Any,
        data: bytes,
        ns: Word,
        keep_expiry: cython.bint,
        now: Word,
    ) -> cython.int:
        # Store a number in place of the one in the slot, or as a new entry if the slot
        # is 0.
        tag: cython.uint = INT_TAG if type(number) is int else FLOAT_TAG
        checksum32: cython.uint = self._checksum(data, h & MASK32, tag)
        ttl: cython.uint = pack_ttl(ns)
        expires: Word = now + ns if ns else NEVER
        v: Index = 0
        if slot:
            v = self._record(b, slot)
            if keep_expiry:
                ttl = self.w32[2 * v + F_TTL]
                expires = self.w64[v + F64_EXPIRES]
                if self.sliding and ttl and now + unpack_ttl(ttl) > expires:
                    expires = now + unpack_ttl(ttl)
            if (
                tag == tag_of(self.w32[2 * v + F_META])
                and expires == self.w64[v + F64_EXPIRES]
                and ttl == self.w32[2 * v + F_TTL]
            ):
                self._begin_rewrite(b, slot, data, checksum32)
                self._use_late(b, slot)
                self._count(b + S_GONE + REPLACED, 1)
                self._count(b + S_SETS, 1)
                self.w32[2 * v + F_STAMP] = self._stamp(now)
                return 0
        self._store(s, b, slot, h, kind, kb, tag, data, checksum32, expires, ttl, now)
        return 0
