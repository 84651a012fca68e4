"""Completion of the ``shmcache`` command in shells, as scripts made from its parser.

A script knows the commands and their options; names of caches it asks for, with
``shmcache ls --names``, when they are wanted.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")


class _Option(NamedTuple):
    """An option of a command."""

    flag: str
    summary: str
    takes_value: bool
    choices: tuple[str, ...]


class _Command(NamedTuple):
    """A command, what may stand in its first place, and its options."""

    name: str
    summary: str
    choices: tuple[str, ...]
    takes_cache: bool
    repeats: bool  # of more than one cache
    options: list[_Option]


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell."""
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return makers[shell](list(_commands(parser)))


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        summaries = {one.dest: one.help or "" for one in action._choices_actions}
        for name, sub in action.choices.items():
            places = [a for a in sub._actions if not a.option_strings]
            yield _Command(
                name=name,
                summary=summaries[name].rstrip("."),
                choices=tuple(places[0].choices or ()) if places else (),
                takes_cache=any(place.metavar == "NAME" for place in places),
                repeats=any(place.dest == "wanted" for place in places),
                options=[
                    _Option(
                        flag=a.option_strings[-1],
                        summary=(a.help or "").partition(":")[0],
                        takes_value=a.nargs != 0,
                        choices=tuple(a.choices or ()),
                    )
                    for a in sub._actions
                    if a.option_strings
                ],
            )


_BASH = """\
_shmcache() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    local words=
    if ((COMP_CWORD == 1)); then
        words="@COMMANDS@ --help --version"
    else
        case ${COMP_WORDS[1]}:$previous in
@VALUES@
        *) case ${COMP_WORDS[1]} in
@PLACES@
            esac
            if [[ $current == -* ]]; then
                case ${COMP_WORDS[1]} in
@OPTIONS@
                esac
            fi ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _shmcache shmcache
"""
_NAMES = "$(shmcache ls --names 2>/dev/null)"


def _bash(commands: list[_Command]) -> str:
    values, options = [], []
    named = "|".join(c.name for c in commands if c.takes_cache and not c.repeats)
    listing = "|".join(c.name for c in commands if c.takes_cache and c.repeats)
    # A cache's name is wanted in the first place; keys are not looked up.
    places = [
        f'            {named}) ((COMP_CWORD == 2)) && words="{_NAMES}" ;;',
        f'            {listing}) words="{_NAMES}" ;;',
    ]
    for c in commands:
        flags = " ".join(option.flag for option in c.options)
        options.append(f'                {c.name}) words="{flags}" ;;')
        for option in c.options:
            if option.takes_value:
                words = " ".join(option.choices)
                values.append(f'        {c.name}:{option.flag}) words="{words}" ;;')
        if c.choices:
            words = " ".join(c.choices)
            places.append(f'            {c.name}) words="{words}" ;;')
    return (
        _BASH.replace("@COMMANDS@", " ".join(c.name for c in commands))
        .replace("@VALUES@", "\n".join(values))
        .replace("@PLACES@", "\n".join(places))
        .replace("@OPTIONS@", "\n".join(options))
    )


_ZSH = """\
#compdef shmcache
_shmcache() {
    local -a commands
    commands=(
@COMMANDS@
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    ((CURRENT -= 1))
    case $command in
@ARGUMENTS@
    esac
}
if [[ $funcstack[1] == _shmcache ]]; then
    _shmcache "$@"
else
    compdef _shmcache shmcache
fi
"""


def _zsh(commands: list[_Command]) -> str:
    def spec(option: _Option) -> str:
        value = f":value:({' '.join(option.choices)})" if option.takes_value else ""
        return _quoted(f"{option.flag}[{_zsh_text(option.summary)}]{value}")

    arguments = []
    for c in commands:
        specs = [spec(option) for option in c.options]
        if c.takes_cache:
            names = "($(shmcache ls --names 2>/dev/null))"
            specs.append(f'"{"*" * c.repeats}:cache:{names}"')
        elif c.choices:
            specs.append(_quoted(f":word:({' '.join(c.choices)})"))
        arguments.append(f"        {c.name}) _arguments {' '.join(specs)} ;;")
    listed = [
        f"        {_quoted(f'{c.name}:{_zsh_text(c.summary)}')}" for c in commands
    ]
    return _ZSH.replace("@COMMANDS@", "\n".join(listed)).replace(
        "@ARGUMENTS@", "\n".join(arguments)
    )


def _zsh_text(text: str) -> str:
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    return text


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(commands: list[_Command]) -> str:
    lines = ["complete -c shmcache -f"]
    for c in commands:
        lines.append(
            "complete -c shmcache -n __fish_use_subcommand"
            f" -a {c.name} -d {_fish_text(c.summary)}"
        )
        within = f"complete -c shmcache -n '__fish_seen_subcommand_from {c.name}'"
        if c.takes_cache:
            lines.append(f"{within} -a '(shmcache ls --names 2>/dev/null)'")
        elif c.choices:
            lines.append(f"{within} -a '{' '.join(c.choices)}'")
        for option in c.options:
            value = " -r" if option.takes_value else ""
            if option.choices:
                value += f" -a '{' '.join(option.choices)}'"
            text = _fish_text(option.summary)
            lines.append(f"{within} -l {option.flag.lstrip('-')}{value} -d {text}")
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
