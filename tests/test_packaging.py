"""What is installed, what an import costs, and that the lists in pyproject are true."""

from __future__ import annotations

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


def test_list_of_compiled_modules_is_true(pyproject: dict[str, Any]) -> None:
    """Exactly the files that start with ``# cython:`` are in ext-modules."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "shmcache").rglob("*.py")
        if path.read_text(encoding="utf-8").startswith("# cython:")
    }
    listed = pyproject["tool"]["setuptools"]["ext-modules"]
    assert expected == {source for ext in listed for source in ext["sources"]}
    for ext in listed:
        assert ext["sources"] == [ext["name"].replace(".", "/") + ".py"]
        # Without it the install would fail where there is no compiler.
        assert ext["optional"] is True


def test_compiled_means_all_of_them(pyproject: dict[str, Any]) -> None:
    """shmcache.compiled is true if every module of the list is, else false of all."""
    code = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__file__)"
    for ext in pyproject["tool"]["setuptools"]["ext-modules"]:
        run = subprocess.run(
            [sys.executable, "-c", code, ext["name"]],
            capture_output=True,
            text=True,
            check=True,
        )
        assert shmcache.compiled == (not run.stdout.strip().endswith(".py"))


def test_compiled_modules_list_what_they_cimport(pyproject: dict[str, Any]) -> None:
    """A module is rebuilt when a .pxd that it names, or a header of that, changes."""
    for ext in pyproject["tool"]["setuptools"]["ext-modules"]:
        text = (ROOT / ext["sources"][0]).read_text(encoding="utf-8")
        expected = set()
        for path in (ROOT / "shmcache").rglob("*.pxd"):
            if f"cython.cimports.shmcache.{path.parent.name}.{path.stem}" in text:
                names = re.findall('extern from "(.*)"', path.read_text("utf-8"))
                needed = [path, *(path.with_name(name) for name in names)]
                expected |= {file.relative_to(ROOT).as_posix() for file in needed}
        assert expected == set(ext.get("depends", ()))


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
