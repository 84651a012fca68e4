"""The storm of self-checking values: all operations on shared keys, under chaos.

``SHMCACHE_FUZZ_SECONDS``: for how long all scenes together are played (3600: an hour).
``SHMCACHE_SEED``: the seed of what is random, to repeat a run (the machine's own
timing stays random).
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import fuzz_storm
import pytest
from amounts import FUZZ_STORM_SECONDS
from fuzz_scenes import (
    CHAIN_TALLY,
    DONE,
    EXPIRED_BY,
    EXPIRING,
    INTENT,
    MEANT,
    SCENES,
    SEQUENCE,
    SURE,
    Ledger,
    Proof,
    Stage,
    Violation,
    make_value,
    prove,
)
from fuzz_worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcache import Cache

SEED = int(os.environ.get("SHMCACHE_SEED", "0")) or secrets.randbits(32)


def storm(name: str, scene: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Plays a scene in a process of its own, which forks others."""
    options = {"--name": name, "--scene": scene, "--seconds": seconds, "--seed": SEED}
    pairs = [str(each) for pair in options.items() for each in pair]
    return subprocess.run(
        [sys.executable, fuzz_storm.__file__, *pairs],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.path.dirname(fuzz_storm.__file__)},
    )


@pytest.mark.slow
@pytest.mark.counted
@pytest.mark.parametrize("scene", SCENES)
def test_what_is_read_proves_itself(
    scene: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    """Whatever happens to the processes, no reader sees what cannot be."""
    print(f"SHMCACHE_SEED={SEED}")
    # It may be asked to run for hours, and watches itself.
    faulthandler.cancel_dump_traceback_later()
    run = storm(name, scene, FUZZ_STORM_SECONDS / len(SCENES))
    assert run.returncode == 0, run.stderr[-5_000:]
    report = json.loads(run.stdout.splitlines()[-1])
    for what, number in report.items():
        record_property(what, number)
    assert report["operations"] > 0
    if SCENES[scene].acts:
        assert report["stops"] > 0
    assert report["revivals"] <= report["stops"]
    assert report["seed"] == SEED


# --- the storm can fail -----------------------------------------------------------


@pytest.fixture
def reader(make_cache: Callable[..., Cache]) -> Worker:
    """A process of the roomy scene, whose writers have the numbers 0 and 1."""
    scene = SCENES["roomy"]
    cache = make_cache(**scene.settings)
    stage = Stage(cache.name, scene, Ledger(2), scene.settings, 256, 100_000, 2)
    return Worker(stage, cache, 0, seed=1)


def proven(reader: Worker, key: str, sequence: int, mark: int = 0) -> Any:
    """A value of writer 1, who says that the number was made."""
    page = reader.ledger.pages[1]
    page[SEQUENCE] = max(page[SEQUENCE], sequence)
    return make_value(key, Proof(1, sequence, mark), 100)


def test_a_torn_or_foreign_value_is_noticed() -> None:
    """Any bit that differs, and any other key, is noticed."""
    for sequence in (3, 4):  # the fourth is a list
        value = make_value("s1", Proof(1, sequence, 0), 20)
        assert prove("s1", value) == Proof(1, sequence, 0)
        with pytest.raises(Violation, match="the value of b's1'"):
            prove("s2", value)
        whole = value[0] if isinstance(value, list) else value
        for at in range(len(whole)):
            torn = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            with pytest.raises(Violation, match=r"torn|nobody"):
                prove("s1", torn)
        with pytest.raises(Violation):
            prove("s1", whole[:-1])
    foreigners: list[Any] = [None, 7, b"", [], "text"]
    for foreign in foreigners:
        with pytest.raises(Violation, match="nobody has stored"):
            prove("s1", foreign)


def test_an_older_value_is_noticed(reader: Worker) -> None:
    """A reader never sees a writer go back; nor what was not made yet."""
    reader.judge("s1", proven(reader, "s1", 5), 0)
    reader.judge("s2", proven(reader, "s2", 4), 0)
    with pytest.raises(Violation, match="after number 5"):
        reader.judge("s1", proven(reader, "s1", 4), 0)
    value = proven(reader, "s1", 9)
    reader.ledger.pages[1][SEQUENCE] = 8
    with pytest.raises(Violation, match="before it was made"):
        reader.judge("s1", value, 0)


def test_a_late_value_is_noticed(reader: Worker) -> None:
    """A read that begins when an entry has certainly expired must not find it."""
    value = proven(reader, "o1:2", 5, mark=1_000)
    page = reader.ledger.pages[1]
    reader.judge("o1:2", value, 3_000)  # nothing is certain about it yet
    page[EXPIRING + 2], page[EXPIRED_BY + 2] = 5, 2_000
    reader.judge("o1:2", value, 1_999)
    with pytest.raises(Violation, match="after it had expired"):
        reader.judge("o1:2", value, 2_001)


def test_a_deleted_a_lost_and_an_old_value_are_noticed(reader: Worker) -> None:
    """The ledger of a key of one writer says what may be there."""
    page = reader.ledger.pages[1]
    reader.look_at_own(1, 0)
    page[INTENT] = page[DONE] = 5 << 1 | 1
    with pytest.raises(Violation, match="absent"):
        reader.look_at_own(1, 0)
    page[INTENT] = 6 << 1
    reader.look_at_own(1, 0)  # it may just have been deleted
    reader.cache["o1:0"] = proven(reader, "o1:0", 5)
    reader.look_at_own(1, 0)  # or not yet
    page[DONE] = 6 << 1
    with pytest.raises(Violation, match="deleted it as number 6"):
        reader.look_at_own(1, 0)
    page[INTENT] = page[DONE] = 7 << 1 | 1
    with pytest.raises(Violation, match="stored it as number 7"):
        reader.look_at_own(1, 0)


def test_a_missing_and_a_wrong_number_are_noticed(reader: Worker) -> None:
    """Numbers are between what is sure and what is meant, and never absent."""
    with pytest.raises(Violation, match="absent"):
        reader.look_at_one("n0")
    page = reader.ledger.pages[1]
    page[MEANT], page[SURE] = 12, 10
    for value, right in ((9, False), (10, True), (12, True), (13, False)):
        reader.cache["n0"] = value
        if right:
            reader.look_at_one("n0")
        else:
            with pytest.raises(Violation, match=r"expected 10 .* to 12"):
                reader.look_at_one("n0")
    reader.counted["n1"] = 5
    reader.cache["n1"] = 0
    with pytest.raises(Violation, match="after 5"):
        reader.count(1)


def test_a_token_won_twice_is_noticed(reader: Worker) -> None:
    """A key that only cas changes has as many generations as tokens were won."""
    for key in ("c0", "c1"):
        reader.cache[key] = proven(reader, key, 1)
    for _ in range(9):
        reader.chain()
        reader.look_at_chain()
    won = reader.ledger.sure(CHAIN_TALLY)
    reader.cache["c0"] = proven(reader, "c0", 2, mark=won - 1)
    with pytest.raises(Violation, match=f"found {won - 1}, expected {won}"):
        reader.look_at_one("c0")


def test_an_impossible_age_is_noticed(reader: Worker) -> None:
    """Ages in the statistics are compared with the age of the cache."""
    reader.cache.set("s1", b"", ttl=0.3)
    time.sleep(0.31)
    reader.cache.sweep()
    reader.look_at_ages()
    reader.stage.born = time.monotonic_ns()
    with pytest.raises(Violation, match="eviction_age_seconds"):
        reader.look_at_ages()
