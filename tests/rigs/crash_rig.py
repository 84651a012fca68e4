"""The fault-injection rig: processes that die, or stop, right before their n-th step.

A step is a store into the segment, or a call on a semaphore.  The rig runs the
interpreted engine, whose word views and semaphores can be replaced by ones that
count; a test starts it as a process of its own, on whatever engine the test itself
runs, and looks at what the dead leave behind.

Run as a program it is a zygote: it attaches to the cache named by its first
argument, reads orders from standard input, one JSON object a line, forks a child for
each, and answers with what became of it.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import shmcache
import shmcache.handles
from shmcache._format import layout as L
from shmcache._process import sweeper as _sweeper

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

DEAD = 137  # the exit code of a child that died as ordered
FAILED = 1


class Clock:
    """The clock of a scenario, in ns; it is the same in all processes."""

    def __init__(self, ns: int = 1_000_000_000_000) -> None:
        self.ns = ns

    def __call__(self) -> int:
        """The time, in ns."""
        return self.ns


# --- dying ----------------------------------------------------------------------


class Fuse:
    """The steps that a process has left; it counts the steps taken in shared words."""

    def __init__(self, left: int, report: memoryview, *, stops: bool = False) -> None:
        self._left = left
        self._report = report  # words: steps taken, token, what it was doing
        self._stops = stops

    def burn(self) -> None:
        """Take a step, or die, or be stopped once, right before it."""
        if self._left == 0:
            if not self._stops:
                os._exit(DEAD)
            os.kill(os.getpid(), signal.SIGSTOP)
        self._left -= 1
        self._report[0] += 1

    @property
    def last(self) -> bool:
        """Whether the next step is the one to die at."""
        return self._left == 0


class DyingWords:
    """A view of the segment in which each store is a step."""

    def __init__(self, words: memoryview, fuse: Fuse) -> None:
        self._words = words
        self._fuse = fuse

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, at: Any) -> Any:
        return self._words[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._fuse.burn()
        if isinstance(at, slice):
            # A copy of many bytes can also end half-way.
            if self._fuse.last:
                half = (at.stop - at.start) // 2
                self._words[at.start : at.start + half] = value[:half]
            self._fuse.burn()
        self._words[at] = value

    def cast(self, kind: str) -> DyingWords:
        """The same bytes in another width, on the same fuse."""
        return DyingWords(self._words.cast(kind), self._fuse)  # type: ignore[call-overload]


class DyingSemaphore:
    """A semaphore on which each call is a step."""

    def __init__(self, semaphore: Any, fuse: Fuse) -> None:
        self._semaphore = semaphore
        self._fuse = fuse

    def acquire(self, timeout: float | None = None) -> None:
        """As posix_ipc's."""
        self._fuse.burn()
        self._semaphore.acquire(timeout)

    def release(self) -> None:
        """As posix_ipc's."""
        self._fuse.burn()
        self._semaphore.release()

    @property
    def value(self) -> int:
        """As posix_ipc's."""
        permits: int = self._semaphore.value
        return permits

    def close(self) -> None:
        """As posix_ipc's."""
        self._semaphore.close()


def light(cache: shmcache.Cache, fuse: Fuse) -> None:
    """Put a process's view of a cache on a fuse."""
    cache.w64 = DyingWords(cache.w64, fuse)
    cache.w32 = DyingWords(cache.w32, fuse)
    cache.mem = DyingWords(cache.mem, fuse)
    semaphores: Any = cache.pysems
    cache.pysems = [DyingSemaphore(semaphore, fuse) for semaphore in semaphores]
    attachment = cache._attachment
    attachment.words = DyingWords(attachment.words, fuse)  # type: ignore[assignment]


class Tracer:
    """A trace function for which each line of attaching and leaving is a step.

    A line counts only the first time, because some loops go over a thousand rows.
    """

    FILES = frozenset(
        {
            *("_segment/block.py", "_segment/create.py", "_segment/header.py"),
            *("_segment/names.py", "_segment/semaphores.py", "_segment/settings.py"),
            *("_process/attachment.py", "_process/exit.py", "_process/lockfile.py"),
            *("_process/rows.py", "cache.py"),
        }
    )

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse
        home = Path(shmcache.__file__).parent
        self._files = {str(home / name) for name in self.FILES}
        self._seen: set[tuple[CodeType, int]] = set()

    def __call__(self, frame: FrameType, event: str, _arg: object) -> Any:
        """What sys.settrace wants."""
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            line = frame.f_code, frame.f_lineno
            if line not in self._seen:
                self._seen.add(line)
                self._fuse.burn()
        return self


# --- scenarios ------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """An operation, and the state in which it begins.

    ``fill`` runs in the test's process, ``act`` in the one that dies.  Both get the
    cache, its clock and its keys.
    """

    fill: Callable[[shmcache.Cache, Clock, Keys], object]
    act: Callable[[shmcache.Cache, Clock, Keys], object]
    settings: dict[str, Any]
    timed: bool  # runs on the scenario's own clock, not on the system's


SCENARIOS: dict[str, Scenario] = {}

# Eight entries in blocks of 64 bytes: a key and its value take one, "long" values four.
SMALL: dict[str, Any] = {"max_entries": 8, "max_bytes": 32 * 64, "shards": 1}
LONG = 200
BUCKETS = SMALL["max_entries"] + 1


class Keys:
    """Keys by the bucket that they fall into: a, b, c ... share one; x, y, z another.

    So every scenario has chains of several entries, whatever the segment's seed.
    The key h is so long that eight bytes behind it lie in two blocks.
    """

    def __init__(self, cache: shmcache.Cache) -> None:
        self._cache = cache
        self.all: list[str] = []
        self._named: dict[str, str] = {}
        for names, bucket in (("abcdefgh", 0), ("xyz", BUCKETS - 1)):
            number = 0
            for name in names:
                start = name * 58 if name == "h" else name
                while self._bucket(f"{start}{number}") != bucket:
                    number += 1
                self._named[name] = f"{start}{number}"
        self.all = list(self._named.values())

    def _bucket(self, key: str) -> int:
        low = self._cache._key_hash(key)[2] & L.MASK32
        bucket: int = low * BUCKETS >> 32
        return bucket

    def __getitem__(self, name: str) -> str:
        return self._named[name]


def scenario(
    fill: Callable[[shmcache.Cache, Clock, Keys], object],
    *,
    timed: bool = False,
    **settings: Any,
) -> Callable[
    [Callable[[shmcache.Cache, Clock, Keys], object]],
    Callable[[shmcache.Cache, Clock, Keys], object],
]:
    """Enter a function as what the dying process of a scenario does."""

    def enter(
        act: Callable[[shmcache.Cache, Clock, Keys], object],
    ) -> Callable[[shmcache.Cache, Clock, Keys], object]:
        name = act.__name__.strip("_")
        SCENARIOS[name] = Scenario(fill, act, {**SMALL, **settings}, timed)
        return act

    return enter


def nothing(_cache: shmcache.Cache, _clock: Clock, _k: Keys) -> None:
    """An empty cache, of which nothing was ever used."""


def some(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    """Five entries, one of them long, and a slot and blocks that were freed."""
    for name in "abcxd":
        cache[k[name]] = f"value of {name}".encode()
    cache[k["y"]] = b"y" * LONG
    del cache[k["d"]]


def brim(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    """As many entries as there may be."""
    for name in "abcdexyz":
        cache[k[name]] = f"value of {name}".encode()


def bulky(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    """Long entries that take all the blocks."""
    for name in "abcdexyz":
        cache[k[name]] = name.encode() * LONG


def numbers(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    """Numbers, and one of them that expires."""
    cache[k["a"]] = 1
    cache[k["b"]] = 2
    cache.set(k["c"], 3, ttl=50)
    cache[k["x"]] = 0.5
    cache[k["h"]] = 0x1122_3344_5566_7788


def mortal(cache: shmcache.Cache, clock: Clock, k: Keys) -> None:
    """Entries that expire, soon and late, and such as do not; eight in all."""
    for name, ttl in (("a", 0.01), ("b", 0.01), ("c", 7), ("d", 7.001), ("x", 5000)):
        cache.set(k[name], f"value of {name}".encode(), ttl=ttl)
    for name in "yz":
        cache[k[name]] = f"value of {name}".encode()
    cache.set(k["e"], b"e" * LONG, ttl=300)


def stale(cache: shmcache.Cache, clock: Clock, k: Keys) -> None:
    """As mortal, at a time when half of them have expired."""
    mortal(cache, clock, k)
    clock.ns += 10_000_000_000


@scenario(nothing)
def set_first(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["a"]] = b"new"


@scenario(nothing)
def set_first_long(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["a"]] = b"n" * LONG


@scenario(some)
def set_new(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["e"]] = b"new"


@scenario(some)
def set_new_long(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["e"]] = b"n" * LONG


@scenario(some)
def set_new_with_ttl(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.set(k["e"], b"new", ttl=60)


@scenario(mortal, timed=True)
def set_into_a_wheel_list(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.set(k["c"], b"new", ttl=7)


@scenario(some)
def overwrite(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["b"]] = b"new"


@scenario(some)
def overwrite_by_larger(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["b"]] = b"n" * LONG


@scenario(some)
def overwrite_by_smaller(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["y"]] = b"new"


@scenario(some)
def overwrite_what_fills_the_cache(
    cache: shmcache.Cache, _clock: Clock, k: Keys
) -> None:
    cache[k["y"]] = b"n" * (31 * 64)


@scenario(mortal, timed=True)
def overwrite_mortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["c"]] = b"new"


@scenario(brim)
def insert_with_eviction(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["f"]] = b"new"


@scenario(bulky)
def insert_with_evictions_for_room(
    cache: shmcache.Cache, _clock: Clock, k: Keys
) -> None:
    cache[k["f"]] = b"n" * (3 * LONG)


@scenario(stale, timed=True)
def insert_with_expired_first(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache[k["f"]] = b"new"


@scenario(stale, timed=True)
def set_over_expired(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.set(k["c"], b"new", ttl=8)


@scenario(some)
def set_many(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.set_many({k["a"]: b"new", k["e"]: b"also new", k["x"]: b"n" * LONG})


@scenario(some)
def set_too_large(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    try:
        cache[k["a"]] = b"n" * 100_000
    except shmcache.EntryTooLarge:
        return


@scenario(some)
def add_absent(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.add(k["e"], b"new")


@scenario(some)
def add_present(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.add(k["a"], b"new")


@scenario(stale, timed=True)
def add_over_expired(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.add(k["a"], b"new")


@scenario(some)
def setdefault(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.setdefault(k["e"], b"new")


@scenario(some)
def replace(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.replace(k["b"], b"new")


@scenario(some)
def cas(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    _, token = cache.gets(k["b"])
    cache.cas(k["b"], b"new", token)


@scenario(numbers)
def incr(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.incr(k["a"], 10)


@scenario(numbers)
def incr_mortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.incr(k["c"], 10)


@scenario(numbers)
def incr_across_blocks(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.incr(k["h"], -0x0101_0101_0101_0101)


@scenario(numbers)
def incr_absent(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.incr(k["d"], 10, initial=5)


@scenario(numbers)
def decr_float(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.decr(k["x"], 0.25, ttl=9)


@scenario(some)
def delete_first_of_chain(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    del cache[k["c"]]


@scenario(some)
def delete_middle_of_chain(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.delete(k["b"])


@scenario(some)
def delete_last_of_chain(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.delete(k["a"])


@scenario(some)
def delete_long(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.delete(k["y"])


@scenario(mortal, timed=True)
def delete_mortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.delete_many([k["a"], k["d"]])


@scenario(some)
def pop(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.pop(k["y"])


@scenario(some)
def touch_that_makes_mortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.touch(k["b"], ttl=60)


@scenario(mortal, timed=True)
def touch_that_makes_immortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.touch(k["c"], ttl=None)


@scenario(mortal, timed=True)
def touch_that_prolongs(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.touch(k["a"], ttl=7)


@scenario(mortal, timed=True)
def touch_that_shortens(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.touch(k["x"], ttl=0.001)


@scenario(mortal, timed=True, sliding=True)
def touch_that_shortens_sliding(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.touch(k["x"], ttl=0.001)


@scenario(some)
def get_that_moves(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get(k["b"])


@scenario(some)
def get_of_the_latest(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get(k["y"])


@scenario(some)
def get_absent(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get(k["z"])


@scenario(stale, timed=True)
def get_expired(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get(k["c"])


@scenario(mortal, timed=True, sliding=True)
def get_sliding(cache: shmcache.Cache, clock: Clock, k: Keys) -> None:
    cache.get(k["e"])


@scenario(some)
def get_many(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get_many([k["a"], k["h"], k["x"]])


@scenario(some)
def peek(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.peek(k["b"])


@scenario(mortal, timed=True)
def time_left(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.ttl(k["c"])


@scenario(some)
def iterate(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    list(cache.items())


@scenario(stale, timed=True)
def sweep(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.sweep()


def cascading(cache: shmcache.Cache, clock: Clock, k: Keys) -> None:
    """As mortal, with entries in the wheel's upper levels that are due soon."""
    mortal(cache, clock, k)
    clock.ns += 299_990_000_000


@scenario(cascading, timed=True)
def sweep_that_cascades(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.sweep()


@scenario(stale, timed=True)
def length(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    len(cache)


@scenario(some)
def clear(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.clear()


@scenario(mortal, timed=True)
def clear_prefix(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.clear(prefix="a")


@scenario(some)
def popitem(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.popitem()


@scenario(stale, timed=True)
def popitem_after_expired(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.popitem()


@scenario(some)
def get_or_set(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.get_or_set(k["e"], lambda: b"new")


@scenario(some)
def get_or_set_that_fails(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    def factory() -> NoReturn:
        raise ZeroDivisionError

    try:
        cache.get_or_set(k["e"], factory)
    except ZeroDivisionError:
        return


@scenario(some)
def check(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache.check()


@scenario(some)
def repair(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache._rebuild_shard(0)


@scenario(mortal, timed=True)
def repair_mortal(cache: shmcache.Cache, _clock: Clock, k: Keys) -> None:
    cache._rebuild_shard(0)


# The scenarios below are about workers, not about shards.

COUNTER = L.ROW_WORDS - 1  # the last counter of a row, which the engine has no use for
COUNTED = 5


@scenario(nothing)
def attach(cache: shmcache.Cache, _clock: Clock, _k: Keys) -> None:
    cache._enter_process()


@scenario(nothing)
def count_and_close(cache: shmcache.Cache, _clock: Clock, _k: Keys) -> None:
    cache._attachment.words[cache._attachment.row + COUNTER] += COUNTED
    cache.close()


@scenario(nothing)
def reap(cache: shmcache.Cache, _clock: Clock, _k: Keys) -> None:
    cache._attachment.reap()


# --- life, line by line -----------------------------------------------------------

LIVES: dict[str, Callable[[str], object]] = {}
PERSISTENT = {**SMALL, "persist": True}


def life(act: Callable[[str], object]) -> Callable[[str], object]:
    """Enter a function as a life during which a process dies."""
    LIVES[act.__name__] = act
    return act


@life
def create_and_leave(name: str) -> None:
    cache = shmcache.Cache(name, **SMALL)
    cache["mine"] = 1
    cache.close()


@life
def create_and_unlink(name: str) -> None:
    cache = shmcache.Cache(name, **SMALL)
    cache.unlink()
    cache.close()


@life
def revive_and_leave(name: str) -> None:
    shmcache.Cache(name, **PERSISTENT).close()


@life
def attach_and_leave(name: str) -> None:
    shmcache.Cache.attach(name).close()


# --- handles, as those who remove them die ----------------------------------------


def replace_own(handles: shmcache.HandleMap) -> None:
    for number in range(2):
        handles.set("own", number)


def close_own(handles: shmcache.HandleMap) -> None:
    handles.set("own", 1)
    handles.close()


HANDLES: dict[str, Callable[[shmcache.HandleMap], object]] = {
    "insert": lambda handles: handles.set("new", "new"),
    "clear": lambda handles: handles.clear(),
    "sweep": lambda handles: handles.sweep(),
    "replace": replace_own,
    "close": close_own,
}


def handle_child(
    handles: shmcache.HandleMap, name: str, steps: int, report: memoryview
) -> None:
    """Be a worker of a map, up to the step at which to die."""
    # No thread, so that the steps are the same each time.
    for module in (_sweeper, shmcache.handles):
        vars(module)["threads_run"] = bool
    handles._state()
    light(handles.registry, Fuse(steps, report))
    HANDLES[name](handles)


# --- the zygote -----------------------------------------------------------------


def child(
    cache: shmcache.Cache, clock: Clock, order: dict[str, Any], report: memoryview
) -> None:
    """Do what a scenario says, up to the step at which to die or stop."""
    fuse = Fuse(order["steps"], report, stops="stop" in order)
    name = order["scenario"]
    keys = Keys(cache)
    if name == "attach":
        light(cache, fuse)  # the scenario is about the row itself
    else:
        cache._enter_process()
        report[1] = cache._attachment.token
        light(cache, fuse)
    SCENARIOS[name].act(cache, clock, keys)


def mortal_child(cache_name: str, name: str, steps: int, report: memoryview) -> None:
    """Run a life, up to the line at which to die."""
    sys.settrace(Tracer(Fuse(steps, report)))
    LIVES[name](cache_name)
    sys.settrace(None)


def answer(pid: int, report: memoryview) -> bool:
    """Wait until a child has ended or stopped, and print what became of it.

    Returns:
        Whether it has stopped.
    """
    _, status = os.waitpid(pid, os.WUNTRACED)
    stopped = os.WIFSTOPPED(status)
    facts = {
        "pid": pid,
        "code": 0 if stopped else os.waitstatus_to_exitcode(status),
        "steps": report[0],
        "token": report[1],
        "stopped": stopped,
    }
    print(json.dumps(facts), flush=True)
    return stopped


def zygote(cache_name: str, mode: str) -> None:
    """Serve orders until the input ends.

    An order is {"scenario", "steps", "now"}, with "stop" if the child is not to die; or
    {"signal"} for the child that was stopped.
    """
    assert not shmcache.compiled
    clock = Clock()
    cache = handles = None
    if mode == "handles":
        handles = shmcache.HandleMap.attach(cache_name, clock=clock)
    elif mode != "life":
        cache = shmcache.Cache.attach(
            cache_name, lock_timeout=1.0, clock=clock if mode == "timed" else None
        )
    report = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    pid, stopped = 0, False
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "signal" in order:
            os.kill(pid, order["signal"])
            stopped = answer(pid, report)
            continue
        clock.ns = order["now"]
        report[0] = report[1] = 0
        pid = os.fork()
        if pid == 0:
            code = FAILED
            try:
                if handles:
                    handle_child(handles, order["scenario"], order["steps"], report)
                elif cache:
                    child(cache, clock, order, report)
                else:
                    mortal_child(cache_name, order["scenario"], order["steps"], report)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        stopped = answer(pid, report)
    if stopped:  # the test failed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for attached in (cache, handles):
        if attached:
            attached.close()


if __name__ == "__main__":
    zygote(sys.argv[1], sys.argv[2])
