"""Completion of the ``shmcache`` command in shells, as scripts.

A script is made from the tables of commands, so it knows them and their options.  The
names of caches change, so the script asks for them with ``shmcache ls --names`` when
they are wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcache.cli.options import argument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shmcache.cli.options import Argument, Command

SHELLS = ("bash", "zsh", "fish")

# argparse adds this option to each command by itself.
_HELP = argument("--help", action="store_true", help="show this help message and exit")


def script(shell: str, commands: Iterable[Command]) -> str:
    """The script that completes these commands in a shell, one of ``SHELLS``."""
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return makers[shell](list(commands))


def _options(command: Command) -> list[Argument]:
    return [_HELP, *(each for each in command.arguments if each.is_option)]


def _places(command: Command) -> list[Argument]:
    return [each for each in command.arguments if not each.is_option]


def _takes_cache(command: Command) -> bool:
    return any(place.names_cache for place in _places(command))


def _takes_caches(command: Command) -> bool:
    return any(place.names_cache and place.repeats for place in _places(command))


def _first_choices(command: Command) -> tuple[str, ...]:
    # The words that the first positional argument accepts.
    places = _places(command)
    return places[0].choices if places else ()


def _summary(command: Command) -> str:
    return command.summary.rstrip(".")


def _short_help(option: Argument) -> str:
    text: str = option.settings.get("help", "")
    return text.partition(":")[0]


# --- bash -------------------------------------------------------------------------

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


def _bash(commands: Sequence[Command]) -> str:
    values, options = [], []
    one = [c.name for c in commands if _takes_cache(c) and not _takes_caches(c)]
    several = [c.name for c in commands if _takes_caches(c)]
    # The name of a cache stands in the first place; keys, which may follow, are not
    # completed.
    places = [
        f'            {"|".join(one)}) ((COMP_CWORD == 2)) && words="{_NAMES}" ;;',
        f'            {"|".join(several)}) words="{_NAMES}" ;;',
    ]
    for command in commands:
        name = command.name
        flags = " ".join(option.flags[-1] for option in _options(command))
        options.append(f'                {name}) words="{flags}" ;;')
        for option in _options(command):
            if option.takes_value:
                words = " ".join(option.choices)
                values.append(f'        {name}:{option.flags[-1]}) words="{words}" ;;')
        if choices := _first_choices(command):
            places.append(f'            {name}) words="{" ".join(choices)}" ;;')
    return (
        _BASH.replace("@COMMANDS@", " ".join(c.name for c in commands))
        .replace("@VALUES@", "\n".join(values))
        .replace("@PLACES@", "\n".join(places))
        .replace("@OPTIONS@", "\n".join(options))
    )


# --- zsh --------------------------------------------------------------------------

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


def _zsh(commands: Sequence[Command]) -> str:
    def spec(option: Argument) -> str:
        value = f":value:({' '.join(option.choices)})" if option.takes_value else ""
        text = _zsh_text(_short_help(option))
        return _quoted(f"{option.flags[-1]}[{text}]{value}")

    arguments = []
    for command in commands:
        specs = [spec(option) for option in _options(command)]
        if _takes_cache(command):
            names = "($(shmcache ls --names 2>/dev/null))"
            specs.append(f'"{"*" * _takes_caches(command)}:cache:{names}"')
        elif choices := _first_choices(command):
            specs.append(_quoted(f":word:({' '.join(choices)})"))
        arguments.append(f"        {command.name}) _arguments {' '.join(specs)} ;;")
    listed = [
        f"        {_quoted(f'{command.name}:{_zsh_text(_summary(command))}')}"
        for command in commands
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


# --- fish -------------------------------------------------------------------------


def _fish(commands: Sequence[Command]) -> str:
    lines = ["complete -c shmcache -f"]
    for command in commands:
        name = command.name
        lines.append(
            "complete -c shmcache -n __fish_use_subcommand"
            f" -a {name} -d {_fish_text(_summary(command))}"
        )
        within = f"complete -c shmcache -n '__fish_seen_subcommand_from {name}'"
        if _takes_cache(command):
            lines.append(f"{within} -a '(shmcache ls --names 2>/dev/null)'")
        elif choices := _first_choices(command):
            lines.append(f"{within} -a '{' '.join(choices)}'")
        for option in _options(command):
            value = " -r" if option.takes_value else ""
            if option.choices:
                value += f" -a '{' '.join(option.choices)}'"
            flag = option.flags[-1].lstrip("-")
            text = _fish_text(_short_help(option))
            lines.append(f"{within} -l {flag}{value} -d {text}")
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
