"""What is installed, what an import costs, and that the lists in pyproject are true."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import files, metadata, requires, version
from pathlib import Path
from typing import Any

import pytest

import shmcache

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(shmcache.__file__).parent

MODULES = sorted(
    ".".join(("shmcache", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name not in {"__init__.py", "__main__.py"}
)

# Imported only by those who use them.
UNWANTED = {
    *("asyncio", "concurrent.futures", "ctypes", "email", "http"),
    *("multiprocessing.managers", "multiprocessing.pool", "ssl", "subprocess"),
    *("tempfile", "urllib.request"),
    *("Cython", "cython", "gevent", "gunicorn", "msgspec", "prometheus_client"),
    *("psutil", "rich", "uvicorn"),
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    """pyproject.toml of the tree that these tests stand in."""
    path = ROOT / "pyproject.toml"
    if not path.is_file():
        pytest.skip("tests were copied out of their tree: no pyproject.toml above")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def fresh(code: str, *options: str) -> str:
    """What a new Python process prints when it runs the code."""
    run = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def parts() -> list[Path]:
    """The files that the extension is made of, in the order in which it has them."""
    unit = ROOT / "shmcache/_engine/compiled.pyx"
    included = re.findall(r'^include "(.*)"$', unit.read_text("utf-8"), re.MULTILINE)
    return [(unit.parent / name).resolve() for name in included]


def test_extension_is_rebuilt_when_a_part_changes(pyproject: dict[str, Any]) -> None:
    """One extension, optional; ``depends`` lists each part, and each C header."""
    (ext,) = pyproject["tool"]["setuptools"]["ext-modules"]
    assert ext["sources"] == [ext["name"].replace(".", "/") + ".pyx"]
    # Without it the install would fail where there is no compiler.
    assert ext["optional"] is True
    beside = (ROOT / "shmcache/_engine").iterdir()
    declarations = {path for path in beside if path.suffix in {".pxd", ".h"}}
    expected = {path.relative_to(ROOT).as_posix() for path in {*parts(), *declarations}}
    assert expected == set(ext["depends"])


def test_engine_includes_all_its_parts() -> None:
    """No part of the engine is forgotten: each module of the folder is included."""
    if not (ROOT / "shmcache").is_dir():
        pytest.skip("tests were copied out of their tree: no shmcache/ beside")
    folder = (ROOT / "shmcache/_engine").resolve()
    modules = {path.name for path in folder.glob("*.py")}
    included = {path.name for path in parts() if path.parent == folder}
    assert modules - included == {"__init__.py", "interpreted.py"}


def test_names_of_parts_are_unique() -> None:
    """All parts share one namespace when compiled, so no two define the same name."""
    if not (ROOT / "shmcache").is_dir():
        pytest.skip("tests were copied out of their tree: no shmcache/ beside")
    owner: dict[str, str] = {}
    for path in parts():
        for node in ast.parse(path.read_text("utf-8")).body:
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            for name in names:
                assert owner.setdefault(name, path.name) == path.name, name


@pytest.mark.parametrize("wanted", ["", "compiled", "interpreted"])
def test_environment_chooses_the_engine(wanted: str) -> None:
    """Compiled if it was built, unless SHMCACHE_ENGINE says otherwise."""
    if wanted == "compiled" and not shmcache.compiled:
        pytest.skip("this run is interpreted, so the engine may not have been built")
    environment = {k: v for k, v in os.environ.items() if k != "SHMCACHE_ENGINE"}
    run = subprocess.run(
        [sys.executable, "-c", "import shmcache; print(shmcache.compiled)"],
        env={**environment, "SHMCACHE_ENGINE": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    if wanted or shmcache.compiled:
        assert run.stdout.strip() == str(wanted != "interpreted")


def test_unknown_engine_is_refused() -> None:
    """The message names the value and what to set."""
    run = subprocess.run(
        [sys.executable, "-c", "import shmcache"],
        env={**os.environ, "SHMCACHE_ENGINE": "fast"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "SHMCACHE_ENGINE is 'fast'; set it to compiled or interpreted" in run.stderr


def test_every_file_of_the_tree_is_installed() -> None:
    """Sources, declarations, py.typed and data files all are in the wheel."""
    tree = ROOT / "shmcache"
    if not tree.is_dir():
        pytest.skip("tests were copied out of their tree: no shmcache/ beside")
    kinds = {".py", ".pyx", ".pxd", ".h", ".json", ".typed"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in tree.rglob("*")
        if path.suffix in kinds or path.name == "py.typed"
    }
    installed = {str(file) for file in files("shmcache") or ()}
    assert expected - installed == set()


def test_package_is_typed() -> None:
    """Type checkers find the marker beside the package in use."""
    assert (PACKAGE / "py.typed").is_file()


def test_no_tests_or_tools_are_installed() -> None:
    """The wheel puts one name into site-packages."""
    tops = {Path(str(file)).parts[0] for file in files("shmcache") or ()}
    packages = {top for top in tops if not top.endswith(".dist-info") and top != ".."}
    assert packages == {"shmcache"}


def test_version_is_the_installed_one() -> None:
    """The literal in the source is what the metadata says."""
    assert version("shmcache") == shmcache.__version__


def test_what_is_needed_is_declared() -> None:
    """Five requirements without an extra; nobody needs Cython to run."""
    needed = [line for line in requires("shmcache") or () if "extra ==" not in line]
    names = {line.split(";")[0].split(">")[0].strip() for line in needed}
    assert names == {"msgpack", "posix-ipc", "prometheus-client", "psutil", "xxhash"}
    assert metadata("shmcache")["Requires-Python"] == ">=3.11"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["shmcache", *MODULES])
def test_module_imports_in_a_fresh_process(module: str) -> None:
    """No module depends on another having been imported before, and none warns."""
    assert fresh(f"import {module}", "-W", "error") == ""


def test_import_is_light() -> None:
    """``import shmcache`` loads none of what only some users need."""
    code = """if True:
        import sys
        before = set(sys.modules)
        import shmcache
        print(*(set(sys.modules) - before))
    """
    loaded = set(fresh(code).split())
    assert "shmcache.cache" in loaded
    assert loaded & UNWANTED == set()


@pytest.mark.parametrize("engine", ["as installed", "interpreted"])
def test_cython_is_not_needed_to_run(
    engine: str, interpreted_env: dict[str, str]
) -> None:
    """Both engines import where there is no module called cython."""
    code = """if True:
        import sys
        sys.modules["cython"] = None
        import shmcache
        print(shmcache.compiled)
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=interpreted_env if engine == "interpreted" else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = shmcache.compiled and engine != "interpreted"
    assert run.stdout.strip() == str(expected)


def test_public_names() -> None:
    """What the package offers is a decision, not an accident."""
    expected = {
        *("Cache", "Stats", "Cause", "MsgspecCodec"),
        *("HandleMap", "HandleStats", "HostEntry", "report", "log_stats"),
        *("ConnectionPools", "PoolSettings", "CorrelationMap", "CorrelationSettings"),
        *("ConfigCache", "ConfigSettings"),
        *("CacheClosed", "ConfigMismatch", "EntryTooLarge", "LockTimeout"),
        *("OutOfSharedMemory", "ReentrantCall", "SegmentCorrupt", "SegmentNotFound"),
        *("SegmentRefused", "ShmCacheError", "TooManyWorkers", "UnsupportedKey"),
        *("UnsupportedPlatform", "UnsupportedValue"),
        *("__version__", "compiled", "errors"),
    }
    assert expected == set(shmcache.__all__)
    for name in shmcache.__all__:
        assert hasattr(shmcache, name)


def test_errors_have_one_root() -> None:
    """Whoever catches ShmCacheError catches everything this package raises."""
    for name, error in vars(shmcache.errors).items():
        if isinstance(error, type) and issubclass(error, Exception):
            assert issubclass(error, shmcache.ShmCacheError), name
            assert name in shmcache.__all__
