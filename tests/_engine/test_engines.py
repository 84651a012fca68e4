"""Both engines on one segment: a compiled and an interpreted process take turns.

Here runs the compiled one.  The other is a child, which does what it is told over a
pipe; to the state machine of ``test_model`` it looks like a second Cache object.
"""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis.stateful import invariant
from model import OneShard, run

import shmcache
from shmcache import Cache
from shmcache._member import EngineSettings
from shmcache._process.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Clock

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not shmcache.compiled, reason="this run is interpreted itself"),
]

CHILD = """
import pickle, sys, shmcache
assert not shmcache.compiled

class Clock:
    ns = 0
    def __call__(self):
        return self.ns

clock, cache = Clock(), None

def do(name, args, kwargs):
    global cache
    if name == "open":
        cache = shmcache.Cache(*args, clock=clock, **kwargs)
    elif name == "items":
        return list(cache.items())
    elif name == "__iter__":
        return list(cache)
    elif name == "closed":
        return cache.closed
    else:
        return getattr(cache, name)(*args, **kwargs)

while True:
    try:
        clock.ns, *call = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = True, do(*call)
    except Exception as error:
        answer = False, error
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


class Child:
    """The interpreted process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def ask(self, ns: int, name: str, args: Any, kwargs: Any) -> Any:
        """The result of a call made there, or the exception that it raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((ns, name, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        good, answer = pickle.load(self.process.stdout)
        if good:
            return answer
        raise answer


class Remote:
    """The child's Cache, as far as the machine uses it."""

    def __init__(self, child: Child, clock: Clock, *args: Any, **kwargs: Any) -> None:
        self._child, self._clock = child, clock
        self._ask("open", *args, **kwargs)

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._child.ask(self._clock.ns, name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._ask(name, *args, **kwargs)

    def __contains__(self, key: Any) -> bool:
        return bool(self._ask("__contains__", key))

    def __len__(self) -> int:
        return int(self._ask("__len__"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("__iter__"))

    def __delitem__(self, key: Any) -> None:
        self._ask("__delitem__", key)

    @property
    def closed(self) -> bool:
        """As of the Cache."""
        return bool(self._ask("closed"))

    def peek(self, key: Any, default: Any) -> Any:
        """A default that is compared by identity does not go over the pipe."""
        value = self._ask("peek", key, "the default")
        return default if value == "the default" else value

    def get(self, key: Any, default: Any) -> Any:
        """As peek."""
        value = self._ask("get", key, "the default")
        return default if value == "the default" else value

    def pop(self, key: Any, default: Any) -> Any:
        """As peek."""
        value = self._ask("pop", key, "the default")
        return default if value == "the default" else value

    def get_or_set(self, key: Any, factory: Callable[[], Any], ttl: Any) -> Any:
        """A function does not go over the pipe either."""
        return self._ask("setdefault", key, factory(), ttl)


class TwoEngines(OneShard):
    """The machine, with one Cache compiled and the other interpreted."""

    child: ClassVar[Child]

    def open(self) -> list[Cache]:
        """Either engine creates the segment, as it happens."""
        settings = self.model.config.settings
        made: list[Any] = []
        for engine in (0, 1) if self.model.serial % 2 else (1, 0):
            if engine:
                made.append(Remote(self.child, self.clock, self.name, **settings))
            else:
                made.append(Cache(self.name, clock=self.clock, **settings))
        return made

    @invariant()
    def is_sound(self) -> None:
        """Check as before, after the recency buffers were applied."""
        for cache in self.handles:
            if isinstance(cache, Cache):
                cache._flush_recency()
        super().is_sound()


def test_engines_agree(
    new_name: Callable[[], str],
    clock: Clock,
    checker: None,
    interpreted_env: dict[str, str],
) -> None:
    """Whichever engine does what, results are the model's, and the segment is sound."""
    child = Child(interpreted_env)
    TwoEngines.child = child
    try:
        run(TwoEngines, new_name, type(clock), 30)
    finally:
        child.process.communicate()
    assert child.process.returncode == 0


def test_both_engines_in_one_process(
    make_cache: Callable[..., Cache], clock: Clock
) -> None:
    """Their modules have different names, so both can be loaded; they take turns on one
    segment, as one worker.
    """
    compiled = importlib.import_module("shmcache._engine.compiled")
    interpreted = importlib.import_module("shmcache._engine.interpreted")
    assert compiled.Engine is not interpreted.Engine
    assert (compiled.compiled, interpreted.compiled) == (True, False)
    assert issubclass(Cache, compiled.Engine)

    cache = make_cache(max_entries=20, clock=clock)
    cache["first"] = 1  # now this process has a worker row
    attachment = cache.internals.attachment
    settings = cache.internals.settings
    engine = interpreted.Engine()
    engine.closed = False
    engine._bind(
        attachment.block.view,
        attachment.header.geometry,
        attachment.header.seed,
        interpreted.MsgpackCodec(),
        EngineSettings(
            capacities=settings.capacities(),
            clock=clock,
            sliding=settings.sliding,
            ttl_ns=settings.ttl_ns,
            jitter_ppm=settings.jitter_ppm,
            created_at_ns=attachment.header.created_at_ns,
            first_sequence=attachment.header.first_sequence,
            lock_timeout_ns=10**9,
        ),
        interpreted.recency_buffers(settings.shards),
        Peers(cache.name, attachment, lambda _: None),
    )
    semaphores = engine._open_semaphores([attachment.names.semaphore(0)])
    engine._join(
        attachment.guard, attachment.token, attachment.row, 1, attachment.owners
    )
    try:
        for i in range(200):
            writer, reader = (cache, engine) if i % 2 else (engine, cache)
            writer.set(i % 30, {"n": i, "text": "x" * (7 * i)})
            assert reader.get(i % 30) == {"n": i, "text": "x" * (7 * i)}
            assert reader.incr("count", initial=0) == i + 1
            if i % 3 == 0:
                assert writer.delete(i % 30)
                assert reader.get(i % 30) is None
        assert cache.check() == []
        assert cache.stats().recoveries == 0
    finally:
        engine._unbind()
        interpreted.close_semaphores(semaphores)


TURNS = 3000

COUNTING = f"""
import sys, shmcache
assert not shmcache.compiled
with shmcache.Cache.attach(sys.argv[1]) as cache:
    cache.incr("n", initial=0)
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range({TURNS}):
        cache.incr("n")
        key = i % 7
        cache[key] = (key, bytes([key]) * (i % 500))
        found = cache.get((i + 3) % 7)
        assert found is None or set(found[1]) <= {{found[0]}}, found
"""


def test_engines_at_the_same_time(
    make_cache: Callable[..., Cache], name: str, interpreted_env: dict[str, str]
) -> None:
    """Both write and read the same few keys at once: counts are exact, values whole."""
    cache = make_cache(name, max_entries=6)
    with subprocess.Popen(
        [sys.executable, "-c", COUNTING, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=interpreted_env,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        for i in range(TURNS):
            cache.incr("n")
            key = i % 7
            cache[key] = (key, bytes([key]) * (i % 400))
            found = cache.get((i + 3) % 7)
            assert found is None or set(found[1]) <= {found[0]}
        other.communicate()
    assert other.returncode == 0
    assert cache.check() == []
    assert cache.stats().recoveries == 0
    assert cache.get("n") == 2 * TURNS + 1
