"""Options that commands share, and what their texts mean."""

from __future__ import annotations

import argparse
from typing import Any


def name_option(parser: argparse.ArgumentParser, **more: Any) -> None:
    """The name of a cache."""
    parser.add_argument(
        "name", metavar="NAME", help="of the cache", type=_cache_name, **more
    )


def names_option(parser: argparse.ArgumentParser) -> None:
    """Names of caches, or none."""
    parser.add_argument(
        "wanted", metavar="NAME", nargs="*", help="only these", type=_cache_name
    )


def json_option(parser: argparse._ActionsContainer) -> None:
    """Whether the answer is for scripts."""
    parser.add_argument("--json", action="store_true", help="say it as JSON")


def type_option(parser: argparse.ArgumentParser, what: str = "KEY") -> None:
    """How a key is written."""
    from shmcache.cli.show import KEY_TYPES

    parser.add_argument(
        "--type",
        choices=KEY_TYPES,
        default="text",
        help=f"how {what} is written: text (the default), a decimal int, bytes in hex,"
        """ or json as keys are shown: "a", 5, ["tuple", 1], {"hex": "00ff"}""",
    )


def key_option(parser: argparse.ArgumentParser, **more: Any) -> None:
    """A key, and how it is written."""
    parser.add_argument(
        "key", metavar="KEY", help="after -- if it begins with a dash", **more
    )
    type_option(parser)


def _cache_name(text: str) -> str:
    from shmcache._segment.names import Names

    try:
        return Names.of(text).cache
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def no_options(parser: argparse.ArgumentParser) -> None:
    """None at all."""


def name_and_json(parser: argparse.ArgumentParser) -> None:
    """The name of a cache, and whether the answer is for scripts."""
    name_option(parser)
    json_option(parser)
