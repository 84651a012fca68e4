"""The command line, through its entry point; what it shows of caches, and does."""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
from peers import PATIENCE, SHM, Peer, names_of

from shmcache import Cache, HandleMap, cli
from shmcache._format import layout as L
from shmcache._observe.snapshot import Segment

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
    """Return what a command printed; it must end with this code and print no errors."""
    done = shmcache(*arguments, given=given)
    assert (code, "") == (done.returncode, done.stderr), done.stdout
    return done.stdout


def complaint(*arguments: str, code: int) -> str:
    """Return the one line of a command's error; it must print nothing else."""
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
    """All caches are listed with their state, and without a yes none is removed."""
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
    """With a yes, all that dead processes have left is removed, and nothing else."""
    given = answer if answer == "y\n" else ""
    options = ["--yes"] if answer == "--yes" else []
    said = result("clean", *scene.values(), *options, given=given)
    assert said.endswith("removed 3 of 5\n")
    left = {what for what, name in scene.items() if names_of(name)}
    assert left == {"used", "persistent"}
    assert len(names_of(scene["used"])) == len(names_of(scene["persistent"])) == 3
    assert "nothing to remove\n" in result("clean", *scene.values())


def test_clean_removes_persistent_ones_if_told_so(scene: dict[str, str]) -> None:
    """A persistent cache is removed with --persistent, unless it is in use."""
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

        from shmcache._segment import semaphores

        make = semaphores.make

        def pause(*arguments: Any) -> None:
            link.send("creating")
            link.recv()
            make(*arguments)

        semaphores.make = pause  # type: ignore[assignment]
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
    """A lock file that others can open is reported, and all stays as it is."""
    lock_file = Path(f"{SHM}/shmcache-{os.getuid()}-{scene['dead']}.lease")
    lock_file.chmod(0o666)
    before = names_of(scene["dead"])
    found = clean(scene["dead"], "--yes")[scene["dead"]]
    assert "has mode 666" in found["trouble"]
    assert not found["removed"]
    assert "has mode 666" in complaint("unlink", scene["dead"], code=2)
    assert before == names_of(scene["dead"])


def test_unlink(scene: dict[str, str]) -> None:
    """A cache that is persistent or damaged is removed.  One in use is removed only
    with --force, and attached processes keep it."""
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
    """A sound cache is reported as sound while others use it; damage is named, with
    exit code 1; the check does not change the segment."""
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
    """If a cache is being written to, a copy of one moment is checked."""
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


def test_clean_of_an_impossible_name() -> None:
    """A name that no cache can have is refused in one line."""
    assert "'a/b' is not 1 to 100 letters" in complaint("clean", "a/b", code=2)


# --- looking ----------------------------------------------------------------------

KEYS: list[Any] = [
    "user:1",
    "user:2",
    "",
    "7",
    7,
    -1,
    b"\x00\xff",
    ("user", 1, (b"x",)),
]
QUIET = 3600.0  # seconds until the sweeper would write a byte
LOOKS = [
    ["ls", "NAME"],
    ["ls", "NAME", "--json"],
    ["stats", "NAME"],
    ["stats", "NAME", "--json"],
    ["top", "NAME", "--once", "--interval", "0.1"],
    ["top", "--once", "--interval", "0.1"],
    ["keys", "NAME"],
    ["keys", "NAME", "--json", "--prefix", "user"],
    ["get", "NAME", "user:1"],
    ["get", "NAME", "user:1", "--json"],
    ["inspect", "NAME", "user:1"],
    ["check", "NAME"],
    ["handles", "NAME"],
]


def said(*arguments: str) -> Any:
    """What a command says as JSON, having ended well."""
    return json.loads(result(*arguments, "--json"))


def everything(name: str) -> dict[str, bytes]:
    """All that a cache has in shared memory, byte for byte."""
    return {entry: Path(SHM, entry).read_bytes() for entry in names_of(name)}


@pytest.fixture
def handles(new_name: Callable[[], str]) -> Iterator[HandleMap]:
    """A map with three handles of this process."""
    with HandleMap(new_name(), max_entries=10, cleanup_interval=QUIET) as made:
        made.set("user:1", object(), value={"peer": "db"}, ttl=500)
        made.set(("pool", 2), object())
        made.set(3, object(), value="three")
        yield made


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_looking_changes_nothing(
    arguments: list[str], make_cache: Callable[..., Cache], handles: HandleMap
) -> None:
    """A read-only command leaves every byte as it was: order, counters, worker rows."""
    cache = make_cache(max_entries=100, ttl=1000, cleanup_interval=QUIET)
    for n, key in enumerate(KEYS):
        cache[key] = n
    cache.get("user:1")
    cache.get("absent")
    cache._flush_recency()
    for name in (cache.name, handles.name):
        before = everything(name)
        done = shmcache(*[name if a == "NAME" else a for a in arguments])
        # Of a cache of values there are no handles to list.
        refused = arguments[0] == "handles" and name == cache.name
        assert (2 if refused else 0) == done.returncode, done.stderr
        assert before == everything(name)


def test_looking_at_what_the_dead_left_changes_nothing(scene: dict[str, str]) -> None:
    """What crashes have left is shown, stays as it was, and is not taken into use."""
    for what in ("dead", "persistent"):
        before = everything(scene[what])
        assert "value\n" == result("get", scene[what], "there")
        assert '"there"\n' == result("keys", scene[what])
        stats = said("stats", scene[what])
        assert (1, 0) == (stats["entries"], stats["workers"])
        assert before == everything(scene[what])


def test_ls(scene: dict[str, str]) -> None:
    """All caches are listed with their state; exit code 1 reports damaged ones."""
    listed = result("ls", *scene.values(), code=1)
    states = {line.split()[0]: line for line in listed.splitlines()}
    for what, state in (("used", " in use "), ("dead", " unused ")):
        assert state in states[scene[what]]
    assert f"{scene['cut']}: " in listed
    assert "10 bytes" in listed
    caches = json.loads(result("ls", *scene.values(), "--json", code=1))["caches"]
    found = {one["name"]: one for one in caches}
    keys = ("state", "entries", "workers", "max_entries", "codec")
    assert {
        what: tuple(found[name][key] for key in keys) for what, name in scene.items()
    } == {
        "used": ("in use", 1, 1, 10, "msgpack"),
        "dead": ("unused", 1, 0, 10, "msgpack"),
        "persistent": ("persistent", 1, 0, 10, "msgpack"),
        "cut": ("trouble", None, None, None, None),
        "permits": ("unused", None, None, None, None),
    }
    result("ls", scene["used"], scene["dead"])
    assert "there is no cache named" in complaint("ls", "none-of-it", code=2)
    assert set(scene.values()) <= set(result("ls", "--names").splitlines())


def test_stats_are_those_of_the_cache(make_cache: Callable[..., Cache]) -> None:
    """The command shows the same numbers as the cache's own stats()."""
    cache = make_cache(max_entries=20, shards=2, cleanup_interval=QUIET)
    for n in range(50):
        cache[n] = n
        cache.get(n // 2)
    cache.delete(49)
    expected = vars(cache.stats())
    stats = said("stats", cache.name)
    varying = ("age", "compiled")
    assert {k: v for k, v in expected.items() if k not in varying} == {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in stats.items()
        if k in expected and k not in varying
    }
    assert {
        "settings": vars(cache._settings),
        "inside": [],
        "trouble": "",
    } == {key: stats[key] for key in ("settings", "inside", "trouble")}
    assert ([], True) == (stats["unstable"], stats["exact"])
    text = result("stats", cache.name)
    hits, lookups = expected["hits"], expected["hits"] + expected["misses"]
    assert f"hits           {hits} of {lookups} (" in text


@pytest.mark.slow
def test_keys_are_shown_as_they_are_asked_for(make_cache: Callable[..., Cache]) -> None:
    """Each line of `keys` is a key that `get --type json` finds, whatever its type."""
    cache = make_cache(max_entries=100)
    for n, key in enumerate([*KEYS, "line\nbreak", "\x1b[31m\x9b", "käse"]):
        cache[key] = n
    lines = result("keys", cache.name).splitlines()
    assert len(cache) == len(lines)
    values = {result("get", cache.name, line, "--type", "json") for line in lines}
    assert {f"{n}\n" for n in range(len(lines))} == values
    assert all(line.isprintable() for line in lines)
    listed = said("keys", cache.name)["keys"]
    assert [json.loads(line) for line in lines] == [one["key"] for one in listed]
    assert {None} == {one["ttl"] for one in listed}


def test_keys_by_prefix_and_number(make_cache: Callable[..., Cache]) -> None:
    """A prefix is of the kind that --type says; expired keys are not listed."""
    cache = make_cache(max_entries=100)
    for key in KEYS:
        cache[key] = 0
    cache.set("user:gone", 0, ttl=1e-9)
    name = cache.name

    def keys(*arguments: str) -> set[str]:
        return set(result("keys", name, *arguments).splitlines())

    assert {'"user:1"', '"user:2"'} == keys("--prefix", "user")
    assert {'["user", 1, [{"hex": "78"}]]'} == keys(
        "--prefix", '["user"]', "--type", "json"
    )
    assert {'{"hex": "00ff"}'} == keys("--prefix", "00", "--type", "hex")
    assert 3 == len(keys("--limit", "3"))
    refusal = complaint("keys", name, "--prefix", "7", "--type", "int", code=2)
    assert "prefix '7' is an int" in refusal
    assert "is not of --type hex" in complaint(
        "keys", name, "--prefix", "x", "--type", "hex", code=2
    )


@pytest.mark.slow
def test_get(make_cache: Callable[..., Cache]) -> None:
    """A str is printed as it is, all other values as Python writes them, or as JSON, or
    raw."""
    cache = make_cache(max_entries=100)
    name = cache.name
    values: dict[str, tuple[Any, str, str]] = {
        "str": ("two\nlines", "two\nlines", '"two\\nlines"'),
        "dict": ({"a": (1, 2.5)}, "{'a': (1, 2.5)}", '{"a": [1, 2.5]}'),
        "bytes": (b"\x00", "b'\\x00'", '{"hex": "00"}'),
        "long": (
            10**5000,
            f'{{"int": "{10**5000:#x}"}}',
            f'{{"int": "{10**5000:#x}"}}',
        ),
        "none": (None, "None", "null"),
        "keys": ({1: True}, "{1: True}", '{"items": [[1, true]]}'),
    }
    for key, (value, text, as_json) in values.items():
        cache[key] = value
        assert (f"{text}\n", f"{as_json}\n") == (
            result("get", name, key),
            result("get", name, key, "--json"),
        )
    assert "two\nlines" == result("get", name, "str", "--raw")
    cache.set("gone", 1, ttl=1e-9)
    for key in ("absent", "gone"):
        assert f"has no key '{key}'" in complaint("get", name, key, code=1)
    assert "is not of --type int" in complaint(
        "get", name, "x", "--type", "int", code=2
    )
    assert "is a dict" in complaint("get", name, '{"a":1}', "--type", "json", code=2)
    assert "would be the same key as 1" in complaint(
        "get", name, "true", "--type", "json", code=2
    )


class Reversing:
    """A codec that only its program knows."""

    name = "reversing"

    def dumps(self, value: Any) -> bytes:
        """Text, backwards."""
        return str(value)[::-1].encode()

    def loads(self, data: bytes) -> Any:
        """And forwards."""
        return data.decode()[::-1]


@pytest.mark.slow
def test_codecs_that_are_not_decoded(make_cache: Callable[..., Cache]) -> None:
    """If a codec is unknown or runs code, the bytes are shown, but simple values that
    have tags of their own are decoded; such caches can be cleared."""
    for codec, stored in (("pickle", b"\x80\x05]"), (Reversing(), b"]2 ,1[")):
        cache = make_cache(max_entries=10, codec=codec)
        cache["list"] = [1, 2] if stored[0] == 91 or codec != "pickle" else []
        done = shmcache("get", cache.name, "list")
        assert 0 == done.returncode
        assert repr(stored)[:-1] in done.stdout
        assert "not decoded" in done.stderr or "only its program" in done.stderr
        [record] = said("inspect", cache.name, "list")["records"]
        assert record["value"]["hex"].startswith(stored.hex())
        if codec == "pickle":
            assert "stored" in result("set", cache.name, "text", "simple")
            assert "simple\n" == result("get", cache.name, "text")
        else:
            refusal = complaint("set", cache.name, "text", "simple", code=2)
            assert "only the program that made the cache" in refusal
        assert 'deleted "list"\n' == result("delete", cache.name, "list")
        assert "removed" in result("clear", cache.name)
        assert 0 == len(cache)


def test_inspect(make_cache: Callable[..., Cache]) -> None:
    """The command shows an entry's record: sizes, times, place in the LRU order."""
    cache = make_cache(max_entries=100, ttl=1000, cleanup_interval=QUIET)
    for n in range(10):
        cache[f"key {n}"] = b"x" * 1000
    cache.get("key 4")
    cache.get("key 2")
    cache._flush_recency()
    [record] = said("inspect", cache.name, "key 4")["records"]
    assert 0 <= record.pop("age") < 500 < record.pop("left") <= 1000
    for varying in ("hash", "checksum", "slot"):
        record.pop(varying)
    block = cache._attachment.header.geometry.block_size
    assert record == {
        "key": "key 4",
        "value": {"hex": (b"x" * 1000).hex()},
        "encoding": "bytes",
        "key_bytes": 5,
        "value_bytes": 1000,
        "blocks": -(-1005 // block),
        "block_bytes": -(-1005 // block) * block,
        "ttl": 1000.0,
        "expired": False,
        "read": True,
        "shard": 0,
        "lru_position": 1,
        "lru_length": 10,
        "write": 5,
        "damage": "",
    }
    text = result("inspect", cache.name, "key 9")
    assert "LRU            2 of 10 in its shard" in text
    assert "read           not since it was written" in text
    cache.set("gone", 1, ttl=1e-9)
    assert "left           expired, not yet removed" in result(
        "inspect", cache.name, "gone"
    )
    assert "has no key" in complaint("inspect", cache.name, "absent", code=1)


def test_handles(handles: HandleMap, make_cache: Callable[..., Cache]) -> None:
    """Handles are listed with owner, age, time left and value; a cache has none."""
    listed = said("handles", handles.name)["handles"]
    found = {json.dumps(one["key"]): one for one in listed}
    assert {
        '"user:1"': (os.getpid(), True, {"peer": "db"}),
        '["pool", 2]': (os.getpid(), True, None),
        "3": (os.getpid(), True, "three"),
    } == {k: (v["owner"], v["owner_alive"], v["value"]) for k, v in found.items()}
    assert 400 < found['"user:1"']["ttl"] <= 500
    assert found["3"]["ttl"] is None
    text = result("handles", handles.name)
    assert str(os.getpid()) in text
    assert "{'peer': 'db'}\n" == result("get", handles.name, "user:1")
    assert "three\n" == result("get", handles.name, "3", "--type", "int")
    [record] = said("inspect", handles.name, "user:1")["records"]
    assert (os.getpid(), True) == (record["owner"], record["owner_alive"])
    cache = make_cache(max_entries=10)
    assert "not a map of handles" in complaint("handles", cache.name, code=2)


def test_handles_of_the_dead_are_shown_as_such(name: str) -> None:
    """A killed owner's handles are listed as a dead worker's until others remove
    them."""

    def use(link: Connection) -> None:
        handles = HandleMap(name, max_entries=10)
        handles["there"] = object()
        link.send("in")
        signal.pause()

    peer = Peer(use)
    assert peer.hear() == "in"
    peer.kill()
    [one] = said("handles", name)["handles"]
    assert (peer.pid, False) == (one["owner"], one["owner_alive"])
    assert f"{peer.pid} (dead)" in result("handles", name)
    result("unlink", name)


# --- writing ----------------------------------------------------------------------


@pytest.mark.slow
def test_set_and_delete(make_cache: Callable[..., Cache]) -> None:
    """A process of the cache finds a value that was set, with its TTL; a deleted key is
    gone; both commands say what they did."""
    cache = make_cache(max_entries=100, ttl=50)
    name = cache.name
    assert 'stored "text"\n' == result("set", name, "text", "5")
    assert 'replaced "text"\n' == result("set", name, "text", "six", "--ttl", "900")
    assert "stored 7\n" == result(
        *("set", name, "7", '{"a": [1, null]}', "--type", "int", "--json"),
        *("--ttl", "never"),
    )
    assert 'stored "given"\n' == result("set", name, "given", given="from\ninput")
    assert ["six", {"a": [1, None]}, "from\ninput"] == [
        cache["text"],
        cache[7],
        cache["given"],
    ]
    assert cache.ttl(7) is None
    assert 50 < (cache.ttl("text") or 0) <= 900
    assert 0 < (cache.ttl("given") or 0) <= 50
    said = result("delete", name, "text", "absent", "given", code=1)
    assert 'deleted "text"\nnot there: "absent"\ndeleted "given"\n' == said
    assert [7] == list(cache)
    assert "VALUE is not JSON" in complaint("set", name, "k", "{", "--json", code=2)
    for ttl in ("0", "-1", "nan", "soon", "1e30"):
        assert "not a number of seconds" in complaint(
            *("set", name, "k", "v", f"--ttl={ttl}"), code=2
        )
    assert [7] == list(cache)


@pytest.mark.slow
def test_set_in_a_raw_cache(make_cache: Callable[..., Cache]) -> None:
    """In a raw cache, set stores the text as UTF-8."""
    cache = make_cache(max_entries=10, codec="raw")
    result("set", cache.name, "key", "käse")
    assert "käse".encode() == cache["key"]


@pytest.mark.slow
def test_clear(make_cache: Callable[..., Cache]) -> None:
    """All entries are removed, or those with a prefix of the kind that --type says."""
    cache = make_cache(max_entries=100)
    for key in KEYS:
        cache[key] = 0
    assert "removed 2 entries\n" == result("clear", cache.name, "--prefix", "user")
    assert "removed 1 entry\n" == result(
        *("clear", cache.name, "--prefix", '["user"]', "--type", "json")
    )
    assert "must be str, bytes or tuple" in complaint(
        *("clear", cache.name, "--prefix", "7", "--type", "int"), code=2
    )
    assert f"removed {len(KEYS) - 3} entries\n" == result("clear", cache.name)
    assert [] == list(cache)


@pytest.mark.slow
def test_owners_close_handles_that_are_removed(new_name: Callable[[], str]) -> None:
    """If the key of a handle is deleted or cleared, its owner closes the handle; no
    handle can be set from outside."""
    closed: queue.Queue[tuple[Any, str]] = queue.Queue()

    def on_evict(key: Any, _: object, cause: Any) -> None:
        closed.put((key, cause.name))

    with HandleMap(new_name(), max_entries=10, on_evict=on_evict) as handles:
        for key in ("a", ("b", 1), ("b", 2), "c"):
            handles[key] = object()
        name = handles.name
        assert 'deleted "a"\n' == result("delete", name, "a")
        assert ("a", "DELETED") == closed.get(timeout=PATIENCE)
        prefix = ("--prefix", '["b"]', "--type", "json")
        assert "removed 2 entries\n" == result("clear", name, *prefix)
        gone = {closed.get(timeout=PATIENCE) for _ in range(2)}
        assert {(("b", 1), "DELETED"), (("b", 2), "DELETED")} == gone
        assert "removed 1 entry\n" == result("clear", name)
        assert ("c", "CLEARED") == closed.get(timeout=PATIENCE)
        assert "is a map of handles" in complaint("set", name, "d", "x", code=2)
        assert 0 == handles.stats().entries


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["set", "NAME", "k", "v"], ["delete", "NAME", "k"], ["clear", "NAME"]]
)
def test_writing_to_what_the_dead_left(
    arguments: list[str], scene: dict[str, str]
) -> None:
    """A command that writes neither uses nor removes what crashed processes have left;
    a persistent cache is taken into use, and stays."""
    before = everything(scene["dead"])
    told = [scene["dead"] if a == "NAME" else a for a in arguments]
    assert "nobody uses cache" in complaint(*told, code=2)
    assert before == everything(scene["dead"])
    told = [scene["persistent"] if a == "NAME" else a for a in arguments]
    result(*told, code=1 if arguments[0] == "delete" else 0)
    assert 3 == len(names_of(scene["persistent"]))
    left = {"set": 2, "delete": 1, "clear": 0}[arguments[0]]
    assert left == said("stats", scene["persistent"])["entries"]


# --- beside writers, and on damage ------------------------------------------------


@pytest.mark.slow
def test_all_keys_are_listed_while_they_are_overwritten(
    make_cache: Callable[..., Cache],
) -> None:
    """Keys that are there all the time are met exactly once, with a value that was
    stored, while another process overwrites them."""
    cache = make_cache(max_entries=400, shards=2)
    for n in range(200):
        cache[n] = b"%d;" % n * 40
    name = cache.name

    def write(link: Connection) -> None:
        with Cache.attach(name) as mine:
            n = 0
            while not link.poll(0):
                mine[n % 200] = b"%d;" % (n % 200) * (n % 77)
                mine.incr("counter", initial=0)
                n += 1

    peer = Peer(write)
    try:
        for _ in range(30):
            with Segment(name) as segment:
                entries = list(segment.entries(values=True))
                assert [] == [entry for entry in entries if entry.damage]
                listed = [segment.key(entry) for entry in entries]
                for entry in entries:
                    key, value = segment.key(entry), segment.value(entry)
                    assert key == "counter" or set(value.split(b";")) <= {
                        b"",
                        b"%d" % key,
                    }
            assert sorted(key for key in listed if key != "counter") == list(range(200))
    finally:
        peer.say()
        peer.end()


@pytest.mark.slow
def test_number_is_seen_while_it_is_overwritten(
    make_cache: Callable[..., Cache],
) -> None:
    """While a writer overwrites a number in place, the number is found after each of
    the writer's stores, with the old or the new value."""
    cache = make_cache(max_entries=10)
    cache["counter"] = 41
    words, base = cache._attachment.words, cache._words_of(0)
    with Segment(cache.name) as segment:
        kind, key = L.Kind.STR, b"counter"
        old = segment.find(kind, key)
        assert old
        at = base + (segment.header.geometry.records_at + L.RECORD * old.slot) // 8
        value = (42).to_bytes(8, "little")
        block = segment.places(old, values=True)[0][0] + old.key_len
        place = cache._attachment.block.view[block : block + 8]
        stores: list[Callable[[], None]] = [
            lambda: words.__setitem__(base + L.S_REDO_VERSION, old.version + 2),
            lambda: words.__setitem__(base + L.S_REDO_VALUE, 42),
            lambda: words.__setitem__(
                base + L.S_REDO_CHECKSUM, L.checksum(value, old.hash, old.tag)
            ),
            lambda: words.__setitem__(base + L.S_REDO_SLOT, old.slot),
            lambda: words.__setitem__(at, old.version + 1),
            lambda: place.__setitem__(slice(None), value),
        ]
        seen = []
        for store in stores:
            store()
            entry = segment.find(kind, key)
            assert entry
            assert entry.damage == ""
            seen.append(segment.value(entry))
        assert seen == [41, 41, 41, 41, 42, 42]
        words[at] = old.version  # as it was
        place[:] = old.value or b""
        words[base + L.S_REDO_SLOT] = 0
        place.release()


@pytest.mark.slow
@pytest.mark.damaged
def test_a_writer_who_does_not_come_out(make_cache: Callable[..., Cache]) -> None:
    """If a writer is stuck inside a shard, all entries are shown, and also the writer
    and those that wait for it; the same holds for a writer that died inside."""
    cache = make_cache(max_entries=100, lock_timeout=PATIENCE)
    cache["key"] = "value"
    name = cache.name
    words, base = cache._attachment.words, cache._words_of(0)
    semaphore = posix_ipc.Semaphore(cache._names.semaphore(0))
    semaphore.acquire(0)
    words[base + L.S_HOLDER] = cache._attachment.token
    words[base + L.S_SEQ] += 1

    def wait(_: Connection) -> None:
        with Cache.attach(name, lock_timeout=PATIENCE) as mine:
            mine["other"] = 1

    peer = Peer(wait)
    deadline = time.monotonic() + PATIENCE
    while (stats := said("stats", name))["inside"][0]["waiting"] == 0:
        assert time.monotonic() < deadline
    [inside] = stats["inside"]
    assert (os.getpid(), True, True, 1) == tuple(
        inside[key] for key in ("pid", "alive", "writing", "waiting")
    )
    assert ([0], True) == (stats["unstable"], stats["exact"])
    assert "shard 0: its counts are not of one moment" in result("stats", name)
    # A waiter wakes up now and then, so from here on it may be seen or not.
    assert f"shard 0: process {os.getpid()} is inside; waiting: " in result(
        "stats", name
    )
    assert '"key"\n' == result("keys", name)
    assert "value\n" == result("get", name, "key")
    assert "LRU            unknown" in result("inspect", name, "key")
    assert f"process {os.getpid()}; waiting: " in result(
        "top", name, "--once", "--interval", "0.1"
    )
    words[base + L.S_SEQ] += 1
    words[base + L.S_HOLDER] = 0
    semaphore.release()
    semaphore.close()
    peer.end()
    assert 1 == cache["other"]
    words[base + L.S_HOLDER] = 99 << 16 | 7
    assert "shard 0: a process that has gone died inside" in result("stats", name)
    words[base + L.S_HOLDER] = 0


def damage_value(cache: Cache, value: bytes) -> None:
    """Change a byte of a value in the arena."""
    view = cache._attachment.block.view
    at = bytes(view).index(value)
    view[at] ^= 1


@pytest.mark.slow
@pytest.mark.damaged
def test_a_damaged_entry_is_told_from_the_others(
    make_cache: Callable[..., Cache],
) -> None:
    """A damaged value is not printed as a value; exit code 1 reports it."""
    cache = make_cache(max_entries=10)
    cache["good"] = b"sound value"
    cache["bad"] = b"some other value"
    damage_value(cache, b"some other value")
    assert "the entry is damaged" in complaint("get", cache.name, "bad", code=1)
    assert "b'sound value'\n" == result("get", cache.name, "good")
    text = result("inspect", cache.name, "bad", code=1)
    assert "damage         the value's bytes are not those that were written" in text
    assert {'"good"', '"bad"'} == set(result("keys", cache.name).splitlines())
    assert "checksum" in result("check", cache.name, code=1)


@pytest.mark.slow
def test_damage_of_the_header_is_told_and_the_rest_shown(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """With a header that is partly wrong, or a file cut short, what can be read is
    shown; with bytes that are no segment, one line says so; each with exit code 1."""
    cache = make_cache(max_entries=100, shards=2)
    for n in range(50):
        cache[n] = n
    data = bytearray(cache._attachment.block.view)
    place = Path(f"{SHM}/shmcache-{os.getuid()}-{name}")
    place.touch(0o600)
    place.write_bytes(data)
    assert "was made for a cache named" in result("stats", name, code=1)
    assert 50 == len(result("keys", name).splitlines())
    geometry = cache._attachment.header.geometry
    place.write_bytes(data[: geometry.shards_at + geometry.stride])
    assert 0 < len(result("keys", name).splitlines()) < 50
    assert "another program changed" in result("stats", name, code=1)
    data[8 * L.H_BLOCK_SIZE] ^= 1
    place.write_bytes(data)
    assert "geometry" in complaint("stats", name, code=1)
    place.write_bytes(bytes(1_000_000))
    assert "magic word" in complaint("keys", name, code=1)
    place.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_are_looked_at_without_harm(
    seed: int, name: str, handles: HandleMap, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever bytes a segment has, read-only commands end soon with one of their exit
    codes, and without a traceback."""
    rng = random.Random(seed)
    with Cache(f"{name}.b", max_entries=60, shards=2) as cache:
        for n in range(50):
            cache.set(f"user:{n}", [n, "x" * rng.randrange(600)], ttl=900)
        sound = [bytes(cache._attachment.block.view)]
    sound.append(bytes(handles.registry._attachment.block.view))
    place = Path(f"{SHM}/shmcache-{os.getuid()}-{name}")
    place.touch(0o600)
    codes: Counter[int] = Counter()
    for _ in range(12):
        data = bytearray(rng.choice(sound))
        at = len(name.encode())
        data[L.NAME_AT : L.NAME_AT + 1 + at] = bytes([at]) + name.encode()
        areas = [(0, 1024), (4096, 8192), (L.ROWS_AT + L.ROWS * L.ROW_SIZE, len(data))]
        for _ in range(rng.choice([1, 3, 300])):
            where = rng.randrange(*rng.choice(areas))
            data[where : where + 8] = rng.choice(
                [rng.randbytes(8), b"\xff" * 8, bytes(8), rng.randbytes(4)]
            )
        place.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for look in LOOKS:
            told = [name if word == "NAME" else word for word in look]
            codes[cli.main(told)] += 1
    place.unlink()
    capsys.readouterr()
    assert set(codes) <= {0, 1, 2}
    assert codes[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", ".lease"])
def test_a_pipe_in_the_place_of_a_file(name: str, end: str) -> None:
    """Commands do not wait for a writer of a pipe that has the name of a cache's file:
    they report it, and go on with the other caches."""
    path = f"{SHM}/shmcache-{os.getuid()}-{name}{end}"
    os.mkfifo(path, 0o600)
    try:
        assert f"{path} is not a regular file" in result("ls", code=1)
        top = result("top", "--once", "--interval", "0.1")
        assert f"{name}: {path} is not" in " ".join(top.split())
        for command in ("stats", "keys", "check"):
            told = complaint(command, name, code=2)
            assert ("no cache named" if end else "is not a regular file") in told
    finally:
        os.unlink(path)


# --- a user's mistakes ------------------------------------------------------------

NAMED = {
    "stats": [],
    "top": ["--once"],
    "keys": [],
    "get": ["k"],
    "set": ["k", "v"],
    "delete": ["k"],
    "clear": [],
    "inspect": ["k"],
    "check": [],
    "handles": [],
    "unlink": [],
}


@pytest.mark.parametrize("command", NAMED)
def test_wrong_names(command: str, name: str) -> None:
    """A name that no cache can have, or that no cache has, is refused in one line, and
    the attempt leaves nothing."""
    impossible = complaint(command, "a/b", *NAMED[command], code=2)
    assert "'a/b' is not 1 to 100 letters" in impossible
    missing = complaint(command, name, *NAMED[command], code=2)
    assert f"there is no cache named '{name}'" in missing
    assert [] == names_of(name)
    assert "required" in complaint(command, code=2) or command == "top"


@pytest.mark.parametrize("command", NAMED)
def test_files_that_are_not_safely_ours(command: str, name: str) -> None:
    """A file that others can open is refused, with its mode, and stays as it is."""
    place = Path(f"{SHM}/shmcache-{os.getuid()}-{name}")
    with Cache(name, max_entries=10, persist=True):
        pass
    place.chmod(0o644)
    before = everything(name)
    if command == "unlink":  # which is what gets rid of them
        result(command, name)
        return
    assert "has mode 644" in complaint(command, name, *NAMED[command], code=2)
    assert before == everything(name)
    assert "has mode 644" in result("ls", name, code=1)
    result("unlink", name)


def test_a_reader_who_has_seen_enough(make_cache: Callable[..., Cache]) -> None:
    """A closed pipe ends a command in silence, with the code of SIGPIPE."""
    cache = make_cache(max_entries=20_000)
    for n in range(20_000):
        cache[n] = n
    process = subprocess.Popen(
        [sys.executable, "-m", "shmcache", "keys", cache.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline().strip().isdigit()
    process.stdout.close()
    complaints = process.stderr.read()
    process.stderr.close()
    assert (128 + signal.SIGPIPE, b"") == (process.wait(PATIENCE), complaints)


def test_a_full_disk(make_cache: Callable[..., Cache]) -> None:
    """Output that cannot be written is one line of complaint."""
    cache = make_cache(max_entries=10)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shmcache", "stats", cache.name],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert (2, 1) == (done.returncode, done.stderr.count("\n"))
    assert "No space left on device" in done.stderr


def test_any_text_can_be_printed(make_cache: Callable[..., Cache]) -> None:
    """Output of an encoding that lacks a character has an escape in its place."""
    cache = make_cache(max_entries=10)
    cache["k"] = "käse \N{SNOWMAN}"
    done = subprocess.run(
        [sys.executable, "-m", "shmcache", "get", cache.name, "k"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (0, b"k\xe4se \\u2603\n", b"") == (
        done.returncode,
        done.stdout,
        done.stderr,
    )


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("top", "rich", "cli"), ("soak", "shmcache.soak", "soak")],
)
def test_what_is_not_installed_is_named(command: str, module: str, extra: str) -> None:
    """Without an optional package a command says which extra has it."""
    script = f"import sys; sys.modules[{module!r}] = None; from shmcache import cli;"
    done = subprocess.run(
        [sys.executable, "-c", f"{script} sys.exit(cli.main([{command!r}]))"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (2, "", 1) == (done.returncode, done.stdout, done.stderr.count("\n"))
    assert f"pip install 'shmcache[{extra}]'" in done.stderr


def test_soak_gets_its_arguments_as_they_are() -> None:
    """What follows `soak` is the soak's own, options and --help included."""
    assert "usage: shmcache soak" in result("soak", "--help")
    assert "--profile" in complaint_of_soak("--profile", "none")


def complaint_of_soak(*arguments: str) -> str:
    """What the soak says of wrong arguments."""
    done = shmcache("soak", *arguments)
    assert 2 == done.returncode
    return done.stderr


# --- completion -------------------------------------------------------------------


@pytest.fixture
def in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is found by its name, as after an installation."""
    command = tmp_path / "shmcache"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m shmcache "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def completed(line: str) -> list[str]:
    """What a real bash would offer for the last word of a line."""
    script = """
        eval "$(shmcache completion bash)"
        eval "COMP_WORDS=($1)"; [[ $1 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        complete -p shmcache >/dev/null && _shmcache
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    return in_shell("bash", "--norc", "-uc", script, "bash", line).split()


def in_shell(*arguments: str) -> str:
    """What a shell printed, which complained of nothing."""
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_completion_in_bash(make_cache: Callable[..., Cache], in_path: None) -> None:
    """Commands, options, their choices and the names of caches are completed."""
    name = make_cache(max_entries=10).name
    for line, expected in {
        "shmcache c": ["clear", "check", "clean", "completion"],
        "shmcache --v": ["--version"],
        f"shmcache stats {name[:-1]}": [name],
        f"shmcache clean {name} {name[:-1]}": [name],
        "shmcache ls --n": ["--names"],
        f"shmcache get {name} ": [],
        f"shmcache get {name} --": ["--help", "--type", "--raw", "--json"],
        "shmcache keys x --type ": ["text", "int", "hex", "json"],
        "shmcache completion z": ["zsh"],
        "shmcache nonsense ": [],
    }.items():
        offered = completed(line)
        assert expected == ([name] if name in offered else offered), line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_completion_in_fish(make_cache: Callable[..., Cache], in_path: None) -> None:
    """A real fish offers commands, options, and the names of caches."""
    name = make_cache(max_entries=10).name
    for line, expected in {
        "shmcache comp": {"completion"},
        f"shmcache stats {name[:-1]}": {name},
        "shmcache get --r": {"--raw"},
        "shmcache keys x --type h": {"hex"},
        "shmcache completion z": {"zsh"},
    }.items():
        script = f"shmcache completion fish | source; complete -C{line!r}"
        offered = in_shell("fish", "--no-config", "-c", script).splitlines()
        words = {one.split("\t")[0] for one in offered}
        assert expected == ({name} if name in words else words), line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_completion_in_zsh(in_path: None) -> None:
    """A real zsh takes the function, and calls it for this command."""
    script = """
        autoload -U compinit; compinit -D -u
        eval "$(shmcache completion zsh)"
        print $_comps[shmcache] $+functions[_shmcache]
    """
    assert "_shmcache 1\n" == in_shell("zsh", "-f", "-c", script)


@pytest.mark.slow
def test_completion_knows_all_commands() -> None:
    """Each script has all commands in it; of other shells there is none."""
    for shell in ("bash", "zsh", "fish"):
        script = result("completion", shell)
        assert all(command in script for command in NAMED)
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, text=True, check=True)
    assert "invalid choice" in complaint("completion", "tcsh", code=2)
