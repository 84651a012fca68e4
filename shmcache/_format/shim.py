"""Stand-in for the ``cython`` module where Cython is not installed.

Only what this package uses.  Annotations are never evaluated (PEP 563), so a
type is needed here only where it is called or passed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

compiled = False
nogil = nullcontext()

Py_ssize_t = ulonglong = uint = uchar = bint = int
int = uint  # cython.int


def cclass(thing: _T) -> _T:
    """A decorator that leaves a class or function as it is."""
    return thing


cfunc = ccall = inline = cclass


def exceptval(*_args: Any, **_kwargs: Any) -> Callable[[_T], _T]:
    """A decorator with arguments that leaves a function as it is."""
    return cclass


def declare(_type: Any = None, value: Any = None, **_kwargs: Any) -> Any:
    """The value that a typed variable starts with."""
    return value


def typedef(kind: _T) -> _T:
    """Another name for a type."""
    return kind


def cast(_type: Any, value: _T, **_kwargs: Any) -> _T:
    """The value itself: a Python int has every width."""
    return value
