"""SIGKILL at random moments under mixed load, thousands of times; and SIGSTOP.

``SHMCACHE_KILLS``: how many processes are killed in each variant of the storm
(amounts.py otherwise).
``SHMCACHE_SEED``: the seed of what is random, to repeat a run (the machine's own
timing stays random).
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import storm_rig
from amounts import KILLS
from storm_rig import ROOMY, VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.counted]

SEED = int(os.environ.get("SHMCACHE_SEED", "0")) or secrets.randbits(32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_1_storm_of_kills(
    variant: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    """If workers are killed at random moments, nothing acknowledged is lost, nobody
    waits for a dead one, and the segment is sound."""
    print(f"SHMCACHE_SEED={SEED}")
    storm = subprocess.run(
        [sys.executable, storm_rig.__file__, name, str(KILLS), str(SEED), variant],
        capture_output=True,
        text=True,
        check=False,
    )
    assert storm.returncode == 0, storm.stderr[-5_000:]
    report = json.loads(storm.stdout.splitlines()[-1])
    for what, number in report.items():
        record_property(what, number)
    assert report["kills"] >= KILLS
    # Some died inside, so the storm was one.
    assert report["recoveries"] > 0
    assert report["dropped"] == 0
    assert report["lock_timeouts"] == 0
    assert (report["evicted"] == 0) == (variant == ROOMY)
