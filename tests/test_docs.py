"""The documentation: its examples run, its links lead somewhere, its facts are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shmcache
from shmcache.cli import parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip(
        "tests were copied out of their tree: no docs/", allow_module_level=True
    )

PATIENCE = 120  # seconds; only a failing test waits so long

README = ROOT / "README.md"
INSTALL = "python3 -m venv .venv && .venv/bin/pip install"
COMMANDS = {
    f"{INSTALL} '.[demo]' && .venv/bin/shmcache demo",
    f"{INSTALL} '.[test]' && .venv/bin/pytest",
}
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "tests").glob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
    ]
)


def named(path: Path) -> str:
    """A page as test ids and messages show it."""
    return path.relative_to(ROOT).as_posix()


# --- examples -------------------------------------------------------------------

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a page's program consists of: Python blocks, and what comments beside them hold.
PART = re.compile(
    r"^```python\n(?P<python>.*?)^```$"
    r"|^<!-- (?P<kind>setup|check|output):\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
# A first line such as "# app.py    gunicorn app:app" makes a file of the block.
FILE = re.compile(r"# ((?:\w+/)*\w+\.py)\b")
# Names of caches, so that tests side by side do not share one.
NAME = re.compile(
    r"\b((?:Cache|HandleMap|ConnectionPools|CorrelationMap|ConfigCache"
    r'|Cache\.attach)\(")([\w.-]+")'
)


@dataclass(frozen=True)
class Part:
    """A block of a page, or a comment that belongs to it."""

    kind: str  # python, setup, check or output
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file that the block is; empty if it is none."""
        found = FILE.match(self.text)
        return found[1] if found and self.kind == "python" else ""


def parts(page: Path) -> Iterator[Part]:
    """The examples of a page, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    for found in PART.finditer(text):
        kind = found["kind"] or "python"
        body = found["python"] if kind == "python" else found["hidden"]
        yield Part(kind, body, text.count("\n", 0, found.start()) + 2)


# The steps of a page run one after the other in one process, as a reader reads them.
RUNNER = """
import json, sys
steps = json.loads(sys.argv[1])
namespace = {"__name__": "__main__"}
for page, line, code in steps:
    exec(compile("\\n" * (line - 1) + code, page, "exec"), namespace)
"""


def run(*arguments: str) -> str:
    """What a Python process prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": python_path()},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_path() -> str:
    """The working directory, where a page's files are, and what there was before."""
    return os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(parts(page))], ids=named
)
def test_examples_run(
    page: Path,
    new_name: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each Python block of a page runs as it is written, and does what is said."""
    import json

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    prefix = new_name()
    steps: list[tuple[str, int, str]] = []
    printed = ""
    expected = []
    for part in parts(page):
        code = NAME.sub(rf"\g<1>{prefix}-\g<2>", part.text)
        if part.kind == "output":
            expected += part.text.splitlines()
        elif part.file:
            file = tmp_path / part.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
            if 'if __name__ == "__main__":' in code:
                printed += run(part.file)
        else:
            steps.append((named(page), part.line, code))
    printed += run("-c", RUNNER, json.dumps(steps))
    assert [text for text in expected if text not in printed] == []


@pytest.mark.once
def test_every_block_is_run() -> None:
    """No Python block hides from the test above behind an indent or another name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^\s*```(?:py|python|pycon)\b.*$", text, re.MULTILINE)
        blocks = [part for part in parts(page) if part.kind == "python"]
        assert len(fences) == len(blocks), named(page)
        comments = re.findall(r"<!-- (?:setup|check|output):", text)
        assert len(comments) == sum(p.kind != "python" for p in parts(page)), named(
            page
        )


def commands() -> set[str]:
    """The commands of ``shmcache``."""
    return set(re.findall(r"^    ([a-z]+)\b", parser().format_help(), re.MULTILINE))


@pytest.mark.once
def test_commands_exist() -> None:
    """Each ``shmcache COMMAND`` of a shell block is a command."""
    used = re.compile(r"^\s*(?:\S*/)?shmcache ([a-z]\w*)", re.MULTILINE)
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in {"", "sh"}:
                assert set(used.findall(block)) - commands() == set(), named(page)


# --- links ----------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|^<!--.*?^-->$", re.MULTILINE | re.DOTALL)
# Files of the tree that a text names: `shmcache/cache.py`.
NAMED = re.compile(
    r"`((?:shmcache|docs|tests|benchmarks|examples|tools|\.ci)/[\w./-]*)`"
)


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings that a page links to are there."""
    wrong = []
    for target in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_exist(page: Path) -> None:
    """Files that a page names are in the tree."""
    found = set(NAMED.findall(prose(page)))
    assert sorted(name for name in found if not (ROOT / name).exists()) == []


# --- facts ----------------------------------------------------------------------


@pytest.mark.once
def test_readme_is_short() -> None:
    """The README has at most 170 lines, and the two commands, word for word."""
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    assert set(lines) >= COMMANDS


@pytest.mark.once
def test_reference_is_complete() -> None:
    """Every public name has its entry in the reference."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    entries = set(
        re.findall(r"auto\w+:: shmcache\.(\w+)(?:\(\))?$", text, re.MULTILINE)
    )
    errors = {name for name in shmcache.__all__ if hasattr(shmcache.errors, name)}
    assert "automodule:: shmcache.errors" in text
    assert set(shmcache.__all__) - errors - entries - {"errors"} == set()


@pytest.mark.once
def test_errors_are_listed() -> None:
    """Every error has its row in the table of errors."""
    text = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for name, error in vars(shmcache.errors).items():
        if isinstance(error, type) and name != "ShmCacheError":
            second = [base.__name__ for base in error.__bases__[1:]]
            cell = f" `{second[0]}` " if second else " "
            assert f"| `{name}` |{cell}|" in text


@pytest.mark.once
def test_measures_are_listed(name: str) -> None:
    """Every measure has its row in the table of metrics, and no other has."""
    from shmcache.prometheus import CacheCollector

    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(shmcache_\w+)` \|", text, re.MULTILINE))
    with shmcache.Cache(name, max_entries=10) as cache:
        families = CacheCollector(cache).describe()
    assert listed == {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in families
    }


@pytest.mark.once
@pytest.mark.parametrize("kind", ["Pool", "Correlation", "Config"])
def test_settings_are_listed(kind: str) -> None:
    """The table of settings has every field of them, with its three values."""
    text = (ROOT / "docs" / "maps.md").read_text(encoding="utf-8")
    settings = getattr(shmcache, f"{kind}Settings")
    presets = settings(), settings.conservative(), settings.high_throughput()
    expected = [
        f" `{field.name}` | "
        + " | ".join(f"{getattr(preset, field.name):,.0f}" for preset in presets)
        + " |"
        for field in fields(settings)
        if not field.name.startswith("enable_")
    ]
    table = text.partition(f"| `{kind}Settings` |")[2].splitlines()
    assert expected == [row.removeprefix("| |") for row in table[: len(expected)]]


@pytest.mark.once
def test_commands_are_listed() -> None:
    """Every command is in the table of the command line."""
    page = prose(ROOT / "docs" / "observing.md")
    table = page.partition("## The command line")[2]
    listed = set(re.findall(r"`(?:shmcache )?([a-z]+)\b[^`]*`", table))
    assert commands() - listed == set()
