"""The commands that look at, and remove, what is in shared memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_processes import PATIENCE, SHM, Peer, names_of

from shmcache import Cache
from shmcache import _layout as L

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

# What is said, and done, is the same on both engines.
pytestmark = pytest.mark.once


def shmcache(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """What a command did."""
    return subprocess.run(
        [sys.executable, "-m", "shmcache", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def result(*arguments: str, code: int = 0, given: str = "") -> str:
    """What a command printed; it ended with this code and without a complaint."""
    done = shmcache(*arguments, given=given)
    assert (code, "") == (done.returncode, done.stderr), done.stdout
    return done.stdout


def complaint(*arguments: str, code: int) -> str:
    """What a command complained of, in one line, and printed nothing else."""
    done = shmcache(*arguments)
    assert (code, "") == (done.returncode, done.stdout), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def crash(name: str, **settings: Any) -> None:
    """Leave a cache behind as a killed process does."""

    def use(link: Connection) -> None:
        cache = Cache(name, max_entries=10, **settings)
        cache["there"] = "value"
        link.send("in")
        signal.pause()

    peer = Peer(use)
    assert peer.hear() == "in"
    peer.kill()


def clean(*arguments: str) -> dict[str, dict[str, Any]]:
    """What `clean --json` says of caches, by name."""
    caches = json.loads(result("clean", "--json", *arguments))["caches"]
    return {one["name"]: one for one in caches}


@pytest.fixture
def scene(new_name: Callable[[], str]) -> Iterator[dict[str, str]]:
    """Caches by what they are: one in use, two left by the dead, and leftovers."""
    names = {
        what: new_name() for what in ("used", "dead", "persistent", "cut", "permits")
    }
    crash(names["dead"], shards=3)
    crash(names["persistent"], persist=True)
    crash(names["cut"])
    os.truncate(f"{SHM}/shmcache-{os.getuid()}-{names['cut']}", 10)
    crash(names["permits"], shards=2)
    for entry in names_of(names["permits"]):
        if not entry.startswith("sem."):
            Path(SHM, entry).unlink()
    with Cache(names["used"], max_entries=10) as cache:
        cache["there"] = "value"
        yield names
        assert cache["there"] == "value"
    for what in ("dead", "persistent", "cut", "permits"):
        for entry in names_of(names[what]):
            Path(SHM, entry).unlink()


def test_clean_lists_before_it_asks(scene: dict[str, str]) -> None:
    """All caches are listed with what they are, and without a yes none is removed."""
    before = {name: names_of(name) for name in scene.values()}
    for given in ("", "n\n", "\n", "what?\n"):
        listed = result("clean", *scene.values(), code=1, given=given)
        states = {
            line.split()[-1]: line[:12].strip()
            for line in listed.splitlines()
            if " B  " in line
        }
        assert states == {
            scene["used"]: "in use",
            scene["dead"]: "unused",
            scene["persistent"]: "persistent",
            scene["cut"]: "unused",
            scene["permits"]: "unused",
        }
        assert "remove 3 unused? [y/N]" in listed
    assert before == {name: names_of(name) for name in scene.values()}


@pytest.mark.parametrize("answer", ["y\n", "--yes"])
def test_clean_removes_what_nobody_uses(scene: dict[str, str], answer: str) -> None:
    """With a yes, what the dead have left goes, all of it; nothing else does."""
    given = answer if answer == "y\n" else ""
    options = ["--yes"] if answer == "--yes" else []
    said = result("clean", *scene.values(), *options, given=given)
    assert said.endswith("removed 3 of 5\n")
    left = {what for what, name in scene.items() if names_of(name)}
    assert left == {"used", "persistent"}
    assert len(names_of(scene["used"])) == len(names_of(scene["persistent"])) == 3
    assert "nothing to remove\n" in result("clean", *scene.values())


def test_clean_removes_persistent_ones_if_told_so(scene: dict[str, str]) -> None:
    """What is to persist is removed with --persistent, unless it is in use."""
    with Cache(scene["persistent"], max_entries=10, persist=True) as cache:
        clean(*scene.values(), "--persistent", "--yes")
        assert cache["there"] == "value"
    found = clean(scene["persistent"], "--persistent", "--yes")
    assert found[scene["persistent"]]["removed"]
    assert names_of(scene["persistent"]) == []


def test_clean_as_json(scene: dict[str, str]) -> None:
    """JSON tells the same; it removes only with --yes."""
    found = clean(*scene.values())
    keys = ("in_use", "persist", "unused", "removed")
    assert {name: tuple(one[key] for key in keys) for name, one in found.items()} == {
        scene["used"]: (True, False, False, False),
        scene["dead"]: (False, False, True, False),
        scene["persistent"]: (False, True, False, False),
        scene["cut"]: (False, False, True, False),
        scene["permits"]: (False, False, True, False),
    }
    for name, one in found.items():
        assert sorted(one["files"]) == names_of(name)
        sizes = [Path(SHM, entry).stat().st_size for entry in one["files"]]
        assert sum(sizes) == one["bytes"]
    assert clean(scene["dead"], "--yes")[scene["dead"]]["removed"]
    assert names_of(scene["dead"]) == []


def test_clean_leaves_what_is_just_being_made(name: str) -> None:
    """A cache whose creator has only the admin lock so far is in use."""

    def create(link: Connection) -> None:
        def clock() -> int:
            return 1

        from shmcache import _segment

        make = _segment.make_semaphores

        def pause(*arguments: Any) -> None:
            link.send("creating")
            link.recv()
            make(*arguments)

        _segment.make_semaphores = pause  # type: ignore[assignment]
        Cache(name, max_entries=10, clock=clock).close()

    peer = Peer(create)
    assert peer.hear() == "creating"
    before = names_of(name)
    assert len(before) == 2
    assert clean(name, "--yes")[name]["in_use"]
    assert complaint("unlink", name, code=1).startswith(f"shmcache: cache {name!r} is")
    assert before == names_of(name)
    peer.say()
    peer.end()
    assert names_of(name) == []


def test_clean_does_not_touch_what_is_not_ours(scene: dict[str, str]) -> None:
    """A lease file that others can open is reported, and all stays as it is."""
    lease = Path(f"{SHM}/shmcache-{os.getuid()}-{scene['dead']}.lease")
    lease.chmod(0o666)
    before = names_of(scene["dead"])
    found = clean(scene["dead"], "--yes")[scene["dead"]]
    assert "has mode 666" in found["trouble"]
    assert not found["removed"]
    assert "has mode 666" in complaint("unlink", scene["dead"], code=2)
    assert before == names_of(scene["dead"])


def test_unlink(scene: dict[str, str]) -> None:
    """One cache goes, persistent or damaged; one in use only with --force, and who is
    attached keeps it."""
    for what in ("persistent", "cut", "permits"):
        assert f"removed {scene[what]}\n" == result("unlink", scene[what])
        assert names_of(scene[what]) == []
    assert "is in use" in complaint("unlink", scene["used"], code=1)
    assert len(names_of(scene["used"])) == 3
    result("unlink", scene["used"], "--force")
    assert names_of(scene["used"]) == []
    with Cache(scene["used"], max_entries=10):
        assert len(names_of(scene["used"])) == 3
    assert "there is no cache named" in complaint("unlink", scene["used"], code=2)


def test_check(name: str, make_cache: Callable[..., Cache]) -> None:
    """A sound cache is said to be sound while others use it; damage is named, with
    exit code 1; the segment is not changed by the look."""
    cache = make_cache(name, max_entries=100, shards=2)
    for n in range(100):
        cache[n] = n
    view = cache._attachment.block.view
    before = bytes(view)
    assert f"cache {name} is sound\n" == result("check", name)
    assert json.loads(result("check", name, "--json")) == {"name": name, "findings": []}
    assert before == bytes(view)
    assert cache.stats().workers == 1
    base = cache._words_of(1)
    cache._attachment.words[base + L.S_ENTRIES] += 1
    [finding] = result("check", name, code=1).splitlines()
    assert "shard 1" in finding
    assert json.loads(result("check", name, "--json", code=1))["findings"] == [finding]
    cache._attachment.words[base + L.S_ENTRIES] -= 1


def test_check_while_others_write(make_cache: Callable[..., Cache]) -> None:
    """Of a cache that is written to, a copy of one moment is looked at."""
    cache = make_cache(max_entries=100)
    name = cache.name

    def write(link: Connection) -> None:
        with Cache.attach(name) as mine:
            n = 0
            while not link.poll(0):
                mine[n % 150] = b"x" * (n % 700)
                n += 1

    peer = Peer(write)
    for _ in range(3):
        result("check", name)
    peer.say()
    peer.end()


def test_check_of_what_the_dead_left(scene: dict[str, str]) -> None:
    """Leftovers can be looked at, and keep being leftovers."""
    result("check", scene["dead"])
    assert "10 bytes" in result("check", scene["cut"], code=1)
    assert "there is no cache named" in complaint("check", scene["permits"], code=2)
    assert not clean(scene["dead"])[scene["dead"]]["in_use"]


@pytest.mark.parametrize("command", ["check", "unlink", "clean"])
def test_impossible_name(command: str) -> None:
    """A name that no cache can have is refused in one line."""
    assert "'a/b' is not 1 to 100 letters" in complaint(command, "a/b", code=2)
