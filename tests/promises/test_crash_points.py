"""Death at every step of every operation, of rebuilds, and of the workers' table.

The dying process runs the interpreted engine, in which every store into the segment
and every call on a semaphore can be counted (crash_rig.py).  For each n, a forked
child dies right before its n-th step, and this process, on the engine under test,
looks at what it left: a death at a store is the same to both engines, and both must
repair it.  The full run visits each n, a moderate one some of them (amounts.py).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from amounts import EVERY_DEATH, offset, points
from crash_rig import (
    COUNTED,
    COUNTER,
    DEAD,
    HANDLES,
    LIVES,
    PERSISTENT,
    SMALL,
    Clock,
)
from scenes import (
    ABSENT,
    FOR_EVER,
    LONGEST_WAIT,
    OPERATIONS,
    WORKERS,
    Scene,
    Zygote,
    either,
)

import shmcache
from shmcache import HandleMap
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.counted]


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    make_cache: Callable[..., shmcache.Cache],
    caplog: pytest.LogCaptureFixture,
) -> Scene:
    """The scene of the scenario that the test is called with."""
    return Scene(request.param, make_cache, caplog)


def unmoved(before: list[int], after: list[int]) -> list[int]:
    """The longest common subsequence of two orders: the slots that kept their place."""
    longest: dict[tuple[int, int], list[int]] = {}
    for i in range(len(before) + 1):
        for j in range(len(after) + 1):
            if i == 0 or j == 0:
                longest[i, j] = []
            elif before[i - 1] == after[j - 1]:
                longest[i, j] = [*longest[i - 1, j - 1], before[i - 1]]
            else:
                longest[i, j] = max(longest[i - 1, j], longest[i, j - 1], key=len)
    return longest[len(before), len(after)]


def look(scene: Scene, allowed: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the content that survivors see before, during and after the takeover."""
    at_once = scene.content()
    scene.cache._step(0, 0)
    found = scene.content()
    for key, values in allowed.items():
        assert at_once[key] in values
        assert found[key] in values
        # Once a survivor has seen the write in flight, it must stay visible.
        assert found[key] == at_once[key] or values.index(found[key]) > 0
    assert scene.cache.check() == []
    assert len(scene.cache) == sum(value != ABSENT for value in found.values())
    assert scene.permits() == 1
    return found


def recoveries(scene: Scene) -> list[dict[str, Any]]:
    """The facts that the log has about recoveries."""
    return [
        {
            name: vars(record)[name]
            for name in ("shard", "dead_pid", "rebuilt", "dropped")
        }
        for record in scene.log.records
        if getattr(record, "event", "") == "recovered"
    ]


@pytest.mark.parametrize("scene", OPERATIONS, indirect=True)
def test_1_death_at_any_step_costs_at_most_the_entry_in_flight(
    scene: Scene,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """A process dies at any step of an operation; the others go on with all other
    entries."""
    with scene.zygote(interpreted_env) as zygote:
        whole = zygote.order(scene.name, FOR_EVER)
        assert whole.code == 0
        assert scene.cache.check() == []
        stay = unmoved(scene.before_order, scene.order_of_use())
        allowed = either(scene.before, scene.content())
        left_allowed = either(scene.before_left, scene.times_left())
        for key, values in allowed.items():
            left_allowed[key] += values[2:]
        visited = points(whole.steps, EVERY_DEATH, scene.name)
        for step in visited:
            scene.restore()
            answer = zygote.order(scene.name, step)
            assert (answer.code, answer.steps) == (DEAD, step)
            died_inside = scene.word(L.S_HOLDER) == answer.token
            assert died_inside or scene.word(L.S_HOLDER) == 0
            torn = bool(scene.word(L.S_SEQ) & 1)
            lost_permit = scene.permits() == 0
            look(scene, allowed)
            facts = {"shard": 0, "rebuilt": torn, "dropped": 0}
            facts["dead_pid"] = answer.pid if died_inside else 0
            expected = [facts] * lost_permit
            assert recoveries(scene) == expected
            assert scene.word(L.S_RECOVERIES) == len(expected)
            for key, left in scene.times_left().items():
                assert left in left_allowed[key]
            order = scene.order_of_use()
            kept = [slot for slot in order if slot in stay]
            assert kept == [slot for slot in stay if slot in order]
            scene.exercise()
            assert scene.cache.check() == []
            scene.attachment.reap()
    record_property("crash points", len(visited))


@pytest.mark.parametrize("scene", ["get_that_moves"], indirect=True)
def test_1_an_entry_that_was_being_used_is_not_the_next_to_go(
    scene: Scene, interpreted_env: dict[str, str]
) -> None:
    """If a process dies while it moves an entry to the front, the entry is there, or
    still in its place."""
    with scene.zygote(interpreted_env) as zygote:
        whole = zygote.order(scene.name, FOR_EVER)
        moved = scene.order_of_use()
        for step in range(whole.steps):
            scene.restore()
            zygote.order(scene.name, step)
            scene.cache._step(0, 0)
            assert scene.order_of_use() in (scene.before_order, moved)
            scene.attachment.reap()


# First deaths after which there is much to repair, and the number of the step.
TORN = [
    ("overwrite_by_larger", 0.3),
    ("overwrite_by_larger", 0.75),
    ("insert_with_evictions_for_room", 0.5),
    ("insert_with_expired_first", 0.4),
    ("delete_middle_of_chain", 0.4),
    ("touch_that_prolongs", 0.6),
    ("sweep_that_cascades", 0.5),
    ("get_that_moves", 0.6),
]


@pytest.mark.parametrize(("scene", "where"), TORN, indirect=["scene"])
def test_1_death_in_repair_leaves_the_repair_to_the_next(
    scene: Scene,
    where: float,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """A process dies at any step of a takeover or rebuild; the next process does it
    again."""
    with scene.zygote(interpreted_env) as zygote:
        whole = zygote.order(scene.name, FOR_EVER)
        first = round(whole.steps * where)
        stay = unmoved(scene.before_order, scene.order_of_use())
        allowed = either(scene.before, scene.content())

        def die_first() -> None:
            scene.restore()
            assert zygote.order(scene.name, first).code == DEAD
            assert scene.word(L.S_SEQ) & 1

        die_first()
        # The process that rebuilds only tried to read an absent key.
        repair = zygote.order("peek", FOR_EVER)
        assert repair.code == 0
        look(scene, allowed)
        visited = points(repair.steps, EVERY_DEATH, f"{scene.name} {where}")
        for step in visited:
            die_first()
            answer = zygote.order("peek", step)
            assert (answer.code, answer.steps) == (DEAD, step)
            died_inside = scene.word(L.S_HOLDER) == answer.token
            lost_permit = scene.permits() == 0
            look(scene, allowed)
            pids = [facts["dead_pid"] for facts in recoveries(scene)]
            if died_inside:
                assert pids == [answer.pid]
            else:
                assert len(pids) == lost_permit
            order = scene.order_of_use()
            kept = [slot for slot in order if slot in stay]
            assert kept == [slot for slot in stay if slot in order]
            scene.exercise()
            assert scene.cache.check() == []
            scene.attachment.reap()
    record_property("crash points", len(visited))


@pytest.mark.parametrize("scene", WORKERS, indirect=True)
def test_1_death_of_a_worker_that_comes_goes_or_reaps(
    scene: Scene,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """A process dies at any step of changing the workers' table; its row becomes free
    again, and each worker's counts are in the sums once."""
    attachment = scene.attachment
    counted = steps = 0

    def counts() -> int:
        return attachment.counters()[COUNTER - L.R_COUNTERS]

    with scene.zygote(interpreted_env) as zygote:
        visited = [FOR_EVER]  # first to the end, then up to each step
        while visited:
            step = visited.pop(0)
            for _ in range(3):
                # Dead ones that have counted; "reap" finds them.
                if scene.name == "reap":
                    assert zygote.order("count_and_close", 1).code == DEAD
                    counted += COUNTED
            answer = zygote.order(scene.name, step)
            assert answer.code == (0 if step == FOR_EVER else DEAD)
            if step == FOR_EVER:
                steps = answer.steps
                visited += points(steps, EVERY_DEATH, scene.name)
            if scene.name == "count_and_close" and answer.steps > 0:
                counted += COUNTED
            assert counts() == counted
            assert scene.cache.check() == []
            attachment.reap()
            assert counts() == counted
            assert len(attachment.tokens()) == 2
            assert scene.cache.check() == []
    record_property("crash points", len(points(steps, EVERY_DEATH, scene.name)))


@pytest.mark.parametrize("act", HANDLES)
def test_1_death_of_a_process_that_removes_handles(
    act: str,
    name: str,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """A process dies at any step of evicting, clearing, sweeping or closing; the owner
    closes the handles that have gone, once, and keeps the rest, and the dead process's
    handles go."""
    closed: list[str] = []
    clock = Clock()
    step, deaths, whole = offset(EVERY_DEATH, act), 0, False
    settings: dict[str, Any] = {"max_entries": 4, "max_bytes": 64 * 64, "ttl": 10}
    handles = HandleMap(
        name,
        **settings,
        clock=clock,
        cleanup_interval=300,
        on_evict=lambda _key, handle, _cause: closed.append(handle),
    )
    with handles, Zygote.of(name, clock, "handles", interpreted_env) as zygote:
        while not whole:
            opened = [f"{step}: {key}" for key in "abcd"]
            for key, handle in zip("abcd", opened, strict=True):
                handles[key] = handle
            if act == "sweep":
                clock.ns += 11_000_000_000
            # The number of steps depends a little on the hashes of the keys.
            answer = zygote.order(act, step)
            whole = answer.code == 0
            assert whole or (answer.code, answer.steps) == (DEAD, step)
            clock.ns -= 11_000_000_000 * (act == "sweep")
            handles.sweep()
            kept = handles.values()
            assert handles._process.delivery.callbacks.wait(60)
            assert sorted(kept + closed) == opened
            assert handles.stats().entries == len(kept)
            assert handles.check() == []
            handles.clear()
            assert handles._process.delivery.callbacks.wait(60)
            assert sorted(closed) == opened
            closed.clear()
            step += EVERY_DEATH
            deaths += not whole
    assert step > 20
    record_property("crash points", deaths)


def names_of(cache: str) -> list[str]:
    """What there is in shared memory of a cache."""
    return [name for name in os.listdir("/dev/shm") if f"-{cache}" in name]


@pytest.mark.once  # those lines are the same Python in both engines
@pytest.mark.parametrize("life", LIVES)
def test_1_death_at_any_line_of_life(
    life: str,
    name: str,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """A process dies at any line of creating, attaching, taking over, leaving or
    unlinking; the next process finds what persists, or an empty cache, and leaves
    nothing."""
    persistent = life == "revive_and_leave"
    keeps = persistent or life == "attach_and_leave"
    settings = {**(PERSISTENT if persistent else SMALL), "lock_timeout": LONGEST_WAIT}
    kept = {"kept": b"k" * 300}
    if persistent:
        # Then each process takes the segment over, also the first one, which counts the
        # lines.
        shmcache.Cache(name, **settings).close()
    with ExitStack() as at_end:
        zygote = at_end.enter_context(Zygote.of(name, Clock(), "life", interpreted_env))
        other = None
        if life == "attach_and_leave":
            other = at_end.enter_context(shmcache.Cache(name, **settings))
        visited = [FOR_EVER]  # first to the end, then up to each line
        lines = 0
        while visited:
            line = visited.pop(0)
            answer = zygote.order(life, line)
            assert answer.code == (0 if line == FOR_EVER else DEAD)
            if line == FOR_EVER:
                lines = answer.steps
                visited += points(lines, EVERY_DEATH, life)
            else:
                assert answer.steps == line
            cache = other or shmcache.Cache(name, **settings)
            assert dict(cache.items()) == (kept if line < FOR_EVER and keeps else {})
            cache.update(kept)
            assert cache["kept"] == kept["kept"]
            if other is None:
                cache.close()  # which checks it
            assert bool(names_of(name)) == keeps
        if other:
            other._attachment.reap()
            assert other.stats().workers == 1
        if persistent:
            with shmcache.Cache(name, **settings) as cache:
                cache.unlink()
    assert names_of(name) == []
    record_property("crash points", len(points(lines, EVERY_DEATH, life)))
