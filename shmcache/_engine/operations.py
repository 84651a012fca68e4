"""Operations: the engine's last part, with the public methods that must be fast.

``Cache`` in ``shmcache/cache.py`` is a subclass of ``Engine``; it adds the parts that
need not be fast: settings, attaching and closing, iteration, single flight, statistics.
"""

import functools
import sys
from array import array
from typing import TYPE_CHECKING, Any

from shmcache._arguments import Ttl
from shmcache._format import layout as L

if TYPE_CHECKING:
    import cython
else:
    from shmcache._format import shim as cython

if not cython.compiled:
    from shmcache._engine.constants import (
        ADD,
        ANY,
        CAS,
        COUNTS_AS_USE,
        NEVER,
        REPLACE,
        WANTS_VALUE,
        Word,
    )
    from shmcache._engine.numbers import Numbers
    from shmcache._engine.words import ABSENT, MISSING


compiled: bool = cython.compiled


@cython.cclass
class Engine(Numbers):
    """One attached segment: its shards, their locks, and the operations on them."""

    def _bind(
        self,
        words: Any,
        geometry: Any,
        seed: int,
        codec: Any,
        settings: Any,
        recency: Any,
        peers: Any,
    ) -> None:
        """Point the engine at a mapped segment; ``_join`` follows.

        Args:
            words: The segment's bytes, a memoryview.
            geometry: Its ``layout.Geometry``.
            seed: The seed of its key hashes.
            codec: Turns values into bytes and back.
            settings: An ``EngineSettings``.
            recency: The buffers of this process, from ``recency_buffers``.
            peers: A ``Peers``, which answers questions about other processes.
        """
        self._bind_words(words, geometry, seed)
        self._bind_recency(recency, min(settings.capacities))
        self.peers = peers
        self.codec = codec
        self.encode = codec.encode
        self.decode = codec.decode
        self.fast_tags = codec.name in {"msgpack", "pickle"}
        self.fast_unpack = codec.name == "msgpack"
        self.raw_only = codec.name == "raw"
        self.notify = codec.name == L.HANDLES
        self.clock = settings.clock
        self.capacity = memoryview(array("Q", settings.capacities))
        self.sliding = settings.sliding
        self.default_ttl = settings.ttl_ns
        self.jitter = settings.jitter_ppm
        self.stamp_zero = settings.created_at_ns
        self.first_sequence = settings.first_sequence
        self.lock_timeout = settings.lock_timeout_ns
        self.lock_bounds = memoryview(
            array("Q", [round(bound * 1e9) for bound in L.LOCK_BOUNDS])
        )
        self.age_bounds = memoryview(
            array("Q", [round(bound * 1e9) >> L.STAMP_SHIFT for bound in L.AGE_BOUNDS])
        )
        self.random = 1
        self.has_news = False
        self.repair_log = []
        self.evicted_log = []
        self.logs_evictions = False
        self.owners = {}
        self.pysems = []
        self.sems = memoryview(array("Q"))
        self.opened = []
        self.waiting = 0
        self.hashing = 0
        self.inside = {}
        self.stuck = memoryview(array("Q", bytes(8 * geometry.shards)))

    def _is_joined(self) -> bool:
        """Return whether this process may go ahead without ``peers.enter``."""
        return self.guard[0] == self.token

    # --- reading --------------------------------------------------------------------

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, or ``default`` if it is absent.

        A hit is a use: it renews the entry's LRU rank, and in a sliding cache its time.
        O(1), without a lock when compiled.

        Raises:
            UnsupportedKey: The key is no str, bytes, int or tuple of these.
            CacheClosed: The cache was closed in this process.
            SegmentCorrupt: Damage was met; the shard has been rebuilt.
        """
        value = self._lookup(key, COUNTS_AS_USE | WANTS_VALUE)
        return default if value is ABSENT else value

    def peek(self, key: Any, default: Any = None) -> Any:
        """Return what ``get`` returns, without counting a use, hit or miss.  O(1)."""
        value = self._lookup(key, WANTS_VALUE)
        return default if value is ABSENT else value

    def __contains__(self, key: Any) -> bool:
        """Return whether a key is there; this does not count as a use.  O(1)."""
        return self._lookup(key, 0) is not ABSENT

    def __getitem__(self, key: Any) -> Any:
        """Return the value of a key, as ``get`` does, or raise KeyError.  O(1)."""
        value = self._lookup(key, COUNTS_AS_USE | WANTS_VALUE)
        if value is ABSENT:
            raise KeyError(key)
        return value

    def get_many(self, keys: Any) -> Any:
        """Return a dict of the keys that are there, with their values.  O(keys)."""
        self._require_joined()
        found = {}
        for key in keys:
            value = self._lookup(key, COUNTS_AS_USE | WANTS_VALUE)
            if value is not ABSENT:
                found[key] = value
        return found

    def gets(self, key: Any) -> tuple:
        """Return ``(value, token)`` for ``cas``, or ``(None, None)`` if absent.  O(1).

        The token stands for this version of the entry, and never for another one, also
        in a segment that takes the place of this one.  The tokens of one key grow.

        Raises:
            LockTimeout: The lock was not free within ``lock_timeout``.
        """
        return self._read_versioned(key)

    def ttl(self, key: Any) -> Any:
        """Return the seconds that an entry has left; None if it never expires.  O(1).

        Raises:
            KeyError: The key is absent.
            LockTimeout: The lock was not free within ``lock_timeout``.
        """
        expires: Word = self._expiry(key)
        now: Word = self._now()  # after the wait for the lock, if there was one
        if expires <= now:
            raise KeyError(key)
        if expires == NEVER:
            return None
        return (expires - now) / 1e9

    # --- writing --------------------------------------------------------------------

    def set(self, key: Any, value: Any, ttl: Ttl = ...) -> None:
        """Store a value in place of the key's former value, if there is one.  O(1).

        A full cache removes expired entries, and then its least recently used ones.

        Args:
            key: A str, bytes, int or tuple of these.
            value: Anything that the codec takes.
            ttl: Seconds after which the entry expires; None: never; left out: the
                default of the cache.

        Raises:
            EntryTooLarge: Key and value could never fit.
            UnsupportedKey: The key is no str, bytes, int or tuple of these.
            UnsupportedValue: The codec does not take the value.
            LockTimeout: The lock was not free within ``lock_timeout``.  In all these
                cases nothing is changed.
        """
        self._put(key, value, ttl, ANY, 0)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Store a value, as ``set`` does, with the default TTL of the cache.  O(1)."""
        self._put(key, value, ..., ANY, 0)

    def set_many(self, mapping: Any, ttl: Ttl = ...) -> None:
        """Store several entries, each by itself.  O(entries)."""
        self._require_joined()
        if not hasattr(mapping, "items"):
            raise TypeError(
                f"set_many() takes a mapping, not a {type(mapping).__qualname__};"
                " make a dict of pairs"
            )
        self._ttl(ttl)  # a bad one is refused even if there is nothing to store
        for key, value in mapping.items():
            self._put(key, value, ttl, ANY, 0)

    def add(self, key: Any, value: Any, ttl: Ttl = ...) -> bool:
        """Store a value if the key is absent; return whether it was.  Atomic, O(1)."""
        return self._put(key, value, ttl, ADD, 0) != 0

    def replace(self, key: Any, value: Any, ttl: Ttl = ...) -> bool:
        """Store a value if the key is there; return whether it was.  Atomic, O(1)."""
        return self._put(key, value, ttl, REPLACE, 0) != 0

    def cas(self, key: Any, value: Any, token: Any, ttl: Ttl = ...) -> bool:
        """Store a value if the entry is unchanged since ``gets``.  Atomic, O(1).

        Args:
            key: The key.
            value: The new value.
            token: From ``gets``: the entry must still be the version that was returned
                with it.  None: the key must still be absent.
            ttl: As for ``set``.

        Returns:
            Whether the value was stored.
        """
        if token is None:
            return self._put(key, value, ttl, ADD, 0) != 0
        if type(token) is not int:
            raise TypeError(f"token must be one that gets() returned, not {token!r}")
        if not 0 < token <= L.MASK64:
            token = 0  # no entry has this version
        return self._put(key, value, ttl, CAS, token) != 0

    def touch(self, key: Any, ttl: Ttl = ...) -> bool:
        """Give an entry a new time to live; return whether it was there.  O(1).

        This counts as a use: the entry becomes the most recently used one.
        """
        return self._renew_ttl(key, ttl)

    def incr(
        self,
        key: Any,
        delta: Any = 1,
        *,
        initial: Any = None,
        ttl: Ttl = ...,
    ) -> Any:
        """Add to a number, atomically over all processes; return the sum.  O(1).

        Args:
            key: The key.
            delta: An int or float.  The sum of an int and a float is a float.
            initial: If the key is absent, ``initial + delta`` is stored.
            ttl: Left out, an entry keeps its expiry (in a sliding cache this is a hit,
                which renews it); else as for ``set``.

        Raises:
            KeyError: The key is absent, and no ``initial`` was given.
            TypeError: The value is no number.
            OverflowError: The sum does not fit into 64 bits.  In all these cases
                nothing is changed.
        """
        return self._add(key, delta, initial, ttl)

    def decr(
        self,
        key: Any,
        delta: Any = 1,
        *,
        initial: Any = None,
        ttl: Ttl = ...,
    ) -> Any:
        """Subtract from a number, as ``incr`` with ``-delta`` does.  O(1)."""
        if type(delta) is int or type(delta) is float:
            delta = -delta
        return self.incr(key, delta, initial=initial, ttl=ttl)

    # --- removing -------------------------------------------------------------------

    def delete(self, key: Any) -> bool:
        """Remove an entry; return whether it was there.  O(1)."""
        return self._remove(key)

    def __delitem__(self, key: Any) -> None:
        """Remove an entry, as ``delete`` does, or raise KeyError.  O(1)."""
        if not self._remove(key):
            raise KeyError(key)

    def delete_many(self, keys: Any) -> int:
        """Remove several entries; return how many were there.  O(keys)."""
        self._require_joined()
        count = 0
        for key in keys:
            if self._remove(key):
                count += 1
        return count

    def pop(self, key: Any, default: Any = MISSING) -> Any:
        """Remove an entry and return its value.  O(1).

        If several processes pop one key, only one gets the value.  If the key is
        absent, ``default`` is returned; without a default, KeyError is raised.  If the
        codec refuses the bytes, its exception is raised and the entry stays.
        """
        value = self._take(key)
        if value is ABSENT:
            if default is MISSING:
                raise KeyError(key)
            return default
        return value


# Interpreted, an exception out of a signal handler may strike between any two
# bytecodes, and so also between taking the lock and the ``try`` that would give it
# back.  The outermost call of a thread therefore gives back any lock that it still
# holds.

if not cython.compiled:
    # These are raised where words, semaphores or the lock file are no longer there.
    OF_CLOSING = (IndexError, OSError, ValueError)

    def _guarded(method: Any) -> Any:
        @functools.wraps(method)
        def guarded(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except BaseException as error:
                if self.token and (self.guard[0] == self.token or self.closed):
                    self._release_left(sys._getframe(1))  # noqa: SLF001
                if self.closed and type(error) in OF_CLOSING:
                    self.peers.enter(self)  # says that another thread has closed it
                raise

        return guarded

    for _name in (
        *("get", "peek", "__contains__", "__getitem__", "gets", "get_many", "ttl"),
        *("set", "__setitem__", "add", "replace", "cas", "set_many", "touch"),
        *("incr", "decr", "delete", "__delitem__", "pop", "delete_many"),
        *("_flush_recency", "_step", "_scan", "_clear_step", "_pop_oldest"),
        *("_rebuild_shard", "_copy_shard", "_renew", "_discard"),
        *("_enter_flight", "_leave_flight", "_free_flights"),
    ):
        setattr(Engine, _name, _guarded(getattr(Engine, _name)))
