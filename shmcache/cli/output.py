"""What commands share in finding entries and in answering."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shmcache._format import layout as L
from shmcache.errors import SegmentNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shmcache._observe.snapshot import Entry, Segment

NO = 1
USAGE_ERROR = 2


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"shmcache: {message}", file=sys.stderr)


def lacking(command: str, extra: str, error: ImportError) -> int:
    """Say which extra has the package that is missing; the exit code."""
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
    """A cache seen from outside."""
    from shmcache._observe.snapshot import Segment

    with Segment(name) as segment:
        yield segment


def chosen_entries(
    segment: Segment, prefix: str | None, how: str, *, values: bool = False
) -> Iterator[Entry]:
    """The living entries whose key begins with a prefix, as for ``Cache.clear``."""
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
    """The entries of a key, expired ones included: of handles one for each owner."""
    from shmcache._engine import encode_key
    from shmcache.cli.show import parse_key

    wanted = encode_key(parse_key(key, how))
    if segment.holds_handles:
        entries = segment.entries(values=True)
        return [entry for entry in entries if segment.own_key(entry) == wanted]
    entry = segment.find(*wanted)
    return [entry] if entry else []


def print_json(data: object) -> None:
    """An answer for scripts."""
    print(json.dumps(data, indent=2))


def print_table(heads: Sequence[str], rows: Any) -> None:
    """An answer for people, in columns: the first one to the left."""
    table = [heads, *rows]
    widths = [max(len(row[n]) for row in table) for n in range(len(heads))]
    for row in table:
        line = [row[0].ljust(widths[0])]
        line += [text.rjust(width) for text, width in zip(row, widths, strict=True)][1:]
        print("  ".join(line).rstrip())


def print_fields(fields: dict[str, str]) -> None:
    """An answer for people, one field on a line."""
    for name, text in fields.items():
        print(f"{name:15}{text}")
