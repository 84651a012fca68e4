"""Commands about no cache in particular: demo, soak, info."""

from __future__ import annotations

import argparse
import platform
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from shmcache._engine import is_compiled
from shmcache._version import __version__
from shmcache.cli.options import Command, argument
from shmcache.cli.output import lacking

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def soak(arguments: Sequence[str]) -> int:
    """Run a soak, which parses its arguments itself; returns the exit code."""
    try:
        from shmcache import soak
    except ImportError as error:
        return lacking("soak", "soak", error)
    return int(soak.main(arguments))


def _soak(options: argparse.Namespace) -> int:
    return soak(options.arguments)


def _info(_options: argparse.Namespace) -> int:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"shmcache  {__version__}")
    print(f"compiled  {'yes' if is_compiled else 'no: runs interpreted'}")
    print(f"python    {python} ({sys.executable})")
    print(f"platform  {platform.platform()}")
    return 0


COMMANDS = (
    Command(
        "demo",
        "Measure gunicorn workers with a dict in each, then with one shared cache.",
        _demo,
        (
            argument(
                "--workers",
                type=_workers,
                default=4,
                metavar="N",
                help="worker processes (default: 4)",
            ),
            argument(
                "--seconds",
                type=_seconds,
                default=10.0,
                metavar="S",
                help="seconds of load, for both measurements together; 0 for none"
                " (default: 10)",
            ),
            argument(
                "--serve",
                action="store_true",
                help="keep serving after the measurements, until Ctrl-C",
            ),
            argument(
                "--json",
                metavar="FILE",
                help="also write the figures to FILE, as JSON; - is standard output",
            ),
        ),
    ),
    Command(
        "soak",
        "Run workers under load, and judge whether their memory stays flat.",
        _soak,
        (
            argument(
                "arguments", nargs=argparse.REMAINDER, help="see shmcache soak --help"
            ),
        ),
    ),
    Command("info", "Print version, engine, Python and platform.", _info),
)
