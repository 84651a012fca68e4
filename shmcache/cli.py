"""The command line: ``shmcache COMMAND``.

A command is a function that takes the parsed arguments and returns the exit code, with
a line in ``_COMMANDS``.  What a user can put right (a wrong option, a cache that does
not exist) is one line on stderr and exit code 2, without a traceback: argparse's own
refusals, and every ShmCacheError.
"""

from __future__ import annotations

import argparse
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


_COMMANDS = (
    Command(
        "demo",
        "Gunicorn workers on real work: a dict in each, then one shared cache.",
        _demo_options,
        _demo,
    ),
    Command("info", "Version, engine, Python and platform.", _no_options, _info),
)
