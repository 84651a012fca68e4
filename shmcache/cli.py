"""The command line: ``shmcache COMMAND``.

A command is a function that takes the parsed arguments and returns the exit code, with
a line in ``_COMMANDS``.  What a user can put right (a wrong option, a cache that does
not exist) is one line on stderr and exit code 2, without a traceback: argparse's own
refusals, and every ShmCacheError.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import shmcache
from shmcache.errors import ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcache._clean import Found

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argparse parser whose refusals are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong and where the help is; ends the process."""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


class Command(NamedTuple):
    """A subcommand: its name, what it does, its options, the function that does it."""

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        code: int = options.run(options)
        sys.stdout.flush()
    except ShmCacheError as error:
        print(f"shmcache: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt as stop:
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="shmcache",
        description="One bounded cache in shared memory for all worker processes.",
    )
    parser.add_argument(
        "--version", action="version", version=f"shmcache {shmcache.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.name, help=command.summary, description=command.summary
        )
        command.add_options(sub)
        sub.set_defaults(run=command.run)
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_workers, default=4, metavar="N", help="(default: 4)"
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="of load, for both measurements together; 0 = none (default: 10)",
    )
    parser.add_argument(
        "--serve", action="store_true", help="then keep serving until Ctrl-C"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too; - = stdout"
    )


def _demo(options: argparse.Namespace) -> int:
    from shmcache.demo.run import Demo

    return Demo(options.workers, options.seconds, options.serve, options.json).run()


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (seconds := float(text)) <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 3600")


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _info(_options: argparse.Namespace) -> int:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"shmcache  {shmcache.__version__}")
    print(f"compiled  {'yes' if shmcache.compiled else 'no: runs interpreted'}")
    print(f"python    {python} ({sys.executable})")
    print(f"platform  {platform.platform()}")
    return 0


def _clean_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the caches of this user in shared memory, and remove those that no living"
        " process uses: what crashes have left.  One in use is never removed, nor one"
        " that is to persist, unless --persistent says so.  Asks first."
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="only these", type=_cache_name
    )
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
    from shmcache import _clean

    found = [
        one for one in _clean.survey() if not options.names or one.name in options.names
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
    return 0 if removed else 1


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
    parser.add_argument("name", metavar="NAME", help="of the cache", type=_cache_name)
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if it is in use: who is attached goes on with what it has, and"
        " newcomers get a new one",
    )


def _unlink(options: argparse.Namespace) -> int:
    from shmcache import _clean

    name = options.name
    found = [one for one in _clean.survey() if one.name == name]
    if not found:
        print(f"shmcache: there is no cache named {name!r}", file=sys.stderr)
        return USAGE_ERROR
    if not _clean.remove(name, force=options.force):
        print(
            f"shmcache: cache {name!r} is in use; stop the processes that use it, or"
            " use --force",
            file=sys.stderr,
        )
        return 1
    print(f"removed {name}")
    return 0


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look for damage in a cache's segment, from a copy and without attaching."
        "  Exit code 1 if there is some."
    )
    parser.add_argument("name", metavar="NAME", help="of the cache", type=_cache_name)
    parser.add_argument("--json", action="store_true", help="say it as JSON")


def _check(options: argparse.Namespace) -> int:
    from shmcache import _clean

    findings = _clean.check(options.name)
    if options.json:
        print(json.dumps({"name": options.name, "findings": findings}, indent=2))
    else:
        print("\n".join(findings) or f"cache {options.name} is sound")
    return 1 if findings else 0


def _cache_name(text: str) -> str:
    from shmcache._segment import Names

    try:
        return Names.of(text).cache
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_COMMANDS = (
    Command(
        "demo",
        "Gunicorn workers on real work: a dict in each, then one shared cache.",
        _demo_options,
        _demo,
    ),
    Command("info", "Version, engine, Python and platform.", _no_options, _info),
    Command("check", "Look for damage in a cache.", _check_options, _check),
    Command("clean", "Remove what no living process uses.", _clean_options, _clean),
    Command("unlink", "Remove one cache.", _unlink_options, _unlink),
)
