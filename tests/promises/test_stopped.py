"""A stopped writer makes readers wait or raise, but never lie.

The process that is stopped runs the interpreted engine, in which every store into the
segment can be counted (crash_rig.py).  For each n, a forked child is stopped right
before its n-th step, and this process, on the engine under test, reads every key: each
has the value from before the operation or the one from after it.  The full run visits
many n, a moderate one fewer (amounts.py).
"""

from __future__ import annotations

import logging
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
from amounts import EVERY_STOP, points
from caught import ROOMY, Writer, stop_inside
from peers import PATIENCE
from scenes import ABSENT, FOR_EVER, OPERATIONS, Scene

import shmcache
from shmcache import Cache, LockTimeout
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.counted]

WAITED = "waited in vain"
LOCK_TIMEOUT = 0.15  # s: a little longer than a reader's patience
LOOKS = 4  # how often a reader looks before it knows that a writer is stuck


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    make_cache: Callable[..., Cache],
    caplog: pytest.LogCaptureFixture,
) -> Scene:
    """The scene of the scenario that the test is called with."""
    return Scene(request.param, make_cache, caplog)


def read(cache: Cache, key: str) -> Any:
    """The value of a key, as each way to read it without the lock must tell."""
    try:
        value = cache.peek(key, ABSENT)
        assert cache.get(key, ABSENT) == value
        assert (key in cache) == (value != ABSENT)
        assert cache.get_many([key]) == ({} if value == ABSENT else {key: value})
    except LockTimeout:
        return WAITED
    return value


def present(content: dict[str, Any]) -> set[str]:
    """The keys that are there."""
    return {key for key, value in content.items() if value != ABSENT}


def read_all(scene: Scene, cache: Cache) -> dict[str, Any]:
    """What each key seems to have, while a writer is stopped."""
    return {key: read(cache, key) for key in scene.keys.all}


@pytest.mark.parametrize("scene", OPERATIONS, indirect=True)
def test_reading_beside_a_writer_stopped_at_any_step(
    scene: Scene,
    interpreted_env: dict[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    """Each key has its old or its new value; none is absent that was and will be there;
    what was seen once stays, also if the writer is killed then."""
    reader = Cache.attach(
        scene.cache.name,
        lock_timeout=LOCK_TIMEOUT,
        clock=scene.clock if scene.scenario.timed else None,
    )
    with reader, scene.zygote(interpreted_env) as zygote:
        whole = zygote.order(scene.name, FOR_EVER)
        assert whole.code == 0
        after, after_left = scene.content(), scene.times_left()
        # Are keys only overwritten?
        stay = present(scene.before) == present(after)
        stay = stay and scene.entries == scene.word(L.S_ENTRIES)
        # Only one of its steps lies between the two stores that matter.
        every = 1 if scene.name == "touch_that_shortens_sliding" else EVERY_STOP
        visited = points(whole.steps, every, scene.name)
        for step in visited:
            scene.restore()
            answer = zygote.stop(scene.name, step)
            assert (answer.stopped, answer.steps) == (True, step)
            inside = scene.word(L.S_HOLDER) == answer.token
            seen = read_all(scene, reader)
            for key, value in seen.items():
                assert value in (scene.before[key], after[key], WAITED)
                # Interpreted, a process may be stopped as it becomes the holder.
                assert inside or value != WAITED or not shmcache.compiled
            assert not stay or scene.word(L.S_ENTRIES) == scene.entries
            end = signal.SIGKILL if step % 2 and every > 1 else signal.SIGCONT
            ended = zygote.end_stopped(end)
            assert ended.code == (-end if end == signal.SIGKILL else 0)
            found = scene.content()
            for key, value in seen.items():
                if value == after[key] != scene.before[key]:
                    assert found[key] == value
            # Readers have not renewed by a time that was taken back.
            assert every > 1 or scene.times_left() == after_left
            assert scene.cache.check() == []
            while scene.permits() > 1:  # a reader may have gone in without one
                take_spare(scene)
            scene.attachment.reap()
    record_property("stops", len(visited))


def test_a_second_reader_of_absent_keys_need_not_find_out_again(
    make_cache: Callable[..., Cache],
) -> None:
    """Only the first lookup of an absent key waits to see whether the writer is stuck;
    the others know, until the writer has left."""
    cache = make_cache(**ROOMY, lock_timeout=PATIENCE)
    cache["there"] = 1
    writer = Writer(cache)
    stop_inside(cache, writer.pid, writer.token)
    sleeps = [sleeps_during(lambda: cache.get("absent")) for _ in range(10)]
    assert sleeps[0] >= LOOKS
    assert sum(sleeps[1:]) < LOOKS * len(sleeps[1:])
    os.kill(writer.pid, signal.SIGCONT)
    writer.say("end")
    writer.end()
    assert cache.get("absent") is None
    assert cache.stats().lock_timeouts == 0


def sleeps_during(act: Callable[[], object]) -> int:
    """How often this thread gave up the CPU of its own accord during a call."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    act()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


# Steps of "set" that a process can be stopped at while nobody is the holder and the
# permit is gone: after taking the permit, and before giving it back.
GAPS = ("first", "last")


@pytest.mark.parametrize("scene", ["set_new"], indirect=True)
@pytest.mark.parametrize("gap", GAPS)
def test_a_process_that_is_stopped_without_being_the_holder(
    scene: Scene, interpreted_env: dict[str, str], gap: str
) -> None:
    """Others go on without the permit; the log does not say that anyone has died; when
    the process goes on, it does so as if nothing had been."""
    with scene.zygote(interpreted_env) as zygote:
        whole = zygote.order(scene.name, FOR_EVER)
        scene.restore()
        # The first step takes the permit, the last gives it back.
        step = 1 if gap == "first" else whole.steps - 1
        answer = zygote.stop(scene.name, step)
        assert answer.stopped
        assert (scene.permits(), scene.word(L.S_HOLDER)) == (0, 0)
        if gap == "first" and not shmcache.compiled:
            # The interpreted engine becomes the holder under a kernel lock, which a
            # stopped process keeps.
            with pytest.raises(LockTimeout):
                scene.cache["other"] = "value"
            assert scene.cache[scene.keys["a"]] == scene.before[scene.keys["a"]]
            assert zygote.end_stopped(signal.SIGCONT).code == 0
            return
        scene.log.set_level(logging.INFO, "shmcache")
        scene.attachment.reap()  # nobody who has died is to be found
        scene.log.clear()
        scene.cache["other"] = "value"
        [record] = scene.log.records
        assert "the permit of its lock was missing" in record.getMessage()
        assert "or stopped" in record.getMessage()
        assert record.levelno == logging.INFO
        assert zygote.end_stopped(signal.SIGCONT).code == 0
        assert scene.cache[scene.keys["e"]] == b"new"
        assert scene.cache["other"] == "value"
        # A spare permit is dropped by the next that finds a holder, or taken in turn.
        assert scene.permits() in (1, 2)
        assert scene.cache.check() == []
        while scene.permits() > 1:
            take_spare(scene)


def take_spare(scene: Scene) -> None:
    """Take the spare permit away, as it is no matter of the tests that follow."""
    semaphore = posix_ipc.Semaphore(scene.cache._names.semaphore(0))
    semaphore.acquire(0)
    semaphore.close()
