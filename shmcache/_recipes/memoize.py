"""Functions whose results are in a cache: what ``Cache.memoize`` returns."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from contextlib import suppress
from types import NoneType
from typing import TYPE_CHECKING, Any

from shmcache.errors import UnsupportedKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache.cache import Cache


class Memoized:
    """A function whose results are remembered in a cache."""

    def __init__(
        self,
        cache: Cache,
        function: Callable[..., Any],
        ttl: Any,
        key: Callable[..., Any] | None,
        typed: bool,
    ) -> None:
        if isinstance(function, (classmethod, staticmethod)):
            raise TypeError(
                f"memoize must come below @{type(function).__name__}, next to the"
                " function itself"
            )
        if not callable(function) or not hasattr(function, "__qualname__"):
            raise TypeError(
                f"memoize takes a function, not {function!r}; give what you have a"
                " name, by a def that calls it"
            )
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self._cache = cache
        self._ttl = ttl
        self._key = key
        self._typed = typed
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._prefix = (self._name, *self._circumstances())
        self._awaits = inspect.iscoroutinefunction(function)
        if self._awaits:
            _mark_as_coroutine_function(self)

    def cache_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The key under which a call's result is kept.

        Raises UnsupportedKey if an argument cannot be part of a key.
        """
        if self._key is not None:
            return (*self._prefix, self._part(self._key(*args, **kwargs), "key()"))
        return (
            *self._prefix,
            *(self._part(a, f"argument {i}") for i, a in enumerate(args, 1)),
            *(
                ("kw", name, self._part(kwargs[name], f"argument {name}"))
                for name in sorted(kwargs)
            ),
        )

    def _circumstances(self) -> Iterator[Any]:
        # What tells functions apart that share one name: lambdas, and those made by
        # one def inside a function.  It must be the same in all processes: the place in
        # the source, and what can be part of a key of what the function closes over.
        function: Any = self.__wrapped__
        if "<" not in function.__qualname__ or not hasattr(function, "__code__"):
            return
        code = function.__code__
        columns = [start for _, _, start, _ in code.co_positions() if start]
        yield ("at", code.co_firstlineno, min(columns, default=0))
        kept = [
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one, as of a function's own name
                kept.append(cell.cell_contents)
        for value in kept:
            if isinstance(value, (str, bytes, int, float, tuple, type, NoneType)):
                with suppress(UnsupportedKey):
                    yield ("by", self._part(value, "a value that is closed over"))

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Forget a call's result; whether there was one."""
        return self._cache.delete(self.cache_key(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = self.cache_key(*args, **kwargs)
        call = functools.partial(self.__wrapped__, *args, **kwargs)
        if self._awaits:
            return self._cache._get_or_await(key, call, self._ttl)
        return self._cache.get_or_set(key, call, self._ttl)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _Bound(self, instance)

    def _part(self, value: Any, what: str) -> Any:
        # An argument as part of a key: each type that is not a key itself is a tuple
        # that begins with a letter of its own, and so are tuples.
        part: Any
        if isinstance(value, _Instance):
            part = value.part
        elif value is None:
            part = ("n",)
        elif isinstance(value, (bool, float)):
            whole = value == int(value) if value - value == 0 else False
            part = int(value) if whole else ("f", repr(float(value)))
        elif isinstance(value, (str, bytes, int)):
            part = value
        elif isinstance(value, tuple):
            part = ("t", *(self._part(v, what) for v in value))
        elif isinstance(value, type):
            part = ("c", f"{value.__module__}.{value.__qualname__}")
        elif (own := getattr(value, "__cache_key__", None)) is not None:
            part = (*_whose(value), self._part(own() if callable(own) else own, what))
        else:
            raise UnsupportedKey(
                f"{what} of {self._name} is a {type(value).__qualname__}, which cannot"
                " be part of a key; give memoize a key= function, or the class a"
                " __cache_key__ attribute"
            )
        return ("y", type(value).__qualname__, part) if self._typed else part


class _Bound:
    """A memoized method of one instance."""

    def __init__(self, memoized: Memoized, instance: Any) -> None:
        functools.update_wrapper(self, memoized.__wrapped__)
        if memoized._awaits:
            _mark_as_coroutine_function(self)  # before it has a __func__ to be marked
        self.__self__ = instance
        self.__func__ = memoized
        self.__wrapped__ = functools.partial(memoized.__wrapped__, instance)

    def cache_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As of the function, with the instance's part."""
        if self.__func__._key is not None:
            return self.__func__.cache_key(self.__self__, *args, **kwargs)
        return self.__func__.cache_key(_Instance(self.__self__), *args, **kwargs)

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Forget a call's result; whether there was one."""
        memoized = self.__func__
        return memoized._cache.delete(self.cache_key(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        memoized = self.__func__
        cache, ttl = memoized._cache, memoized._ttl
        key = self.cache_key(*args, **kwargs)
        call = functools.partial(memoized.__wrapped__, self.__self__, *args, **kwargs)
        if memoized._awaits:
            return cache._get_or_await(key, call, ttl)
        return cache.get_or_set(key, call, ttl)


class _Instance:
    """The instance of a bound method, as part of a key.

    Its ``__cache_key__`` if it has one.  Else a number drawn for this very object:
    what it computes may depend on its state, of which other processes know nothing.
    """

    def __init__(self, instance: Any) -> None:
        self.part: Any
        own = getattr(instance, "__cache_key__", None)
        if isinstance(instance, type):
            # What __cache_key__ tells apart are the instances.
            self.part = ("c", f"{instance.__module__}.{instance.__qualname__}")
        elif own is not None:
            self.part = (*_whose(instance), *_flat(own() if callable(own) else own))
        else:
            # With the PID, as from fork on the copies go their own ways.
            self.part = ("o", os.getpid(), _identity(instance))


def _whose(instance: Any) -> tuple[str, str]:
    # Instances of two classes may have the same __cache_key__.
    kind = type(instance)
    return ("i", f"{kind.__module__}.{kind.__qualname__}")


def _mark_as_coroutine_function(thing: Any) -> None:
    # For frameworks that ask before they call.
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(thing)
    else:
        # What asyncio.iscoroutinefunction looks for on 3.11.
        import asyncio

        thing._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]


def _flat(key: Any) -> Iterator[Any]:
    yield from key if isinstance(key, tuple) else (key,)


_identities: dict[int, tuple[weakref.ref[Any], int]] = {}


def _identity(instance: Any) -> int:
    known = _identities.get(id(instance))
    if known is not None and known[0]() is instance:
        return known[1]
    address = id(instance)
    number = int.from_bytes(os.urandom(8))
    try:
        watch = weakref.ref(instance, lambda _: _identities.pop(address, None))
    except TypeError as error:
        raise UnsupportedKey(
            f"a {type(instance).__qualname__} cannot be told from others that had its"
            " address before: give its class a __cache_key__, or __weakref__ among its"
            " __slots__"
        ) from error
    _identities[address] = watch, number
    return number
