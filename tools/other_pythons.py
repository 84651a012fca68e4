"""Run the quick tests on every other version of Python that the package supports.

The script looks for an interpreter of each version that pyproject.toml names in its
classifiers, first on the PATH, then among pyenv's.  For each one found it makes a
virtual environment in a temporary folder, builds the tree with all that the tests need,
and runs pytest:

    python tools/other_pythons.py                    # the tests that are not slow
    python tools/other_pythons.py tests/promises     # these arguments go to pytest

The exit code is 1 if the tests fail on one of them.  If none is found, it is 0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["-m", "not slow", "-q"]
# pip needs half a minute to compile it, and only slow tests use it.
LEFT_OUT = "uwsgi"


def versions() -> list[str]:
    """Return the versions that the classifiers name, such as "3.12", but this one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r":: Python :: (3\.\d+)\b", "\n".join(project["classifiers"]))
    return [each for each in named if each != "{}.{}".format(*sys.version_info)]


def interpreter(version: str) -> str | None:
    """Return the path of an interpreter of this version, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = shutil.which(f"python{version}")
    of_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    candidates = [on_path] * bool(on_path) + [str(path) for path in of_pyenv]
    code = "import ensurepip, sys; print(sys.executable, sys.version_info[:2])"
    for candidate in candidates:
        # A shim of pyenv's may exist for a version that is not in use here.
        probe = subprocess.run(
            [str(candidate), "-c", code], capture_output=True, text=True, check=False
        )
        path, _, found = str(probe.stdout).strip().partition(" ")
        if found == str(tuple(map(int, version.split(".")))):
            return path
    return None


def requirements() -> list[str]:
    """Return the requirements of the extra "test", except those that are left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    test: list[str] = project["optional-dependencies"]["test"]
    return [each for each in test if not each.startswith(LEFT_OUT)]


def passes(python: str, arguments: list[str]) -> bool:
    """Return whether the tests pass on an interpreter, in an environment for it."""
    with tempfile.TemporaryDirectory(prefix="shmcache-python-") as home:
        # A copy is built, so that the tree's own build folder stays as it is.
        tree = Path(home, "tree")
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info")
        )
        programs = Path(home, "venv", "bin")
        subprocess.run([python, "-m", "venv", programs.parent], check=True)
        pip = [str(programs / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, str(tree), *requirements()], check=True)
        ours = ("PYTHONPATH", "PYTEST_ADDOPTS", "SHMCACHE_EXPECT", "SHMCACHE_CI")
        env = {key: value for key, value in os.environ.items() if key not in ours}
        run = subprocess.run(
            [programs / "pytest", "-p", "no:cacheprovider", *arguments],
            env={**env, "SHMCACHE_EXPECT": "compiled"},
            cwd=ROOT,
            check=False,
        )
        return run.returncode == 0


def main() -> int:
    """Run the tests on each interpreter found; return 1 if they failed on one."""
    failed = []
    for version in versions():
        python = interpreter(version)
        print(f"\n--- Python {version}: {python or 'not found'}", flush=True)
        started = time.monotonic()
        if python and not passes(python, sys.argv[1:] or QUICK):
            failed.append(version)
        print(f"--- {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        print(f"failed on Python {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
