"""The same tests once more, on the interpreted engine.

Each folder, and each module of the folders that have long ones, is run in a pytest of
its own, with SHMCACHE_ENGINE=interpreted.  What this run leaves out by ``-m`` is left
out there, too.
"""

from __future__ import annotations

import faulthandler
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import shmcache

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.counted,  # some of the modules' tests are
    pytest.mark.skipif(not shmcache.compiled, reason="this run is interpreted itself"),
]

HERE = Path(__file__).parent

# What ``pytestmark`` of a module says, on one line or over several.
MARKS = re.compile(r"^pytestmark = (?:\[.*?^\]|.*?$)", re.MULTILINE | re.DOTALL)


def repeats(path: Path) -> bool:
    """Whether some tests of a module depend on the engine: it is not marked as once."""
    marks = MARKS.search(path.read_text(encoding="utf-8"))
    return not marks or not re.search(r"\bmark\.(once|servers)\b", marks[0])


def groups() -> dict[str, list[Path]]:
    """The modules that are run together, by the name of their folder or their own."""
    found: dict[str, list[Path]] = {}
    for path in filter(repeats, sorted(HERE.rglob("test_*.py"))):
        alone = path.parent in {HERE, HERE / "promises"}
        group = path if alone else path.parent
        found.setdefault(group.relative_to(HERE).as_posix(), []).append(path)
    return found


GROUPS = groups()


@pytest.mark.parametrize("group", GROUPS)
def test_group_passes_interpreted(
    group: str,
    interpreted_env: dict[str, str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Every test of the group passes on the interpreted engine, and some do run."""
    # A whole group may take longer than a test; each of its tests is watched itself.
    faulthandler.cancel_dump_traceback_later()
    report = tmp_path / "report.xml"
    chosen = request.config.getoption("markexpr")
    marks = "not once and not servers" + f" and ({chosen})" * bool(chosen)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *map(str, GROUPS[group])),
            *("-m", marks, "--numprocesses=0"),
            *(f"--junit-xml={report}", f"--basetemp={tmp_path / 'base'}"),
            *("-p", "no:cacheprovider", "--tb=short"),
        ],
        env=interpreted_env,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(f"no test of {group} is {marks}")
    assert run.returncode == 0, run.stdout
    suite = ET.parse(report).getroot()[0]
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    assert tests - skipped > 0, run.stdout
