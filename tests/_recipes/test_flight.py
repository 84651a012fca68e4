"""Single flight: of all callers that miss one key, one computes; and ``memoize``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import shmcache
from shmcache._recipes.single_flight import Flight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Clock

    MakeCache = Callable[..., shmcache.Cache]

PATIENCE = 60.0


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another process or thread brings about."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if holds():
            return
        pause.wait(0.005)
    pytest.fail("it did not come about in time")


async def until_in_loop(holds: Callable[[], bool]) -> None:
    """The same for a task, while others run."""
    for _ in range(int(PATIENCE / 0.001)):
        if holds():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it did not come about in time")


@pytest.fixture
def cache(make_cache: MakeCache) -> Iterator[shmcache.Cache]:
    """A cache whose in-flight table is empty after the test."""
    made = make_cache()
    yield made
    if not made.closed:
        assert made._fliers(0) == set()
    assert made._attachment.flights == {}


# --- get_or_set -----------------------------------------------------------------


def test_value_is_computed_and_stored_once(cache: shmcache.Cache) -> None:
    """A miss computes and stores, and after it all are hits."""
    calls = Counter[str]()

    def factory() -> list[int]:
        calls["factory"] += 1
        return [1, 2]

    assert [cache.get_or_set("k", factory) for _ in range(3)] == [[1, 2]] * 3
    assert calls["factory"] == 1
    assert cache["k"] == [1, 2]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets) == (3, 1, 1)


def test_none_is_a_result(cache: shmcache.Cache) -> None:
    """A factory that returns None is not asked again."""
    calls: list[int] = []
    for _ in range(3):
        assert cache.get_or_set("k", lambda: calls.append(1)) is None
    assert calls == [1]


def test_ttl_counts_from_the_end_of_the_work(
    make_cache: MakeCache, clock: Clock
) -> None:
    """The result lives for the TTL given, or the cache's, from when it was stored."""
    cache = make_cache(ttl=60, clock=clock)

    def factory() -> int:
        clock.advance(5)
        return 1

    cache.get_or_set("default", factory)
    assert cache.ttl("default") == 60
    cache.get_or_set("own", factory, ttl=7)
    assert cache.ttl("own") == 7
    cache.get_or_set("never", factory, ttl=None)
    assert cache.ttl("never") is None
    clock.advance(7)
    assert cache.get_or_set("own", lambda: 2) == 2


def test_failure_reaches_its_own_caller(cache: shmcache.Cache) -> None:
    """What the factory raises is raised, nothing is stored, and the next one works."""
    errors: list[BaseException] = [ValueError("x"), KeyboardInterrupt(), SystemExit(3)]
    for error in errors:

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            cache.get_or_set("k", fail)
        assert caught.value is error
    assert "k" not in cache
    assert cache.get_or_set("k", lambda: 1) == 1


def test_result_that_cannot_be_stored(cache: shmcache.Cache) -> None:
    """The refusal reaches the caller, and the key is free for the next one."""
    with pytest.raises(shmcache.UnsupportedValue):
        cache.get_or_set("k", object)
    with pytest.raises(shmcache.EntryTooLarge):
        cache.get_or_set("k", lambda: b"x" * (8 << 20))
    assert cache.get_or_set("k", lambda: 1) == 1


def test_factory_may_ask_for_other_keys(cache: shmcache.Cache) -> None:
    """A computation may depend on others."""

    def outer() -> int:
        return int(cache.get_or_set("inner", lambda: 20)) + 1

    assert cache.get_or_set("outer", outer) == 21
    assert (cache["inner"], cache["outer"]) == (20, 21)


def test_factory_that_asks_for_its_own_key(cache: shmcache.Cache) -> None:
    """It is told that it would wait for itself, and the key is free afterwards."""

    def factory() -> Any:
        return cache.get_or_set("k", factory)

    with pytest.raises(shmcache.ReentrantCall, match=r"'k'.*use another key"):
        cache.get_or_set("k", factory)
    assert cache.get_or_set("k", lambda: 1) == 1


@pytest.mark.parametrize("what", ["__exit__", "end"])
def test_exception_out_of_a_signal_handler_at_the_end(
    cache: shmcache.Cache, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """An exception that strikes when a flight is about to end, or ends, does not keep
    anybody from computing the key later."""

    def strike(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Flight, what, strike)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_set("k", lambda: 1)
    cache.delete("k")
    assert cache.get_or_set("k", lambda: 2) == 2


def test_factory_that_stores_the_key_itself(cache: shmcache.Cache) -> None:
    """What the factory returns counts in the end."""
    assert cache.get_or_set("k", lambda: cache.set("k", 1) or 2) == 2  # type: ignore[func-returns-value]
    assert cache["k"] == 2


@pytest.mark.parametrize("key", ["k", b"k", 5, ("k", 1), "", ()])
def test_keys_of_all_kinds(cache: shmcache.Cache, key: Any) -> None:
    """Any key will do."""
    assert cache.get_or_set(key, lambda: 1) == 1
    assert cache.get_or_set(key, lambda: 2) == 1


def test_one_thread_computes(cache: shmcache.Cache) -> None:
    """If many threads miss at once, one computes, and all get its result."""
    going = threading.Event()
    computed: list[int] = []

    def factory() -> object:
        computed.append(1)
        assert going.wait(PATIENCE)
        return {"by": len(computed)}

    with ThreadPoolExecutor(12) as pool:
        results = [pool.submit(cache.get_or_set, "k", factory) for _ in range(12)]
        until(lambda: cache.stats().misses == 12)
        going.set()
        assert [r.result(PATIENCE) for r in results] == [{"by": 1}] * 12
    assert computed == [1]


def test_different_keys_do_not_wait_for_each_other(cache: shmcache.Cache) -> None:
    """While one key is being computed, others are computed too."""
    going = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.get_or_set, "slow", lambda: going.wait(PATIENCE))
        until(lambda: cache.stats().misses == 1)
        assert cache.get_or_set("quick", lambda: 1) == 1
        going.set()
        assert slow.result(PATIENCE) is True


def test_next_thread_computes_after_a_failure(cache: shmcache.Cache) -> None:
    """Each failure reaches one caller, and one success all the others."""
    going = threading.Event()
    turns: list[int] = []

    def factory() -> str:
        turns.append(1)
        assert going.wait(PATIENCE)
        if len(turns) < 4:
            raise ValueError(len(turns))
        return "at last"

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(cache.get_or_set, "k", factory) for _ in range(8)]
        until(lambda: cache.stats().misses == 8)
        going.set()
        errors = [r.exception(PATIENCE) for r in results]
    failed = [error for error in errors if error is not None]
    assert sorted(str(error) for error in failed) == ["1", "2", "3"]
    assert [r.result() for r in results if not r.exception()] == ["at last"] * 5
    assert len(turns) == 4


def test_two_objects_of_one_process(
    make_cache: MakeCache, cache: shmcache.Cache
) -> None:
    """Of callers on two Cache objects of one name, one computes."""
    other = make_cache(cache.name)
    going = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get_or_set, "k", lambda: going.wait(PATIENCE))
        until(lambda: cache.stats().misses == 1)
        with pytest.raises(shmcache.LockTimeout):
            other.get_or_set("k", lambda: 5, timeout=0.01)
        going.set()
        assert first.result(PATIENCE) is True
    assert other.get_or_set("k", lambda: 5) is True


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_timeout(cache: shmcache.Cache, timeout: float) -> None:
    """A caller whose time is up gets LockTimeout, and disturbs nobody."""
    going = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get_or_set, "k", lambda: going.wait(PATIENCE))
        until(lambda: cache.stats().misses == 1)
        with pytest.raises(shmcache.LockTimeout, match=f"'k'.*{os.getpid()}"):
            cache.get_or_set("k", lambda: 5, timeout=timeout)
        going.set()
        assert first.result(PATIENCE) is True
    assert cache.get_or_set("k", lambda: 5, timeout=timeout) is True


def test_timeout_does_not_limit_the_work(cache: shmcache.Cache) -> None:
    """The caller that computes may take longer than its timeout."""
    waiting = threading.Event()
    assert cache.get_or_set("k", lambda: waiting.wait(0.05), timeout=0.01) is False


# --- many processes -------------------------------------------------------------

WORKER = """
import os, sys, shmcache
cache = shmcache.Cache.attach(sys.argv[1])
timeout = float(sys.argv[2]) if len(sys.argv) > 2 else None

def factory():
    print("computing", flush=True)
    order = sys.stdin.readline().strip()
    if order == "fail":
        raise ValueError("as told")
    return os.getpid()

print("ready", flush=True)
for line in sys.stdin:
    try:
        print(cache.get_or_set(line.strip(), factory, timeout=timeout), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
cache.close()
"""


class Worker:
    """A process that computes on demand."""

    def __init__(self, name: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.pid = self.process.pid
        assert self.answer() == "ready"

    def tell(self, line: str) -> None:
        """Give it a key, or in the midst of work an order."""
        print(line, file=self.stdin, flush=True)

    def answer(self) -> str:
        """What it says next."""
        return self.stdout.readline().strip()

    def end(self) -> None:
        """Wait for it to be done."""
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def workers(
    cache: shmcache.Cache,
) -> Iterator[Callable[..., list[Worker]]]:
    """A source of workers on the cache, which end with the test."""
    made: list[Worker] = []

    def start(count: int, *options: str) -> list[Worker]:
        made.extend(Worker(cache.name, *options) for _ in range(count))
        return made[-count:]

    yield start
    for worker in made:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGCONT)
        worker.end()


def misses_are(cache: shmcache.Cache, count: int) -> bool:
    """Whether so many lookups have missed."""
    return cache.stats().misses == count


def speaker(workers: list[Worker]) -> Worker:
    """The first of some workers that sends a message."""
    ready, _, _ = select.select([w.stdout for w in workers], [], [], PATIENCE)
    return next(w for w in workers if w.stdout in ready)


def test_one_process_computes(
    cache: shmcache.Cache, workers: Callable[..., list[Worker]]
) -> None:
    """If several processes miss at once, one computes; all have its result."""
    several = workers(4)
    for round_ in range(3):
        key, missed = f"k{round_}", cache.stats().misses
        for worker in several:
            worker.tell(key)
        winner = speaker(several)
        assert winner.answer() == "computing"
        until(functools.partial(misses_are, cache, missed + 4))
        winner.tell("go on")
        assert [w.answer() for w in several] == [str(winner.pid)] * 4
        assert cache.get_or_set(key, lambda: "again") == winner.pid


def test_next_process_computes_after_a_failure(
    cache: shmcache.Cache, workers: Callable[..., list[Worker]]
) -> None:
    """The exception stays with the process whose factory raised it."""
    several = workers(3)
    for worker in several:
        worker.tell("k")
    first = speaker(several)
    assert first.answer() == "computing"
    until(lambda: cache.stats().misses == 3)
    first.tell("fail")
    assert first.answer() == "ValueError as told"
    others = [w for w in several if w is not first]
    second = speaker(others)
    assert second.answer() == "computing"
    second.tell("go on")
    assert [w.answer() for w in others] == [str(second.pid)] * 2


def test_killed_process_is_replaced(
    cache: shmcache.Cache, workers: Callable[..., list[Worker]]
) -> None:
    """When the one that computes is killed, one of the waiters takes over."""
    several = workers(3)
    for worker in several:
        worker.tell("k")
    left = list(several)
    for _ in range(2):
        winner = speaker(left)
        assert winner.answer() == "computing"
        until(lambda: cache.stats().misses == 3)
        left.remove(winner)
        winner.process.kill()
        winner.process.wait(PATIENCE)
    assert left[0].answer() == "computing"
    left[0].tell("go on")
    assert left[0].answer() == str(left[0].pid)
    assert cache.get_or_set("k", lambda: 0) == left[0].pid


def test_key_of_a_dead_worker_is_free(
    cache: shmcache.Cache, workers: Callable[..., list[Worker]]
) -> None:
    """A caller that comes after the death finds the key free."""
    (worker,) = workers(1)
    worker.tell("k")
    assert worker.answer() == "computing"
    worker.process.kill()
    worker.process.wait(PATIENCE)
    assert cache.get_or_set("k", lambda: 5) == 5


def test_stopped_process_is_not_robbed(
    cache: shmcache.Cache, workers: Callable[..., list[Worker]]
) -> None:
    """A stopped process is alive: others wait for it, and may time out."""
    (winner,), (hasty,) = workers(1), workers(1, "0.1")
    winner.tell("k")
    assert winner.answer() == "computing"
    winner.process.send_signal(signal.SIGSTOP)
    hasty.tell("k")
    said = hasty.answer()
    assert said.startswith("LockTimeout the value of 'k' did not come within 0.1 s")
    assert f"process {winner.pid} " in said
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(cache.get_or_set, "k", lambda: 5)
        until(lambda: cache.stats().misses == 3)
        winner.process.send_signal(signal.SIGCONT)
        winner.tell("go on")
        assert patient.result(PATIENCE) == winner.pid
    assert winner.answer() == str(winner.pid)


CLAIMANT = """
import os, sys, shmcache
cache = shmcache.Cache.attach(sys.argv[1])
cache.check()
for i in range(int(sys.argv[2])):
    _, _, key_hash, shard = cache._key_hash(i)
    assert cache._enter_flight(shard, key_hash, 0) == 0
print("claimed", flush=True)
sys.stdin.read()
if sys.argv[3] == "die":
    os._exit(1)
for i in range(int(sys.argv[2])):
    _, _, key_hash, shard = cache._key_hash(i)
    cache._leave_flight(shard, key_hash)
"""


def test_pairs_of_the_dead_do_not_add_up(cache: shmcache.Cache) -> None:
    """Deaths in the middle of work never fill the in-flight table, because the pairs of
    dead workers are removed."""
    subprocess.run(
        [sys.executable, "-c", CLAIMANT, cache.name, "256", "die"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=PATIENCE,
    )
    assert len(cache._fliers(0)) == 1
    assert cache.get_or_set("k", lambda: 5) == 5


def test_crowd_of_the_living(cache: shmcache.Cache) -> None:
    """If living workers fill the in-flight table, one more caller still computes."""
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMANT, cache.name, "256", "live"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "claimed\n"
        assert cache.get_or_set("k", lambda: 5) == 5
        with pytest.raises(shmcache.LockTimeout):
            cache.get_or_set(7, lambda: 5, timeout=0.01)
        crowd.communicate(timeout=PATIENCE)
    assert crowd.returncode == 0


# --- memoize --------------------------------------------------------------------


def test_memoized_function(cache: shmcache.Cache) -> None:
    """It computes once for each different call, and looks like what it wraps."""
    calls = Counter[Any]()

    @cache.memoize()
    def area(width: int, height: int = 2, *, unit: str = "m") -> str:
        """The area."""
        calls[width, height, unit] += 1
        return f"{width * height} {unit}"

    for _ in range(3):
        assert area(3) == "6 m"
        assert area(3, 3) == "9 m"
        assert area(3, unit="cm") == "6 cm"
    assert set(calls.values()) == {1}
    assert len(calls) == 3
    assert (area.__name__, area.__doc__) == ("area", "The area.")
    assert inspect.signature(area) == inspect.signature(area.__wrapped__)
    assert area.__wrapped__(3) == "6 m"
    assert calls[3, 2, "m"] == 2


def test_cache_key_and_invalidate(cache: shmcache.Cache) -> None:
    """The key of a call is that of its entry, and invalidate removes just that."""

    @cache.memoize()
    def double(x: int) -> int:
        return 2 * x

    assert [double(1), double(2)] == [2, 4]
    assert cache[double.cache_key(1)] == 2
    cache[double.cache_key(1)] = 100
    assert double(1) == 100
    assert double.invalidate(1) is True
    assert double.invalidate(1) is False
    assert [double(1), double(2)] == [2, 4]
    assert cache.clear(double.cache_key(1)[:-1]) == 2


def test_keywords_in_any_order(cache: shmcache.Cache) -> None:
    """The order in which keyword arguments are given does not matter."""
    calls: list[int] = []

    @cache.memoize()
    def f(**options: int) -> int:
        calls.append(1)
        return options["a"] - options["b"]

    assert f(a=1, b=2) == -1
    assert f(b=2, a=1) == -1
    assert f(a=2, b=1) == 1
    assert calls == [1, 1]


DIFFERENT: list[Any] = [
    *("1", b"1", 1, 2, 1.5, -1.5, float("inf"), None, "n", "None", "", b"", (), (1,)),
    *((1, 2), ((1,), 2), ("1",), (None,), ("n",), ("t", 1), ("f", "1.5"), int, str),
    *(10**30, 1e30, "builtins.int", ("c", "builtins.int"), ("kw", "a", 1)),
]


def test_different_arguments_are_told_apart(cache: shmcache.Cache) -> None:
    """No two arguments that differ share a result, whatever they look like."""

    @cache.memoize()
    def show(*args: Any, **kwargs: Any) -> str:
        return repr((args, kwargs))

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    calls = [((value,), {}) for value in DIFFERENT]
    calls += [((), {"a": value}) for value in DIFFERENT]
    calls += [((1, 2), {}), ((1, (2,)), {}), ((), {}), ((1,), {"a": 1})]
    for _ in range(2):
        for args, kwargs in calls:
            assert show(*args, **kwargs) == repr((args, kwargs))


@pytest.mark.parametrize("typed", [False, True])
def test_typed(cache: shmcache.Cache, typed: bool) -> None:
    """1, 1.0 and True are one argument, and three if typed; inside tuples, too."""

    @cache.memoize(typed=typed)
    def kind(x: Any) -> str:
        return repr(x)

    shown = [kind(1), kind(1.0), kind(True), kind((1,)), kind((1.0,)), kind((True,))]
    if typed:
        assert shown == ["1", "1.0", "True", "(1,)", "(1.0,)", "(True,)"]
    else:
        assert shown == ["1", "1", "1", "(1,)", "(1,)", "(1,)"]


@pytest.mark.parametrize(
    "value", [[1], {"a": 1}, {1}, object(), 1j, ([1],), bytearray(b"x")]
)
def test_unsupported_arguments(cache: shmcache.Cache, value: Any) -> None:
    """An argument that cannot be part of a key is named, and nothing is called."""

    @cache.memoize()
    def f(a: Any, b: Any = None) -> None:
        pytest.fail("called")

    with pytest.raises(shmcache.UnsupportedKey, match=r"argument 2 of .*f is a .*key="):
        f(1, value)
    with pytest.raises(shmcache.UnsupportedKey, match="argument b of"):
        f(1, b=value)
    with pytest.raises(shmcache.UnsupportedKey):
        f.invalidate(value)


def test_key_function(cache: shmcache.Cache) -> None:
    """Key makes the key from the arguments, so that any will do."""
    calls: list[int] = []

    @cache.memoize(key=lambda user, **_: user["id"])
    def name(user: dict[str, Any], *, loud: bool = False) -> str:
        calls.append(1)
        return str(user["name"])

    assert name({"id": 5, "name": "Ada"}) == "Ada"
    assert name({"id": 5, "name": "Eve"}, loud=True) == "Ada"
    assert name({"id": 6, "name": "Eve"}) == "Eve"
    assert name.invalidate({"id": 5}) is True
    assert name({"id": 5, "name": "Eve"}) == "Eve"
    assert len(calls) == 3


def test_ttl_of_results(make_cache: MakeCache, clock: Clock) -> None:
    """Results live for the TTL given."""
    cache = make_cache(clock=clock, ttl=60)
    calls: list[int] = []

    @cache.memoize(ttl=5)
    def f() -> int:
        calls.append(1)
        return len(calls)

    assert [f(), f()] == [1, 1]
    clock.advance(5)
    assert [f(), f()] == [2, 2]


def test_exceptions_are_not_remembered(cache: shmcache.Cache) -> None:
    """A call that failed is made again."""
    calls: list[int] = []

    @cache.memoize()
    def f() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ValueError(len(calls))
        return "well"

    for number in ("1", "2"):
        with pytest.raises(ValueError, match=number):
            f()
    assert [f(), f()] == ["well", "well"]


def test_recursion(cache: shmcache.Cache) -> None:
    """A memoized function may call itself."""
    calls = Counter[int]()

    @cache.memoize()
    def fib(n: int) -> int:
        calls[n] += 1
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    assert fib(60) == 1548008755920
    assert set(calls.values()) == {1}


def test_deep_recursion(cache: shmcache.Cache) -> None:
    """It may do so more often than an in-flight table has room."""

    @cache.memoize()
    def depth(n: int) -> int:
        return 1 + depth(n - 1) if n else 0

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        assert depth(280) == 280  # Python 3.12 has a limit of its own on C's stack
    finally:
        sys.setrecursionlimit(limit)


def test_one_thread_computes_a_memoized_call(cache: shmcache.Cache) -> None:
    """If many threads make the same call at once, one computes."""
    going = threading.Event()
    calls: list[int] = []

    @cache.memoize()
    def slow(x: int) -> int:
        calls.append(x)
        assert going.wait(PATIENCE)
        return x + 1

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(slow, 1) for _ in range(6)]
        until(lambda: cache.stats().misses == 6)
        going.set()
        assert [r.result(PATIENCE) for r in results] == [2] * 6
    assert calls == [1]


def test_functions_of_one_name_are_told_apart(cache: shmcache.Cache) -> None:
    """Lambdas, closures and functions made in a loop do not share results."""

    def times(n: int) -> Any:
        @cache.memoize()
        def multiply(x: int) -> int:
            return x * n

        return multiply

    remember = cache.memoize()
    lambdas = remember(lambda x: x + 1), remember(lambda x: x + 2)
    loop = [remember(lambda x, n=n: x + n) for n in (10, 20)]
    assert [f(5) for f in (times(2), times(3), times(2))] == [10, 15, 10]
    assert [f(5) for f in lambdas] == [6, 7]
    assert [f(5) for f in loop] == [15, 25]
    assert times(2).cache_key(5) == times(2).cache_key(5)


class Shop:
    """Something with methods of all kinds."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, city: str) -> None:
        self.city = city

    def price(self, item: str) -> str:
        """A method."""
        self.calls["price"] += 1
        return f"{item} in {self.city}"

    def kind(self, item: str) -> str:
        """For a class method."""
        self.calls["kind"] += 1
        return f"{item} of {self}"


def test_methods(cache: shmcache.Cache) -> None:
    """Results of a method belong to the instance, also if another takes its place."""

    class Local(Shop):
        price = cache.memoize()(Shop.price)

    Shop.calls.clear()
    oslo, rome = Local("Oslo"), Local("Rome")
    for _ in range(2):
        assert oslo.price("tea") == "tea in Oslo"
        assert rome.price("tea") == "tea in Rome"
    assert Shop.calls["price"] == 2
    assert oslo.price.cache_key("tea") != rome.price.cache_key("tea")
    assert oslo.price.invalidate("tea") is True
    assert oslo.price.invalidate("tea") is False
    assert oslo.price.__wrapped__("tea") == "tea in Oslo"
    assert oslo.price.__name__ == "price"
    for i in range(100):  # freed addresses are used again
        assert Local(str(i)).price("tea") == f"tea in {i}"


class Keyed(Shop):
    """Instances that are the same in all processes, by an attribute."""

    @property
    def __cache_key__(self) -> str:
        """What stands for it."""
        return self.city


class KeyedByMethod(Shop):
    """The same by a method."""

    def __cache_key__(self) -> tuple[str, int]:
        """What stands for it."""
        return self.city, 1


@pytest.mark.parametrize("base", [Keyed, KeyedByMethod])
def test_instances_with_a_key(cache: shmcache.Cache, base: type[Shop]) -> None:
    """Instances with equal keys share results; those of other classes do not."""

    class Local(base):  # type: ignore[misc, valid-type]
        price = cache.memoize()(Shop.price)

    class Other(Local):
        pass

    Shop.calls.clear()
    assert Local("Oslo").price("tea") == "tea in Oslo"
    assert Local("Oslo").price("tea") == "tea in Oslo"
    assert Local("Rome").price("tea") == "tea in Rome"
    assert Shop.calls["price"] == 2
    assert Other("Oslo").price("tea") == "tea in Oslo"
    assert Shop.calls["price"] == 3

    @cache.memoize()
    def show(shop: Any) -> str:
        return f"{type(shop).__name__}{shop.city}"

    shops = [Local("Oslo"), Local("Rome"), Other("Oslo"), Local("Oslo")]
    shown = ["LocalOslo", "LocalRome", "OtherOslo", "LocalOslo"]
    assert [show(shop) for shop in shops] == shown


@pytest.mark.parametrize("base", [Shop, Keyed, KeyedByMethod])
def test_class_methods_and_static_methods(
    cache: shmcache.Cache, base: type[Shop]
) -> None:
    """They are memoized below their decorator, a class method for each class."""
    calls: list[str] = []

    class Local(base):  # type: ignore[misc, valid-type]
        @classmethod
        @cache.memoize()
        def make(cls, x: int) -> str:
            calls.append("make")
            return f"{cls.__name__} {x}"

        @staticmethod
        @cache.memoize()
        def double(x: int) -> int:
            calls.append("double")
            return 2 * x

    class Other(Local):
        pass

    for _ in range(2):
        assert [Local.make(1), Local("x").make(1)] == ["Local 1", "Local 1"]
        assert Other.make(1) == "Other 1"
        assert [Local.double(2), Local("x").double(2), Other.double(2)] == [4, 4, 4]
    assert Counter(calls) == {"make": 2, "double": 1}


@pytest.mark.parametrize("wrapper", [classmethod, staticmethod])
def test_memoize_above_a_method_decorator(
    cache: shmcache.Cache, wrapper: Callable[[Any], Any]
) -> None:
    """It is refused with the right order."""
    with pytest.raises(TypeError, match=f"below @{wrapper.__name__}"):
        cache.memoize()(wrapper(Shop.price))


def test_what_is_no_function(cache: shmcache.Cache) -> None:
    """Without a name there is no key that other processes would find."""
    for thing in (functools.partial(Shop.price), 5, None):
        with pytest.raises(TypeError, match="takes a function"):
            cache.memoize()(thing)  # type: ignore[arg-type]


def test_instance_that_cannot_be_watched(cache: shmcache.Cache) -> None:
    """Instances that cannot be told from later ones at the same address are refused."""

    class Slim:
        __slots__ = ()

        @cache.memoize()
        def f(self) -> int:
            return 1

    with pytest.raises(shmcache.UnsupportedKey, match="__cache_key__"):
        Slim().f()


SCRIPT = """
import sys, shmcache
cache = shmcache.Cache.attach(sys.argv[1])

@cache.memoize()
def f(x):
    print("computed", end=" ")
    return x + 1

class C:
    __cache_key__ = "c"
    @cache.memoize()
    def f(self):
        print("computed", end=" ")
        return 5

g = cache.memoize()(lambda x: print("computed", end=" "))
print(f(1), g(3), C().f())
"""


def test_processes_share_results(cache: shmcache.Cache) -> None:
    """What one process computed another one finds."""
    said = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, cache.name],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said == ["computed computed computed 2 None 5", "2 None 5"]


# --- coroutine functions --------------------------------------------------------


def test_memoized_coroutine_function(cache: shmcache.Cache) -> None:
    """If many tasks await the same call at once, one computes."""
    calls: list[int] = []

    @cache.memoize()
    async def slow(x: int) -> int:
        calls.append(x)
        await asyncio.sleep(0)
        return x + 1

    async def main() -> list[Any]:
        return await asyncio.gather(*(slow(i % 2) for i in range(10)))

    assert asyncio.run(main()) == [1, 2] * 5
    assert sorted(calls) == [0, 1]
    assert asyncio.run(main()) == [1, 2] * 5
    assert len(calls) == 2
    assert cache[slow.cache_key(1)] == 2
    assert slow.invalidate(1) is True


def test_coroutine_functions_are_known_as_such(cache: shmcache.Cache) -> None:
    """Frameworks that ask see a coroutine function, bound ones included."""

    class Local:
        @cache.memoize()
        async def f(self) -> int:
            return 1

    @cache.memoize()
    def plain() -> int:
        return 1

    asks = (
        inspect.iscoroutinefunction
        if sys.version_info >= (3, 12)
        else asyncio.iscoroutinefunction
    )
    bound = Local().f
    assert [asks(Local.f), asks(bound), asks(plain)] == [True, True, False]
    assert asyncio.run(bound()) == 1


def test_waiting_leaves_the_loop_free(cache: shmcache.Cache) -> None:
    """While one loop waits for another's result, its other tasks run."""
    computing = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    finish: list[asyncio.Event] = []
    calls: list[int] = []

    @cache.memoize()
    async def slow() -> int:
        calls.append(1)
        finish.append(asyncio.Event())
        loops.append(asyncio.get_running_loop())
        computing.set()
        await asyncio.wait_for(finish[0].wait(), PATIENCE)
        return 7

    async def wait() -> Any:
        waiting = asyncio.ensure_future(slow())
        await until_in_loop(lambda: cache.stats().misses == 2)
        # Only a loop that is not blocked comes here, and only this lets the other one
        # finish.
        loops[0].call_soon_threadsafe(finish[0].set)
        return await waiting

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: asyncio.run(slow()))
        assert computing.wait(PATIENCE)
        assert asyncio.run(wait()) == 7
        assert first.result(PATIENCE) == 7
    assert calls == [1]


def test_cancelled_task_is_replaced(cache: shmcache.Cache) -> None:
    """When the task that computes is cancelled, one that waits computes."""
    calls: list[int] = []

    @cache.memoize()
    async def slow() -> int:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return 8

    async def main() -> int:
        first = asyncio.ensure_future(slow())
        await until_in_loop(lambda: bool(calls))
        second = asyncio.ensure_future(slow())
        await until_in_loop(lambda: cache.stats().misses == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await asyncio.wait_for(second, PATIENCE)

    assert asyncio.run(main()) == 8
    assert len(calls) == 2


def test_cancelled_waiter_disturbs_nobody(cache: shmcache.Cache) -> None:
    """When a task that waits is cancelled, the others go on."""
    calls: list[int] = []

    async def main() -> int:
        go_on = asyncio.Event()

        @cache.memoize()
        async def slow() -> int:
            calls.append(1)
            await go_on.wait()
            return 9

        tasks = [asyncio.ensure_future(slow()) for _ in range(3)]
        await until_in_loop(lambda: cache.stats().misses == 3)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        go_on.set()
        assert await asyncio.wait_for(tasks[0], PATIENCE) == 9
        return await asyncio.wait_for(tasks[2], PATIENCE)

    assert asyncio.run(main()) == 9
    assert calls == [1]


def test_failing_coroutine(cache: shmcache.Cache) -> None:
    """Each failure reaches one task, and one success all the others."""
    calls: list[int] = []

    @cache.memoize()
    async def slow() -> str:
        calls.append(1)
        turn = len(calls)
        await asyncio.sleep(0)
        if turn < 3:
            raise ValueError(turn)
        return "at last"

    async def main() -> list[Any]:
        return await asyncio.gather(*(slow() for _ in range(6)), return_exceptions=True)

    results = asyncio.run(main())
    assert sorted(map(repr, results)) == (
        ["'at last'"] * 4 + ["ValueError(1)", "ValueError(2)"]
    )


def test_coroutine_that_awaits_itself(cache: shmcache.Cache) -> None:
    """A call that would wait for itself is told so, and recursion is possible."""

    @cache.memoize()
    async def same(x: int) -> int:
        return int(await same(x))

    @cache.memoize()
    async def count(n: int) -> int:
        return 1 + await count(n - 1) if n else 0

    with pytest.raises(shmcache.ReentrantCall):
        asyncio.run(same(1))
    assert asyncio.run(count(50)) == 50
