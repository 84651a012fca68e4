"""The options of a soak."""

from __future__ import annotations

import argparse
import lzma
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shmcache._parser import Parser
from shmcache.errors import ShmCacheError

PROFILES = ("cache", "handles", "mixed", "churn")
SERVERS = ("fork", "gunicorn")
LEAKS = ("memory", "descriptors", "threads")
DESCRIPTION = (
    "Does memory stay flat?  This runs workers on a cache, kills and recycles them,"
    " and judges whether what they hold grows.  The exit code is 1 if there is a leak,"
    " or if anything does not add up."
)


class SoakError(ShmCacheError):
    """The soak cannot run, or cannot go on."""


@dataclass(frozen=True)
class Options:
    """The options of one soak."""

    seconds: float = 60.0  # math.inf: until Ctrl-C
    workers: int = 3
    profile: str = "mixed"
    server: str = "fork"
    rate: float = 1000.0  # operations per second, of all workers together
    kill_every: float = 0.0  # s; 0: never
    recycle_every: float = 0.0  # s; 0: never
    seed: int = 1
    trace: str | None = None  # the path of a trace
    pid: int | None = None  # of a master to watch; then the soak starts no workers
    warm_up: float = 0.0  # s of the run, and of each worker's life; not judged
    interval: float = 1.0  # s from sample to sample
    check_every: float = 10.0  # s
    tolerance: float = 1024.0  # KiB by which a process may grow over the window
    html: str | None = None
    json: str | None = None
    self_test: bool = False
    leak: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The options for a report; ``seconds`` is None if the run has no end."""
        bounded = math.isfinite(self.seconds)
        return {**asdict(self), "seconds": self.seconds if bounded else None}


def _number(text: str, low: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= 1e8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} on")
    return number


def _positive(text: str) -> float:
    return _number(text, 0.001)


def _seconds(text: str) -> float:
    return _number(text, 0)


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)


# The options of the command line, as ``add_argument`` takes them.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "--seconds": {
        "type": _positive,
        "metavar": "N",
        "help": "length of the run (default: 60)",
    },
    "--workers": {
        "type": _workers,
        "default": Options.workers,
        "metavar": "K",
        "help": "worker processes, 1 to 64 (default: 3)",
    },
    "--profile": {
        "choices": PROFILES,
        "default": Options.profile,
        "help": "what the workers use (default: mixed)",
    },
    "--server": {
        "choices": SERVERS,
        "default": Options.server,
        "help": "what starts the workers (default: fork)",
    },
    "--rate": {
        "type": _positive,
        "default": Options.rate,
        "metavar": "R",
        "help": "operations per second, of all workers together (default: 1000)",
    },
    "--kill-every": {
        "type": _seconds,
        "default": Options.kill_every,
        "metavar": "S",
        "help": "SIGKILL a worker every S seconds (default: 0, never)",
    },
    "--recycle-every": {
        "type": _seconds,
        "default": Options.recycle_every,
        "metavar": "S",
        "help": "end a worker in good order every S seconds (default: 0, never)",
    },
    "--seed": {
        "type": int,
        "default": Options.seed,
        "metavar": "X",
        "help": "what the random choices start from (default: 1)",
    },
    "--trace": {
        "metavar": "FILE",
        "help": (
            "take the keys from an access trace: numbers, one a line (.gz or plain),"
            " or 32-bit big-endian (.xz); default: Zipf's law"
        ),
    },
    "--pid": {
        "type": int,
        "metavar": "MASTER",
        "help": (
            "start no workers: watch this gunicorn or uWSGI master and its workers,"
            " until it ends, or Ctrl-C, or for --seconds"
        ),
    },
    "--warm-up": {
        "type": _seconds,
        "metavar": "S",
        "help": (
            "seconds of the run, and of each worker's life, that are not judged"
            " (default: 30; at most a quarter of the run or a third of a worker's life)"
        ),
    },
    "--interval": {
        "type": _positive,
        "default": Options.interval,
        "metavar": "S",
        "help": "seconds from sample to sample (default: 1)",
    },
    "--tolerance": {
        "type": _positive,
        "default": Options.tolerance,
        "metavar": "KIB",
        "help": (
            "a process leaks if its memory grows by more over the window"
            " (default: 1024)"
        ),
    },
    "--html": {
        "metavar": "PATH",
        "help": "write a report with plots to this file",
    },
    "--json": {
        "metavar": "PATH",
        "help": "write verdict and samples to this file; - is standard output",
    },
    "--self-test": {
        "action": "store_true",
        "help": (
            "test this tool: a clean run must pass, and a leak must be found; takes"
            " half a minute"
        ),
    },
    "--leak": {
        "choices": LEAKS,
        "help": argparse.SUPPRESS,
    },
}


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of a soak; ``prog`` is the name of the command."""
    made = Parser(prog=prog, description=DESCRIPTION)
    for flag, settings in _ARGUMENTS.items():
        made.add_argument(flag, **settings)
    return made


def from_namespace(namespace: argparse.Namespace) -> Options:
    """The options of a parsed command line.

    Raises:
        SoakError: They contradict each other, or name a file that cannot be used.
    """
    given = {k: v for k, v in vars(namespace).items() if k in Options.__annotations__}
    seconds = given.pop("seconds", None)
    warm_up = given.pop("warm_up", None)
    if seconds is None:
        seconds = Options.seconds if given.get("pid") is None else math.inf
    if warm_up is None:
        warm_up = min(30.0, seconds / 4, _life(given) / 3)
    options = Options(**given, seconds=seconds, warm_up=warm_up)
    if options.warm_up >= options.seconds:
        raise SoakError(
            f"--warm-up {options.warm_up:g} leaves nothing of --seconds"
            f" {options.seconds:g} to be judged: shorten it"
        )
    if options.pid is not None and (options.kill_every or options.recycle_every):
        raise SoakError(
            f"--pid {options.pid} only watches: leave out --kill-every and"
            " --recycle-every"
        )
    for option, path in (("--html", options.html), ("--json", options.json)):
        if path not in (None, "-"):
            _refuse_folder(option, Path(path or ""))
    if options.trace is not None:
        _refuse_trace(options.trace)
    return options


def _refuse_trace(path: str) -> None:
    # It is refused here, where the user sees it, and not later in each worker.
    from shmcache.soak.load import accesses

    hint = "name a trace file: numbers, one a line (.gz or plain), or 32-bit (.xz)"
    try:
        if next(accesses(path), None) is None:
            raise SoakError(f"--trace {path}: there are no accesses in it; {hint}")
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise SoakError(f"--trace {path}: cannot be read ({error}); {hint}") from error


def _life(given: dict[str, Any]) -> float:
    # How long a worker lives on average, in seconds.
    every = [given.get("kill_every"), given.get("recycle_every")]
    ends = sum(1 / seconds for seconds in every if seconds)
    return float(given.get("workers", 1)) / ends if ends else math.inf


def for_self_test(options: Options, leak: str | None) -> Options:
    """The options of a short run for the self-test.

    Args:
        options: What the user asked for.
        leak: What the workers leak.  None is a clean run, in which a worker is killed
            and another one recycled.
    """
    return replace(
        options,
        profile="mixed",
        workers=2,
        seconds=7.0 if leak else 11.0,
        warm_up=2.0 if leak else 3.0,
        kill_every=0.0 if leak else 4.0,
        recycle_every=0.0 if leak else 5.0,
        rate=600.0,
        interval=0.25,
        check_every=2.0,
        tolerance=4096.0,
        leak=leak,
        pid=None,
        trace=None,
    )


def run_name() -> str:
    """What the names of this run's caches begin with; no other run has the same."""
    return f"soak-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"


def _refuse_folder(option: str, path: Path) -> None:
    # It is refused now, and not after a run of hours.
    if path.is_dir() or not path.parent.is_dir():
        raise SoakError(
            f"{option} {path}: cannot be written there: name a file in an existing"
            " folder"
        )
