from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families
from servers import APPS, Kind, Server, UnixConnection

import shmcache
from shmcache import Cache, EntryTooLarge, HandleMap
from shmcache._format import layout as L
from shmcache._process.rows import retire
from shmcache.prometheus import CacheCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Clock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm")

# As they were promised.
EIGHT = {
    "bounded_map_entries": "gauge",
    "bounded_map_hits": "counter",
    "bounded_map_misses": "counter",
    "bounded_map_evictions": "counter",
    "bounded_map_ttl_evictions": "counter",
    "bounded_map_lru_evictions": "counter",
    "bounded_map_cleanup_runs": "counter",
    "bounded_map_cleanup_duration_seconds": "histogram",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def registered(*caches: Any, **options: Any) -> CollectorRegistry:
    """A registry with a collector of these caches alone."""
    registry = CollectorRegistry()
    registry.register(CacheCollector(*caches, **options))
    return registry


def parsed(text: str) -> Samples:
    """All samples of a scrape, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(*caches: Any) -> Samples:
    """All samples that a scrape of caches finds."""
    return parsed(generate_latest(registered(*caches)).decode())


def one(samples: Samples, name: str, **labels: str) -> float:
    """The value of the one sample with this name and these labels, and the cache's."""
    found = [
        value
        for (sample, has), value in samples.items()
        if sample == name and labels.items() <= dict(has).items()
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


# --- names and values -----------------------------------------------------------


def test_eight_names(make_cache: Callable[..., Cache]) -> None:
    """With the prefix bounded_map the eight promised names are there, of their types,
    and so are their samples.
    """
    cache = make_cache(ttl=60)
    text = generate_latest(registered(cache, prefix="bounded_map")).decode()
    families = list(text_string_to_metric_families(text))
    found = {family.name: family.type for family in families}
    assert EIGHT.items() <= found.items()
    assert {name.split("_")[0] for name in found} == {"bounded"}
    samples = {sample.name for family in families for sample in family.samples}
    promised = {f"{n}_total" if t == "counter" else n for n, t in EIGHT.items()}
    promised -= {"bounded_map_cleanup_duration_seconds"}
    parts = {f"bounded_map_cleanup_duration_seconds_{p}" for p in ("sum", "count")}
    assert promised | parts <= samples


def test_values(make_cache: Callable[..., Cache], clock: Clock) -> None:
    """Each number is what happened."""
    cache = make_cache(max_entries=3, max_bytes=64 * 1024, ttl=100, clock=clock)
    for key in "abc":
        cache[key] = key
    assert [cache.get(key) for key in "abx"] == ["a", "b", None]
    clock.advance(5)
    cache["d"] = "d"  # "c" goes, unread and 5 s old
    del cache["a"]
    cache["b"] = "again"
    with pytest.raises(EntryTooLarge):
        cache["large"] = b"x" * 100_000
    clock.advance(200)
    assert cache.sweep() == 2  # "d" and "b", unread since, some 200 s old
    found = scrape(cache)
    expected = {
        "entries": 0,
        "max_entries": 3,
        "hits_total": 2,
        "misses_total": 1,
        "sets_total": 5,
        "ttl_evictions_total": 2,
        "lru_evictions_total": 1,
        "unread_evictions_total": 3,
        "cleanup_runs_total": 1,
        "cleanup_duration_seconds_count": 1,
        "used_bytes": 0,
        "capacity_bytes": cache.stats().bytes_capacity,
        "segment_bytes": cache.stats().segment_bytes,
        "too_large_total": 1,
        "lock_timeouts_total": 0,
        "recoveries_total": 0,
        "dropped_entries_total": 0,
        "workers": 1,
        "eviction_age_seconds_count": 3,
    }
    assert expected == {name: one(found, f"shmcache_{name}") for name in expected}
    causes = {
        cause: one(found, "shmcache_evictions_total", cause=cause, cache=cache.name)
        for cause in ("expired", "capacity")
    }
    assert causes == {"expired": 2, "capacity": 1}
    removed = {
        dict(labels)["cause"]: value
        for (name, labels), value in found.items()
        if name == "shmcache_removals_total"
    }
    others = {"cleared": 0, "owner_died": 0, "closed": 0}
    assert removed == {"deleted": 1, "replaced": 1, **others}


def test_histogram_is_cumulative(
    make_cache: Callable[..., Cache], clock: Clock
) -> None:
    """Ages of 5 s, 5 s and 300 s are counted in every bucket that is wide enough."""
    cache = make_cache(max_entries=1, clock=clock)
    for wait in (5, 5, 300):
        cache[wait] = wait
        clock.advance(wait)
        cache["other"] = wait
        cache.clear()
        clock.advance(1)
    found = scrape(cache)
    name = "shmcache_eviction_age_seconds"
    buckets = {
        dict(labels)["le"]: value
        for (sample, labels), value in found.items()
        if sample == f"{name}_bucket"
    }
    expected = [("1.0", 0), ("10.0", 2), ("60.0", 2), ("600.0", 3), ("3600.0", 3)]
    expected += [("21600.0", 3), ("86400.0", 3), ("604800.0", 3), ("+Inf", 3)]
    assert expected == list(buckets.items())
    assert one(found, f"{name}_count") == 3
    assert abs(one(found, f"{name}_sum") - 310) < 1  # stamps count 67 ms


def test_info(make_cache: Callable[..., Cache]) -> None:
    """The info metric names version, engine, codec and geometry."""
    cache = make_cache(max_entries=7, max_bytes="1 MiB", codec="raw", ttl=2.5)
    ((labels, value),) = (
        (dict(labels), value)
        for (name, labels), value in scrape(cache).items()
        if name == "shmcache_info"
    )
    assert value == 1
    geometry = cache._attachment.header.geometry
    assert labels == {
        "cache": cache.name,
        "version": shmcache.__version__,
        "compiled": str(shmcache.compiled).lower(),
        "codec": "raw",
        "shards": "1",
        "max_entries": "7",
        "max_bytes": "1048576",
        "block_size": str(geometry.block_size),
        "blocks": str(geometry.blocks),
        "ttl_seconds": "2.5",
        "sliding": "false",
        "persist": "false",
    }


def test_several_caches(
    make_cache: Callable[..., Cache], new_name: Callable[[], str]
) -> None:
    """One collector tells caches and maps apart by the label ``cache``."""
    first, second = make_cache(), make_cache()
    first["a"] = second["a"] = second["b"] = 1
    with HandleMap(new_name(), max_entries=4) as handles:
        handles["a"] = object()
        found = scrape(first, second, handles)
        entries = [
            one(found, "shmcache_entries", cache=each.name)
            for each in (first, second, handles)
        ]
        assert entries == [1, 2, 1]
        # What only a map has is told only of maps.
        one(found, "shmcache_handles_opened_total", cache=handles.name)
        with pytest.raises(AssertionError, match="handles_opened"):
            one(found, "shmcache_handles_opened_total", cache=first.name)


def test_component_stands_for_its_parts(new_name: Callable[[], str]) -> None:
    """A ready-made map is measured part by part."""
    pools = pytest.importorskip("shmcache.pools")
    name = new_name()
    with pools.ConnectionPools(name) as component:
        found = scrape(component)
        for part in component.parts().values():
            assert one(found, "shmcache_entries", cache=part.name) == 0


def test_handles_by_state(name: str) -> None:
    """Handles are registered until they are evicted, then closing until the callback
    has ended.
    """
    go_on, inside = threading.Event(), threading.Event()

    def close(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    def states() -> dict[str, float]:
        found = scrape(handles)
        each = ("registered", "closing")
        return {state: one(found, "shmcache_handles", state=state) for state in each}

    with HandleMap(name, max_entries=2, on_evict=close) as handles:
        handles["a"] = object()
        handles["b"] = object()
        assert states() == {"registered": 2, "closing": 0}
        with handles.lease("b"), handles.lease("b"):
            assert one(scrape(handles), "shmcache_leases") == 2
        assert one(scrape(handles), "shmcache_leases") == 0
        handles["c"] = object()
        assert inside.wait(60)
        assert states() == {"registered": 2, "closing": 1}
        go_on.set()
        assert handles._process.delivery.callbacks.wait(60)
        assert states() == {"registered": 2, "closing": 0}
        found = scrape(handles)
        assert one(found, "shmcache_handles_opened_total") == 3
        assert one(found, "shmcache_handles_closed_total") == 1
        assert one(found, "shmcache_callbacks_total") == 1
        assert one(found, "shmcache_callback_failures_total") == 0


def test_handles_of_the_dead_are_not_closing_for_ever(name: str) -> None:
    """Handles that a killed worker held are neither registered nor closing, although
    nobody ever closed them.
    """
    with HandleMap(name, max_entries=9) as handles:
        handles["mine"] = object()
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            handles["a"] = handles["b"] = object()
            with handles.lease("a"):
                os.write(tell, b"!")
                signal.pause()
        assert os.read(told, 1) == b"!"
        os.close(told)
        os.close(tell)
        found = scrape(handles)
        assert one(found, "shmcache_handles", state="registered") == 3
        assert one(found, "shmcache_leases") == 1
        assert one(found, "shmcache_workers") == 2
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        handles.sweep()
        found = scrape(handles)
        assert one(found, "shmcache_handles", state="registered") == 1
        assert one(found, "shmcache_handles", state="closing") == 0
        assert one(found, "shmcache_leases") == 0
        assert one(found, "shmcache_handles_opened_total") == 3
        assert one(found, "shmcache_handles_closed_total") == 0
        assert one(found, "shmcache_workers") == 1


@pytest.mark.once
def test_promtool(make_cache: Callable[..., Cache], name: str) -> None:
    """Prometheus's own tool finds no fault."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed")
    with HandleMap(name, max_entries=4) as handles:
        text = generate_latest(registered(make_cache(ttl=9), handles))
    run = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_openmetrics(make_cache: Callable[..., Cache], name: str) -> None:
    """The strict parser of OpenMetrics takes the other format, too."""
    with HandleMap(name, max_entries=4) as handles:
        registry = registered(make_cache(), handles)
        text = openmetrics.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    families = openmetrics_parser.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    assert {"shmcache", "shmcache_hits", "shmcache_handles"} <= {
        family.name for family in families
    }


def test_description_is_what_is_collected(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """describe() gives the names and types of all that collect() finds."""
    with HandleMap(name, max_entries=4) as handles:
        collector = CacheCollector(make_cache(), handles)
        described = [(family.name, family.type) for family in collector.describe()]
        collected = [(family.name, family.type) for family in collector.collect()]
    assert described == collected
    assert all(not family.samples for family in collector.describe())


# --- what a scrape costs --------------------------------------------------------


class Counting:
    """The words of a segment, with a count of those that were read."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.read = 0
        self.at_read: Callable[[Any], None] = lambda _: None

    def __getitem__(self, at: Any) -> Any:
        """Reads a word, or a slice of them."""
        found = self.words[at]
        self.read += len(found) if isinstance(at, slice) else 1
        self.at_read(at)
        return found

    def __setitem__(self, at: int, value: int) -> None:
        """Writes a word."""
        self.words[at] = value


@pytest.fixture
def counting(make_cache: Callable[..., Cache]) -> Iterator[tuple[Cache, Counting]]:
    """A cache, used already, whose bookkeeping reads through a counter."""
    cache = make_cache(max_entries=10)
    cache["a"] = 1
    assert cache.get("a") == 1
    attachment: Any = cache._attachment
    words = Counting(attachment.words)
    attachment.words = words
    yield cache, words
    attachment.words = words.words
    del words.words  # a view keeps the mapping alive


def test_registering_reads_nothing(counting: tuple[Cache, Counting]) -> None:
    """Registering a collector does not read the segment; a scrape does."""
    cache, words = counting
    registry = registered(cache)
    assert words.read == 0
    generate_latest(registry)
    assert words.read > 0


def die(cache: Cache, row: int, hits: int) -> None:
    """Leaves a row in the state of a worker that was killed after so many hits."""
    attachment = cache._attachment
    words = attachment.words
    at = (L.ROWS_AT + row * L.ROW_SIZE) // 8
    assert words[at + L.R_TOKEN] == 0
    words[L.H_GENERATION] = words[L.H_GENERATION] + 1
    words[at + L.R_PID] = os.getpid()
    words[at + L.R_HITS] = hits
    words[at + L.R_TOKEN] = words[L.H_GENERATION] << 16 | (row + 1)


def cost(cache: Cache, words: Counting) -> tuple[int, int, int]:
    """Return words read, calls of fcntl, and samples, of one scrape."""
    asked = 0

    def count(_: object, event: str, called: object) -> None:
        nonlocal asked
        asked += event == "c_call" and called is fcntl.fcntl

    words.read = 0
    registry = registered(cache)
    sys.setprofile(count)
    try:
        text = generate_latest(registry).decode()
    finally:
        sys.setprofile(None)
    return words.read, asked, len(parsed(text))


def test_ten_thousand_recycled_workers(counting: tuple[Cache, Counting]) -> None:
    """After 10,000 workers a scrape reads as much and is as long as after none, and
    nothing that they counted is lost.
    """
    cache, words = counting
    before = cost(cache, words)
    total = one(scrape(cache), "shmcache_hits_total")
    gone = 0
    while gone < 10_000:
        batch = min(500, 10_000 - gone)
        for row in range(1, batch + 1):
            die(cache, row, hits=row)
            total += row
        # Workers that are dead and not reaped yet count already.
        assert one(scrape(cache), "shmcache_hits_total") == total
        assert cache._attachment.reap() == batch
        gone += batch
        assert one(scrape(cache), "shmcache_hits_total") == total
    assert cost(cache, words) == before
    assert one(scrape(cache), "shmcache_workers") == 1


def test_counters_do_not_fall_while_rows_are_retired(
    counting: tuple[Cache, Counting],
) -> None:
    """If two workers are retired in the middle of a scrape, so that the first copy of
    the retired counters counts again, the scrape misses none of their counts.
    """
    cache, words = counting
    for row in (1, 2, 3, 4):
        die(cache, row, hits=100)
    cache._attachment.reap()
    die(cache, 1, hits=1000)
    die(cache, 2, hits=1000)

    def reap(at: Any) -> None:
        if (
            at == L.RETIRED_AT + L.RETIRED_TOKEN
        ):  # the copy has been read, the rows not yet
            words.at_read = lambda _: None
            assert cache._attachment.reap() == 2

    assert words[L.H_RETIRED] == 0  # the copy that is read, and will count again
    words.at_read = reap
    hits = one(scrape(cache), "shmcache_hits_total")
    assert cache._attachment.tokens() == [cache._attachment.token]  # they were reaped
    assert hits == 1 + 400 + 2000


def test_death_between_retiring_and_clearing(
    counting: tuple[Cache, Counting],
) -> None:
    """A row whose reaper died before clearing it is not counted twice when the next
    reaper begins with another row.
    """
    cache, words = counting
    die(cache, 5, hits=1000)
    die(cache, 3, hits=1000)

    class Killed(BaseException):
        pass

    row = (L.ROWS_AT + 5 * L.ROW_SIZE) // 8
    retired = words[row + L.R_TOKEN]

    class Dying(Counting):
        def __setitem__(self, at: int, value: int) -> None:
            if row < at < row + L.ROW_WORDS:
                raise Killed
            super().__setitem__(at, value)

    cache._attachment.words = Dying(words.words)  # type: ignore[assignment]
    with pytest.raises(Killed):
        retire(cache._attachment.words, 5)
    cache._attachment.words = words  # type: ignore[assignment]
    assert words[row + L.R_TOKEN] == retired
    assert one(scrape(cache), "shmcache_hits_total") == 1 + 2000
    cache._attachment.reap()
    assert one(scrape(cache), "shmcache_hits_total") == 1 + 2000


def test_killed_worker_keeps_its_counts(make_cache: Callable[..., Cache]) -> None:
    """What a worker counted stays when it is killed, before and after it is reaped."""
    cache = make_cache()
    cache["a"] = 1
    child = os.fork()
    if child == 0:
        for _ in range(7):
            cache.get("a")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert one(scrape(cache), "shmcache_hits_total") == 7
    assert cache._attachment.reap() == 1
    assert one(scrape(cache), "shmcache_hits_total") == 7


# --- what can go wrong ----------------------------------------------------------


def test_closed_cache_is_left_out(
    make_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    """A closed cache is left out of the scrape and not opened again, the others are
    reported, and the log says so once.
    """
    cache, closed = make_cache(), make_cache()
    registry = registered(closed, cache)
    closed.close()
    for _ in range(2):
        found = parsed(generate_latest(registry).decode())
        assert one(found, "shmcache_entries") == 0  # of the other alone
    assert closed.closed
    said = [r.__dict__ for r in caplog.records if r.levelno == logging.WARNING]
    assert [(r["event"], r["cache"]) for r in said] == [("not measured", closed.name)]


def test_broken_cache_is_left_out(
    make_cache: Callable[..., Cache],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache that cannot be read is missing from a scrape, and back when it can."""
    cache, broken = make_cache(), make_cache()
    registry = registered(broken, cache)

    class Unreadable:
        def __getitem__(self, at: object) -> int:
            raise OSError(5, "the memory has gone")

    with monkeypatch.context() as patch:
        patch.setattr(broken._attachment, "words", Unreadable())
        found = parsed(generate_latest(registry).decode())
        assert one(found, "shmcache_entries") == 0
        (said,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "the memory has gone" in said.getMessage()
    found = parsed(generate_latest(registry).decode())
    assert one(found, "shmcache_entries", cache=broken.name) == 0


@pytest.mark.parametrize("prefix", ["", "9lives", "a-b", "a b", "ä", "x\n", 3])
def test_prefix_is_checked(make_cache: Callable[..., Cache], prefix: Any) -> None:
    """A prefix that no metric's name can begin with is refused."""
    with pytest.raises(ValueError, match="prefix"):
        CacheCollector(make_cache(), prefix=prefix)


def test_arguments_are_checked(make_cache: Callable[..., Cache]) -> None:
    """No cache, something else, and a cache twice are refused."""
    with pytest.raises(TypeError, match="at least"):
        CacheCollector()
    with pytest.raises(TypeError, match="not 'a cache'"):
        CacheCollector("a cache")  # type: ignore[arg-type]
    cache = make_cache()
    again = make_cache(cache.name)
    with pytest.raises(ValueError, match="two objects"):
        CacheCollector(cache, again)
    assert one(scrape(cache, cache), "shmcache_entries") == 0


@pytest.mark.once
def test_prometheus_client_is_imported_by_its_module_alone() -> None:
    """The package, its caches, maps and logs do without prometheus_client."""
    code = (
        "import sys, shmcache, shmcache.cache, shmcache.handles;"
        "import shmcache._observe.stats_log;"
        "print([m for m in sys.modules if m.startswith('prometheus_client')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


# --- a real server --------------------------------------------------------------


def gunicorn(*options: str) -> Kind:
    """Gunicorn with four workers of the application that serves metrics."""

    def command(address: str, workers: int) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", "metrics_app:application"),
            *("--bind", f"unix:{address}", "--workers", str(workers)),
            *("--chdir", str(APPS), *options),
        ]

    return Kind("gunicorn", command, 4, "" if find_spec("gunicorn") else "gunicorn")


@pytest.fixture
def served(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the cache of a server that is started next."""
    monkeypatch.setenv("METRICS_CACHE", name)
    return name


def fetch(server: Server, path: str) -> tuple[int, str]:
    """The PID of the worker that answered, and the body."""
    connection = UnixConnection(server.address)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        return int(response.headers["X-Worker"]), response.read().decode()
    finally:
        connection.close()


def same(text: str) -> Samples:
    """A scrape's samples but those that change by themselves."""
    own = ("shmcache_age_seconds", "shmcache_cleanup")
    found = parsed(text)
    return {each: found[each] for each in found if not each[0].startswith(own)}


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_any_worker_tells_the_totals_of_the_host(
    served: str, options: tuple[str, ...]
) -> None:
    """Whichever of four gunicorn workers is scraped, the numbers are the same, and
    those of all requests.
    """
    with Server(gunicorn(*options), served) as server:
        workers: set[int] = set()
        lookups = 1  # of the wait for the server
        # Until each worker has counted something.
        while len(workers) < 4:
            pid, _ = fetch(server, f"/put?key=k{len(workers)}")
            workers.add(pid)
            fetch(server, "/get?key=k0")
            if lookups <= 10:  # few enough that none is evicted, and closed later
                fetch(server, f"/hold?key={lookups}")
            lookups += 1
        scrapes: dict[int, Samples] = {}
        for _ in range(2):  # a preloaded worker attaches at its first use or scrape
            scrapes.clear()
            while len(scrapes) < 4:
                pid, text = fetch(server, "/metrics")
                scrapes[pid] = same(text)
        assert set(scrapes) == workers
        first, *others = scrapes.values()
        assert [first] * 3 == others
        found = parsed(text)
        hits = one(found, "shmcache_hits_total", cache=served)
        assert hits + one(found, "shmcache_misses_total", cache=served) == lookups
        handles = f"{served}-handles"
        opened = one(found, "shmcache_handles_opened_total", cache=handles)
        assert opened == min(lookups - 1, 10)
        assert one(found, "shmcache_workers", cache=served) in {4, 5}  # preloaded
        server.stop()


@pytest.mark.slow
@pytest.mark.servers
def test_counters_never_fall_while_workers_are_recycled(
    served: str, make_cache: Callable[..., Cache]
) -> None:
    """From scrape to scrape no counter or bucket falls, though gunicorn replaces each
    worker after a few requests and one is killed; in the end every request counts.
    """
    options = ("--max-requests", "5", "--max-requests-jitter", "3")
    # At times all workers are being replaced; the cache would go with the last one.
    make_cache(served, max_entries=50)
    with Server(gunicorn(*options), served) as server:
        last: Samples = {}
        workers: Counter[int] = Counter()
        lookups = 1
        for turn in range(60):
            answer = server.try_to_ask("get", key="k")
            lookups += answer is not None
            if turn == 30:
                os.kill(server.family()[0].pid, signal.SIGKILL)
            try:
                pid, text = fetch(server, "/metrics")
            except OSError:
                continue  # of the worker that is killed
            workers[pid] += 1
            now = parsed(text)
            counters = (each for each in last if re.search("_(total|bucket)$", each[0]))
            fallen = [each for each in counters if now[each] < last[each]]
            assert fallen == []
            last = now
        assert len(workers) > 8
        found = parsed(fetch(server, "/metrics")[1])
        assert one(found, "shmcache_misses_total", cache=served) == lookups
        server.stop()


# --- the dashboard --------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    """The dashboard that comes with the package."""
    found = json.loads(
        (files("shmcache") / "_observe" / "grafana.json").read_text("utf-8")
    )
    assert isinstance(found, dict)
    return found


def queries(board: dict[str, Any]) -> list[str]:
    """All PromQL of a dashboard."""
    found = [t["expr"] for p in board["panels"] for t in p.get("targets", ())]
    variables = board["templating"]["list"]
    found += [v["query"]["query"] for v in variables if v["type"] == "query"]
    return found


@pytest.mark.once
def test_dashboard_uses_exported_names(
    make_cache: Callable[..., Cache], name: str
) -> None:
    """Every metric that the dashboard asks for is exported, with the labels used."""
    with HandleMap(name, max_entries=4) as handles:
        found = scrape(make_cache(), handles)
    names = {sample for sample, _ in found}
    labels = {label for _, pairs in found for label, _ in pairs}
    used: set[str] = set()
    by: set[str] = set()
    for query in queries(dashboard()):
        used |= set(re.findall(r"\bshmcache_\w+", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            by |= {label.strip() for label in group.split(",")}
    assert used - names == set()
    assert by - labels == set()
    # And it shows what was promised.
    for wanted in (
        *("hits_total", "misses_total", "evictions_total", "recoveries_total"),
        *("eviction_age_seconds_bucket", "lock_wait_seconds_bucket", "used_bytes"),
        *("handles", "callback_failures_total", "workers"),
    ):
        assert f"shmcache_{wanted}" in used


@pytest.mark.once
def test_dashboard_queries_are_promql(tmp_path: Any) -> None:
    """Prometheus's own tool can read every query."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed")
    rules = [
        {"record": f"panel:{i}", "expr": re.sub(r"\$__\w+", "5m", query)}
        for i, query in enumerate(queries(dashboard()))
        if not query.startswith("label_values")
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    run = subprocess.run(
        [promtool, "check", "rules", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


class Traffic:
    """A collector of nothing: a little work before each scrape, and a count of them."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.scrapes = threading.Semaphore(0)

    def collect(self) -> list[Any]:
        """What Prometheus's library calls at a scrape."""
        self._work()
        self.scrapes.release()
        return []


@contextmanager
def prometheus_watching(port: int, folder: Path) -> Iterator[psutil.Process]:
    """A Prometheus that scrapes a port of this machine five times a second."""
    program = shutil.which("prometheus")
    if not program:
        pytest.skip("prometheus is not installed")
    target = {"targets": [f"127.0.0.1:{port}"]}
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [{"job_name": "workers", "static_configs": [target]}],
    }
    path = folder / "prometheus.yml"
    path.write_text(json.dumps(config))
    options = (
        *(f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"),
        *("--web.listen-address=127.0.0.1:0", "--log.level=error"),
    )
    with subprocess.Popen([program, *options]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def answer(prometheus: psutil.Process, query: str) -> list[float]:
    """The values that a Prometheus answers a query with, cache by cache."""
    (port,) = (
        connection.laddr.port
        for connection in prometheus.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )
    asked = urlencode({"query": query})
    with urlopen(f"http://127.0.0.1:{port}/api/v1/query?{asked}", timeout=60) as reply:
        return [float(one["value"][1]) for one in json.load(reply)["data"]["result"]]


@pytest.mark.once
def test_prometheus_answers_the_dashboard(
    make_cache: Callable[..., Cache], name: str, tmp_path: Path
) -> None:
    """A real Prometheus scrapes the metrics, and answers every query of the dashboard
    with figures of what was done.
    """
    cache = make_cache(max_entries=4)
    turns = count()

    def work() -> None:
        for n in range(10):
            cache.set((next(turns), n), n)
            cache.get("absent" if n else next(iter(cache)))
        handles[next(turns)] = object()

    with HandleMap(name, max_entries=4) as handles:
        traffic = Traffic(work)
        registry = CollectorRegistry()
        registry.register(traffic)
        registry.register(CacheCollector(cache, handles))
        httpd, serving = start_http_server(0, "127.0.0.1", registry)
        try:
            with prometheus_watching(httpd.server_port, tmp_path) as prometheus:
                # When a scrape begins, those before it have been stored.
                for _ in range(6):
                    assert traffic.scrapes.acquire(timeout=60)
                for query in queries(dashboard()):
                    if not query.startswith("label_values"):
                        asked = query.replace("$__rate_interval", "1m")
                        assert answer(prometheus, asked.replace("$cache", ".+")), query
                entries = f'shmcache_entries{{cache="{cache.name}"}}'
                assert [4.0] == answer(prometheus, entries)
                ratio = queries(dashboard())[0].replace("$__rate_interval", "1m")
                found = answer(prometheus, ratio.replace("$cache", cache.name))
                assert [pytest.approx(0.1)] == found
        finally:
            httpd.shutdown()
            serving.join()
            httpd.server_close()


@pytest.mark.once
def test_dashboard_is_in_order() -> None:
    """Panels have different numbers, do not overlap, fit the grid, and ask the chosen
    source about the chosen caches.
    """
    board = dashboard()
    panels = board["panels"]
    assert len(panels) == len({panel["id"] for panel in panels})
    cells: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update(
            (at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])
        )
    assert max(cells.values()) == 1
    assert ["datasource", "cache"] == [v["name"] for v in board["templating"]["list"]]
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            for selector in re.findall(r"shmcache_\w+(\{[^}]*\})?", target["expr"]):
                assert 'cache=~"$cache"' in selector
