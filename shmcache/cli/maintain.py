"""Commands that find and remove what is in shared memory: clean, unlink, check."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shmcache.cli.options import name_and_json, name_option, names_option
from shmcache.cli.output import NO, complain, not_found

if TYPE_CHECKING:
    import argparse

    from shmcache.cli.clean import Found


def _clean_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the caches of this user in shared memory, and remove those that no living"
        " process uses: what crashes have left.  One in use is never removed, nor one"
        " that is to persist, unless --persistent says so.  Asks first."
    )
    names_option(parser)
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument(
        "--persistent",
        action="store_true",
        help="also remove caches made with persist=True, and so the data in them",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="say it as JSON; removes nothing without --yes",
    )


def _clean(options: argparse.Namespace) -> int:
    from shmcache.cli import clean as _clean

    found = [
        one
        for one in _clean.survey()
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
        removed = [name for name in chosen if _clean.remove(name)]
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


def _unlink_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Remove one cache from shared memory, persistent or damaged as it may be."
    )
    name_option(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if it is in use: who is attached goes on with what it has, and"
        " newcomers get a new one",
    )


def _unlink(options: argparse.Namespace) -> int:
    from shmcache.cli import clean as _clean

    name = options.name
    found = [one for one in _clean.survey() if one.name == name]
    if not found:
        raise not_found(name)
    if not _clean.remove(name, force=options.force):
        complain(
            f"cache {name!r} is in use; stop the processes that use it, or use --force"
        )
        return NO
    print(f"removed {name}")
    return 0


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look for damage in a cache's segment, from a copy and without attaching."
        "  Exit code 1 if there is some."
    )
    name_and_json(parser)


def _check(options: argparse.Namespace) -> int:
    from shmcache.cli import clean as _clean

    findings = _clean.check(options.name)
    if options.json:
        print(json.dumps({"name": options.name, "findings": findings}, indent=2))
    else:
        print("\n".join(findings) or f"cache {options.name} is sound")
    return NO if findings else 0
