from __future__ import annotations

import gzip
import json
import lzma
import os
import pty
import random
import re
import signal
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import psutil
import pytest

from shmcache._format import layout as L
from shmcache.demo.server import python
from shmcache.demo.stop import StopRequest
from shmcache.handles import HandleMap
from shmcache.soak import ledger, main, plot, report
from shmcache.soak.load import Load, Traffic, accesses
from shmcache.soak.options import Options, SoakError
from shmcache.soak.record import Record
from shmcache.soak.run import Host, run
from shmcache.soak.sampling import LIMIT, Process, Sample, names_of
from shmcache.soak.servers import Server
from shmcache.soak.verdict import Judgement, Series, judge, judge_all, theil_sen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import shmcache

MIB = 1 << 20
DEADLINE = 60.0  # s

# A busy machine gives a young worker's memory any shape: what is judged there is not
# its memory, but whether everything adds up.
LENIENT = 1e6


def process(pid: int, age: float, uss: float = 8.0, **more: int) -> Process:
    """A process with so many MiB."""
    counts = {"descriptors": 12, "threads": 2, "handles": 0, "waiting": 0} | more
    size = round(uss * MIB)
    # The same wall clock at which it started, whatever its age.
    return Process(pid, 1000.0 + pid, age, size, size, size, 0, **counts)


def watched(*workers: Callable[[float], Process | None], seconds: int) -> list[Sample]:
    """Samples, a second apart, of workers that are functions of time."""
    shm = {"shmcache-0-x": 4096}
    samples = []
    for t in range(seconds):
        there = [w for worker in workers if (w := worker(t)) is not None]
        samples.append(Sample(float(t), process(1, t), there, shm))
    return samples


def verdicts(samples: list[Sample], **options: Any) -> dict[str, Judgement]:
    """What comes out, by quantity."""
    chosen = Options(seconds=len(samples), warm_up=10.0, **options)
    return {j.quantity: j for j in judge_all(samples, chosen)}


def leaks(samples: list[Sample], **options: Any) -> set[str]:
    """The quantities that leak."""
    return {q for q, j in verdicts(samples, **options).items() if j.leak}


# --- the verdict ----------------------------------------------------------------


@pytest.mark.once
def test_the_slope_is_the_median_over_pairs() -> None:
    """The slope of a line with an outlier is the line's, and tau counts the pairs."""
    line: Series = [(float(t), 3.0 * t) for t in range(20)]
    assert theil_sen([line]) == (3.0, 1.0)
    bent = [*line[:10], (10.0, 1e9), *line[11:]]
    slope, tau = theil_sen([bent])
    assert slope == 3.0
    assert 0.8 < tau < 1.0
    assert theil_sen([[(0.0, 1.0)], []]) == (0.0, 0.0)


@pytest.mark.once
def test_pairs_are_of_one_series() -> None:
    """Flat series at rising levels have no slope: no pair has a point of each."""
    steps: list[Series] = [
        [(float(t), float(level)) for t in range(10 * level, 10 * level + 10)]
        for level in range(5)
    ]
    assert theil_sen(steps) == (0.0, 0.0)


@pytest.mark.once
def test_a_growing_worker_is_a_leak() -> None:
    """20 KiB a second in one of two workers, under noise of 1 MiB, is found."""
    rng = random.Random(1)
    found = leaks(
        watched(
            lambda t: process(2, t, 8 + t * 20 / 1024 + rng.random()),
            lambda t: process(3, t, 8 + t * 20 / 1024 + rng.random()),
            seconds=240,
        )
    )
    assert "a worker's USS" in found


@pytest.mark.once
def test_noise_steps_and_spikes_are_no_leak() -> None:
    """Neither noise, nor a step, nor spikes, nor a fall make a leak."""
    rng = random.Random(2)
    shapes: list[Callable[[float], float]] = [
        lambda _: 8 + rng.random() * 3,
        lambda t: 8 if t < 120 else 12,
        lambda t: 60 if t % 50 == 0 else 8,
        lambda t: 30 - t / 20,
    ]
    for shape in shapes:
        samples = watched(
            lambda t, shape=shape: process(2, t, shape(t)),  # type: ignore[misc]
            seconds=240,
        )
        assert leaks(samples) == set()


def successive(
    life: int, uss: Callable[[int, float], float]
) -> Callable[[float], Process]:
    """A place whose worker is replaced each so many seconds."""
    return lambda t: process(
        100 + int(t) // life, t % life, uss(int(t) // life, t % life)
    )


@pytest.mark.once
@pytest.mark.parametrize("figure", ["uss", "rss"])
def test_memory_grows_when_both_its_figures_do(figure: str) -> None:
    """Pages that cease to be shared, or files read in, are not taken for a leak."""

    def worker(t: float) -> Process:
        return replace(process(2, t), **{figure: round((8 + t) * MIB)})

    samples = watched(worker, seconds=60)
    assert leaks(samples) == set()
    found = verdicts(samples)[f"a worker's {figure.upper()}"]
    assert found.line().startswith("unconfirmed ")
    assert found.growth > 10_000


@pytest.mark.once
def test_workers_that_come_and_go_are_no_leak() -> None:
    """A sawtooth, as recycling makes it of a warm-up of 3 MiB, is flat."""
    grown = successive(40, lambda _, age: 8 + min(3.0, age / 3))
    assert leaks(watched(grown, grown, seconds=400)) == set()


@pytest.mark.once
def test_each_worker_larger_than_the_one_before_is_a_leak() -> None:
    """Workers that are flat, but begin 1 MiB larger each time, are found."""
    handed_down = successive(30, lambda generation, _: 8.0 + generation)
    found = leaks(watched(handed_down, handed_down, seconds=400))
    assert found == {"a window's least mean USS", "a window's least mean RSS"}


@pytest.mark.once
def test_a_leak_shows_through_recycling() -> None:
    """Workers that grow by 100 KiB a second and live 40 s are found."""
    leaking = successive(40, lambda _, age: 8 + age * 100 / 1024)
    assert "a worker's USS" in leaks(watched(leaking, seconds=200))


@pytest.mark.once
@pytest.mark.parametrize(
    ("field", "quantity"),
    [
        ("descriptors", "a worker's descriptors, less its handles"),
        ("threads", "a worker's threads"),
    ],
)
def test_descriptors_and_threads_are_judged(field: str, quantity: str) -> None:
    """One more every ten seconds is found; a handle's descriptor is not one more."""
    samples = watched(
        lambda t: process(2, t, **{field: 12 + int(t) // 10}), seconds=200
    )
    assert leaks(samples) == {quantity}
    with_handles = watched(
        lambda t: process(2, t, descriptors=12 + int(t) // 10, handles=int(t) // 10),
        seconds=200,
    )
    assert leaks(with_handles) == set()


@pytest.mark.once
def test_names_and_bytes_in_shared_memory_are_judged() -> None:
    """A name more every half a minute is found, and so are its bytes."""
    samples = [
        replace(s, shm={f"name-{n}": 4096 for n in range(int(s.t) // 30)})
        for s in watched(lambda t: process(2, t), seconds=240)
    ]
    assert leaks(samples) == {"names in /dev/shm", "bytes in /dev/shm"}


@pytest.mark.once
def test_what_was_too_short_is_not_called_flat() -> None:
    """Workers that never outlive the warm-up are reported as not judged."""
    samples = watched(successive(9, lambda *_: 8.0), seconds=100)
    found = verdicts(samples)["a worker's USS"]
    assert (found.word, found.leak) == ("not judged", False)
    assert "nothing lived long enough" in found.line()


@pytest.mark.once
def test_long_series_are_thinned_by_medians() -> None:
    """A day of samples is judged from a few points, with the slope of all."""
    day: Series = [(float(t), t / 3600) for t in range(86_400)]
    found = judge("x", "KiB", [day], 10.0)
    assert found.points < 200
    assert found.slope == pytest.approx(1.0)
    assert found.leak


# --- what must add up -----------------------------------------------------------


def test_blocks_slots_and_entries_add_up(
    make_cache: Callable[..., shmcache.Cache],
) -> None:
    """Whatever was done, capacity is used and free, and what was stored is accounted
    for."""
    cache = make_cache(max_entries=200, max_bytes=64_000, shards=2, ttl=60)
    rng = random.Random(3)
    for _ in range(3000):
        key = rng.randrange(400)
        what = rng.random()
        if what < 0.7:
            cache.set(key, bytes(rng.randrange(900)))
        elif what < 0.9:
            cache.delete(key)
        elif what < 0.99:
            cache.incr(f"n{key % 9}", initial=0)
        else:
            cache.clear()
    books = ledger.read_books(cache)
    assert books.findings("cache") == []
    geometry = cache._attachment.header.geometry
    assert books.slots.capacity == geometry.slots * 2
    assert books.slots.used == len(cache) == books.entries
    assert books.bytes.capacity == geometry.blocks * 2 * geometry.block_size
    assert books.bytes.used == cache.stats().bytes_used


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("word", "finding"),
    [
        (L.S_FREE_SLOT, "slots are lost"),
        (L.S_FREE_BLOCK, "bytes are lost"),
        (L.S_SETS, "entries were stored"),
    ],
)
def test_what_is_lost_is_found(
    make_cache: Callable[..., shmcache.Cache], word: int, finding: str
) -> None:
    """A free list that was dropped, or a count that is wrong, is a finding."""
    cache = make_cache(max_entries=50, shards=1)
    for key in range(20):
        cache.set(key, b"x" * 100)
    for key in range(10):
        cache.delete(key)
    assert ledger.read_books(cache).findings("cache") == []
    at = cache._words_of(0) + word
    before = cache._attachment.words[at]
    cache._attachment.words[at] = 0
    found = ledger.read_books(cache).findings("cache")
    cache._attachment.words[at] = before
    assert len(found) == 1
    assert finding in found[0]


def test_a_workers_row_says_what_it_has_open(
    name: str,
) -> None:
    """Handles opened less handles closed are those in the map, whose owner is this
    process."""
    closed: list[str] = []
    with HandleMap(
        name, max_entries=10, on_evict=lambda key, *_: closed.append(key)
    ) as handles:
        for n in range(7):
            handles.set(f"k{n}", object())
        handles.discard("k0")
        handles.pop("k1")
        deadline = time.monotonic() + DEADLINE
        registry = handles.registry
        while (row := ledger.read_rows(registry)[os.getpid()]).open != 5:
            assert time.monotonic() < deadline, row
            time.sleep(0.01)
        assert (row.opened, row.closed) == (7, 2)
        assert ledger.owners(registry) == {row.token: 5}
        stats = handles.stats().host
        # Five are open: as if their worker had died, and as if they were lost.
        assert ledger.final_findings(stats, died=5, uncertain=0) == []
        assert "5 are missing" in ledger.final_findings(stats, 0, 0)[0]
        assert "-1 are missing" in ledger.final_findings(stats, 6, 1)[0]
        assert ledger.final_findings(stats, died=0, uncertain=1) == []


@pytest.mark.slow
@pytest.mark.servers
def test_handles_balance_over_violent_deaths() -> None:
    """With workers killed several times a second, opened = closed + died, exactly."""
    options = Options(
        profile="handles",
        seconds=4.5,
        workers=2,
        rate=2000.0,
        kill_every=0.4,
        recycle_every=0.9,
        interval=0.5,
        check_every=1.0,
    )
    with StopRequest() as stop:
        record = Host(options, stop).run()
    assert record.findings == []
    assert record.count("kill") >= 1
    assert record.died > 0
    final = record.final["handles"]
    assert (final.entries, final.slots_used) == (0, 0)
    assert final.opened == final.closed + record.died
    assert final.closed > 0
    assert max(s.caches["handles"].slots_used for s in record.samples) > 10


# --- runs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.servers
def test_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """A clean run with deaths is flat, a leaking one is caught, and the code is 0."""
    assert main(["--self-test"]) == 0
    out = capsys.readouterr().out
    assert "LEAK        a worker's USS" in out
    assert out.count("Flat, and everything adds up.") == 1
    assert "a leak is found, and only a leak" in out


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.parametrize("leak", ["descriptors", "threads"])
def test_a_leak_ends_in_exit_code_1(
    leak: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Workers that lose descriptors or threads are caught, with the evidence."""
    figures = tmp_path / "figures.json"
    options = Options(
        seconds=3.0,
        warm_up=0.5,
        workers=1,
        profile="cache",
        interval=0.2,
        leak=leak,
        tolerance=LENIENT,
        json=str(figures),
    )
    record = run(options)
    assert record.status == 1
    assert [True] == [leak in j.quantity for j in record.leaks]
    assert "LEAK" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert [j["verdict"] for j in written["judgements"]].count("LEAK") == 1
    assert len(written["samples"]) == len(record.samples)


@pytest.mark.slow
@pytest.mark.servers
def test_a_gunicorn_is_run_and_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Under gunicorn workers are killed and recycled, and the reports are whole."""
    pytest.importorskip("gunicorn")
    options = Options(
        server="gunicorn",
        profile="churn",
        seconds=4.5,
        warm_up=1.0,
        workers=2,
        interval=0.25,
        kill_every=1.1,
        recycle_every=1.4,
        tolerance=LENIENT,
        html=str(tmp_path / "report.html"),
        json=str(tmp_path / "report.json"),
    )
    record = run(options)
    assert (record.status, record.findings, record.stopped_by) == (0, [], 0)
    assert record.count("kill") >= 1
    assert record.count("recycle") >= 1
    # Whether one lives long enough to be judged is left to who is killed.
    assert "verything adds up" in report.conclusion(record)
    assert report.conclusion(record) in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 12
    for drawn in plots:
        ET.fromstring(drawn)
    assert "kill at" in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in page
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["conclusion"] == report.conclusion(record)
    sample = figures["samples"][-1]
    assert {"uss", "pss", "rss", "descriptors", "threads"} <= set(sample["workers"][0])
    assert sample["caches"]["cache"]["slots_lost"] == 0


@pytest.mark.slow
@pytest.mark.servers
def test_a_running_tree_is_watched_and_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--pid gives a verdict on somebody else's workers, which live on unharmed."""
    load = Load(name=f"soak-t{os.getpid()}", profile="cache", seed=1, rate=50.0)
    with StopRequest() as stop, Server(2, load, stop) as server:
        before = {w.pid for w in server.workers()}
        options = Options(
            pid=server.master.pid,
            seconds=3.0,
            warm_up=0.5,
            interval=0.25,
            tolerance=LENIENT,
        )
        record = run(options)
        assert {w.pid for w in server.workers()} == before
        assert server.faults() == []
        assert server.end() == []
    assert record.status == 0
    assert {w.pid for s in record.samples for w in s.workers} == before
    assert names_of(load.name) == {}
    assert f"watching {server.master.pid}" in capsys.readouterr().out
    shm = record.samples[-1].shm
    assert [n for n in shm if n.endswith(f"{load.name}-cache")] != []
    with pytest.raises(SoakError, match="no such process"):
        run(options)


@pytest.mark.servers
def test_a_server_that_ends_is_a_finding() -> None:
    """When the master is killed under it, the run ends with a verdict that says so."""
    options = Options(profile="handles", seconds=DEADLINE, workers=1, interval=0.1)

    class Unlucky(Host):
        def sample(self) -> Sample:
            if len(self.record.samples) == 3:
                self._server.master.kill()
            return super().sample()

    with StopRequest() as stop:
        record = Unlucky(options, stop).run()
    assert record.status == 1
    assert [f for f in record.findings if "the server ended unexpectedly" in f] != []
    assert record.seconds < DEADLINE


def ours(pid: int) -> list[str]:
    """What is left of a soak: names in shared memory."""
    return [n for n in os.listdir("/dev/shm") if f"-soak-{pid}-" in n]


@pytest.mark.servers
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_when_it_is_stopped(signum: signal.Signals) -> None:
    """Whether told to end or killed, workers and names go, in good order."""
    command = python("shmcache", "soak", "--seconds=600", "--workers=2")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as soak:
        assert soak.stderr is not None
        line = soak.stderr.readline()  # the first sample has been taken
        assert "2 workers" in line, soak.stderr.read()
        tree = psutil.Process(soak.pid).children(recursive=True)
        assert len(tree) == 3
        assert ours(soak.pid) != []
        soak.send_signal(signum)
        out, err = soak.communicate(timeout=DEADLINE)
    assert psutil.wait_procs(tree, timeout=DEADLINE)[1] == []
    assert ours(soak.pid) == []
    if signum == signal.SIGTERM:
        assert (soak.returncode, "Traceback" in err) == (128 + signum, False)
        assert "stopped early" in out


@pytest.mark.slow
@pytest.mark.servers
def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    """A closed pipe is no traceback: code 141, and nothing is left behind."""
    command = python("shmcache", "soak", "--seconds=2", "--interval=0.1", "--workers=1")
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, text=True
    ) as soak:
        os.close(writer)
        _, err = soak.communicate(timeout=DEADLINE)
    assert soak.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in err
    assert ours(soak.pid) == []


@pytest.mark.slow
@pytest.mark.servers
def test_a_terminal_gets_a_live_line() -> None:
    """On a terminal the progress is drawn in place; the verdict follows it."""
    pytest.importorskip("rich")
    primary, secondary = pty.openpty()
    command = python("shmcache", "soak", "--seconds=3", "--interval=0.2")
    with subprocess.Popen(
        [*command, "--workers=1", f"--tolerance={LENIENT}"],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as soak:
        os.close(secondary)
        drawn = b""
        with suppress(OSError):  # the terminal's other end is closed
            while piece := os.read(primary, 4096):
                drawn += piece
        os.close(primary)
        assert soak.wait(DEADLINE) == 0, drawn
    assert drawn.count(b"1 workers") > 3
    assert b"\x1b[" in drawn
    assert b"everything adds up" in drawn


# --- use ------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pid", "4194305"], "there is no such process"),
        (["--pid", "1", "--kill-every", "9"], "only watches"),
        (["--seconds", "5", "--warm-up", "5"], "leaves nothing"),
        (["--seconds", "5", "--warm-up", "1"], "run at least 11 s"),
        (["--html", "/nowhere/at/all.html"], "name a file in an existing"),
        (["--trace", "/nowhere/at/all.xz"], "name a trace file"),
        (["--trace", "/dev/null"], "there are no accesses in it"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's mistake is reported at once, in one line, with code 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.once
@pytest.mark.parametrize(
    "argument",
    ["--seconds=0", "--seconds=x", "--workers=0", "--kill-every=-1", "--profile=x"],
)
def test_a_wrong_option_is_refused(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option out of its range is refused, by name, with code 2."""
    with pytest.raises(SystemExit) as stop:
        main([argument])
    assert stop.value.code == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


@pytest.mark.once
def test_traces_of_all_three_kinds_are_read(tmp_path: Path) -> None:
    """Numbers come in their order, from text and from 32-bit words; marks do not."""
    numbers = [0, 1, 70_000, 1]
    lines = "*\n" + "".join(f"{n}\n" for n in numbers) + "* end\n"
    plain, zipped, binary = (tmp_path / n for n in ("a.trace", "b.gz", "c.xz"))
    plain.write_text(lines)
    zipped.write_bytes(gzip.compress(lines.encode()))
    binary.write_bytes(lzma.compress(struct.pack(">4I", *numbers)))
    for path in (plain, zipped, binary):
        assert list(islice(accesses(str(path)), 9)) == numbers


@pytest.mark.once
def test_samples_of_a_month_stay_bounded() -> None:
    """Past the limit every second sample goes, and the interval doubles."""
    with StopRequest() as stop:
        host = Host(Options(), stop)
    sample = Sample(0.0, None, [], {})
    t = 0.0
    while t < 10 * LIMIT:
        host._keep(replace(sample, t=t))
        t += host._interval
    kept = [s.t for s in host.record.samples]
    assert host._interval == 16.0
    assert kept == [16.0 * n for n in range(10 * LIMIT // 16)]


@pytest.mark.once
def test_a_broken_run_says_so_everywhere() -> None:
    """A finding is in the exit code, in the text and on the page, escaped."""
    record = Record(Options(), samples=watched(lambda t: process(2, t), seconds=60))
    record.judgements = judge_all(record.samples, record.options)
    assert (record.status, report.conclusion(record)) == (
        0,
        "Flat, and everything adds up.",
    )
    record.findings.append("3 slots are <lost>")
    assert record.status == 1
    assert "BROKEN      3 slots are <lost>" in report.text(record)
    assert "3 slots are &lt;lost&gt;" in report.page(record)


@pytest.mark.once
def test_axes_have_round_steps() -> None:
    """An axis ends at or above the largest value, after at most five even steps."""
    rng = random.Random(4)
    for _ in range(1000):
        most = 10 ** rng.uniform(-3, 10)
        top, step = plot.scale(most)
        assert most <= top * 1.001
        assert 1 <= round(top / step) <= 5
        assert abs(top / step - round(top / step)) < 1e-6
    assert plot.scale(0.0) == (1.0, 1.0)
    assert [plot.short(v) for v in (0, 2.5, 12_000, 3e6)] == ["0", "2.5", "12k", "3M"]


@pytest.mark.once
def test_drawing_less_keeps_the_extremes() -> None:
    """A line of many points keeps its highest and lowest in few."""
    points = [(float(t), 0.0) for t in range(10_000)]
    points[4321], points[8765] = (4321.0, 9.0), (8765.0, -9.0)
    kept = plot.reduced(points, 400)
    assert len(kept) <= 400
    assert {(4321.0, 9.0), (8765.0, -9.0)} <= set(kept)


@pytest.mark.once
def test_a_trace_is_played_round_and_round(name: str, tmp_path: Path) -> None:
    """Keys are the trace's, from a place that the seed chooses, again and again."""
    trace = tmp_path / "a.trace"
    trace.write_text("5\n6\n8\n")
    traffic = Traffic(Load(name, "cache", 1, 100.0, trace=str(trace)), serial=1)
    try:
        played = [next(traffic._numbers) for _ in range(7)]
        traffic.batch()
    finally:
        traffic.close()
    turns = [[5, 6, 8], [6, 8, 5], [8, 5, 6]]
    assert played[:3] in turns
    assert played == [*played[:3], *played[:3], played[0]]
