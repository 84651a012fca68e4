"""Operations of several processes on one key happen one after another, kills or not.

Workers record each operation with the times of its call and return, and are killed now
and then.  For every key a search looks for an order of all operations that explains
what each returned.  In it, an operation that had ended when another one began must come
first (the algorithm is Wing and Gong's, and remembers what has failed).  An operation
that its process did not survive may have had its effect, at any time after its call, or
none.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from amounts import HISTORIES
from peers import PATIENCE, run_and_end

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from shmcache import Cache

NEVER = 1 << 62  # the return of an operation that did not
ABSENT = "absent"


@dataclass(frozen=True)
class Operation:
    """What was called, when, and what came of it."""

    called: int
    returned: int
    kind: str
    arguments: tuple[Any, ...] = ()
    result: Any = None


# A key's state: its value, and the token by which cas() knows it, None if nobody asked.
State = tuple[Any, Any]
NOTHING: State = (ABSENT, None)


def after(state: State, op: Operation) -> State | None:
    """The state after an operation, None if it cannot have returned what it did."""
    value, token = state
    died = op.returned == NEVER
    result: Any
    new = state
    if op.kind == "get":
        result = None if value is ABSENT else value
    elif op.kind == "set":
        result, new = None, (op.arguments[0], None)
    elif op.kind == "add":
        result = value is ABSENT
        new = (op.arguments[0], None) if result else state
    elif op.kind == "delete":
        result, new = value is not ABSENT, NOTHING
    elif op.kind == "incr":
        result = (0 if value is ABSENT else value) + op.arguments[0]
        new = (result, None)
    elif op.kind == "gets":
        if died:
            return state
        result = (None, None) if value is ABSENT else (value, token or op.result[1])
        new = (value, result[1])
    else:
        assert op.kind == "cas"
        wanted = op.arguments[1]
        # A token that was seen is that of the state as long as nothing was written.
        result = value is ABSENT if wanted is None else token == wanted
        new = (op.arguments[0], None) if result else state
    return new if died or result == op.result else None


def linearizable(history: list[Operation]) -> bool:
    """Whether there is an order that explains the history of one key."""
    ops = sorted(history, key=lambda op: op.called)
    everything = (1 << len(ops)) - 1
    failed: set[tuple[int, Hashable]] = set()
    stack = [(0, NOTHING)]
    while stack:
        done, state = stack.pop()
        if (done, state) in failed:
            continue
        failed.add((done, state))
        left = [n for n in range(len(ops)) if not done >> n & 1]
        if all(ops[n].returned == NEVER for n in left):
            return True
        first_return = min(ops[n].returned for n in left)
        for n in left:
            if ops[n].called > first_return:
                break
            new = after(state, ops[n])
            if new is not None:
                stack.append((done | 1 << n, new))
            # An operation whose process died may never have taken place: then it
            # remains.
    return not everything


# --- the checker can fail -------------------------------------------------------


def op(called: int, returned: int, kind: str, *arguments: Any, gives: Any) -> Operation:
    """A short form of Operation."""
    return Operation(called, returned, kind, arguments, gives)


GOOD = {
    "nothing": [],
    "one after another": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "get", gives=5),
        op(5, 6, "incr", 2, gives=7),
        op(7, 8, "delete", gives=True),
        op(9, 10, "get", gives=None),
    ],
    "a read beside a write sees it": [
        op(1, 9, "set", 5, gives=None),
        op(2, 3, "get", gives=5),
        op(4, 5, "get", gives=5),
    ],
    "or does not": [op(1, 9, "set", 5, gives=None), op(2, 3, "get", gives=None)],
    "the order of two writes is open": [
        op(1, 9, "set", 5, gives=None),
        op(2, 8, "set", 6, gives=None),
        op(10, 11, "get", gives=5),
    ],
    "the dead had written": [
        op(1, NEVER, "set", 5, gives=None),
        op(2, 3, "get", gives=5),
    ],
    "the dead had not": [
        op(1, NEVER, "set", 5, gives=None),
        op(2, 3, "get", gives=None),
        op(4, 5, "get", gives=None),
    ],
    "the dead write late": [
        op(1, NEVER, "incr", 1, gives=None),
        op(2, 3, "get", gives=None),
        op(4, 5, "get", gives=1),
    ],
    "cas by a token that holds": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "gets", gives=(5, 77)),
        op(5, 6, "cas", 6, 77, gives=True),
        op(7, 8, "cas", 7, 77, gives=False),
        op(9, 10, "get", gives=6),
    ],
}
BAD = {
    "a lost write": [op(1, 2, "set", 5, gives=None), op(3, 4, "get", gives=None)],
    "a value from nowhere": [op(1, 2, "get", gives=5)],
    "a stale read": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "set", 6, gives=None),
        op(5, 6, "get", gives=5),
    ],
    "two reads in two orders": [
        op(1, 20, "set", 5, gives=None),
        op(2, 3, "get", gives=5),
        op(4, 5, "get", gives=None),
    ],
    "a lost increment": [
        op(1, 5, "incr", 1, gives=1),
        op(2, 6, "incr", 1, gives=1),
    ],
    "two that add": [op(1, 5, "add", 1, gives=True), op(2, 6, "add", 2, gives=True)],
    "two that delete one": [
        op(1, 2, "set", 5, gives=None),
        op(3, 6, "delete", gives=True),
        op(4, 7, "delete", gives=True),
    ],
    "an old token": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "gets", gives=(5, 77)),
        op(5, 6, "set", 5, gives=None),
        op(7, 8, "cas", 6, 77, gives=True),
    ],
    "two that swap by one token": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "gets", gives=(5, 77)),
        op(5, 8, "cas", 6, 77, gives=True),
        op(6, 9, "cas", 7, 77, gives=True),
    ],
    "a token that changes by itself": [
        op(1, 2, "set", 5, gives=None),
        op(3, 4, "gets", gives=(5, 77)),
        op(5, 6, "gets", gives=(5, 78)),
    ],
    "the dead had written and then had not": [
        op(1, NEVER, "set", 5, gives=None),
        op(2, 3, "get", gives=5),
        op(4, 5, "get", gives=None),
    ],
    "the dead write twice": [
        op(1, NEVER, "incr", 1, gives=None),
        op(2, 3, "get", gives=2),
    ],
    "the dead write before they begin": [
        op(1, 2, "get", gives=5),
        op(3, NEVER, "set", 5, gives=None),
    ],
}


@pytest.mark.once
@pytest.mark.parametrize("name", GOOD)
def test_history_with_an_explanation(name: str) -> None:
    """The checker accepts what can have happened."""
    assert linearizable(GOOD[name])


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_history_without_an_explanation(name: str) -> None:
    """The checker refuses what cannot have happened."""
    assert not linearizable(BAD[name])


# --- histories ------------------------------------------------------------------

WORKERS = 4
STEPS = 30  # of a worker
KEYS = ("k", "l")


def work(cache: Cache, keys: list[str], random: Random, log: int) -> None:
    """Do random operations; write down each before it begins and when it is done."""
    tokens: dict[str, Any] = {}
    for step in range(STEPS):
        key = random.choice(keys)
        kind = random.choice(
            ["get", "get", "set", "add", "delete", "incr", "incr", "gets", "cas"]
        )
        number = random.randrange(1 << 40)
        arguments: tuple[Any, ...] = {
            "set": (number,),
            "add": (number,),
            "incr": (step + 1,),
            "cas": (number, tokens.get(key)),
        }.get(kind, ())
        call = getattr(cache, kind)
        record(log, key, time.monotonic_ns(), kind, arguments)
        if kind == "incr":
            result = cache.incr(key, *arguments, initial=0)
        else:
            result = call(key, *arguments)
        returned = time.monotonic_ns()
        if kind == "gets":
            tokens[key] = result[1]
        record(log, returned, result)


def record(log: int, *words: object) -> None:
    """Write to a log, at once: the process may be killed at any moment."""
    data = pickle.dumps(words)
    os.write(log, len(data).to_bytes(2, "little") + data)


def read(log: int) -> dict[str, list[Operation]]:
    """The operations of one worker, by key."""
    os.lseek(log, 0, os.SEEK_SET)
    with open(log, "rb", closefd=False) as file:
        data = file.read()
    records = []
    while data:
        size = int.from_bytes(data[:2], "little")
        records.append(pickle.loads(data[2 : 2 + size]))
        data = data[2 + size :]
    found: dict[str, list[Operation]] = {}
    for n in range(0, len(records), 2):
        key, called, kind, arguments = records[n]
        returned, result = records[n + 1] if n + 1 < len(records) else (NEVER, None)
        found.setdefault(key, []).append(
            Operation(called, returned, kind, arguments, result)
        )
    return found


def one_history(cache: Cache, number: int, random: Random) -> dict[str, Any]:
    """The operations of some workers of which some are killed, by key."""
    keys = [f"{key} {number}" for key in KEYS]
    begin, go = os.pipe()
    logs, pids = [], []
    for _ in range(WORKERS):
        log = os.memfd_create("log")
        seed = random.random()
        pid = os.fork()
        if pid == 0:
            os.close(go)

            def body(log: int = log, seed: float = seed) -> None:
                cache.get("there")  # be a worker before the others begin
                os.read(begin, 1)
                work(cache, keys, Random(seed), log)

            run_and_end(body)
        logs.append(log)
        pids.append(pid)
    os.close(begin)
    time.sleep(0.005)
    os.close(go)
    for pid in random.sample(pids, random.randint(0, WORKERS - 1)):
        until = time.monotonic_ns() + random.randrange(600_000)
        while time.monotonic_ns() < until:
            pass
        os.kill(pid, signal.SIGKILL)
    codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    assert codes <= {0, -signal.SIGKILL}
    histories: dict[str, Any] = {}
    for log in logs:
        for key, ops in read(log).items():
            histories.setdefault(key, []).extend(ops)
        os.close(log)
    # And one that comes after all of them.
    for key in keys:
        now = time.monotonic_ns()
        value = cache.get(key)
        histories.setdefault(key, []).append(
            Operation(now, time.monotonic_ns(), "get", (), value)
        )
    return histories


@pytest.mark.counted
def test_operations_are_linearizable(make_cache: Callable[..., Cache]) -> None:
    """Every history of a key, of four processes of which up to three are killed, has
    an order of its operations that explains what each of them returned."""
    cache = make_cache(max_entries=10_000, shards=1, lock_timeout=PATIENCE)
    cache["there"] = 1
    random = Random(20261123)
    unfinished = overlapping = 0
    number = 0
    deadline = time.monotonic() + PATIENCE
    # Repeat until operations really overlapped, however the machine runs them.
    while number < HISTORIES or not unfinished or overlapping < HISTORIES:
        assert time.monotonic() < deadline, (unfinished, overlapping)
        number += 1
        for key, history in one_history(cache, number, random).items():
            unfinished += sum(op.returned == NEVER for op in history)
            ops = sorted(history, key=lambda op: op.called)
            overlapping += sum(
                later.called < earlier.returned
                for earlier, later in itertools.pairwise(ops)
            )
            assert linearizable(history), (key, ops)
    assert cache.check() == []
