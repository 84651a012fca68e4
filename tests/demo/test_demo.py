"""The demo as a user runs it: what it measures, what it says, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import psutil
import pytest

import shmcache
from shmcache import cli
from shmcache.demo import app, hooks
from shmcache.demo.load import zipf
from shmcache.demo.modules import MODULES
from shmcache.demo.report import Phase, conclusion, table

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_gunicorn = pytest.mark.skipif(
    find_spec("gunicorn") is None,
    reason="gunicorn is not installed: pip install 'shmcache[demo]'",
)

SHM = "/dev/shm"
PATIENCE = 60.0  # s
DEMO = (sys.executable, "-m", "shmcache", "demo")
DICTS, SHARED = "a dict in each worker", "one shared cache"  # as the progress says


def left_in_shm(pid: int) -> list[str]:
    """Names in shared memory of the demo that was this process."""
    name = f"shmcache-{os.getuid()}-demo-{pid}"
    pattern = re.compile(rf"(sem\.)?{re.escape(name)}(\.\w+)?")
    return [entry for entry in os.listdir(SHM) if pattern.fullmatch(entry)]


def survivors(pid: int) -> list[psutil.Process]:
    """Processes of gunicorns that were started by this process."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(hooks.PARENT) == str(pid):
                found.append(process)
    return found


@contextmanager
def demo(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A running demo in a session of its own; killed if it is still there after."""
    # Tests in the background or under nohup have these ignored; children inherit that.
    signals = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(signum, signal.default_int_handler) for signum in signals]
    try:
        process = subprocess.Popen(
            [*DEMO, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(stream: IO[str] | None, text: str) -> str:
    """The line of a stream that contains the text."""
    assert stream is not None
    seen = ""
    for line in stream:
        if text in line:
            return line
        seen += line
    pytest.fail(f"{text!r} did not come, but: {seen}")


def get(url: str) -> tuple[str, dict[str, str]]:
    """The body and the headers of a page."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return answer.read().decode(), dict(answer.headers)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], int]:
    """A demo that ran to its end: what it said, its figures, its PID."""
    figures = tmp_path_factory.mktemp("demo") / "figures.json"
    with demo("--seconds", "4", "--json", str(figures)) as process:
        out, err = process.communicate(timeout=PATIENCE)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert done.returncode == 0, err
    return done, json.loads(figures.read_text()), process.pid


Finished = tuple[subprocess.CompletedProcess[str], dict[str, Any], int]


@pytest.mark.slow
@needs_gunicorn
@pytest.mark.servers
class TestFinished:
    """One demo that ran to its end."""

    def test_requests_are_the_same(self, finished: Finished) -> None:
        """Both servers answered the same number of requests, without an error."""
        _, figures, _ = finished

        assert 0 < figures["separate"]["requests"] == figures["shared"]["requests"]
        assert figures["separate"]["errors"] == figures["shared"]["errors"] == 0

    def test_every_request_is_accounted_for(self, finished: Finished) -> None:
        """Each answer was rendered, an own hit, or a hit on another worker's page."""
        _, figures, _ = finished
        for phase in (figures["separate"], figures["shared"]):
            parts = phase["rendered"] + phase["own_hits"] + phase["cross_hits"]

            assert parts == phase["requests"]

    def test_shared_pages_are_rendered_once(self, finished: Finished) -> None:
        """With the shared cache each page that was asked for was rendered once."""
        _, figures, _ = finished
        asked = zipf(MODULES, figures["shared"]["requests"])

        assert len(set(asked)) == figures["shared"]["rendered"]
        assert len(set(asked)) == figures["cache"]["entries"]
        assert len(set(asked)) <= figures["separate"]["rendered"]

    def test_workers_serve_pages_of_others(self, finished: Finished) -> None:
        """Hits on another worker's page occur with the shared cache, and only there."""
        _, figures, _ = finished

        assert figures["shared"]["cross_hits"] > 0
        assert figures["separate"]["cross_hits"] == 0

    def test_output_is_table_and_conclusion(self, finished: Finished) -> None:
        """Standard output is the table and the conclusion of the figures, no more."""
        done, figures, _ = finished
        phases = [Phase(**figures[key]) for key in ("separate", "shared")]
        expected = f"{table(*phases)}\n\n{figures['conclusion']}"

        assert expected.split() == done.stdout.split()
        assert conclusion(*phases) == figures["conclusion"]

    def test_progress_is_lines_in_a_pipe(self, finished: Finished) -> None:
        """Without a terminal the progress is plain lines, without control codes."""
        done, _, _ = finished

        assert DICTS in done.stderr
        assert SHARED in done.stderr
        assert done.stderr.replace("\n", "").isprintable()

    def test_nothing_is_left(self, finished: Finished) -> None:
        """A demo that ran to its end leaves nothing in shared memory."""
        _, _, pid = finished

        assert left_in_shm(pid) == []


@pytest.mark.slow
@needs_gunicorn
@pytest.mark.servers
@pytest.mark.parametrize("moment", [DICTS, SHARED])
@pytest.mark.parametrize("how", ["SIGINT", "SIGINT to the group", "SIGTERM", "SIGHUP"])
def test_stopped_demo_leaves_nothing(how: str, moment: str) -> None:
    """Stopped under load, it ends all its processes, then itself, without a trace."""
    signum = signal.Signals[how.partition(" ")[0]]
    with demo("--seconds", "3", "--workers", "2", "--serve") as process:
        read_until(process.stderr, moment)
        (os.killpg if "group" in how else os.kill)(process.pid, signum)
        out, err = process.communicate(timeout=PATIENCE)

    assert survivors(process.pid) == []
    assert left_in_shm(process.pid) == []
    # On a machine too busy to let us hit the moment, it was serving by then.
    assert (0 if "Serving" in out else 128 + signum) == process.returncode
    assert "Traceback" not in err


@pytest.mark.slow
@needs_gunicorn
@pytest.mark.servers
def test_killed_demo_takes_its_workers_along() -> None:
    """After kill -9 of the demo gunicorn ends by itself, and the last worker cleans."""
    with demo("--serve", "--seconds", "0", "--workers", "2") as process:
        read_until(process.stdout, "http://")
        below = survivors(process.pid)
        process.kill()

        assert len(below) == 3
        assert psutil.wait_procs(below, PATIENCE)[1] == []
    assert left_in_shm(process.pid) == []


@pytest.mark.slow
@needs_gunicorn
@pytest.mark.servers
def test_serve() -> None:
    """With --serve the pages, the index and the statistics can be looked at."""
    with demo("--serve", "--seconds", "0", "--workers", "2") as process:
        line = read_until(process.stdout, "http://")
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", line)
        index, _ = get(url)
        rendered, first = get(f"{url}json.html")
        again, second = get(f"{url}json.html")
        stats, _ = get(f"{url}stats")
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            get(f"{url}antigravity.html")
        refused.value.close()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)

    assert all(f'"/{name}.html"' in index for name in MODULES)
    assert "JSON (JavaScript Object Notation)" in rendered.replace("&nbsp;", " ")
    assert rendered == again
    assert first["X-Page"] == "rendered"
    same = first["X-Worker"] == second["X-Worker"]
    assert second["X-Page"] == ("own" if same else "other")
    assert json.loads(stats)["entries"] == 1
    assert process.returncode == 0
    assert left_in_shm(process.pid) == []


@pytest.mark.slow
@needs_gunicorn
@pytest.mark.servers
def test_two_demos_at_once() -> None:
    """Two demos at a time have their own ports and caches."""
    options = ("--serve", "--seconds", "0", "--workers", "1")
    with demo(*options) as one, demo(*options) as two:
        for process in (one, two):
            url = read_until(process.stdout, "http://").split()[2]
            _, headers = get(f"{url}json.html")

            assert headers["X-Page"] == "rendered"
        for process in (one, two):
            process.terminate()
            process.communicate(timeout=PATIENCE)
    assert left_in_shm(one.pid) + left_in_shm(two.pid) == []


@pytest.mark.once
def test_modules_import_quietly() -> None:
    """All modules of the list exist here; importing them prints and starts nothing."""
    code = (
        "import threading; from shmcache.demo.modules import usable; "
        "print(*usable()); print(threading.active_count())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    names, threads = run.stdout.splitlines()

    assert list(MODULES) == names.split()
    assert len(set(MODULES)) == 200
    assert threads == "1"
    assert run.stderr == ""


@pytest.mark.once
def test_zipf_is_reproducible() -> None:
    """The same requests come every time, and popularity falls as Zipf says."""
    names = zipf(MODULES, 20_000)
    counts = sorted((names.count(name) for name in MODULES), reverse=True)

    assert names[:1000] == zipf(MODULES, 1000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)


@pytest.mark.once
def test_process_cache_is_bounded() -> None:
    """The dict to compare with drops the least recently used page when full."""
    cache = app.ProcessCache()
    made = []

    def get(key: str) -> None:
        def factory() -> app.Page:
            made.append(key)
            return {"body": b"", "worker": 1}

        cache.get_or_set(key, factory)

    keys = [str(number) for number in range(app.MAX_ENTRIES)]
    for key in [*keys, "0", "new", "0", "1"]:
        get(key)

    assert [*keys, "new", "1"] == made


@pytest.mark.once
def test_process_cache_is_bounded_in_bytes() -> None:
    """The dict to compare with drops pages when they are too many bytes together."""
    cache = app.ProcessCache()
    half: app.Page = {"body": bytes(app.MAX_BYTES // 2), "worker": 1}
    other: app.Page = {"body": b"made again", "worker": 1}
    for key in "abc":
        cache.get_or_set(key, lambda: half)

    assert cache.get_or_set("c", lambda: other) == half
    assert cache.get_or_set("b", lambda: other) == half
    assert cache.get_or_set("a", lambda: other) == other


FIGURES = Phase(
    requests=1000,
    errors=0,
    seconds=2.0,
    rendered=100,
    own_hits=300,
    cross_hits=600,
    requests_per_second=500.0,
    median_ms=1.0,
    p99_ms=20.0,
    workers_pss_bytes=50 << 20,
    segment_bytes=10 << 20,
)
SEPARATE = replace(
    FIGURES,
    seconds=4.0,
    rendered=400,
    own_hits=600,
    cross_hits=0,
    workers_pss_bytes=80 << 20,
    segment_bytes=0,
)


@pytest.mark.once
class TestConclusion:
    """The one sentence at the end."""

    def test_says_what_the_figures_say(self) -> None:
        """Renderings, time and memory are compared, the segment counted in."""
        sentence = conclusion(SEPARATE, FIGURES)

        assert "600 of 1,000 requests" in sentence
        assert "75% fewer renderings, 50% less time and 25% less memory" in sentence

    def test_says_it_when_it_is_worse(self) -> None:
        """If sharing costs more time and memory, the sentence says so."""
        worse = replace(FIGURES, seconds=6.0, workers_pss_bytes=110 << 20)

        assert "50% more time and 50% more memory" in conclusion(SEPARATE, worse)

    def test_does_not_make_much_of_little(self) -> None:
        """Figures that differ by less than two runs might are reported as equal."""
        alike = replace(FIGURES, seconds=3.8, workers_pss_bytes=72 << 20)

        assert "the same time and about the same memory" in conclusion(SEPARATE, alike)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"errors": 1}, "1 requests failed"),
            ({"requests": 99}, "too few"),
            ({"cross_hits": 0}, "sharing gained nothing"),
        ],
    )
    def test_claims_nothing(self, change: dict[str, int], expected: str) -> None:
        """After errors, few requests or no shared hit nothing is claimed."""
        sentence = conclusion(SEPARATE, replace(FIGURES, **change))

        assert expected in sentence
        assert "%" not in sentence

    def test_unknown_memory_is_left_out(self) -> None:
        """If PSS cannot be read, the sentence does not mention memory."""
        unknown = replace(FIGURES, workers_pss_bytes=None)

        assert "memory" not in conclusion(SEPARATE, unknown)
        assert "unknown" in table(SEPARATE, unknown)


@pytest.mark.once
class TestCommandLine:
    """The shmcache command."""

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("nonsense",),
            ("demo", "--workers", "0"),
            ("demo", "--workers", "many"),
            ("demo", "--seconds", "nan"),
            ("demo", "--seconds", "-1"),
            ("demo", "--seconds", "0"),
            ("demo", "--json", "/nowhere/figures.json"),
            ("demo", "--json", "/"),
        ],
        ids=" ".join,
    )
    def test_mistake_is_one_line(self, arguments: tuple[str, ...]) -> None:
        """A user's mistake is one line on stderr and exit code 2, nothing else."""
        run = subprocess.run(
            [sys.executable, "-m", "shmcache", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

        assert run.returncode == 2
        assert re.fullmatch(r"shmcache.*: .+\n", run.stderr)
        assert run.stdout == ""

    def test_missing_gunicorn_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without gunicorn the demo says what to install."""
        monkeypatch.setitem(sys.modules, "gunicorn", None)
        code = cli.main(["demo"])
        out, err = capsys.readouterr()

        assert code == 2
        assert out == ""
        assert err.endswith("pip install 'shmcache[demo]'\n")
        assert err.count("\n") == 1

    def test_info(self, capsys: pytest.CaptureFixture[str]) -> None:
        """It names the version, the engine, the Python and the platform."""
        assert cli.main(["info"]) == 0
        lines = capsys.readouterr().out.splitlines()

        assert [line.split()[0] for line in lines] == [
            "shmcache",
            "compiled",
            "python",
            "platform",
        ]
        assert lines[0].split()[1] == shmcache.__version__
        assert lines[1].split()[1].startswith("yes") == shmcache.compiled

    def test_reader_that_leaves(self) -> None:
        """Output into a closed pipe ends the command without a traceback."""
        read, write = os.pipe()
        os.close(read)
        with open(write, "wb") as broken:
            run = subprocess.run(
                [sys.executable, "-m", "shmcache", "info"],
                stdout=broken,
                stderr=subprocess.PIPE,
                check=False,
            )

        assert run.returncode == 128 + signal.SIGPIPE
        assert run.stderr == b""
