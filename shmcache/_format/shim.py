"""Stand-in for the ``cython`` module where Cython is not installed.

The data path is Python in Cython's pure mode: ordinary Python whose decorators, types
and casts tell Cython what to compile to C.  Interpreted, they only have to exist and to
change nothing.  This module has those that the package uses, so that Cython is needed
to build the package and not to run it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


class CType:
    """A C type: a name for annotations and casts, and ``kind[::1]`` for a view of it.

    The compiled files cannot postpone the evaluation of their annotations, so such
    expressions are evaluated when a module is imported.
    """

    def __getitem__(self, _index: slice) -> CType:
        return self


compiled = False
nogil = nullcontext()
NULL = None

Py_ssize_t = longlong = ulonglong = uint = uchar = bint = double = CType()
p_double = p_longlong = p_ulonglong = p_void = CType()
int = CType()  # cython.int


def cclass(thing: _T) -> _T:
    """A decorator that leaves a class or function as it is."""
    return thing


cfunc = ccall = final = inline = cclass


def exceptval(*_args: Any, **_kwargs: Any) -> Callable[[_T], _T]:
    """A decorator with arguments that leaves a function as it is."""
    return cclass


def declare(_type: Any = None, value: Any = None, **_kwargs: Any) -> Any:
    """Return the value that a typed variable starts with."""
    return value


def typedef(kind: _T) -> _T:
    """Return the type itself, under another name."""
    return kind


def cast(_type: Any, value: _T, **_kwargs: Any) -> _T:
    """Return the value itself, because a Python int has every width."""
    return value
