"""How commands answer, and how they find the entries that a user names."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shmcache._format import layout as L
from shmcache._parser import USAGE_ERROR
from shmcache.errors import SegmentNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shmcache._observe.records import Entry
    from shmcache._observe.snapshot import Segment

# The exit code of a command whose answer is no.
NO = 1


def complain(message: str) -> None:
    """Print one line on standard error."""
    print(f"shmcache: {message}", file=sys.stderr)


def lacking(command: str, extra: str, error: ImportError) -> int:
    """Say which extra installs the missing package; returns the exit code."""
    complain(
        f"{command} needs a package that is not installed ({error}): pip install"
        f" 'shmcache[{extra}]'"
    )
    return USAGE_ERROR


def not_found(name: str) -> SegmentNotFound:
    """The error of a name that no cache has."""
    return SegmentNotFound(
        f"there is no cache named {name!r} of user {os.geteuid()}; shmcache ls lists"
        " what there is"
    )


@contextmanager
def opened(name: str) -> Iterator[Segment]:
    """A cache seen from outside, for the time of a with block."""
    from shmcache._observe.snapshot import Segment

    with Segment(name) as segment:
        yield segment


def chosen_entries(
    segment: Segment, prefix: str | None, how: str, *, values: bool = False
) -> Iterator[Entry]:
    """The entries that have not expired and whose key has a prefix.

    Args:
        segment: The cache.
        prefix: The prefix as the user wrote it, with the meaning that it has for
            ``Cache.clear``; None for all entries.
        how: One of ``KEY_TYPES``, in which the prefix is written.
        values: Whether the values are copied and checked, too.

    Raises:
        UnsupportedKey: The prefix is not of that type, or is an int.
    """
    from shmcache._engine import encode_key
    from shmcache.cli.show import parse_key
    from shmcache.errors import UnsupportedKey

    wanted = None
    if prefix is not None:
        wanted = encode_key(parse_key(prefix, how))
        if wanted[0] == L.Kind.INT:
            raise UnsupportedKey(
                f"prefix {prefix!r} is an int; use one of text, hex or json, or"
                " shmcache get for a single key"
            )
    return (
        entry
        for entry in segment.entries(values=values)
        if not segment.expired(entry)
        and (wanted is None or _begins(segment.own_key(entry), wanted))
    )


def _begins(key: tuple[int, bytes], prefix: tuple[int, bytes]) -> bool:
    return key[0] == prefix[0] and key[1].startswith(prefix[1])


def entries_of(segment: Segment, key: str, how: str) -> list[Entry]:
    """The entries of a key, including expired ones.

    Args:
        segment: The cache.  In a map of handles each owner may have an entry.
        key: The key as the user wrote it.
        how: One of ``KEY_TYPES``, in which the key is written.

    Raises:
        UnsupportedKey: The key is not of that type, or cannot be a key.
    """
    from shmcache._engine import encode_key
    from shmcache.cli.show import parse_key

    wanted = encode_key(parse_key(key, how))
    if segment.holds_handles:
        entries = segment.entries(values=True)
        return [entry for entry in entries if segment.own_key(entry) == wanted]
    entry = segment.find(*wanted)
    return [entry] if entry else []


def print_json(data: object) -> None:
    """Print an answer for scripts."""
    print(json.dumps(data, indent=2))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print an answer for people, in columns; all but the first are right-aligned."""
    table = [heads, *rows]
    widths = [max(len(row[n]) for row in table) for n in range(len(heads))]
    for row in table:
        line = [row[0].ljust(widths[0])]
        line += [text.rjust(width) for text, width in zip(row, widths, strict=True)][1:]
        print("  ".join(line).rstrip())


def print_fields(fields: dict[str, str]) -> None:
    """Print an answer for people, one field on a line."""
    for name, text in fields.items():
        print(f"{name:15}{text}")
