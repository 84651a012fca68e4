"""Commands for what is in shared memory: check, clean, unlink."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shmcache.cli.options import JSON, NAME, NAMES, Command, argument
from shmcache.cli.output import NO, complain, not_found

if TYPE_CHECKING:
    import argparse

    from shmcache.cli.clean import Found


def _check(options: argparse.Namespace) -> int:
    from shmcache.cli import clean

    findings = clean.check(options.name)
    if options.json:
        print(json.dumps({"name": options.name, "findings": findings}, indent=2))
    else:
        print("\n".join(findings) or f"cache {options.name} is sound")
    return NO if findings else 0


def _clean(options: argparse.Namespace) -> int:
    from shmcache.cli import clean

    found = [
        one
        for one in clean.survey()
        if not options.wanted or one.name in options.wanted
    ]
    chosen = [
        one.name
        for one in found
        if not (one.in_use or one.trouble or (one.persist and not options.persistent))
    ]
    if not options.json:
        for one in found:
            print(f"{_state(one, one.name in chosen):12}{one.bytes:>15,} B  {one.name}")
            if one.trouble:
                print(f"  {one.trouble}")
        if not chosen:
            print("nothing to remove")
            return 0
    removed = []
    if options.yes or (not options.json and _agreed(len(chosen))):
        removed = [name for name in chosen if clean.remove(name)]
    if options.json:
        caches = [
            {**vars(one), "unused": one.name in chosen, "removed": one.name in removed}
            for one in found
        ]
        print(json.dumps({"caches": caches}, indent=2))
        return 0
    print(f"removed {len(removed)} of {len(found)}")
    return 0 if removed else NO


def _state(one: Found, chosen: bool) -> str:
    if one.trouble:
        return "refused"
    if one.in_use:
        return "in use"
    return "unused" if chosen else "persistent"


def _agreed(count: int) -> bool:
    try:
        answer = input(f"remove {count} unused? [y/N] ")
    except EOFError:
        print("no answer; use --yes to remove without being asked")
        return False
    return answer.strip().lower() in {"y", "yes"}


def _unlink(options: argparse.Namespace) -> int:
    from shmcache.cli import clean

    name = options.name
    found = [one for one in clean.survey() if one.name == name]
    if not found:
        raise not_found(name)
    if not clean.remove(name, force=options.force):
        complain(
            f"cache {name!r} is in use; stop the processes that use it, or use --force"
        )
        return NO
    print(f"removed {name}")
    return 0


COMMANDS = (
    Command(
        "check",
        "Look for damage in a cache.",
        _check,
        (NAME, JSON),
        description="Look for damage in a cache's segment, in a copy and without"
        " attaching.  The exit code is 1 if there is some.",
    ),
    Command(
        "clean",
        "Remove caches that no living process uses.",
        _clean,
        (
            NAMES,
            argument("--yes", action="store_true", help="remove without asking"),
            argument(
                "--persistent",
                action="store_true",
                help="also remove caches made with persist=True, with all their data",
            ),
            argument(
                "--json",
                action="store_true",
                help="print the answer as JSON; removes nothing without --yes",
            ),
        ),
        description="List the caches of this user in shared memory, and remove those"
        " that no living process uses, which crashes have left behind.  A cache in use"
        " is never removed.  A persistent cache is removed only with --persistent."
        "  Asks before it removes.",
    ),
    Command(
        "unlink",
        "Remove one cache.",
        _unlink,
        (
            NAME,
            argument(
                "--force",
                action="store_true",
                help="remove it even if it is in use: the processes that use it keep"
                " what they have, and the next one gets a new cache",
            ),
        ),
        description="Remove one cache from shared memory, even if it is persistent or"
        " damaged.",
    ),
)
