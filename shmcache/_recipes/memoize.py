"""Functions whose results are kept in a cache; ``Cache.memoize`` makes them.

The key of a call begins with the function's name, so the key must distinguish functions
of the same name; and it must be the same in all processes.  Arguments that are no keys
themselves become tuples that begin with a letter of their own, so that no two of them
collide.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

from shmcache.errors import UnsupportedKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Results:
    """The methods of a cache that memoize needs.

    Attributes:
        get_or_set: ``get_or_set(key, factory, ttl)`` returns the value of a key; the
            factory computes it if it is absent.
        get_or_await: It does the same for a factory that is a coroutine function.
        delete: ``delete(key)`` removes a key, and returns whether it was there.
    """

    get_or_set: Callable[[Any, Callable[[], Any], Any], Any]
    get_or_await: Callable[[Any, Callable[[], Any], Any], Any]
    delete: Callable[[Any], bool]


@dataclass(frozen=True)
class _Recipe:
    """The settings by which a memoized function and its bound methods find a result."""

    recall: Callable[[Any, Callable[[], Any], Any], Any]
    delete: Callable[[Any], bool]
    ttl: Any
    make_key: Callable[..., Any] | None
    awaits: bool


class Memoized:
    """A function whose results are remembered in a cache.

    Args:
        results: Where the results are.
        function: The function.
        ttl: Seconds that a result lives.  None means for ever, an Ellipsis the cache's
            default.
        key: ``key(*args, **kwargs)`` makes the key of a call; None means that the
            arguments are the key.
        typed: Whether equal arguments of different types are different.

    Raises:
        TypeError: ``function`` is no plain function.
    """

    def __init__(
        self,
        results: Results,
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
        awaits = inspect.iscoroutinefunction(function)
        self._recipe = _Recipe(
            recall=results.get_or_await if awaits else results.get_or_set,
            delete=results.delete,
            ttl=ttl,
            make_key=key,
            awaits=awaits,
        )
        self._typed = typed
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._prefix = (self._name, *self._circumstances())
        if awaits:
            _mark_as_coroutine_function(self)

    def cache_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the key under which the result of a call with these arguments is kept.

        Raises:
            UnsupportedKey: An argument cannot be part of a key.
        """
        make_key = self._recipe.make_key
        if make_key is not None:
            return (*self._prefix, self._part(make_key(*args, **kwargs), "key()"))
        return (
            *self._prefix,
            *(self._part(a, f"argument {i}") for i, a in enumerate(args, 1)),
            *(
                ("kw", name, self._part(kwargs[name], f"argument {name}"))
                for name in sorted(kwargs)
            ),
        )

    def _circumstances(self) -> Iterator[Any]:
        # Lambdas, and functions that one def inside a function makes, share one name.
        # Two things tell them apart in the same way in all processes: their place in
        # the source, and the values they close over, as far as those can be keys.
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
            # A cell is empty, for example, if the function refers to itself.
            with suppress(ValueError):
                kept.append(cell.cell_contents)
        for value in kept:
            if isinstance(value, (str, bytes, int, float, tuple, type, NoneType)):
                with suppress(UnsupportedKey):
                    yield ("by", self._part(value, "a value that is closed over"))

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Forget the result of a call with these arguments; False if there was none."""
        return self._recipe.delete(self.cache_key(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recipe = self._recipe
        key = self.cache_key(*args, **kwargs)
        call = functools.partial(self.__wrapped__, *args, **kwargs)
        return recipe.recall(key, call, recipe.ttl)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _Bound(self, self._recipe, instance)

    def _part(self, value: Any, what: str) -> Any:
        # Return an argument as part of a key.  A value whose type is no key itself, and
        # also a tuple, becomes a tuple that begins with a letter of its own.
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
            part = ("t", *(self._part(v, what) for v in tuple.__iter__(value)))
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

    def __init__(self, memoized: Memoized, recipe: _Recipe, instance: Any) -> None:
        functools.update_wrapper(self, memoized.__wrapped__)
        if recipe.awaits:
            # This comes before __func__ is set; otherwise inspect would mark __func__
            # instead.
            _mark_as_coroutine_function(self)
        self._recipe = recipe
        self.__self__ = instance
        self.__func__ = memoized
        self.__wrapped__ = functools.partial(memoized.__wrapped__, instance)

    def cache_key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the key of the call, with the instance as first argument."""
        if self._recipe.make_key is not None:
            return self.__func__.cache_key(self.__self__, *args, **kwargs)
        return self.__func__.cache_key(_Instance(self.__self__), *args, **kwargs)

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Forget the result of a call with these arguments; False if there was none."""
        return self._recipe.delete(self.cache_key(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recipe = self._recipe
        key = self.cache_key(*args, **kwargs)
        function = self.__func__.__wrapped__
        call = functools.partial(function, self.__self__, *args, **kwargs)
        return recipe.recall(key, call, recipe.ttl)


class _Instance:
    """The instance of a bound method, as part of a key.

    The part is the instance's ``__cache_key__`` if it has one.  Otherwise it is a
    number drawn for this very object: the result may depend on the state of the object,
    which other processes do not know.
    """

    def __init__(self, instance: Any) -> None:
        self.part: Any
        own = getattr(instance, "__cache_key__", None)
        if isinstance(instance, type):
            # The class's __cache_key__ distinguishes its instances, not classes.
            self.part = ("c", f"{instance.__module__}.{instance.__qualname__}")
        elif own is not None:
            self.part = (*_whose(instance), *_flat(own() if callable(own) else own))
        else:
            # The PID is part of it, because after a fork the copies may change
            # differently.
            self.part = ("o", os.getpid(), _identity(instance))


def _whose(instance: Any) -> tuple[str, str]:
    # Instances of two classes may have the same __cache_key__.
    kind = type(instance)
    return ("i", f"{kind.__module__}.{kind.__qualname__}")


def _mark_as_coroutine_function(thing: Any) -> None:
    # Frameworks ask whether a function is a coroutine function before they call it.
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(thing)
    else:
        # asyncio.iscoroutinefunction of 3.11 looks for this mark; there is no function
        # that sets it.
        import asyncio

        vars(thing)["_is_coroutine"] = vars(asyncio.coroutines)["_is_coroutine"]


def _flat(key: Any) -> Iterator[Any]:
    yield from tuple.__iter__(key) if isinstance(key, tuple) else (key,)


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
