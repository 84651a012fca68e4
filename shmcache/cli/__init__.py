"""The command line: ``shmcache COMMAND``.

A command is a function that takes the parsed arguments and returns the exit code, with
a line in ``_COMMANDS``.  What a user can put right (a wrong option, a cache that does
not exist) is one line on stderr and exit code 2, without a traceback: argparse's own
refusals, every ShmCacheError and OSError.

Commands that only look (looking.py) see a cache from outside, by _inspect.py, and
change nothing; those that write (writing.py) attach to it as any process does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import shmcache
from shmcache.cli import looking, removing, running, writing
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
            return running._soak(arguments[1:])
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
    Command("ls", "List the caches of this user.", looking._ls_options, looking._ls),
    Command(
        "stats", "What a cache did, over all processes.", name_and_json, looking._stats
    ),
    Command("top", "Watch caches live.", looking._top_options, looking._top),
    Command("keys", "List the keys of a cache.", looking._keys_options, looking._keys),
    Command("get", "Print the value of a key.", looking._get_options, looking._get),
    Command("set", "Store a value under a key.", writing._set_options, writing._set),
    Command("delete", "Remove keys.", writing._delete_options, writing._delete),
    Command("clear", "Remove all entries.", writing._clear_options, writing._clear),
    Command(
        "inspect",
        "Show the record of a key.",
        looking._inspect_options,
        looking._inspect,
    ),
    Command(
        "handles", "List the handles of all workers.", name_and_json, looking._handles
    ),
    Command(
        "check", "Look for damage in a cache.", removing._check_options, removing._check
    ),
    Command(
        "clean",
        "Remove what no living process uses.",
        removing._clean_options,
        removing._clean,
    ),
    Command("unlink", "Remove one cache.", removing._unlink_options, removing._unlink),
    Command(
        "demo",
        "Gunicorn workers on real work: a dict in each, then one shared cache.",
        running._demo_options,
        running._demo,
    ),
    Command(
        "soak",
        "Does memory stay flat?  Worker processes under load, watched.",
        running._soak_options,
        lambda options: running._soak(options.arguments),
    ),
    Command("info", "Version, engine, Python and platform.", no_options, running._info),
    Command(
        "completion",
        "Print a script that completes this command in a shell.",
        running._completion_options,
        running._completion,
    ),
)
