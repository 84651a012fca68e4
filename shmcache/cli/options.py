"""Commands and their arguments as data, and the arguments that commands share.

Problem: the parser, the help and the completion scripts of three shells need the same
facts about each command.

Mechanism: each module of commands exports a table ``COMMANDS``.  The parser and the
completion scripts are both made from these tables.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_TYPES = ("text", "int", "hex", "json")


@dataclass(frozen=True)
class Argument:
    """One argument of a command."""

    flags: tuple[str, ...]  # of an option; or the one name of a positional argument
    settings: dict[str, Any]  # what ``add_argument`` takes beside the flags
    # Only one of a command's alternatives can be given.
    alternative: bool = False

    @property
    def is_option(self) -> bool:
        """Whether this is an option, and not a positional argument."""
        return self.flags[0].startswith("-")

    @property
    def takes_value(self) -> bool:
        """Whether a word for it follows on the command line."""
        return self.settings.get("action") != "store_true"

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it accepts; none, if it accepts any word."""
        return tuple(self.settings.get("choices", ()))

    @property
    def names_cache(self) -> bool:
        """Whether it is the name of a cache, or several names."""
        return self.settings.get("metavar") == "NAME"

    @property
    def repeats(self) -> bool:
        """Whether it may be given several times."""
        return self.settings.get("nargs") in {"*", "+"}


def argument(*flags: str, alternative: bool = False, **settings: Any) -> Argument:
    """An argument, described as ``argparse`` wants it."""
    return Argument(flags, settings, alternative)


@dataclass(frozen=True)
class Command:
    """A subcommand: a function, and how it is called on the command line."""

    name: str
    summary: str  # one line for the list of commands
    run: Callable[[argparse.Namespace], int]  # returns the exit code
    arguments: tuple[Argument, ...] = ()
    description: str = ""  # for the command's own help; empty: the summary

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Give a parser the arguments of this command."""
        alternatives = None
        for each in self.arguments:
            if not each.alternative:
                parser.add_argument(*each.flags, **each.settings)
                continue
            if alternatives is None:
                alternatives = parser.add_mutually_exclusive_group()
            alternatives.add_argument(*each.flags, **each.settings)


# --- arguments that commands share ------------------------------------------------


def _cache_name(text: str) -> str:
    from shmcache._segment.names import Names

    try:
        return Names.of(text).cache
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_NAME: dict[str, Any] = {"metavar": "NAME", "type": _cache_name}

NAME = argument("name", help="the name of the cache", **_NAME)
OPTIONAL_NAME = argument("name", nargs="?", help="the name of the cache", **_NAME)
NAMES = argument("wanted", nargs="*", help="only these caches", **_NAME)

_JSON: dict[str, Any] = {"action": "store_true", "help": "print the answer as JSON"}

JSON = argument("--json", **_JSON)
JSON_ALTERNATIVE = argument("--json", alternative=True, **_JSON)

_KEY: dict[str, Any] = {
    "metavar": "KEY",
    "help": "write -- before a key that begins with a dash",
}

KEY = argument("key", **_KEY)
KEYS = argument("key", nargs="+", **_KEY)

PREFIX = argument("--prefix", metavar="P", help="only keys that begin with P")


def key_type(what: str = "KEY") -> Argument:
    """The option that says how a key, or a prefix of keys, is written."""
    return argument(
        "--type",
        choices=KEY_TYPES,
        default="text",
        help=f"how {what} is written: text (the default), a decimal int, bytes in hex,"
        """ or json as keys are shown: "a", 5, ["tuple", 1], {"hex": "00ff"}""",
    )
