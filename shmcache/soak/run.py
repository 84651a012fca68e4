"""The run: start the workers, sample, kill and recycle, end; then judge and report.

``Watch`` takes the samples.  ``Guest`` watches a server that somebody else has started;
``Host`` starts workers, kills and recycles them, and keeps the books of their caches.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from shmcache._segment.names import SHM_DIR
from shmcache.cache import Cache
from shmcache.demo.progress import progress
from shmcache.demo.stop import Stopped, StopRequest
from shmcache.soak import ledger, report, sampling
from shmcache.soak.load import LOCK_TIMEOUT, Load, open_cache, open_handles, uses
from shmcache.soak.options import SoakError, for_self_test, from_namespace, run_name
from shmcache.soak.record import Record
from shmcache.soak.servers import Gunicorn, Server, halt
from shmcache.soak.verdict import judge_all

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from shmcache.handles import HandleMap
    from shmcache.soak.options import Options
    from shmcache.soak.sampling import CacheSample, Process, Sample

TICK = 0.05  # s
FEWEST = 8  # samples after the warm-up that a verdict needs
MOST_FINDINGS = 50
MIB = 1 << 20


class Watch:
    """Takes the samples of a run, until its end.

    Args:
        options: The options of the run.
        stop: Tells whether the user wants the run to end.
    """

    def __init__(self, options: Options, stop: StopRequest) -> None:
        self.options = options
        self.record = Record(options)
        self._stop = stop
        self._interval = options.interval
        self._began = time.monotonic()

    def now(self) -> float:
        """Seconds since the beginning of the run."""
        return time.monotonic() - self._began

    def say(self, finding: str) -> None:
        """Record that something does not add up."""
        if len(self.record.findings) < MOST_FINDINGS:
            self.record.findings.append(f"at {self.now():.0f} s: {finding}")

    def loop(self) -> None:
        """Take samples until the time is over, the workers end, or a signal comes."""
        options, record = self.options, self.record
        self._began = time.monotonic()
        due = 0.0
        label = f"soak, {options.profile}" if options.pid is None else "soak, watching"
        try:
            with progress(label) as show:
                while (now := self.now()) < options.seconds and self.going():
                    self._stop.check()
                    self.prod(now)
                    if now >= due:
                        due = max(due + self._interval, now)
                        self._keep(self.sample())
                        show(self._done(now), self._note(now))
                    time.sleep(max(0.0, min(TICK, due - self.now())))
        except Stopped as stopped:
            record.stopped_by = stopped.signum
        record.seconds = self.now()

    def _done(self, now: float) -> float:
        seconds = self.options.seconds
        return now / seconds if math.isfinite(seconds) else 0.0

    def _keep(self, sample: Sample) -> None:
        samples = self.record.samples
        samples.append(sample)
        if len(samples) > sampling.LIMIT:
            self.record.samples = sampling.thin(samples)
            self._interval *= 2

    def _note(self, now: float) -> str:
        record = self.record
        last = record.samples[-1]
        memory = sum(w.uss for w in last.workers) / MIB
        parts = [f"{now:.0f} s", f"{len(last.workers)} workers {memory:.1f} MiB"]
        if last.caches:
            before = record.samples[max(0, len(record.samples) - 6)]
            rate = (last.operations - before.operations) / max(1, last.t - before.t)
            kills, farewells = record.count("kill"), record.count("recycle")
            parts.append(f"{rate:,.0f} ops/s, {kills} kills, {farewells} recycled")
        parts.append(f"{len(record.findings)} faults" if record.findings else "sound")
        return ", ".join(parts)

    # --- what each kind of watch does in its own way --------------------------------

    def going(self) -> bool:
        """Whether the watched server is still running."""
        return True

    def prod(self, now: float) -> None:
        """Kill, recycle or check, if that is due at ``now``."""

    def sample(self) -> Sample:
        """Measure all processes and caches once."""
        raise NotImplementedError


class Guest(Watch):
    """The watch over a server that somebody else has started; it only looks.

    Raises:
        SoakError: There is no such process, or this user may not look at it.
    """

    def __init__(self, options: Options, stop: StopRequest) -> None:
        super().__init__(options, stop)
        try:
            self._master = psutil.Process(options.pid)
            self._master.memory_maps()
        except psutil.NoSuchProcess as error:
            raise SoakError(
                f"--pid {options.pid}: there is no such process; name the master of a"
                " running gunicorn or uWSGI"
            ) from error
        except psutil.AccessDenied as error:
            raise SoakError(
                f"--pid {options.pid}: its memory may not be looked at; run the soak"
                " as its user, or as root"
            ) from error

    def going(self) -> bool:
        """Whether the master is still running."""
        zombie = psutil.STATUS_ZOMBIE
        with suppress(psutil.NoSuchProcess):
            return self._master.is_running() and self._master.status() != zombie
        return False

    def sample(self) -> Sample:
        """Measure the processes, and what they have mapped in /dev/shm."""
        workers: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            workers = self._master.children(recursive=True)
        now = time.time()
        found = [_measured(w, now) for w in workers]
        return sampling.Sample(
            t=self.now(),
            master=_measured(self._master, now),
            workers=[w for w in found if w is not None],
            shm=sampling.mapped_names([self._master, *workers]),
        )


def _measured(process: psutil.Process, now: float) -> Process | None:
    with suppress(psutil.AccessDenied):
        return sampling.measure(process, now, {}, {})
    return None


class Host(Watch):
    """The watch over workers that this run has started, and kills and recycles."""

    def __init__(self, options: Options, stop: StopRequest) -> None:
        super().__init__(options, stop)
        self.name = run_name()
        self._rng = random.Random(options.seed)  # noqa: S311 - repeatable
        self._expected: set[int] = set()  # PIDs of workers that were told to end
        self._known: set[int] = set()  # PIDs of workers in the last sample
        # Workers that had an unknown number of handles open when they died.
        self._uncertain = 0
        self._due = {
            what: every
            for what, every in (
                ("kill", options.kill_every),
                ("recycle", options.recycle_every),
                ("check", options.check_every),
            )
            if every
        }
        self._every = dict(self._due)

    def run(self) -> Record:
        """Run from the start of the server until the last name in /dev/shm is gone."""
        options = self.options
        with_cache, with_handles = uses(options.profile)
        load = Load(
            name=self.name,
            profile=options.profile,
            seed=options.seed,
            rate=options.rate / options.workers,
            trace=options.trace and str(Path(options.trace).resolve()),
            leak=options.leak,
        )
        kind = Gunicorn if options.server == "gunicorn" else Server
        with ExitStack() as stack:
            self._handles: HandleMap | None = None
            self._caches: dict[str, Cache] = {}
            if with_cache:
                self._caches["cache"] = stack.enter_context(open_cache(self.name))
            if with_handles:
                self._handles = stack.enter_context(open_handles(self.name))
                # The entries of a handle map are a cache like any other one.
                self._caches["handles"] = stack.enter_context(
                    Cache.attach(self._handles.name, lock_timeout=LOCK_TIMEOUT)
                )
            self._server = stack.enter_context(kind(options.workers, load, self._stop))
            self.loop()
            for complaint in self._server.end():
                self.say(complaint)
            self._settle()
        self._look_around()
        return self.record

    def going(self) -> bool:
        """Whether the server is running; an end of it is a finding."""
        if not self._server.ended():
            return True
        self.say(f"the server ended unexpectedly: {self._server.said()}")
        return False

    # --- sampling -------------------------------------------------------------------

    def sample(self) -> Sample:
        """Measure the processes, the names in /dev/shm, and the caches."""
        for complaint in self._server.faults():
            self.say(complaint)
        rows: dict[int, ledger.Row] = {}
        entries: dict[int, int] = {}
        if "handles" in self._caches:
            entries = ledger.owners(self._caches["handles"])
            rows = ledger.read_rows(self._caches["handles"])
        workers = self._server.workers()
        self._note_deaths({w.pid for w in workers})
        now = time.time()
        found = [sampling.measure(w, now, rows, entries) for w in workers]
        return sampling.Sample(
            t=self.now(),
            master=sampling.measure(self._server.master, now, {}, {}),
            workers=[w for w in found if w is not None],
            shm=sampling.names_of(self.name),
            caches={name: self._book(name) for name in self._caches},
        )

    def _book(self, name: str) -> CacheSample:
        cache = self._caches[name]
        books = ledger.read_books(cache)
        for finding in books.findings(name):
            self.say(finding)
        return sampling.look(cache, books)

    def _note_deaths(self, alive: set[int]) -> None:
        for pid in self._known - alive - self._expected:
            self._uncertain += 1
            self.record.marks.append((self.now(), "died"))
            self.say(f"worker {pid} ended without having been told to")
        self._expected &= alive
        self._known = alive

    # --- prodding -------------------------------------------------------------------

    def prod(self, now: float) -> None:
        """Kill, recycle or check, if that is due at ``now``."""
        actions: dict[str, Callable[[], bool]] = {
            "kill": self._kill,
            "recycle": self._recycle,
            "check": self._check,
        }
        for what, due in self._due.items():
            if now >= due and actions[what]():
                self._due[what] = now + self._every[what]

    def _pick(self) -> psutil.Process | None:
        # A worker at random that uses the caches and has not been told to end.
        tokens = {pid for c in self._caches.values() for pid in ledger.read_rows(c)}
        able = [
            w
            for w in self._server.workers()
            if w.pid in tokens and w.pid not in self._expected
        ]
        return self._rng.choice(sorted(able, key=lambda w: w.pid)) if able else None

    def _kill(self) -> bool:
        victim = self._pick()
        if victim is None:
            return False
        self._expected.add(victim.pid)
        # While the worker stands still its row says what it has open.  If it does not
        # stand still, the number that is read is uncertain.
        self._uncertain += not halt(victim)
        if "handles" in self._caches:
            row = ledger.read_rows(self._caches["handles"]).get(victim.pid)
            self.record.died += row.open if row else 0
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        self.record.marks.append((self.now(), "kill"))
        return True

    def _recycle(self) -> bool:
        worker = self._pick()
        if worker is None:
            return False
        self._expected.add(worker.pid)
        with suppress(psutil.NoSuchProcess):
            worker.terminate()
        self.record.marks.append((self.now(), "recycle"))
        return True

    def _check(self) -> bool:
        self.record.checks += 1
        for name, cache in self._caches.items():
            for finding in cache.check():
                self.say(f"{name}: {finding}")
        return True

    # --- the end --------------------------------------------------------------------

    def _settle(self) -> None:
        # All workers have ended.  Says what they left behind, and what is missing.
        if self._handles is not None:
            self._handles.sweep()
            stats = self._handles.stats().host
            for finding in ledger.final_findings(
                stats, self.record.died, self._uncertain
            ):
                self.say(finding)
            if stats.entries:
                self.say(f"handles: {stats.entries} entries outlived their owners")
        self._check()
        self.record.final = {name: self._book(name) for name in self._caches}

    def _look_around(self) -> None:
        left = sampling.names_of(self.name)
        if left:
            self.say(f"left behind in {SHM_DIR}: {', '.join(left)}")


def run(options: Options) -> Record:
    """Run one soak, print its verdict, and write its reports.

    Raises:
        SoakError: The soak cannot run, or a report cannot be written.
    """
    _refuse_short(options)
    with StopRequest() as stop:
        if options.pid is not None:
            guest = Guest(options, stop)
            guest.loop()
            record = guest.record
        else:
            record = Host(options, stop).run()
    record.judgements = judge_all(record.samples, options)
    out = sys.stderr if options.json == "-" else sys.stdout
    print(report.text(record), file=out, flush=True)
    _write(options.html, lambda: report.page(record))
    _write(options.json, lambda: json.dumps(report.figures(record)) + "\n")
    return record


def run_parsed(namespace: argparse.Namespace) -> int:
    """Do what a parsed command line asks for; returns the exit code."""
    options = from_namespace(namespace)
    return self_test(options) if options.self_test else run(options).status


def _refuse_short(options: Options) -> None:
    judged = (options.seconds - options.warm_up) / options.interval
    if judged < FEWEST:
        needed = FEWEST * options.interval
        # Unless the user gives it, the warm-up is a quarter of the run.
        least = math.ceil(max(options.warm_up + needed, needed / 0.75))
        raise SoakError(
            f"{options.seconds:g} s with a warm-up of {options.warm_up:g} s leave"
            f" {judged:.0f} samples to be judged: run at least {least} s"
        )


def _write(path: str | None, content: Callable[[], str]) -> None:
    if path is None:
        return
    if path == "-":
        print(content())
        return
    try:
        Path(path).write_text(content(), encoding="utf-8")
    except OSError as error:
        raise SoakError(
            f"{path}: {error.strerror}: name a file that can be written"
        ) from error


def self_test(options: Options) -> int:
    """Test this tool: a clean run must pass, and a leak must be found.

    Returns:
        The exit code: 0 if both is so.
    """
    failed = []
    clean = run(for_self_test(options, None))
    if clean.stopped_by:
        return 128 + clean.stopped_by
    if clean.status:
        failed.append("the clean run did not pass")
    print()
    leaking = run(for_self_test(options, options.leak or "memory"))
    if not leaking.leaks:
        failed.append("the leak was not found")
    if leaking.findings:
        failed.append("the leaking run had other faults")
    print("\nself-test: " + ("; ".join(failed) or "a leak is found, and only a leak"))
    if leaking.stopped_by:
        return 128 + leaking.stopped_by
    return int(bool(failed))
