from __future__ import annotations

import ast
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import shmcache
from shmcache import Cache, Cause, ConfigMismatch, HandleMap
from shmcache._format import layout as L
from shmcache._observe.stats_log import log_stats
from shmcache._process.election import Office

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Clock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm")

LOGGER = logging.getLogger("shmcache")
USUAL = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def extras(record: logging.LogRecord) -> dict[str, Any]:
    """What a record carries besides what all do, as JSON tells it."""
    found = {k: v for k, v in record.__dict__.items() if k not in USUAL}
    loaded = json.loads(json.dumps(found))
    assert isinstance(loaded, dict)
    return loaded


class Records(logging.Handler):
    """A handler that keeps the extras of records, each with its level."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        with self.came:
            self.found.append({"level": record.levelname, **extras(record)})
            self.came.notify_all()

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of a kind of event."""
        return [each for each in self.found if each.get("event") == event]

    def wait(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The records of a kind of event, once there are so many."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.of(event)) >= count, 60)
            return self.of(event)


@pytest.fixture
def records() -> Iterator[Records]:
    """What the package logs at any level."""
    handler = Records()
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    yield handler
    LOGGER.setLevel(level)
    LOGGER.removeHandler(handler)


# --- events ---------------------------------------------------------------------


def test_creation_and_attachment(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """A creation is logged at INFO, an attachment at DEBUG with the process."""
    cache = make_cache()
    name = cache.name
    assert records.found == [
        {"level": "INFO", "cache": name, "event": "created"},
        {"level": "DEBUG", "cache": name, "event": "attached", "pid": os.getpid()},
    ]


def test_config_mismatch(make_cache: Callable[..., Cache], records: Records) -> None:
    """Settings that differ are logged as a warning, each as it is and as asked."""
    cache = make_cache(max_entries=10, ttl=5)
    with pytest.raises(ConfigMismatch):
        make_cache(cache.name, max_entries=20, ttl=5)
    (said,) = records.of("config mismatch")
    assert said["level"] == "WARNING"
    assert said["cache"] == cache.name
    assert said["exists"]["max_entries"] == 10
    assert said["asked"]["max_entries"] == 20
    assert "ttl_ns" not in said["asked"]


def test_replacement_and_reuse(
    make_cache: Callable[..., Cache], new_name: Callable[[], str], records: Records
) -> None:
    """What the dead left is logged when it is replaced, or used again."""
    for persist, event in ((False, "replaced"), (True, "rebuilt")):
        name = new_name()
        child = os.fork()
        if child == 0:
            cache = Cache(name, persist=persist)
            cache["a"] = 1
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        cache = make_cache(name, persist=persist)
        (said,) = records.of(event)
        assert (said["level"], said["cache"]) == ("INFO", name)
        if persist:
            assert (said["recovered"], said["dropped"]) == (1, 0)
            cache.unlink()


def test_recovery_and_reaping(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """A takeover from a dead holder is logged as a warning with its facts, and the
    reaping of its row with their number.
    """
    cache = make_cache()
    cache["a"] = 1
    attachment = cache._attachment
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        cache.get("a")
        b = cache._words_of(0)
        # The process dies in its write section, with the permit taken.
        attachment.words[b + L.S_HOLDER] = attachment.token
        attachment.words[b + L.S_SEQ] += 1
        os.write(tell, b"!")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.read(told, 1) == b"!"
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    import posix_ipc

    semaphore = posix_ipc.Semaphore(attachment.names.semaphore(0))
    semaphore.acquire(0)
    semaphore.close()
    cache["b"] = 2
    (said,) = records.of("recovered")
    assert said["level"] == "WARNING"
    assert (said["cache"], said["shard"]) == (cache.name, 0)
    assert (said["dead_pid"], said["rebuilt"], said["dropped"]) == (child, True, 0)
    assert attachment.reap() == 1
    (said,) = records.of("reaped")
    assert (said["level"], said["cache"], said["count"]) == ("INFO", cache.name, 1)


def test_callback_failure(name: str, records: Records) -> None:
    """A callback that raises is logged as an error with key and cause."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with HandleMap(name, max_entries=1, on_evict=fail) as handles:
        handles["a", 1] = object()
        handles["b"] = object()
        (said,) = records.wait("callback failed")
        expected = {"level": "ERROR", "cache": name, "event": "callback failed"}
        assert said == {**expected, "key": "('a', 1)", "cause": "CAPACITY"}


@pytest.mark.once
def test_every_record_has_an_event() -> None:
    """Wherever the package logs, the record carries what happened, in ``extra``."""
    found: dict[str, int] = {"with": 0}
    for path in Path(shmcache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=method)
                ) if method != "isEnabledFor":
                    extra = any(each.arg == "extra" for each in node.keywords)
                    place = "with" if extra else f"{path.name}:{node.lineno}"
                    found[place] = found.get(place, 0) + 1
    assert found.pop("with") > 10
    assert found == {}


# --- evictions ------------------------------------------------------------------


def test_evictions(
    make_cache: Callable[..., Cache], records: Records, clock: Clock
) -> None:
    """At DEBUG each eviction is logged with key and cause, and only evictions."""
    cache = make_cache(max_entries=2, ttl=10, clock=clock)
    for key in ("a", b"b", 3, ("d", 4)):
        cache[key] = 1
    cache[3] = "replaced"
    del cache[3]
    clock.advance(100)
    assert cache.sweep() == 1
    said = records.of("evicted")
    assert {each["level"] for each in said} == {"DEBUG"}
    assert {each["cache"] for each in said} == {cache.name}
    assert [(each["key"], each["cause"]) for each in said] == [
        ("'a'", "CAPACITY"),
        ("b'b'", "CAPACITY"),
        ("('d', 4)", "EXPIRED"),
    ]


def test_expiry_met_by_a_read(
    make_cache: Callable[..., Cache], records: Records, clock: Clock
) -> None:
    """An entry that is found to have expired by a write to its key is logged, too."""
    cache = make_cache(ttl=10, clock=clock)
    cache["a"] = 1
    clock.advance(100)
    assert cache.add("a", 2)
    (said,) = records.of("evicted")
    assert (said["key"], said["cause"]) == ("'a'", "EXPIRED")


def test_evictions_are_noted_only_at_debug(
    make_cache: Callable[..., Cache], clock: Clock
) -> None:
    """By default nothing is noted under the lock, and no function of logging runs in
    any operation, evictions included.
    """
    cache = make_cache(max_entries=2, ttl=10, clock=clock)
    assert not LOGGER.isEnabledFor(logging.DEBUG)
    called: list[str] = []

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and "logging" in frame.f_code.co_filename:
            called.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        for key in range(9):
            cache[key] = key
            cache.get(key)
        clock.advance(100)
        cache.sweep()
    finally:
        sys.setprofile(None)
    assert called == []
    assert cache.stats().evicted == 7
    # Nor was anything noted that would be logged later.
    handler, level = Records(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    try:
        cache._tend(1.0)
        cache["one more"] = 1
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
    assert handler.of("evicted") == []


def test_level_is_heeded_while_the_cache_is_open(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """The level may be changed at any time: from the next sweep on evictions are, or
    are not, logged.
    """
    LOGGER.setLevel(logging.INFO)
    cache = make_cache(max_entries=1)
    cache["a"] = cache["b"] = 1
    assert records.of("evicted") == []
    LOGGER.setLevel(logging.DEBUG)
    cache._tend(1.0)
    cache["c"] = 1
    LOGGER.setLevel(logging.INFO)
    cache._tend(1.0)
    cache["d"] = 1
    assert [each["key"] for each in records.of("evicted")] == ["'b'"]


def test_log_handler_may_use_the_cache(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """Evictions are logged when the lock has been given up: a handler may write to the
    same shard.
    """
    cache = make_cache(max_entries=2, lock_timeout=5)

    class Writing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "key", "") == "'a'":
                cache["written"] = 1

    handler = Writing()
    LOGGER.addHandler(handler)
    try:
        for key in "abc":
            cache[key] = 1
    finally:
        LOGGER.removeHandler(handler)
    assert [each["key"] for each in records.of("evicted")] == ["'a'", "'b'"]
    assert set(cache) == {"c", "written"}


def test_evictions_of_handles(name: str, records: Records) -> None:
    """The eviction of a handle is logged once, by its owner, with the owner's key."""
    with HandleMap(name, max_entries=1) as handles:
        handles["a"] = object()
        handles["b"] = object()
        said = records.wait("evicted")
    expected = {"level": "DEBUG", "cache": name, "event": "evicted"}
    assert said == [{**expected, "key": "'a'", "cause": Cause.CAPACITY.name}]


# --- statistics -----------------------------------------------------------------


def test_log_stats(make_cache: Callable[..., Cache], records: Records) -> None:
    """Statistics are logged again and again, with all fields of Stats and what was
    counted since the last time, until stop().
    """
    cache = make_cache(max_entries=2)
    for key in "abc":
        cache[key] = 1
    cache.get("c")
    cache.get("x")
    with log_stats(0.01, cache) as running:
        first, second, *_ = records.wait("stats", 2)
    assert first["level"] == "INFO"
    assert first["cache"] == cache.name
    stats = first["stats"]
    assert (stats["hits"], stats["misses"], stats["evicted"]) == (1, 1, 1)
    assert (stats["hit_ratio"], stats["workers"]) == (0.5, 1)
    both = {"hits": 1, "misses": 1, "sets": 3, "expired": 0, "evicted": 1}
    assert first["recent"] == both
    assert second["recent"] == dict.fromkeys(both, 0)
    assert not running._thread.is_alive()
    running.stop()


def test_log_stats_at_another_level(
    make_cache: Callable[..., Cache], name: str, records: Records
) -> None:
    """The level is the caller's, and a map's open handles are told."""
    with HandleMap(name, max_entries=2) as handles:
        handles["a"] = object()
        with log_stats(0.01, handles, level=logging.WARNING):
            said = records.wait("stats")[0]
    assert (said["level"], said["open_handles"]) == ("WARNING", 1)


def test_log_stats_reads_nothing_when_switched_off(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """Below the logger's level no statistics are taken, and no office is."""
    cache = make_cache()
    LOGGER.setLevel(logging.WARNING)
    with log_stats(1000, cache) as running:
        running.write()
        child = os.fork()
        if child == 0:
            taken = cache._attachment.lockfile.office_holder(Office.LOGGER) is not None
            os._exit(taken)
        assert os.waitpid(child, 0)[1] == 0
        LOGGER.setLevel(logging.INFO)
        running.write()
        assert len(records.of("stats")) == 1


def test_log_stats_ends_with_its_caches(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """When all caches are closed the thread ends by itself, without a word."""
    cache = make_cache()
    running = log_stats(0.01, cache)
    records.wait("stats")
    cache.close()
    running._thread.join(60)
    assert not running._thread.is_alive()
    assert records.of("not measured") == []


def test_one_process_logs_statistics(
    make_cache: Callable[..., Cache], records: Records
) -> None:
    """Of two processes that ask for statistics one logs them; when it is killed the
    other one does.
    """
    cache = make_cache()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            records.found.clear()
            running = log_stats(0.01, cache)
            records.wait("stats")
            os.write(tell, b"!")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(told, 1) == b"!"
    with log_stats(1000, cache) as running:
        for _ in range(3):
            running.write()
        assert records.of("stats") == []
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        running.write()
        assert len(records.of("stats")) == 1
    os.close(told)
    os.close(tell)


def test_log_stats_and_fork(make_cache: Callable[..., Cache]) -> None:
    """A child that is forked while its parent's thread is inside a log handler finds
    that handler free, has no such thread itself, and may begin one.
    """
    cache = make_cache()
    lock = threading.Lock()
    inside, never = threading.Event(), threading.Event()

    class Slow(Records):
        def emit(self, record: logging.LogRecord) -> None:
            with lock:
                super().emit(record)
                inside.set()
                never.wait(0.05)  # long enough for a fork, if one is possible

    handler = Slow()
    LOGGER.addHandler(handler)
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    try:
        with log_stats(0.001, cache):
            for _ in range(3):
                inside.clear()
                assert inside.wait(60)
                child = os.fork()
                if child == 0:
                    free = lock.acquire(timeout=5)
                    os._exit(0 if free and threading.active_count() == 1 else 1)
                assert os.waitpid(child, 0)[1] == 0
            handler.wait("stats", len(handler.of("stats")) + 1)  # the parent's goes on
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


@pytest.mark.parametrize(
    ("interval", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)],
)
def test_log_stats_checks_its_arguments(
    make_cache: Callable[..., Cache], interval: Any, error: type[Exception]
) -> None:
    """Intervals that make no sense, other levels, and no caches are refused."""
    cache = make_cache()
    with pytest.raises(error, match="interval"):
        log_stats(interval, cache)
    with pytest.raises(TypeError, match="level"):
        log_stats(1, cache, level="INFO")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least"):
        log_stats(1)


def test_evictions_by_several_threads(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """Threads that evict in different shards at once are logged each for itself."""
    caplog.set_level(logging.DEBUG, "shmcache")
    cache = make_cache(max_entries=40, shards=8)
    raised: list[BaseException] = []

    def fill(number: int) -> None:
        try:
            for n in range(300):
                cache[f"{number} {n}"] = n
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert raised == []
    logged = [r for r in caplog.records if getattr(r, "event", "") == "evicted"]
    assert len(logged) == cache.stats().evicted
