"""The command line: ``shmcache COMMAND``.

Read in this order::

    options.py     a command as data, and the arguments that commands share
    output.py      how commands answer; how they find entries
    show.py        keys, values, sizes and times as text
    inspect.py     commands that only look: ls, stats, top, keys, get, inspect, handles
    top.py         the live view of ``shmcache top``
    modify.py      commands that write to a cache: set, delete, clear
    maintain.py    commands for what is in shared memory: check, clean, unlink
    clean.py       how the files of caches are found, checked and removed
    run.py         commands about no cache in particular: demo, soak, info
    completion.py  scripts that complete the command in shells

A command is a function that takes the parsed arguments and returns the exit code, with
an entry in its module's table ``COMMANDS``.  A mistake that the user can correct, such
as a wrong option or a cache that does not exist, gives one line on standard error and
exit code 2, without a traceback.  That covers argparse's refusals, every ShmCacheError
and every OSError.

Commands that only look see a cache from outside (_observe/snapshot.py) and change
nothing.  Commands that write attach to the cache, as any process does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from shmcache._parser import USAGE_ERROR, Parser
from shmcache._version import __version__
from shmcache.cli import inspect, maintain, modify, run
from shmcache.cli.completion import SHELLS, script
from shmcache.cli.options import Command, argument
from shmcache.cli.output import NO, complain
from shmcache.errors import SegmentCorrupt, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CODES = """\
exit codes:
  0  done
  1  the answer is no: no such key, damage found, in use, nothing removed
  2  not done: wrong arguments, no such cache, not ours
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``shmcache``; None for those of this process.

    Returns:
        The exit code, see ``EXIT_CODES``; 128 + N if signal N ended the command.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with suppress(AttributeError):  # a test's replacement of the terminal
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if arguments[:1] == ["soak"]:  # it parses its arguments itself
            return run.soak(arguments[1:])
        options = parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
    except ShmCacheError as error:
        complain(str(error))
        return NO if isinstance(error, SegmentCorrupt) else USAGE_ERROR
    except KeyboardInterrupt as stop:
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        complain(f"{error}; remove the cause, and try again")
        return USAGE_ERROR
    return code


def _drop_output() -> None:
    # The rest in the buffer cannot be written.  Without this the interpreter would try
    # again at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = Parser(
        prog="shmcache",
        description="One bounded cache in shared memory for all worker processes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"shmcache {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description or command.summary,
            allow_abbrev=False,
        )
        command.add_to(sub)
        sub.set_defaults(run=command.run)
    return made


def _completion(options: argparse.Namespace) -> int:
    print(script(options.shell, COMMANDS), end="")
    return 0


COMMANDS = (
    *inspect.COMMANDS,
    *modify.COMMANDS,
    *maintain.COMMANDS,
    *run.COMMANDS,
    Command(
        "completion",
        "Print a script that completes this command in a shell.",
        _completion,
        (argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish"),),
        description="Print a script that completes commands, options and cache names."
        '  Put eval "$(shmcache completion bash)" into .bashrc, or the same with zsh'
        " into .zshrc; for fish, write the script to"
        " ~/.config/fish/completions/shmcache.fish.",
    ),
)
