"""A stopped writer makes readers wait or raise, but never lie.

The process that is stopped runs the interpreted engine, in which every store into the
segment can be counted (crash_rig.py).  For each n, a forked child is stopped right
before its n-th step, and this process, on the engine under test, reads every key: each
has the value from before the operation or the one from after it.  The full run visits
many n, a moderate one fewer (amounts.py).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
from amounts import EVERY_STOP, points
from scenes import ABSENT, FOR_EVER, OPERATIONS, Scene

from shmcache import Cache, LockTimeout
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.counted]

WAITED = "waited in vain"
LOCK_TIMEOUT = 0.15  # s: a little longer than a reader's patience


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
        after = scene.content()
        visited = points(whole.steps, EVERY_STOP, scene.name)
        for step in visited:
            scene.restore()
            answer = zygote.stop(scene.name, step)
            assert (answer.stopped, answer.steps) == (True, step)
            inside = scene.word(L.S_HOLDER) == answer.token
            seen = read_all(scene, reader)
            for key, value in seen.items():
                assert value in (scene.before[key], after[key], WAITED)
                assert inside or value != WAITED
            end = signal.SIGKILL if step % 2 else signal.SIGCONT
            ended = zygote.end_stopped(end)
            assert ended.code == (-signal.SIGKILL if step % 2 else 0)
            found = scene.content()
            for key, value in seen.items():
                if value == after[key] != scene.before[key]:
                    assert found[key] == value
            assert scene.cache.check() == []
            scene.attachment.reap()
    record_property("stops", len(visited))
