"""Commands about no cache in particular: demo, soak, info, completion."""

from __future__ import annotations

import argparse
import platform
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import shmcache
from shmcache.cli.output import lacking

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def _info(_options: argparse.Namespace) -> int:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"shmcache  {shmcache.__version__}")
    print(f"compiled  {'yes' if shmcache.compiled else 'no: runs interpreted'}")
    print(f"python    {python} ({sys.executable})")
    print(f"platform  {platform.platform()}")
    return 0


def _soak_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see soak --help")


def _soak(arguments: Sequence[str]) -> int:
    try:
        from shmcache import soak
    except ImportError as error:
        return lacking("soak", "soak", error)
    return int(soak.main(arguments))


def _completion_options(parser: argparse.ArgumentParser) -> None:
    from shmcache.cli.completion import SHELLS

    parser.description = (
        'Print a script that completes commands, options and cache names: eval "$('
        'shmcache completion bash)" in .bashrc, or the same with zsh in .zshrc; for'
        " fish, write it to ~/.config/fish/completions/shmcache.fish."
    )
    parser.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help="bash, zsh, fish"
    )


def _completion(options: argparse.Namespace) -> int:
    from shmcache.cli import completion as _completion
    from shmcache.cli import parser

    print(_completion.script(options.shell, parser()), end="")
    return 0
