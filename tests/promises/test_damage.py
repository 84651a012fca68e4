"""Damaged segments: no signal, no endless loop, no value that was never stored.

``SHMCACHE_DAMAGES``: how many segments are damaged in all (amounts.py otherwise);
``SHMCACHE_SEED``: the seed, always the same unless given, so that a failure is of the
change and not of the day.  A failure names seed and round, and ``damage_rig.py`` can
repeat that round alone.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys

import damage_rig
import pytest
from amounts import DAMAGES

pytestmark = [pytest.mark.slow, pytest.mark.counted]

SEED = int(os.environ.get("SHMCACHE_SEED", "1"))
# Segments in use are the cheap ones; those at rest are attached to anew each time.
BATCHES = [("used", batch) for batch in range(10)] + [("at rest", 0), ("handles", 0)]


@pytest.mark.parametrize(("kind", "batch"), BATCHES)
def test_8_damage_is_rebuilt_or_reported(kind: str, batch: int, name: str) -> None:
    """Damage of any bytes ends in a rebuild or in an error of the package: never in a
    signal, in an endless loop, or in a value that was not stored under its key."""
    number = DAMAGES // len(BATCHES)
    fd = os.memfd_create("progress")
    os.ftruncate(fd, mmap.PAGESIZE)
    progress = mmap.mmap(fd, mmap.PAGESIZE)
    try:
        first = batch * number
        done = subprocess.run(
            [
                *(sys.executable, damage_rig.__file__, name, kind),
                *map(str, (SEED, first, number, fd)),
            ],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
        )
        reached = int.from_bytes(progress[:8], sys.byteorder)
        assert done.returncode == 0, (
            f"seed {SEED}, round {reached}: {done.stderr[-5_000:]}"
        )
        assert reached == first + number - 1
        # Some of it was met, so the damage was real.
        seen = json.loads(done.stdout.splitlines()[-1])
        assert sum(seen.values()) > number
    finally:
        progress.close()
        os.close(fd)
