"""The command line: ``shmcache COMMAND``.

A command is a function that takes the parsed arguments and returns the exit code, with
a line in ``_COMMANDS``.  What a user can put right (a wrong option, a cache that does
not exist) is one line on stderr and exit code 2, without a traceback: argparse's own
refusals, every ShmCacheError and OSError.

Commands that only look (inspect.py) see a cache from outside, by _inspect.py, and
change nothing; those that write (modify.py) attach to it as any process does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import shmcache
from shmcache.cli import inspect, maintain, modify, run
from shmcache.cli.options import name_and_json, no_options
from shmcache.cli.output import NO, USAGE_ERROR, complain
from shmcache.errors import SegmentCorrupt, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_CODES = """\
exit codes:
  0  done
  1  the answer is no: no such key, damage found, in use, nothing removed
  2  not done: wrong arguments, no such cache, not ours
"""


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
    arguments = sys.argv[1:] if argv is None else list(argv)
    with suppress(AttributeError):  # a test's stand-in for the terminal
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if arguments[:1] == ["soak"]:
            return run._soak(arguments[1:])
        options = parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
    except ShmCacheError as error:
        complain(str(error))
        return NO if isinstance(error, SegmentCorrupt) else USAGE_ERROR
    except KeyboardInterrupt as stop:
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has seen enough
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        complain(f"{error}; see that it can be had, and try again")
        return USAGE_ERROR
    return code


def _drop_output() -> None:
    # What is still in the buffer cannot be written, and the interpreter would try.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = Parser(
        prog="shmcache",
        description="One bounded cache in shared memory for all worker processes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--version", action="version", version=f"shmcache {shmcache.__version__}"
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            allow_abbrev=False,
        )
        command.add_options(sub)
        sub.set_defaults(run=command.run)
    return made


_COMMANDS = (
    Command("ls", "List the caches of this user.", inspect._ls_options, inspect._ls),
    Command(
        "stats", "What a cache did, over all processes.", name_and_json, inspect._stats
    ),
    Command("top", "Watch caches live.", inspect._top_options, inspect._top),
    Command("keys", "List the keys of a cache.", inspect._keys_options, inspect._keys),
    Command("get", "Print the value of a key.", inspect._get_options, inspect._get),
    Command("set", "Store a value under a key.", modify._set_options, modify._set),
    Command("delete", "Remove keys.", modify._delete_options, modify._delete),
    Command("clear", "Remove all entries.", modify._clear_options, modify._clear),
    Command(
        "inspect",
        "Show the record of a key.",
        inspect._inspect_options,
        inspect._inspect,
    ),
    Command(
        "handles", "List the handles of all workers.", name_and_json, inspect._handles
    ),
    Command(
        "check", "Look for damage in a cache.", maintain._check_options, maintain._check
    ),
    Command(
        "clean",
        "Remove what no living process uses.",
        maintain._clean_options,
        maintain._clean,
    ),
    Command("unlink", "Remove one cache.", maintain._unlink_options, maintain._unlink),
    Command(
        "demo",
        "Gunicorn workers on real work: a dict in each, then one shared cache.",
        run._demo_options,
        run._demo,
    ),
    Command(
        "soak",
        "Does memory stay flat?  Worker processes under load, watched.",
        run._soak_options,
        lambda options: run._soak(options.arguments),
    ),
    Command("info", "Version, engine, Python and platform.", no_options, run._info),
    Command(
        "completion",
        "Print a script that completes this command in a shell.",
        run._completion_options,
        run._completion,
    ),
)
