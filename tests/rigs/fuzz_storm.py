"""A storm of processes on shared keys, whose values prove themselves.

Several processes do all operations on the same keys as fast as they can, while a
conductor kills, stops, revives and forks them.  A value carries its key, its writer,
the writer's sequence number, a deadline and a checksum over all of that, so whoever
reads it can judge it without asking anybody: it belongs to its key, it is whole, it is
no older than what this reader has seen, and its time is not over.

A ledger in memory that outlives the processes says what else must hold: which keys of a
single writer are there, what counters add up to, how often a token was won.  Each
process notes there what it means to do, does it, and notes that it is sure.

Each scene is a geometry, a mix of operations, and what must hold in it.  Run as a
program, this module plays the scenes one after the other for a number of seconds; the
last line that it prints is a JSON object of what happened.  If a promise was broken, it
says what was seen and what was expected, and ends with 1.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import logging
import os
import random
import secrets
import select
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import NoReturn

from fuzz_scenes import (
    ADDED_TALLY,
    ASKED,
    OPERATIONS,
    OWN,
    PID,
    POPPED_TALLY,
    QUEUES,
    SCENES,
    Ledger,
    Stage,
    Violation,
)
from fuzz_worker import BURST, LONGEST_WAIT, Worker, die_with_parent

import shmcache
from shmcache._format import layout as L

SHM = "/dev/shm"
# Without progress for so long, the storm has failed.
PATIENCE = 60.0
# The conductor looks at a cache while it keeps a process stopped, so it must not wait
# long for the lock; a stopped process is revived after this time in any case.
LOOK_TIMEOUT, LONGEST_STOP = 0.3, 1.5
SET_CHILD_SUBREAPER = 36  # for prctl


class Conductor:
    """One round of a scene: starts processes, disturbs them, and compares.

    Args:
        scene: The name of the scene.
        name: The name of the cache.
        processes: How many processes take part.
        seed: The seed of what is random here and in them.
        events: What has happened is counted here.
    """

    def __init__(
        self, scene: str, name: str, processes: int, seed: int, events: Counter[str]
    ) -> None:
        self.random = random.Random(seed)
        self.events = events
        self.processes = processes
        self.pids: dict[int, int] = {}  # of each slot in use
        self.stopped = 0  # the pid of the process that is stopped
        self.since = 0.0  # when it was stopped
        self.owed = 0.0  # s; for how long processes were stopped of late
        self.deadline = 0.0  # when the round is long enough
        slots = 2 * processes
        self.hearing, verdict = os.pipe()
        born = time.monotonic_ns()
        settings = dict(SCENES[scene].settings, lock_timeout=LONGEST_WAIT)
        if scene == "flood":
            settings["max_entries"] = max(100, 12 * slots)
        self.cache = shmcache.Cache(name, **settings)
        geometry = self.cache._attachment.header.geometry
        self.shards = geometry.shards
        self.stage = Stage(
            name=name,
            scene=SCENES[scene],
            # The last page is the conductor's.
            ledger=Ledger(slots + 1),
            settings=settings,
            block=geometry.block_size,
            room=geometry.blocks * geometry.block_size,
            verdict=verdict,
            born=born,
        )
        self.ledger = self.stage.ledger
        self.glance = shmcache.Cache.attach(name, lock_timeout=LOOK_TIMEOUT)
        self.eye = Worker(self.stage, self.glance, slots, self.random.getrandbits(64))
        self.eye.takes_locks = False

    def play(self, seconds: float) -> None:
        """Let the storm rage for so long, and compare."""
        signal.signal(signal.SIGALRM, lambda *_: self.release())
        self.deadline = time.monotonic() + seconds
        try:
            for number in range(self.stage.scene.filled):
                self.cache[f"f{number}"] = number
            for key in self.stage.scene.lasting:
                self.cache[key] = 0 if key[0] == "n" else self.eye.value(key)
            if self.stage.scene.acts:
                self.rage()
            else:
                self.keep_one_in_use()
            self.compare()
        finally:
            self.end_all()
            self.glance.close()
            self.cache.close()
            os.close(self.hearing)
            os.close(self.stage.verdict)
        left = [entry for entry in os.listdir(SHM) if self.owns(entry)]
        if left:
            raise Violation(f"left in {SHM}: {left}")

    def owns(self, entry: str) -> bool:
        """Whether a name in shared memory belongs to this cache."""
        ours = f"shmcache-{os.getuid()}-{self.stage.name}"
        return entry == ours or entry.startswith((f"{ours}.", f"sem.{ours}."))

    def rage(self) -> None:
        """Disturb the processes until the time is over, at least some times."""
        for slot in range(self.processes):
            self.start(slot)
        acts = {self.glimpse: 12, self.stop_for_a_while: 2, self.fork: 1, self.check: 1}
        if self.stage.scene.kills:
            heirs = 20 if self.stage.scene.filled else 2
            acts |= {self.kill_one: 5, self.kill_the_stopped: 1}
            acts |= {self.stop_the_heir: heirs}
        turns = 0
        while turns < 4 or time.monotonic() < self.deadline:
            turns += 1
            # Processes run at least as long as they stand still.
            time.sleep(self.owed + self.random.expovariate(1 / 0.002))
            self.owed = 0.0
            self.listen()
            self.random.choices(list(acts), list(acts.values()))[0]()
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
        self.await_progress(list(self.pids), PATIENCE, "at the end")
        self.ledger.ending[0] = 1
        for slot in list(self.pids):
            self.reap(slot, 0)

    # --- processes --------------------------------------------------------------------

    def start(self, slot: int) -> None:
        """Start a process; every second one attaches by name."""
        seed = self.random.getrandbits(64)
        pid = os.fork()
        if pid:
            self.pids[slot] = pid
            return
        die_with_parent()
        cache = self.cache
        if slot & 1:
            cache = shmcache.Cache.attach(self.stage.name, lock_timeout=LONGEST_WAIT)
        Worker(self.stage, cache, slot, seed).live()

    def listen(self, patience: float = 0) -> None:
        """Hear whether a process has met a violation."""
        if select.select([self.hearing], [], [], patience)[0]:
            raise Violation(os.read(self.hearing, select.PIPE_BUF).decode().strip())

    def reap(self, slot: int, code: int) -> None:
        """Wait for the end of a process, which must be this one."""
        deadline = time.monotonic() + PATIENCE
        pid, status = 0, 0
        while not pid:
            pid, status = os.waitpid(self.pids[slot], os.WNOHANG)
            if time.monotonic() > deadline:
                self.fail_with_stack(slot, "does not end")
            time.sleep(0 if pid else 0.000_2)
        del self.pids[slot]
        ended = os.waitstatus_to_exitcode(status)
        if ended != code:
            self.listen()
            raise Violation(f"process {slot} has ended by itself, with {ended}")
        self.events["operations"] += self.ledger.pages[slot][OPERATIONS]
        self.ledger.pages[slot][OPERATIONS] = 0

    def fail_with_stack(self, slot: int, complaint: str) -> NoReturn:
        """Fail, and have the process show where it is."""
        os.kill(self.pids[slot], signal.SIGABRT)
        self.listen(0.2)
        raise Violation(f"process {slot} {complaint}")

    def await_progress(self, slots: list[int], patience: float, when: str) -> None:
        """Wait until some processes have done something more."""
        before = {slot: self.ledger.pages[slot][OPERATIONS] for slot in slots}
        deadline = time.monotonic() + patience
        for slot, operations in before.items():
            while self.ledger.pages[slot][OPERATIONS] <= operations:
                self.listen()
                if time.monotonic() > deadline:
                    self.fail_with_stack(slot, f"did nothing for {patience} s {when}")
                time.sleep(0.000_2)

    def end_all(self) -> None:
        """Kill what is left of the processes."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        self.pids.clear()
        # One that was just being forked is not known yet; it ends by itself.
        self.ledger.ending[0] = 1
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    # --- what happens to them ---------------------------------------------------------

    def kill(self, slot: int) -> None:
        """Kill a process; the others go on, and another one takes its place."""
        os.kill(self.pids[slot], signal.SIGKILL)
        self.ledger.kills[0] += 1
        self.events["kills"] += 1
        self.reap(slot, -signal.SIGKILL)
        self.ledger.settle(slot)
        self.stopped = 0

    def replace(self, slot: int) -> None:
        """Have the others go on, and let another process take a dead one's place."""
        self.await_progress(list(self.pids), LONGEST_WAIT, "after a death")
        if len(self.pids) < self.processes:
            self.start(slot)

    def kill_one(self) -> None:
        """Kill a process, most often one that holds a lock."""
        inside = self.holders() if self.random.random() < 0.7 else []
        slot = self.random.choice(inside or list(self.pids))
        self.kill(slot)
        self.replace(slot)

    def holders(self) -> list[int]:
        """The processes that hold a lock at this moment."""
        attachment = self.cache._attachment
        by_pid = {pid: slot for slot, pid in self.pids.items()}
        tokens = [
            attachment.words[self.cache._words_of(shard) + L.S_HOLDER]
            for shard in range(self.shards)
        ]
        pids = [attachment.pid(token) for token in tokens if token]
        return [by_pid[pid] for pid in pids if pid in by_pid]

    def stop(self, slot: int) -> None:
        """Stop a process, and wait until it has been stopped."""
        pid = self.pids[slot]
        os.kill(pid, signal.SIGSTOP)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            del self.pids[slot]
            self.listen()
            raise Violation(f"process {slot} has ended by itself: {status}")
        self.stopped, self.since = pid, time.monotonic()
        self.events["stops"] += 1
        # Whatever the conductor waits for meanwhile, it goes on after a while.
        signal.setitimer(signal.ITIMER_REAL, LONGEST_STOP)

    def release(self) -> None:
        """Revive the process that is stopped."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.stopped:
            os.kill(self.stopped, signal.SIGCONT)
            self.events["revivals"] += 1
            self.owed += time.monotonic() - self.since
            self.stopped = 0

    def stop_inside(self, attempts: int) -> int | None:
        """Stop some process while it holds a lock; None if that did not succeed."""
        for _ in range(attempts):
            # A process that is seen inside has most probably been preempted there.
            slot = self.random.choice(self.holders() or list(self.pids))
            self.stop(slot)
            if slot in self.holders():
                return slot
            self.release()
            time.sleep(self.random.random() * 0.000_2)
        return None

    def look(self) -> None:
        """Look at the cache, as the scene says; a lock may be taken for long."""
        started, looks = time.monotonic(), self.stage.scene.looks
        for name in self.random.sample(looks, len(looks)):
            for _ in range(6):
                # Each look that has to wait for the lock takes as long as the others
                # together.
                if not self.stopped or time.monotonic() - started > 0.05:
                    return
                try:
                    getattr(self.eye, name)()
                except shmcache.LockTimeout:
                    return
                except Violation as violation:
                    raise Violation(
                        f"while a process is stopped: {violation}"
                    ) from None

    def glimpse(self) -> None:
        """Stop processes inside for moments, and look."""
        for _ in range(10):
            if self.stop_inside(5) is not None:
                self.look()
            self.release()
            if self.owed > 0.2 or time.monotonic() > self.deadline:
                return

    def stop_for_a_while(self) -> None:
        """Stop a process, inside or elsewhere, and let the others run against it."""
        if self.random.random() < 0.5:
            self.stop_inside(20)
        if not self.stopped:
            self.stop(self.random.choice(list(self.pids)))
        self.look()
        time.sleep(self.random.choice([0.001, 0.08, 0.15, 0.25]))
        self.listen()
        self.release()

    def kill_the_stopped(self) -> None:
        """Kill a process that was stopped before."""
        slot = self.stop_inside(20)
        if slot is not None:
            self.look()
            self.kill(slot)
            self.replace(slot)
        self.release()

    def stop_the_heir(self) -> None:
        """Kill a process inside, and stop the next one that holds the lock: it may be
        rebuilding."""
        slot = self.stop_inside(20)
        if slot is None:
            return
        self.kill(slot)
        heirs: list[int] = []
        deadline = time.monotonic() + 0.1
        while not heirs and time.monotonic() < deadline:
            heirs = self.holders()
        if heirs:
            # Somewhere in the rebuild, which takes about so long for each entry.
            each = 5e-8 if shmcache.compiled else 1e-4
            time.sleep(self.random.random() * self.stage.scene.filled * each)
            self.stop(heirs[0])
            self.look()
            self.release()
        self.replace(slot)

    def fork(self) -> None:
        """Have a process fork another one, which takes a page that is free."""
        free = set(range(2 * self.processes)) - set(self.pids)
        if not free:
            return
        slot, parent = min(free), self.random.choice(list(self.pids))
        page = self.ledger.pages[slot]
        page[PID] = 0
        self.ledger.pages[parent][ASKED] = slot + 1
        deadline = time.monotonic() + PATIENCE
        while not page[PID]:
            self.listen()
            if time.monotonic() > deadline:
                self.fail_with_stack(parent, "was asked to fork, and did not")
            time.sleep(0.000_2)
        self.pids[slot] = page[PID]
        self.events["forks"] += 1

    def check(self) -> None:
        """Check the segment while all are at work."""
        findings = self.cache.check()
        if findings:
            raise Violation(f"check() while all are at work: {findings}")

    # --- the end ----------------------------------------------------------------------

    def compare(self) -> None:
        """With no process alive, compare everything."""
        findings = self.cache.check()
        if findings:
            raise Violation(f"check() at the end: {findings}")
        self.eye.look_at_ages()
        for key in self.stage.scene.lasting:
            self.eye.look_at_one(key)
        if self.stage.scene.fixed:
            self.eye.look_at_length()
        for slot in range(2 * self.processes):
            for at in range(OWN):
                self.eye.look_at_own(slot, at)
        for at in range(QUEUES):
            self.compare_queue(at)
        # Nobody writes now, so entries can only leave, when their time is over.
        before, met, after = len(self.cache), len(list(self.cache)), len(self.cache)
        if not after <= met <= before:
            raise Violation(f"{before} entries, then {after}, but iteration met {met}")

    def compare_queue(self, at: int) -> None:
        """What was added was popped once, or is still there."""
        if not self.stage.scene.roomy:
            return
        there = f"p{at}" in self.cache
        added, popped = (t + at for t in (ADDED_TALLY, POPPED_TALLY))
        fewest = self.ledger.sure(added) - self.ledger.meant(popped)
        most = self.ledger.meant(added) - self.ledger.sure(popped)
        if not fewest <= there <= most:
            raise Violation(
                f"p{at}: {int(there)} in the cache, expected {fewest} to {most} by what"
                " was added and popped"
            )

    def keep_one_in_use(self) -> None:
        """Flood a small cache, while another process only reads a key, in turns."""
        key = "hot"
        self.cache[key] = self.eye.value(key)
        asking, answering = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            os.close(asking[1])
            reader = Worker(self.stage, self.cache, 0, self.random.getrandbits(64))
            reader.acts = [lambda: reader.use(key, asking[0], answering[1])]
            reader.weights = [1]
            reader.live()
        self.pids[0] = pid
        turns = 0
        try:
            while turns < 8 or time.monotonic() < self.deadline:
                os.write(asking[1], b"!")
                while not select.select([answering[0]], [], [], 0.1)[0]:
                    self.listen()
                os.read(answering[0], 1)
                for number in range(BURST):
                    self.cache[f"g{turns}:{number}"] = number
                turns += 1
                faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
            self.ledger.ending[0] = 1
            os.write(asking[1], b"!")
            self.reap(0, 0)
        finally:
            for descriptor in (*asking, *answering):
                os.close(descriptor)


# --- the program --------------------------------------------------------------------


def storm(options: argparse.Namespace) -> Counter[str]:
    """Play the scenes in turn until the time is over; each is played at least once."""
    scenes = [options.scene] if options.scene else list(SCENES)
    events = Counter[str]()
    seeds = random.Random(options.seed)
    share = min(10.0, options.seconds / len(scenes))
    deadline = time.monotonic() + options.seconds
    turns = 0
    while turns < len(scenes) or time.monotonic() < deadline:
        scene = scenes[turns % len(scenes)]
        turns += 1
        try:
            conductor = Conductor(
                scene, options.name, options.processes, seeds.getrandbits(64), events
            )
            conductor.play(share)
        except Violation as violation:
            raise Violation(
                f"scene {scene!r}, seed {options.seed}: {violation}"
            ) from None
        except shmcache.ShmCacheError as error:
            raise Violation(
                f"scene {scene!r}, seed {options.seed}: the conductor met"
                f" {type(error).__name__}: {error}"
            ) from error
    return events


def main() -> None:
    """Run a storm, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--scene", choices=list(SCENES), help="play only this one")
    parser.add_argument("--name", default=f"fuzz-{os.getpid()}", help="of the cache")
    options = parser.parse_args()
    faulthandler.enable()
    # That the heirs of the dead rebuild, and say so, is what is expected.
    logging.getLogger("shmcache").addHandler(logging.NullHandler())
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        events = storm(options)
    except Violation as violation:
        sys.exit(f"VIOLATION: {violation}")
    kinds = ("operations", "kills", "stops", "revivals", "forks")
    print(json.dumps({**{kind: events[kind] for kind in kinds}, "seed": options.seed}))


if __name__ == "__main__":
    main()
