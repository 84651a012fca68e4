"""The command-line parser of ``shmcache`` and of the soak: a refusal is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

USAGE_ERROR = 2  # the exit code


class Parser(argparse.ArgumentParser):
    """An argparse parser whose refusals are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what was wrong and where the help is, and end the process."""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")
