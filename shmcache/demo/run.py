"""The demo from beginning to end: measure without and with sharing, report, serve."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import shmcache
from shmcache import Cache
from shmcache.demo.app import remove_cache
from shmcache.demo.load import Load, zipf
from shmcache.demo.progress import progress
from shmcache.demo.report import Phase, conclusion, table
from shmcache.demo.server import DemoError, Server, python
from shmcache.demo.stop import TICK, Stopped, StopRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmcache import Stats

CLIENTS_PER_WORKER = 2
# The part of the seconds that the measurement without sharing gets; with the shared
# cache the same requests take less.
SEPARATE_SHARE = 0.6
LONGEST = 200_000  # requests of a load at most
PATIENCE = 600.0  # s for the second measurement at most


@dataclass
class Demo:
    """One run of the demo."""

    workers: int
    seconds: float  # of load, for both measurements together; 0: no measurement
    serve: bool  # whether to keep serving after the measurements
    json: str | None  # a file for the figures as JSON; "-" is standard output
    stop: StopRequest = field(default_factory=StopRequest)
    errors: list[str] = field(default_factory=list)  # of requests that failed

    def run(self) -> int:
        """Run the demo.

        Returns:
            The exit code: 0, or 1 if requests failed.

        Raises:
            DemoError: The demo cannot run, or cannot go on.
            Stopped: A signal ended it.
        """
        self._refuse_in_time()
        with self.stop:
            names: list[str] = []
            separate: Phase | None = None
            if self.seconds:
                modules = self._usable_modules()
                self._introduce(len(modules))
                names = zipf(modules, LONGEST)
                separate = self._measure_separate(names)
                names = names[: separate.requests + separate.errors]
            with (
                _cache_name() as name,
                Server(self.workers, name, self.stop) as server,
            ):
                if separate:
                    with Cache.attach(name) as cache:
                        shared = self._measure(
                            "one shared cache", server, names, PATIENCE, cache
                        )
                        self._report(separate, shared, cache.stats())
                if self.serve:
                    self._serve(server)
        if self.errors:
            failed = f"{len(self.errors)} requests failed, the first: {self.errors[0]}"
            print(f"shmcache demo: {failed}", file=sys.stderr)
        return 1 if self.errors else 0

    def _refuse_in_time(self) -> None:
        """Refuse now what would fail only after the measurements."""
        if util.find_spec("gunicorn") is None:
            raise DemoError(
                "the demo needs gunicorn, which is not installed: "
                "pip install 'shmcache[demo]'"
            )
        if not self.seconds and not self.serve:
            raise DemoError("--seconds 0 leaves nothing to do: add --serve")
        if self.json not in (None, "-"):
            path = Path(self.json)
            if path.is_dir() or not path.parent.is_dir():
                raise DemoError(
                    f"--json {path}: cannot be written there: name a file in an "
                    "existing folder, or - for standard output"
                )

    def _usable_modules(self) -> list[str]:
        """The modules to request, checked and read once, in a process of its own."""
        with subprocess.Popen(
            python("shmcache.demo.modules"),
            cwd="/",
            process_group=0,  # Ctrl-C reaches only this process
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            try:
                while child.poll() is None:  # its output fits into the pipe
                    self.stop.tick()
            finally:
                child.kill()
            out, said = child.communicate()
        if child.returncode:
            why = said.strip().rpartition("\n")[2]
            raise DemoError(f"the list of modules could not be made: {why}")
        modules: list[str] = json.loads(out)
        return modules

    def _introduce(self, pages: int) -> None:
        print(
            f"shmcache {shmcache.__version__} "
            f"({'compiled' if shmcache.compiled else 'interpreted'}), "
            f"Python {platform.python_version()}, "
            f"gunicorn {metadata.version('gunicorn')}, {os.cpu_count()} CPUs\n"
            f"{self.workers} workers serve {pages} pages of Python's documentation, "
            "rendered by pydoc on request.",
            file=sys.stderr,
        )

    def _measure_separate(self, names: list[str]) -> Phase:
        with Server(self.workers, None, self.stop) as server:
            budget = self.seconds * SEPARATE_SHARE
            return self._measure("a dict in each worker", server, names, budget, None)

    def _measure(
        self,
        label: str,
        server: Server,
        names: list[str],
        seconds: float,
        cache: Cache | None,
    ) -> Phase:
        """Put the load on a server, and measure its memory before it ends."""
        load = Load(server.address, names, seconds, CLIENTS_PER_WORKER * self.workers)
        with progress(label) as show:

            def tick(done: float, requests: int) -> None:
                show(done, f"{requests:,} requests")
                server.check()
                self.stop.check()

            outcome = load.run(tick, every=TICK)
        self.errors += outcome.errors
        if not outcome.answers:
            raise DemoError(f"no request was answered: {outcome.errors[:1]}")
        size = cache.stats().segment_bytes if cache else 0
        return Phase.of(outcome, server.worker_memory(), size)

    def _report(self, separate: Phase, shared: Phase, stats: Stats) -> None:
        verdict = conclusion(separate, shared)
        figures = {
            "shmcache": shmcache.__version__,
            "compiled": shmcache.compiled,
            "python": platform.python_version(),
            "gunicorn": metadata.version("gunicorn"),
            "cpus": os.cpu_count(),
            "workers": self.workers,
            "separate": asdict(separate),
            "shared": asdict(shared),
            "cache": asdict(stats),
            "conclusion": verdict,
        }
        text = json.dumps(figures, indent=2, default=str)
        report = f"\n{table(separate, shared)}\n\n{fill(verdict, 79)}"
        if self.json == "-":
            print(report, file=sys.stderr)
            print(text)
            return
        print(report, flush=True)
        if self.json:
            try:
                Path(self.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise DemoError(
                    f"--json {self.json}: {error.strerror}: name a file that can be "
                    "written, or - for standard output"
                ) from error

    def _serve(self, server: Server) -> None:
        """Serve until Ctrl-C, which is not an error here."""
        print(f"\nServing on {server.url}  (Ctrl-C ends it)", flush=True)
        try:
            while True:
                self.stop.tick()
                server.check()
        except Stopped:
            print("Stopped.", file=sys.stderr)


@contextmanager
def _cache_name() -> Iterator[str]:
    """A name for the cache of this run, which is removed at the end."""
    name = f"demo-{os.getpid()}"
    try:
        yield name
    finally:
        remove_cache(name)
