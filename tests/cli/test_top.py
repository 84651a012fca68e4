"""The live view: in a real terminal, and what its figures are made of."""

from __future__ import annotations

import fcntl
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest
from peers import PATIENCE, Peer

pytest.importorskip("rich")

from rich.console import Console

from shmcache import Cache, HandleMap, SegmentNotFound
from shmcache._format import layout as L
from shmcache.cli import top as _top

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

pytestmark = pytest.mark.once

OTHER_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A real terminal with `shmcache top` in it."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = os.openpty()
        size = struct.pack("HHHH", 24, 80, 0, 0)
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, size)
        self.before = termios.tcgetattr(self.ours)
        self.seen = ""
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.login_tty(theirs)
                os.environ["TERM"] = "xterm-256color"
                for variable in ("COLUMNS", "LINES"):  # the terminal knows its own
                    os.environ.pop(variable, None)
                command = [sys.executable, "-m", "shmcache", "top", *arguments]
                os.execv(command[0], command)
            finally:
                os._exit(1)
        os.close(theirs)

    def read(self) -> bool:
        """Takes what is shown; whether there may be more."""
        ready, _, _ = select.select([self.ours], [], [], PATIENCE)
        assert ready, self.seen
        try:
            self.seen += os.read(self.ours, 65_536).decode(errors="replace")
        except OSError:  # all is read, and nobody is at the other end any more
            return False
        return True

    def wait_for(self, text: str) -> None:
        """Reads until the text is shown."""
        deadline = time.monotonic() + PATIENCE
        while text not in _CONTROL.sub("", self.seen):
            assert self.read(), self.seen
            assert time.monotonic() < deadline, self.seen

    def press(self, key: str) -> None:
        """As a user does."""
        os.write(self.ours, key.encode())

    def end(self) -> int:
        """The exit code of the command; the terminal is as it was."""
        while self.read():
            pass
        code = self.wait()
        assert self.before == termios.tcgetattr(self.ours)
        screens = self.seen.count(OTHER_SCREEN), self.seen.count(FIRST_SCREEN)
        assert (1, 1) == screens
        return code

    def wait(self) -> int:
        """The exit code, once."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        """Ends what a failed test left."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self.ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """A factory of terminals, which are closed after the test."""
    made: list[Terminal] = []

    def make(*arguments: str) -> Terminal:
        made.append(Terminal(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def shown(view: Any, width: int = 120) -> str:
    """A frame as text."""
    console = Console(file=io.StringIO(), width=width, height=60)
    console.print(view.frame(console))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("q", 0),
        ("Q", 0),
        ("\x03", 128 + signal.SIGINT),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
    ],
)
def test_terminal_is_as_it_was_after(
    end: Any,
    code: int,
    terminal: Callable[..., Terminal],
    make_cache: Callable[..., Cache],
) -> None:
    """Frames are shown until a key or a signal ends it, with the code for that, and the
    terminal is then in the mode and on the screen in which it was."""
    cache = make_cache(max_entries=100)
    cache["user:1"] = b"x" * 1000
    top = terminal(cache.name, "--interval", "0.1")
    top.wait_for("WORKER")
    top.wait_for('"user:1"')
    top.wait_for("q: quit")
    if isinstance(end, str):
        top.press(end)
    else:
        os.kill(top.pid, end)
    assert code == top.end()


def test_all_caches_are_watched(
    terminal: Callable[..., Terminal], new_name: Callable[[], str]
) -> None:
    """Without a name all caches are shown, those that come later, too."""
    names = new_name(), new_name()
    with Cache(names[0], max_entries=10):
        top = terminal("--interval", "0.1")
        top.wait_for(names[0])
        with Cache(names[1], max_entries=10):
            top.wait_for(names[1])
        top.press("q")
        assert 0 == top.end()


def test_cache_that_goes_and_comes(
    terminal: Callable[..., Terminal], name: str
) -> None:
    """The view says that a cache has gone, and watches a new one of its name."""
    with Cache(name, max_entries=10, codec="raw"):
        top = terminal(name, "--interval", "0.1")
        top.wait_for("codec raw")
    top.wait_for("there is no cache named")
    with Cache(name, max_entries=10, codec="pickle"):
        top.wait_for("codec pickle")
        top.press("q")
        assert 0 == top.end()


def test_without_a_terminal(make_cache: Callable[..., Cache]) -> None:
    """One line tells what to do, and --once does it."""
    cache = make_cache(max_entries=10)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shmcache", "top", cache.name, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    refused = run()
    assert (2, "", 1) == (
        refused.returncode,
        refused.stdout,
        refused.stderr.count("\n"),
    )
    assert "--once" in refused.stderr
    once = run("--once", "--interval", "0.1")
    assert (0, "") == (once.returncode, once.stderr)
    assert cache.name in once.stdout
    assert "\x1b" not in once.stdout
    for interval in ("0", "-1", "nan", "1h"):
        wrong = run("--once", f"--interval={interval}")
        assert 2 == wrong.returncode
        assert "is not a number from 0.1 to 3600" in wrong.stderr


def test_rates_are_differences_by_time(make_cache: Callable[..., Cache]) -> None:
    """A rate is the difference between two looks divided by their distance in time, by
    cause; totals count from the beginning."""
    cache = make_cache(max_entries=10)
    for n in range(10):
        cache[n] = n
    view = _top._One(cache.name)
    view.look()
    for n in range(10, 30):
        cache[n] = n
    for n in range(40):
        cache.get(n)
    cache.delete(29)
    cache.set("short", 1, ttl=1e-9)
    cache.sweep()
    view.look()
    span = view._span
    assert span
    names = ("hits", "misses", "sets", "evicted", "expired", "deleted", "replaced")
    differences = {name: span.difference(_top._RATES[name]) for name in names}
    assert {
        "hits": 10,
        "misses": 30,
        "sets": 21,
        "evicted": 20,
        "expired": 1,
        "deleted": 1,
        "replaced": 0,
    } == differences
    assert span.rate(_top._RATES["hits"]) == pytest.approx(10 / span.seconds)
    text = shown(view)
    assert "25.0 %" in text
    assert "nobody holds one, nobody waits" in text
    [(worker, hits, misses)] = span.worker_rates()
    assert (os.getpid(), True) == (worker.pid, worker.alive)
    rates = hits * span.seconds, misses * span.seconds
    counted = (10, 30) if worker.hits else (0, 0)  # interpreted, shards count them
    assert rates == pytest.approx(counted)


def test_new_cache_of_the_name_has_no_rates(name: str) -> None:
    """Counters that begin anew make no negative rates."""
    view = _top._One(name)
    with Cache(name, max_entries=10) as cache:
        cache["a"] = 1
        view.look()
    with Cache(name, max_entries=10):
        view.look()
        assert view._span
        assert (0, 0.0) == (view._span.seconds, view._span.rate(lambda s: s.sets))
        shown(view)
    view.look()
    assert "there is no cache named" in shown(view)
    with pytest.raises(SegmentNotFound):
        _top._One(name).look()


def test_keys_that_are_used_and_large(make_cache: Callable[..., Cache]) -> None:
    """The keys that are used again and again come first; the largest are sorted by
    size."""
    cache = make_cache(max_entries=200, shards=2)
    for n in range(100):
        cache[n] = b"x" * n
    view = _top._One(cache.name)
    for _ in range(20):
        for key in ("hot", ("very", "hot")):
            cache.set(key, b"")
            view.glance()
        cache[5] = b""
    view.look()
    assert {'"hot"', '["very", "hot"]', "5"} <= set(view._keys.hottest())
    expected = [(str(n), n + 1) for n in range(99, 99 - _top.KEYS, -1)]
    assert expected == view._keys.largest
    text = shown(view)
    assert '"hot"' in text
    assert "100 B" in text


def test_workers_are_shown_with_their_memory(make_cache: Callable[..., Cache]) -> None:
    """Each attached process is shown with its memory, and dead ones as dead."""
    cache = make_cache(max_entries=10, cleanup_interval=3600)
    name = cache.name

    def use(link: Connection) -> None:
        Cache.attach(name)["k"] = 1
        link.send("in")
        signal.pause()

    peer = Peer(use)
    assert peer.hear() == "in"
    view = _top._One(name)
    view.look()
    memory, command = _top._process(peer.pid)
    assert memory.endswith("MiB")
    assert "python" in command
    assert f"\n{peer.pid} " in shown(view)
    peer.kill()
    view.look()
    assert f"\n{peer.pid} dead " in shown(view)
    assert ("-", "") == _top._process(0)
    assert ("-", "") == _top._process(peer.pid)
    cache.sweep()


def test_handles_and_damage_can_be_watched(
    new_name: Callable[[], str], make_cache: Callable[..., Cache]
) -> None:
    """The keys of a map of handles are shown without their owners; a header that makes
    no sense is shown as damage, beside the other caches."""
    with HandleMap(new_name(), max_entries=10) as handles:
        handles["conn"] = object()
        view = _top._One(handles.name)
        view.look()
        view.glance()
        assert ['"conn"'] == view._keys.hottest()
        assert "1 opened, 0 closed" in shown(view)
    cache = make_cache(max_entries=10)
    words = cache._attachment.words
    words[L.H_BLOCK_SIZE] += 1
    everything = _top._All()
    everything.look()
    assert f"{cache.name}: " in shown(everything)
    words[L.H_BLOCK_SIZE] -= 1
    everything.look()
    assert f"{cache.name}: " not in shown(everything)
