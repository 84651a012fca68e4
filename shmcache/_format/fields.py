# mypy: disable-error-code="valid-type, untyped-decorator, no-any-return, misc"
"""Fields packed into a word, and arithmetic of addresses: the only place for both.

Every module that reads a packed word calls these functions.  The compiled engine
includes this file, so there they are inlined C functions; everybody else imports it and
runs it as Python.
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
    """The length of the key, in bytes."""
    return meta & 0xFFFF


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def kind_of(meta: cython.uint) -> cython.uint:
    """What the key was before it became bytes: a ``Kind``."""
    return (meta >> 16) & 15


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def tag_of(meta: cython.uint) -> cython.uint:
    """How the bytes of the value are to be read: a ``Tag``."""
    return (meta >> 20) & 15


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_meta(
    key_len: cython.Py_ssize_t, kind: cython.uint, tag: cython.uint
) -> cython.uint:
    """The meta word of a new entry, without flags."""
    return cython.cast(cython.uint, key_len) | kind << 16 | tag << 20


# --- version: write sequence of the shard << 1 | live -----------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_version(sequence: cython.ulonglong) -> cython.ulonglong:
    """The version of the live record that a write makes."""
    return sequence << 1 | 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def sequence_of(version: cython.ulonglong) -> cython.ulonglong:
    """The write that made a record."""
    return version >> 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def is_live(version: cython.ulonglong) -> cython.bint:
    """Whether a record with this version is an entry."""
    return version & 1


# --- token of a worker: generation << 16 | row + 1 --------------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def make_token(
    generation: cython.ulonglong, row: cython.Py_ssize_t
) -> cython.ulonglong:
    """The token of a worker: its row, and a generation that is never used again."""
    return (generation & 0xFFFF_FFFF_FFFF) << 16 | cython.cast(
        cython.ulonglong, row + 1
    )


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def row_of(token: cython.ulonglong) -> cython.Py_ssize_t:
    """The row of a worker, which may be out of bounds if the token is damaged."""
    return cython.cast(cython.Py_ssize_t, token & 0xFFFF) - 1


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def generation_of(token: cython.ulonglong) -> cython.ulonglong:
    """The generation of a worker; 0 is no worker's."""
    return token >> 16


# --- addresses --------------------------------------------------------------------


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def shard_of(key_hash: cython.ulonglong, shards: cython.ulonglong) -> cython.Py_ssize_t:
    """The shard of a key: its hash's upper half, scaled to the number of shards."""
    return cython.cast(cython.Py_ssize_t, ((key_hash >> 32) * shards) >> 32)


@cython.cfunc
@cython.inline
@cython.exceptval(check=False)
def bucket_of(hash32: cython.ulonglong, slots: cython.ulonglong) -> cython.Py_ssize_t:
    """The bucket of a key within its shard: the lower half of its hash, scaled."""
    return cython.cast(cython.Py_ssize_t, (hash32 * slots) >> 32)
