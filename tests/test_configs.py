"""Configurations: they are loaded once per host; listeners are told in order."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import pickle
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import configs_app as app
import pytest
from worker_app import Worker, until

from shmcache import Cache, HandleMap, ReentrantCall, UnsupportedValue
from shmcache._format import layout as L
from shmcache._observe.report import report
from shmcache.configs import ConfigCache, ConfigSettings, Version
from shmcache.correlations import CorrelationMap
from shmcache.pools import ConnectionPools, PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def make_configs(new_name: Callable[[], str]) -> Iterator[Callable[..., ConfigCache]]:
    """A factory of ConfigCaches that are closed after the test."""
    made: list[ConfigCache] = []

    def make(loader: Any = None, name: str = "", **more: Any) -> ConfigCache:
        made.append(ConfigCache(name or new_name(), loader, **more))
        return made[-1]

    yield make
    for configs in made:
        assert configs.close()


class Watcher:
    """A watcher that a test tells what it has seen."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed = changed
        self.stops = 0

    def stop(self) -> None:
        """Count."""
        self.stops += 1


def _either(watcher: Any, _: Callable[[], None]) -> Any:
    # What a start() returns that ignores what it is given.
    return watcher


def _ends_with(found: list[Any], value: Any) -> bool:
    return found[-1:] == [value]


def _inside(function: str, thread: threading.Thread) -> bool:
    # Whether a thread is in a function, or in what it calls.
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def _told(worker: Worker, key: str, value: Any) -> bool:
    # Whether a worker's listener was told this value last.
    return [value] == [new.value for _, new in worker.call(app.told, key)[-1:]]


# --- settings -----------------------------------------------------------------------


def test_settings_are_those_promised() -> None:
    """Defaults and presets have the values that users know."""
    assert (1000, 3600.0, 500, 7200.0, 500, 7200.0, 900.0, True) == astuple(
        ConfigSettings()
    )
    assert (500, 1800.0, 100, 3600.0, 100, 3600.0, 600.0, True) == astuple(
        ConfigSettings.conservative()
    )
    assert (5000, 7200.0, 1000, 14400.0, 1000, 14400.0, 300.0, True) == astuple(
        ConfigSettings.high_throughput()
    )


@pytest.mark.parametrize(
    "field", ["max_cached_configs", "max_watchers", "max_listeners"]
)
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (1.0, TypeError), (None, TypeError)]
)
def test_counts_are_validated(field: str, value: Any, error: type[Exception]) -> None:
    """A number that makes no sense is refused by its setting's name."""
    with pytest.raises(error, match=field):
        ConfigSettings(**{field: value})


@pytest.mark.parametrize(
    "field", ["config_cache_ttl", "watcher_ttl", "listener_ttl", "cleanup_interval"]
)
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1.0, ValueError), ("1 h", TypeError)]
)
def test_times_are_validated(field: str, value: Any, error: type[Exception]) -> None:
    """A time that makes no sense is refused by its setting's name."""
    with pytest.raises(error, match=field):
        ConfigSettings(**{field: value})


# --- configurations -----------------------------------------------------------------


def test_loaded_once_until_it_expires(
    make_configs: Callable[..., ConfigCache], clock: Any
) -> None:
    """A configuration is loaded when it is absent, and again after its TTL."""
    loads = itertools.count(1)
    configs = make_configs(lambda key: {"key": key, "load": next(loads)}, clock=clock)
    assert {"key": "a", "load": 1} == configs.get("a")
    assert {"key": "a", "load": 1} == configs.get("a")
    assert 1 == len(configs)
    clock.advance(3601)
    assert "a" not in configs
    assert {"key": "a", "load": 2} == configs.get("a")
    assert configs.invalidate("a")
    assert not configs.invalidate("a")
    assert {"key": "a", "load": 3} == configs.get("a")
    assert 3 == configs.stats().loads


def test_loader_of_the_call(make_configs: Callable[..., ConfigCache]) -> None:
    """A loader given to a call is used in place of the cache's."""
    configs = make_configs()
    with pytest.raises(KeyError):
        configs.get("a")
    assert [1] == configs.get("a", lambda _: [1])
    assert [1] == configs.get("a")
    assert [2] == configs.reload("a", lambda _: [2])
    assert [2] == configs.get("a")


def test_versions_grow(make_configs: Callable[..., ConfigCache], clock: Any) -> None:
    """A key's later version has the higher number, also over removal and expiry."""
    configs = make_configs(lambda key: [key], clock=clock)
    assert configs.version("a") is None
    numbers = []
    for act in (
        lambda: configs.get("a"),
        lambda: configs.set("a", {"x": 1}),
        lambda: (configs.invalidate("a"), configs.get("a")),
        lambda: (clock.advance(4000), configs.get("a")),
        lambda: configs.reload("a"),
    ):
        act()
        version = configs.version("a")
        assert isinstance(version, Version)
        numbers.append(version.number)
    assert numbers == sorted(set(numbers))


def test_failing_loader(make_configs: Callable[..., ConfigCache]) -> None:
    """If a loader raises, its caller gets the exception, it is counted, and the stored
    configuration stays."""

    def fail(key: str) -> Any:
        raise OSError(key)

    configs = make_configs(fail)
    with pytest.raises(OSError, match="a"):
        configs.get("a")
    configs.set("a", {"x": 1})
    with pytest.raises(OSError, match="a"):
        configs.reload("a")
    assert {"x": 1} == configs.get("a")
    assert (0, 2) == (configs.stats().loads, configs.stats().load_failures)


def test_a_load_does_not_overwrite_what_was_set_meanwhile(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A configuration that was set while a load was under way stays, and the load
    returns it."""
    configs = make_configs()

    def overtaken(_: str) -> Any:
        configs.set("a", "set")
        return "loaded"

    assert "set" == configs.get("a", overtaken)
    assert "set" == configs.reload("a", overtaken)
    assert "set" == configs.get("a")


def test_threads_load_once(make_configs: Callable[..., ConfigCache]) -> None:
    """If many threads miss at once, one loads; if many reload at once, two at most."""
    loads: list[str] = []
    barrier = threading.Barrier(8)

    def load(key: str) -> Any:
        loads.append(key)
        time.sleep(0.05)
        return {"load": len(loads)}

    configs = make_configs(load)
    got: list[Any] = []

    def each(call: Callable[[str], Any]) -> None:
        barrier.wait()
        got.append(call("a"))

    def together(call: Callable[[str], Any]) -> None:
        threads = [threading.Thread(target=each, args=(call,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together(configs.get)
    assert [{"load": 1}] * 8 == got
    together(configs.reload)
    assert len(loads) < 9
    assert configs.get("a") == {"load": len(loads)}


def test_a_load_that_comes_too_late_is_none(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A caller that missed, but whose turn comes after another one has loaded, takes
    the other's configuration."""
    configs = make_configs()
    configs.set("a", 1)
    # As ``get`` goes on after its miss.
    assert 1 == configs._load("a", lambda _: 2, 0, None)
    assert 0 == configs.stats().loads


def test_reload_is_not_content_with_an_earlier_load(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A reload that is requested while a load is under way loads again, because the
    source may have changed since that load read it."""
    source = [1]
    inside, go_on = threading.Event(), threading.Event()

    def load(_: str) -> Any:
        value = source[0]
        inside.set()
        go_on.wait(60)
        return value

    configs = make_configs(load)
    got: list[Any] = []
    first = threading.Thread(target=configs.get, args=("a",))
    second = threading.Thread(target=lambda: got.append(configs.reload("a")))
    first.start()
    assert inside.wait(60)
    source[0] = 2
    second.start()
    until("the reload waits", lambda: _inside("_load", second))
    go_on.set()
    first.join()
    second.join()
    assert [2] == got
    assert 2 == configs.get("a")


def test_bad_input_changes_nothing(
    make_configs: Callable[..., ConfigCache], name: str
) -> None:
    """Wrong arguments are refused, and what is there stays."""
    configs = make_configs()
    configs.set("kept", {"x": 1})
    with pytest.raises(ValueError, match="None"):
        configs.get("a", lambda _: None)
    with pytest.raises(ValueError, match="None"):
        configs.set("kept", None)
    with pytest.raises(UnsupportedValue):
        configs.get("a", lambda _: object())
    with pytest.raises(UnsupportedValue):
        configs.set("kept", {"x": object()})
    with pytest.raises(TypeError, match="key"):
        configs.get(["a"], lambda _: 1)
    with pytest.raises(TypeError, match="loader must be callable"):
        configs.get("a", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callback must be callable"):
        configs.subscribe("kept", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_end must be callable"):
        configs.subscribe("kept", print, on_end=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="start must be callable"):
        configs.watch("kept", 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loader"):
        configs.watch("kept", Watcher)
    for bad in (None, object()):
        with pytest.raises(TypeError, match="stop"):
            configs.watch("kept", functools.partial(_either, bad), lambda _: 1)
    with pytest.raises(TypeError, match="ConfigSettings"):
        ConfigCache(name, settings=5)  # type: ignore[arg-type]
    with pytest.raises(ReentrantCall):
        configs.get("a", lambda key: configs.get(key, lambda _: 1))
    assert {"x": 1} == configs.get("kept")
    assert ["kept"] == list(configs.parts()["configs"])
    counts = configs.stats()
    assert (0, 0) == (counts.watchers.entries, counts.listeners.entries)


# --- watchers -----------------------------------------------------------------------


def test_a_watcher_reloads_and_is_stopped_once(
    make_configs: Callable[..., ConfigCache], caplog: pytest.LogCaptureFixture
) -> None:
    """What a watcher reports is loaded; a load that fails is logged, and the former
    configuration stays; the watcher is stopped once."""
    values = iter([{"n": 1}, {"n": 2}])
    configs = make_configs(lambda _: next(values))
    watcher = configs.watch("a", Watcher)
    assert configs.watch("a", Watcher) is watcher
    assert {"n": 1} == configs.get("a")
    watcher.changed()
    assert {"n": 2} == configs.get("a")
    with caplog.at_level(logging.ERROR, "shmcache"):
        watcher.changed()
    assert ["reload failed"] == [r.event for r in caplog.records]  # type: ignore[attr-defined]
    assert {"n": 2} == configs.get("a")
    assert configs.unwatch("a")
    until("stopped", lambda: watcher.stops)
    assert configs.close()
    assert 1 == watcher.stops
    watcher.changed()  # late, and of no consequence


def test_watchers_are_bounded(make_configs: Callable[..., ConfigCache]) -> None:
    """The watcher that was unused for longest is stopped to make room for another;
    getting its configuration is a use."""
    configs = make_configs(lambda key: [key], settings=ConfigSettings(max_watchers=2))
    first = configs.watch("a", Watcher)
    second = configs.watch("b", Watcher)
    configs.get("a")
    configs.watch("c", Watcher)
    until("b is stopped", lambda: second.stops)
    assert (0, 1) == (first.stops, second.stops)


def test_unused_watchers_and_listeners_expire(
    make_configs: Callable[..., ConfigCache], clock: Any
) -> None:
    """A watcher and a group that nobody uses for their time are removed; used ones
    stay."""
    configs = make_configs(lambda key: [key], clock=clock)
    ended: list[str] = []
    watchers = {key: configs.watch(key, Watcher) for key in "ab"}
    listeners = {
        key: configs.subscribe(key, lambda *_: None, on_end=ended.append)
        for key in "ab"
    }
    clock.advance(5000)
    configs.get("a")
    clock.advance(5000)
    configs.sweep()
    until("b has gone", lambda: watchers["b"].stops and ended)
    assert ["b"] == ended
    assert {"a": True, "b": False} == {k: s.active for k, s in listeners.items()}
    assert 0 == watchers["a"].stops
    assert not listeners["b"].cancel()
    assert listeners["a"].cancel()


# --- listeners ----------------------------------------------------------------------


def test_listener_is_told_old_and_new(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A callback gets the version told before, None at first, and the newest."""
    told: list[tuple[str, Version | None, Version]] = []
    configs = make_configs(lambda _: {"n": 0})
    configs.subscribe("a", lambda *change: told.append(change))
    configs.get("a")
    until("the first", lambda: len(told) == 1)
    configs.set("a", {"n": 1})
    until("the second", lambda: len(told) == 2)
    (_, old, first), (key, before, second) = told
    assert ("a", None, first) == (key, old, before)
    assert [{"n": 0}, {"n": 1}] == [first.value, second.value]
    assert first.number < second.number
    configs.set("b", {"n": 2})  # another key
    other: list[Version | None] = []
    configs.subscribe("a", lambda _, old, new: other.extend([old, new]))
    configs.reload("a")
    until("both are told", lambda: len(told) == 3 and len(other) == 2)
    assert second == told[2][1] == other[0]
    assert configs.version("a") == told[2][2] == other[1]
    assert told[2][2].number > second.number


def test_cancelled_listener_is_told_no_more(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """After ``cancel`` another subscription is told, and the cancelled one is not; the
    group goes with the last."""
    configs = make_configs()
    one: list[Any] = []
    two: list[Any] = []
    first = configs.subscribe("a", lambda *change: one.append(change))
    second = configs.subscribe("a", lambda *change: two.append(change))
    assert first.cancel()
    assert not first.cancel()
    configs.set("a", 1)
    until("two is told", lambda: two)
    assert [] == one
    assert 1 == configs.stats().listeners.entries
    assert second.cancel()
    assert 0 == configs.stats().listeners.entries
    third = configs.subscribe("a", lambda *change: one.append(change))
    configs.set("a", 2)
    until("the third is told", lambda: one)
    assert third.active


def test_slow_and_failing_listeners(
    make_configs: Callable[..., ConfigCache], caplog: pytest.LogCaptureFixture
) -> None:
    """A listener that fails is logged and counted, and told the next time; one that is
    slow is told the last version when it has time, and others do not wait for it."""
    configs = make_configs()
    slow: list[Any] = []
    quick: list[Any] = []
    go_on = threading.Event()
    inside = threading.Event()

    def take_time(_: str, __: Any, new: Version) -> None:
        slow.append(new.value)
        inside.set()
        go_on.wait(60)

    def fail(_: str, __: Any, new: Version) -> None:
        quick.append(new.value)
        raise ArithmeticError(new.value)

    configs.subscribe("slow", take_time)
    configs.subscribe("quick", fail)
    configs.set("slow", 0)
    assert inside.wait(60)
    with caplog.at_level(logging.CRITICAL, "shmcache"):
        for n in range(1, 6):
            configs.set("slow", n)
            configs.set("quick", n)
            until("quick is told", functools.partial(_ends_with, quick, n))
    assert [0] == slow
    go_on.set()
    until("slow is told", lambda: slow[-1] == 5)
    assert [0, 5] == slow
    assert [1, 2, 3, 4, 5] == quick
    until("counted", lambda: 5 == configs.stats().listener_failures)
    assert 7 == configs.stats().told


def test_close_is_no_eviction(make_configs: Callable[..., ConfigCache]) -> None:
    """``close`` ends a subscription without ``on_end``, which may subscribe again."""
    configs = make_configs()
    ended: list[str] = []
    subscription = configs.subscribe("a", lambda *_: None, on_end=ended.append)
    assert configs.close()
    assert not subscription.active
    assert not subscription.cancel()
    assert [] == ended


def test_evicted_listener_may_subscribe_again(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """``on_end`` can subscribe again, and the new listener is told of later
    versions."""
    configs = make_configs(settings=ConfigSettings(max_listeners=1))
    told: list[Any] = []

    def again(key: str) -> None:
        configs.subscribe(key, lambda *change: told.append(change[2].value))
        configs.set(key, "news")

    configs.subscribe("a", lambda *_: None, on_end=again)
    configs.subscribe("b", lambda *_: None)
    until("told", lambda: told)
    assert ["news"] == told


def test_listener_may_use_the_configs(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A callback may get, set and subscribe."""
    configs = make_configs(lambda key: [key])
    told: list[Any] = []

    def copy(_: str, __: Any, new: Version) -> None:
        configs.subscribe("copy", lambda *change: told.append(change[2].value))
        configs.set("copy", new.value)
        configs.get("other")

    configs.subscribe("a", copy)
    configs.set("a", {"n": 1})
    until("the copy is told", lambda: told)
    assert [{"n": 1}] == told


def test_a_look_in_the_midst_of_a_write_is_not_the_last(
    make_configs: Callable[..., ConfigCache],
) -> None:
    """A look while a shard is being written to does not count as a look."""
    configs = make_configs()
    cache = configs._configs
    configs.set("a", 1)
    before = configs._listeners.moment(0)
    assert before is not None
    assert configs._listeners.moment(0) == before
    assert configs._listeners.moment(1) != before
    words, at = cache._attachment.words, cache._words_of(0) + L.S_SEQ
    words[at] += 1  # as a writer does after it has taken the lock
    try:
        assert configs._listeners.moment(0) is None
    finally:
        words[at] -= 1
    configs.set("a", 2)
    assert configs._listeners.moment(0) not in (None, before)


# --- several workers ----------------------------------------------------------------


@contextmanager
def workers(
    name: str, folder: Path, count: int, settings: ConfigSettings
) -> Iterator[list[Worker]]:
    """So many processes with one config cache over a folder of TOML files."""
    with ExitStack() as stack:
        found = [stack.enter_context(Worker()) for _ in range(count)]
        for worker in found:
            worker.call(app.open_cache, name, str(folder), settings)
        yield found


def test_one_load_per_host(name: str, tmp_path: Path) -> None:
    """If four workers miss at once, one loads, and all get the same."""
    (tmp_path / "app.toml").write_text("workers = 4\n[db]\nhost = 'db1'\n")
    with workers(name, tmp_path, 4, ConfigSettings()) as all_of_them:
        for worker in all_of_them:
            worker.send(app.get, "app.toml")
        expected = {"workers": 4, "db": {"host": "db1"}}
        assert [expected] * 4 == [worker.receive() for worker in all_of_them]
        assert 1 == len((tmp_path / "loads").read_text().splitlines())
        loads = [worker.call(app.stats).loads for worker in all_of_them]
        assert [0, 0, 0, 1] == sorted(loads)


def test_every_subscriber_is_told_the_last(name: str, tmp_path: Path) -> None:
    """While two workers set a key, each of three is told versions in order, each
    change beginning where the last one ended, and in the end the last one."""
    with workers(name, tmp_path, 3, ConfigSettings()) as all_of_them:
        for worker in all_of_them:
            worker.call(app.subscribe, "a")
        for round_ in range(5):
            for worker in all_of_them[:2]:
                worker.send(app.put, "a", round_ * 100, round_ * 100 + 99)
            for worker in all_of_them[:2]:
                worker.receive()
            last = all_of_them[2].call(app.get, "a")
            for worker in all_of_them:
                until("the last is told", functools.partial(_told, worker, "a", last))
        for worker in all_of_them:
            told = worker.call(app.told, "a")
            assert told[0][0] is None
            assert [new for _, new in told[:-1]] == [old for old, _ in told[1:]]
            numbers = [new.number for _, new in told]
            assert numbers == sorted(set(numbers))
            worker.call(app.close)


def test_listener_groups_are_bounded_over_the_host(name: str, tmp_path: Path) -> None:
    """With room for two groups, a third worker's group evicts the least recently used
    one, which is told so; the other groups are still told of changes."""
    with workers(name, tmp_path, 3, ConfigSettings(max_listeners=2)) as (
        one,
        two,
        three,
    ):
        one.call(app.subscribe, "a")
        two.call(app.subscribe, "a")
        three.call(app.subscribe, "a")
        until("the first has ended", lambda: one.call(app.ended) == ["a"])
        assert [False, True, True] == [
            worker.call(app.active, "a") for worker in (one, two, three)
        ]
        one.call(app.put, "a", 1, 1)
        for worker in (two, three):
            until("told", functools.partial(worker.call, app.told, "a"))
        assert [] == one.call(app.told, "a")


def test_forked_child_listens_for_itself(name: str, tmp_path: Path) -> None:
    """A forked child can change and subscribe, and its parent is told."""
    with workers(name, tmp_path, 1, ConfigSettings()) as (worker,):
        worker.call(app.subscribe, "a")
        assert 0 == worker.call(app.fork_and_put, "a")
        until(
            "the parent is told",
            lambda: (t := worker.call(app.told, "a")) and t[-1][1].value["n"] == 2,
        )
        assert 1 == worker.call(app.stats).listeners.entries
        worker.call(app.close)


def test_groups_of_a_killed_worker_make_room(name: str, tmp_path: Path) -> None:
    """A killed worker's groups are removed by the others."""
    with workers(name, tmp_path, 2, ConfigSettings()) as (one, two):
        one.call(app.subscribe, "a")
        two.call(app.subscribe, "b")
        one.kill()
        until("it has gone", lambda: two.call(app.stats).listeners.entries == 1)
        two.call(app.close)


@pytest.mark.once
def test_a_changed_file_reaches_all_workers(name: str, tmp_path: Path) -> None:
    """A TOML file changes; one worker watches it by watchfiles; all are told, and get
    the new content; the watcher is stopped at the end."""
    pytest.importorskip("watchfiles")
    path = tmp_path / "app.toml"
    path.write_text("n = 1\n")
    with workers(name, tmp_path, 3, ConfigSettings()) as (one, *others):
        one.call(app.watch, "app.toml")
        for worker in (one, *others):
            worker.call(app.subscribe, "app.toml")
            assert {"n": 1} == worker.call(app.get, "app.toml")
        with path.open("r+") as file:  # in one piece: never seen empty
            file.write("n = 2\n")
        for worker in (one, *others):
            until("told", functools.partial(_told, worker, "app.toml", {"n": 2}))
            assert {"n": 2} == worker.call(app.get, "app.toml")
        assert one.call(app.close)
        assert 1 == one.call(app.stopped)
        for worker in others:
            worker.call(app.close)


# --- all three together -------------------------------------------------------------


class _Closable:
    def close(self) -> None:
        """Nothing to do."""


def test_report(make_configs: Callable[..., ConfigCache], new_name: Any) -> None:
    """``report()`` has each open component with the counts of all of its parts, as
    JSON takes them; it leaves out the closed, and those that ask for it."""
    configs = make_configs(lambda key: [key])
    configs.get("a")
    quiet = PoolSettings(enable_pool_metrics=False)
    with (
        ConnectionPools(new_name(), factory=lambda _: _Closable()) as pools,
        CorrelationMap(new_name()) as correlations,
        ConnectionPools(new_name(), settings=quiet) as silent,
        ConnectionPools(pools.name, factory=lambda _: _Closable()) as same,
    ):
        pools.get("server")
        found = json.loads(json.dumps(report()))
        assert {
            pools.name: "ConnectionPools",
            f"{pools.name}#2": "ConnectionPools",
            correlations.name: "CorrelationMap",
            configs.name: "ConfigCache",
        } == {name: part["kind"] for name, part in found.items()}
        assert silent.name not in found
        assert 1 == found[pools.name]["pools"]["host"]["entries"]
        assert 1 == found[configs.name]["loads"]
        for component in (pools, correlations, configs, same):
            assert set(component.parts()) <= set(found[component.name])
    assert [configs.name] == list(report())


def test_parts_and_pickle(make_configs: Callable[..., ConfigCache]) -> None:
    """``parts()`` names its three parts, and a pickled copy is on the same ones."""
    configs = make_configs()
    parts = configs.parts()
    assert ["configs", "watchers", "listeners"] == list(parts)
    assert isinstance(parts["configs"], Cache)
    assert isinstance(parts["watchers"], HandleMap)
    assert isinstance(parts["listeners"], HandleMap)
    assert [] == configs.check()
    configs.set("a", {"n": 1})
    with pickle.loads(pickle.dumps(configs)) as copy:
        assert {"n": 1} == copy.get("a")
        assert configs.clear() == 1
        assert len(copy) == 0


def test_nothing_stays_open_when_a_part_is_refused(
    make_configs: Callable[..., ConfigCache], name: str
) -> None:
    """Other settings than the host's are refused, and what was opened is closed."""
    make_configs(name=name)
    with pytest.raises(ValueError, match="max_entries"):
        ConfigCache(name, settings=ConfigSettings(max_listeners=7))
    assert [name] == list(report())
