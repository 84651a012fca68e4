"""Draw a picture of ``shmcache top`` for the documentation.

The script runs the command as in a terminal of 90 columns, and draws its output:

    python tools/top_picture.py NAME docs/top.svg
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 90, 40


def printed(name: str) -> str:
    """Return what ``shmcache top NAME --once`` prints, with its colours."""
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "FORCE_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "shmcache", "top", name, "--once", "--interval", "3"],
        env={**os.environ, **size, "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def picture(text: str) -> str:
    """Return a text as an SVG that loads no other files."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(text))
    drawn = console.export_svg(title="shmcache top")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def main(name: str, path: str) -> None:
    """Draw the view of a cache into a file."""
    drawn = picture(printed(name))
    with open(path, "w", encoding="utf-8") as file:
        file.write(drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
