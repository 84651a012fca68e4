"""Long random histories agree with a model (rigs/fuzz_model.py), and can disagree.

``SHMCACHE_FUZZ_SECONDS`` has each of the first two tests run for that long, and
``SHMCACHE_SEED`` is the number of their first history.
"""

from __future__ import annotations

import faulthandler
import os
from typing import TYPE_CHECKING, Any

import fuzz_map
import pytest
from amounts import FUZZ_HISTORY_SECONDS, FUZZ_LOCK_STEP_SECONDS
from fuzz_map import Model
from fuzz_model import Disagreement, play

import shmcache

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = {
    "one-process": FUZZ_HISTORY_SECONDS,
    "lock-step": FUZZ_LOCK_STEP_SECONDS,
}
SEED = int(os.environ.get("SHMCACHE_SEED", "1"))
HANGS = 300  # s; no operation takes so long
PATIENCE = 60  # s; most faults are found within the first second


@pytest.mark.slow
@pytest.mark.counted
@pytest.mark.parametrize("kind", SECONDS)
def test_histories_agree_with_the_model(
    kind: str,
    new_name: Callable[[], str],
    checker: None,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever one process does, or two in turn, every result is the model's."""
    # A run of hours is watched, too: it may hang after the time that was asked for.
    faulthandler.dump_traceback_later(SECONDS[kind] + HANGS, exit=True, file=2)
    played = play(SECONDS[kind], SEED, new_name, kind == "lock-step")
    print(f"{kind}: {played}")
    for what, number in vars(played).items():
        record_property(f"{kind} {what}", number)
    assert played.histories >= 1


# --- a fault would be found -----------------------------------------------------


def answer(value: Any) -> Callable[..., Any]:
    """A method that always returns this."""
    return lambda *_, **__: value


def peek_and_hit(self: Model, key: Any, default: Any) -> Any:
    """A peek that counts as a hit."""
    return self.get(key, default)


# Each makes a model of a cache that differs in one thing, by the name of that thing.
FAULTS: dict[str, tuple[str, Any]] = {
    "a hit is no use": ("hit", lambda self, key: self.find(key)[2]),
    "a touch is no use": ("use", answer(None)),
    "expired entries stay": ("expire", answer(None)),
    "blocks are for nothing": ("need", answer(1)),
    "a hit never renews": ("renewed", lambda _, entry: entry.expires),
    "peek is a hit": ("peek", peek_and_hit),
    "rotten values can be read": ("error", answer(None)),
    "all keys are in one shard": ("shard_of", lambda self, _: self.shards[0]),
    "a sum is the delta": ("incr", lambda _self, _key, by, **_: by),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(
    fault: str,
    new_name: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    checker: None,
) -> None:
    """If cache and model differ in one thing, some history shows it."""
    monkeypatch.setattr(Model, *FAULTS[fault])
    with pytest.raises(Disagreement, match=r"repeat: SHMCACHE_SEED=\d+ "):
        play(PATIENCE, SEED, new_name, False)


@pytest.mark.skipif(not shmcache.compiled, reason="interpreted, hits are seen at once")
def test_late_hits_are_found(
    new_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch, checker: None
) -> None:
    """A process that saw no hits of others would be found in lock-step."""
    monkeypatch.setattr(fuzz_map, "BUFFER", 0)
    with pytest.raises(Disagreement, match=r"was evicted|popitem\(\) gave"):
        play(PATIENCE, SEED, new_name, True)
