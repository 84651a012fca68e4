"""The common ground of all tests: the right engine, own names, and checks at the end.

``SHMCACHE_EXPECT=compiled`` or ``interpreted``: refuse to run with the other engine.
``--full``, ``SHMCACHE_FULL=1``: storms and sweeps with the full amounts (amounts.py).
``SHMCACHE_CI=1``: a test skipped because something is not installed has failed.
``SHMCACHE_TREE=1``: test the tree, not the installed package (while developing).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from base64 import urlsafe_b64encode
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import distribution, version
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
import psutil
import pytest

import shmcache

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

# Failed assertions in a rig are explained as in a test.
pytest.register_assert_rewrite(
    "caches",
    "caught",
    "fuzz_map",
    "fuzz_model",
    "fuzz_values",
    "model",
    "peers",
    "scenes",
    "servers",
    "worker_app",
)

ROOT = Path(__file__).resolve().parent.parent
SHM = Path("/dev/shm")
PATIENCE = 20.0  # seconds until what ends by itself has ended; only leaks take so long

# --- what is under test ---------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--full``."""
    parser.addoption(
        "--full",
        action="store_true",
        help="run storms and sweeps with the full amounts of tests/rigs/amounts.py; "
        "so does SHMCACHE_FULL=1",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to run on the wrong engine or on a stale package."""
    if config.getoption("full"):
        os.environ["SHMCACHE_FULL"] = "1"  # for child processes, too
    # Children start in other directories; theirs must not shadow the package either.
    os.environ["PYTHONSAFEPATH"] = "1"
    if paths := os.environ.get("PYTHONPATH"):
        absolute = [os.path.abspath(path) for path in paths.split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(absolute)
    mode = "compiled" if shmcache.compiled else "interpreted"
    expected = os.environ.get("SHMCACHE_EXPECT", mode)
    if mode != expected:
        raise pytest.UsageError(
            f"SHMCACHE_EXPECT={expected}, but shmcache is {mode} "
            f"({shmcache.__file__}): reinstall it with a C compiler at hand, "
            "or set SHMCACHE_ENGINE=interpreted for the interpreted engine"
        )
    in_tree = os.environ.get("SHMCACHE_TREE") == "1"
    for complaint in older_than_its_parts() if in_tree else stale():
        remedy = "rm -rf build && .venv/bin/pip install '.[test]'"
        raise pytest.UsageError(f"{complaint}; run: {remedy}")
    # A shell that starts this in the background has SIGINT ignored, and programs that
    # tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # No timing is asserted, and machines that run tests are busy.
    hypothesis.settings.register_profile(
        "shmcache",
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("shmcache")
    if sys.platform == "linux":
        # Orphans of this process's children become its own children, so that none is
        # missed.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def stale() -> Iterator[str]:
    """What differs between the package in use, its installation and the tree."""
    used = Path(shmcache.__file__).resolve().parent
    tree = ROOT / "shmcache"
    if used == tree:
        yield (
            f"shmcache is imported from the tree, {tree}, not as installed: start "
            "tests by `pytest`, which does not put the working directory into "
            "sys.path as `python -m pytest` does"
        )
        return
    for source in sorted(tree.rglob("*.py")):
        installed = used / source.relative_to(tree)
        if not installed.is_file() or installed.read_bytes() != source.read_bytes():
            yield f"{installed} is not what the tree has in {source}"
    for installed in sorted(used.rglob("*.py")):
        if not (tree / installed.relative_to(used)).is_file():
            yield f"{installed} is not in the tree any more"
    # The compiled engine is the one that was built of the parts beside it.
    for file in distribution("shmcache").files or ():
        path = Path(str(file.locate()))
        if file.hash and path.suffix in {".py", ".so"} and path.is_file():
            digest = urlsafe_b64encode(sha256(path.read_bytes()).digest())
            if digest.rstrip(b"=").decode() != file.hash.value:
                yield f"{path} was changed after it was installed"


def older_than_its_parts() -> Iterator[str]:
    """A compiled engine in the tree that was built before one of its parts changed."""
    built = sys.modules.get("shmcache._engine.compiled")
    if built is None:
        return
    path = Path(str(built.__file__))
    parts = [*path.parent.iterdir(), *(path.parent.parent / "_format").iterdir()]
    for part in parts:
        kinds = {".py", ".pyx", ".pxd", ".h"}
        if part.suffix in kinds and part.stat().st_mtime > path.stat().st_mtime:
            yield f"{path} was built before {part} changed"


def pytest_report_header() -> list[str]:
    """The engine, and the versions that results depend on."""
    mode = "compiled" if shmcache.compiled else "interpreted"
    tree = " FROM THE TREE" if os.environ.get("SHMCACHE_TREE") == "1" else ""
    packages = ("msgpack", "posix_ipc", "xxhash", "psutil", "hypothesis")
    from amounts import FULL

    amounts = "full" if FULL else "moderate; `pytest --full` does all"
    return [
        f"shmcache {shmcache.__version__}, {mode}{tree}: {Path(shmcache.__file__)}",
        f"amounts of storms and sweeps: {amounts}",
        f"{platform.python_implementation()} {platform.python_version()} on "
        f"{platform.system()} {platform.release()} {platform.machine()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
    ]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first: whole modules on the interpreted engine."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remembers failures, and in CI turns "not installed" into one."""
    report = yield
    if must_run(report):
        report.outcome = "failed"
        report.longrepr = f"in CI this test must run: {report.longrepr}"
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Does the same to modules that skip themselves as a whole."""
    report = yield
    if must_run(report):
        report.outcome = "failed"
        report.longrepr = f"in CI this module must run: {report.longrepr}"
    return report


def must_run(report: pytest.TestReport | pytest.CollectReport) -> bool:
    """Whether something was skipped in CI for want of a program or a package."""
    reason = str(report.longrepr)
    missing = "not installed" in reason or "could not import" in reason
    return report.skipped and missing and os.environ.get("SHMCACHE_CI") == "1"


# --- what a test uses -----------------------------------------------------------


class Clock:
    """A clock that stands still until it is told to move; ns, as monotonic_ns."""

    def __init__(self, ns: int = 1_000_000_000_000) -> None:
        self.ns = ns

    def __call__(self) -> int:
        """The time, in ns."""
        return self.ns

    def advance(self, seconds: float) -> None:
        """Moves on by so many seconds."""
        self.ns += round(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    """A fake clock for ``Cache(clock=)``."""
    return Clock()


_numbers = itertools.count(1)


def own(kind: str = "") -> str:
    """What the names of this process's caches begin with in /dev/shm."""
    return f"{kind}shmcache-{os.getuid()}-t{os.getpid()}-"


@pytest.fixture
def new_name(nothing_left_behind: None) -> Callable[[], str]:
    """A source of cache names that no other test and no other worker has."""
    return lambda: f"t{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def name(new_name: Callable[[], str]) -> str:
    """A cache name that no other test and no other worker has."""
    return new_name()


@pytest.fixture
def make_cache(
    new_name: Callable[[], str], checker: None
) -> Iterator[Callable[..., shmcache.Cache]]:
    """A factory of caches that are checked and closed after the test."""
    made: list[shmcache.Cache] = []

    def make(name: str | None = None, **settings: Any) -> shmcache.Cache:
        made.append(shmcache.Cache(name or new_name(), **settings))
        return made[-1]

    yield make
    for cache in reversed(made):
        cache.close()


@pytest.fixture
def interpreted_env() -> dict[str, str]:
    """The environment of a child that shall run the interpreted engine."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        "SHMCACHE_ENGINE": "interpreted",
        "SHMCACHE_EXPECT": "interpreted",
    }


# --- what is checked after every test -------------------------------------------


@pytest.fixture(autouse=True)
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working directory without the tree, for servers that import from theirs."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def checker(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left_behind: None,
) -> Iterator[None]:
    """The checker looks at every cache that this process closes, as it closes it."""
    close, home = shmcache.Cache.close, os.getpid()
    findings: list[str] = []

    def checked_close(cache: shmcache.Cache) -> None:
        if os.getpid() == home:
            # Closed already, or locked by a process that a test has stopped.
            with suppress(shmcache.CacheClosed, shmcache.LockTimeout):
                findings.extend(cache.check())
        close(cache)

    if request.node.get_closest_marker("damaged"):
        yield
        return
    monkeypatch.setattr(shmcache.Cache, "close", checked_close)
    yield
    assert findings == []


class Child(NamedTuple):
    """A process below this one; the time of its start tells reused pids apart."""

    pid: int
    started: float
    what: str


@dataclass(frozen=True)
class Surroundings:
    """The resources of a process that a test must not leave more of."""

    names: frozenset[str]
    mappings: frozenset[str]
    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[threading.Thread]
    children: frozenset[Child]

    @classmethod
    def now(cls) -> Surroundings:
        """The state at this moment, without multiprocessing's own helpers."""
        helpers = {
            getattr(resource_tracker._resource_tracker, "_pid", None),
            getattr(forkserver._forkserver, "_forkserver_pid", None),
        }
        pipes = {
            getattr(resource_tracker._resource_tracker, "_fd", None),
            getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
        }
        return cls(
            names=frozenset(own_names()),
            mappings=frozenset(own_mappings()),
            descriptors=frozenset(d for d in descriptors() if d[0] not in pipes),
            threads=frozenset(threading.enumerate()),
            children=frozenset(c for c in children() if c.pid not in helpers),
        )

    def more_than(self, before: Surroundings) -> list[str]:
        """What is here and was not before, one line each."""
        return [
            *(f"in {SHM}: {name}" for name in self.names - before.names),
            *(f"mapped: {name}" for name in self.mappings - before.mappings),
            *(f"open: {fd} {to}" for fd, to in self.descriptors - before.descriptors),
            *(f"running: {thread}" for thread in self.threads - before.threads),
            *(f"alive: {child}" for child in self.children - before.children),
        ]


def own_names() -> Iterator[str]:
    """Names in shared memory that belong to this process's tests."""
    if SHM.is_dir():
        for entry in os.listdir(SHM):
            if entry.startswith((own(), own("sem."))):
                yield entry


def own_mappings() -> Iterator[str]:
    """Files of this process's tests that are mapped here, deleted ones included."""
    with suppress(FileNotFoundError), open("/proc/self/maps") as maps:
        for line in maps:
            _, slash, path = line.partition("/")
            if own() in path or own("sem.") in path:
                yield slash + path.rstrip()


def descriptors() -> Iterator[tuple[int, str]]:
    """Open descriptors and what they lead to."""
    here = Path("/proc/self/fd")
    if here.is_dir():
        for entry in os.listdir(here):
            # The descriptor of this very listing is gone by now.
            with suppress(FileNotFoundError):
                yield int(entry), os.readlink(here / entry)


def children() -> Iterator[Child]:
    """Processes below this one, orphans of its children included."""
    multiprocessing.active_children()  # reaps what has ended
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline()) or process.name()
            yield Child(process.pid, process.create_time(), command[:200])


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Names, mappings, descriptors, threads and children are as they were before."""
    before = Surroundings.now()
    yield
    # A failed test keeps its objects alive, and is not to be blamed twice.
    failed = request.node.stash.get(FAILED, False)
    left = wait_for(before, 0.5 if failed else PATIENCE)
    if left:
        clean_up(before)
        if not failed:
            pytest.fail("left behind:\n" + "\n".join(left), pytrace=False)


def wait_for(before: Surroundings, patience: float) -> list[str]:
    """What is still left when everything that was about to end has ended."""
    deadline = time.monotonic() + patience
    pause = 0.001
    while left := (now := Surroundings.now()).more_than(before):
        for child in now.children - before.children:
            with suppress(ChildProcessError, PermissionError):
                # It is our child or an orphan, which nobody else reaps.
                if psutil.pid_exists(child.pid) and zombie(child.pid):
                    os.waitpid(child.pid, os.WNOHANG)
        gc.collect()
        if time.monotonic() > deadline:
            return left
        time.sleep(pause)
        pause = min(0.1, pause * 2)
    return []


def zombie(pid: int) -> bool:
    """Whether a process has ended and waits to be reaped."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return False


def clean_up(before: Surroundings) -> None:
    """Ends what a failing test left, so that the next one is not blamed for it."""
    now = Surroundings.now()
    for child in now.children - before.children:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            if process.create_time() == child.started:
                process.kill()
                process.wait(PATIENCE)
    for entry in now.names - before.names:
        with suppress(FileNotFoundError):
            (SHM / entry).unlink()
