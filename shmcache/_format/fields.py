# mypy: disable-error-code="valid-type, untyped-decorator, no-any-return, misc"
"""Fields packed into a word, tokens of workers, and addresses.

Every module that needs one of them calls these functions; no other module shifts or
masks.  The compiled engine includes this file and calls inlined C functions; all other
modules import it and call Python functions.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

# --- meta: key length | key kind << 16 | value tag << 20 | flags << 24 ------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def key_len_of(meta: cython.uint) -> cython.Py_ssize_t:
    """Return the length of the key in bytes."""
    return meta & 0xFFFF


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def kind_of(meta: cython.uint) -> cython.uint:
    """Return the type that the key had before it became bytes: a ``Kind``."""
    return (meta >> 16) & 15


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def tag_of(meta: cython.uint) -> cython.uint:
    """Return how the bytes of the value are to be decoded: a ``Tag``."""
    return (meta >> 20) & 15


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_meta(
    key_len: cython.Py_ssize_t, kind: cython.uint, tag: cython.uint
) -> cython.uint:
    """Return the meta word of a new entry, without flags."""
    return cython.cast(cython.uint, key_len) | kind << 16 | tag << 20


# --- version: write sequence of the shard << 1 | live -----------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_version(sequence: cython.ulonglong) -> cython.ulonglong:
    """Return the version of the live record that a write makes."""
    return sequence << 1 | 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def sequence_of(version: cython.ulonglong) -> cython.ulonglong:
    """Return the number of the write that made a record."""
    return version >> 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def is_live(version: cython.ulonglong) -> cython.bint:
    """Tell whether a record with this version is an entry."""
    return version & 1


# --- stamp: a time in units of 2**STAMP_SHIFT ns, of which 32 bits are kept --------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def stamps_between(stamp: cython.uint, now: cython.uint) -> cython.ulonglong:
    """Return how much later ``now`` is than ``stamp``; 0 if it is earlier.

    It is earlier if a process read the clock, waited for a lock, and then met an entry
    that was stored meanwhile, or if the clock was set back.
    """
    # In C a literal of more than 31 bits would be a Python object, so it has a name.
    bits: cython.ulonglong = 0xFFFF_FFFF
    later: cython.ulonglong = cython.cast(cython.ulonglong, now) - stamp
    later &= bits
    return 0 if later >> 31 else later


# --- token of a worker: generation << 16 | row + 1 --------------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_token(
    generation: cython.ulonglong, row: cython.Py_ssize_t
) -> cython.ulonglong:
    """Return the token of a worker: its row, and a generation that is used once."""
    return (generation & 0xFFFF_FFFF_FFFF) << 16 | cython.cast(
        cython.ulonglong, row + 1
    )


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def row_of(token: cython.ulonglong) -> cython.Py_ssize_t:
    """Return the row of a worker; out of bounds if the token is damaged."""
    return cython.cast(cython.Py_ssize_t, token & 0xFFFF) - 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def generation_of(token: cython.ulonglong) -> cython.ulonglong:
    """Return the generation of a worker; no worker has generation 0."""
    return token >> 16


# --- addresses --------------------------------------------------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def shard_of(key_hash: cython.ulonglong, shards: cython.ulonglong) -> cython.Py_ssize_t:
    """Return the shard of a key: the upper half of its hash, scaled to the count."""
    return cython.cast(cython.Py_ssize_t, ((key_hash >> 32) * shards) >> 32)


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def bucket_of(hash32: cython.ulonglong, slots: cython.ulonglong) -> cython.Py_ssize_t:
    """Return the bucket of a key in its shard: the lower half of its hash, scaled."""
    return cython.cast(cython.Py_ssize_t, (hash32 * slots) >> 32)
