"""Commands that write: they attach to the cache, as any process does."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import shmcache
from shmcache._format import layout as L
from shmcache._parser import USAGE_ERROR
from shmcache.cli.options import KEY, KEYS, NAME, PREFIX, Command, argument, key_type
from shmcache.cli.output import (
    NO,
    chosen_entries,
    complain,
    entries_of,
    opened,
)
from shmcache.errors import SegmentNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator


def _ttl(text: str) -> float | None:
    from shmcache._arguments import ttl_to_ns

    if text == "never":
        return None
    try:
        ttl_to_ns(seconds := float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds over 0, or never"
        ) from error
    return seconds


def _set(options: argparse.Namespace) -> int:
    from shmcache.cli.show import json_line, parse_key

    key = parse_key(options.key, options.type)
    text = sys.stdin.read() if options.value is None else options.value
    value: Any = text
    if options.json:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            complain(f"VALUE is not JSON ({error}); without --json it is a text")
            return USAGE_ERROR
    with _attached(options.name, storing=True) as cache:
        if _codec_of(cache) == "raw":
            value = text.encode()
        there = key in cache
        cache.set(key, value, ttl=options.ttl)
    print(f"{'replaced' if there else 'stored'} {json_line(key)}")
    return 0


def _delete(options: argparse.Namespace) -> int:
    from shmcache._engine import encode_key
    from shmcache.cli.show import json_line, parse_key

    missing = 0
    keys = [parse_key(text, options.type) for text in options.key]
    for key in keys:
        encode_key(key)  # raises now if one of them is no key, before any is removed
    with _attached(options.name) as cache:
        for text, key in zip(options.key, keys, strict=True):
            gone = _delete_one(cache, text, key, options.type)
            missing += not gone
            print(f"{'deleted' if gone else 'not there:'} {json_line(key)}")
    return NO if missing else 0


def _delete_one(cache: shmcache.Cache, text: str, key: Any, how: str) -> int:
    # In a map of handles each owner may have an entry of the key.
    if _codec_of(cache) != L.HANDLES:
        return int(cache.delete(key))
    with opened(cache.name) as segment:
        found = entries_of(segment, text, how)
    return sum(cache.delete(entry.key) for entry in found)


def _clear(options: argparse.Namespace) -> int:
    from shmcache.cli.show import parse_key

    with _attached(options.name) as cache:
        if options.prefix is None:
            count = cache.clear()
        elif _codec_of(cache) == L.HANDLES:
            with opened(options.name) as segment:
                chosen = list(chosen_entries(segment, options.prefix, options.type))
            count = sum(cache.delete(entry.key) for entry in chosen)
        else:
            count = cache.clear(parse_key(options.prefix, options.type))
    print(f"removed {count} {'entry' if count == 1 else 'entries'}")
    return 0


COMMANDS = (
    Command(
        "set",
        "Store a value under a key.",
        _set,
        (
            NAME,
            KEY,
            key_type(),
            argument(
                "value",
                metavar="VALUE",
                nargs="?",
                help="default: what standard input has",
            ),
            argument(
                "--ttl",
                type=_ttl,
                default=...,
                metavar="S",
                help="seconds to live, or never; default: that of the cache",
            ),
            argument(
                "--json",
                action="store_true",
                help="VALUE is JSON, not a text to be stored",
            ),
        ),
        description="Store a value under a key, as any process that uses the cache"
        " does.",
    ),
    Command(
        "delete",
        "Remove keys.",
        _delete,
        (NAME, KEYS, key_type()),
        description="Remove keys.  Handles of these keys are closed by their owners."
        "  The exit code is 1 if one of the keys was not there.",
    ),
    Command(
        "clear",
        "Remove all entries.",
        _clear,
        (NAME, PREFIX, key_type("the prefix")),
        description="Remove all entries, or those whose key has a prefix.  Handles are"
        " closed by their owners.",
    ),
)


# --- attaching --------------------------------------------------------------------


@contextmanager
def _attached(name: str, *, storing: bool = False) -> Iterator[shmcache.Cache]:
    """A cache that is in use or persistent, attached for the time of a with block.

    A cache that a crash has left behind is refused.  The next process to create it
    would start with a new one anyway; and if this process attached, it would be the
    last one to leave, and so remove what the user may want to look at.
    """
    from shmcache._engine import FunctionCodec
    from shmcache._observe.snapshot import Segment

    with Segment(name) as segment:
        codec: Any = segment.codec
        settings = segment.header.settings
        if not settings.persist and not any(w.alive for w in segment.workers()):
            raise SegmentNotFound(
                f"nobody uses cache {name!r}, and it is not to persist: it is what a"
                " crash has left, which shmcache clean removes"
            )
    if storing and codec == L.HANDLES:
        raise shmcache.UnsupportedValue(
            f"{name!r} is a map of handles, which live in the processes that opened"
            " them; they alone can store one"
        )
    if codec not in {"msgpack", "msgspec", "pickle", "raw", L.HANDLES}:
        codec = FunctionCodec(codec, _unknown, _unknown, simple=False)
    with shmcache.Cache.attach(name, codec=codec) as cache:
        yield cache


def _codec_of(cache: shmcache.Cache) -> str:
    codec: str = cache.internals.settings.codec
    return codec


def _unknown(_: object) -> NoReturn:
    raise TypeError("only the program that made the cache knows its codec")
