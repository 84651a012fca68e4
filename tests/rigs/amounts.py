"""How much the tests do: every count of a storm, a sweep or a history, in one table.

``pytest`` takes the moderate amounts: every scenario runs, with fewer repetitions, in
about five minutes.  ``pytest --full``, or ``SHMCACHE_FULL=1`` in the environment (which
child processes inherit), takes the full ones.  A variable named in the table sets an
amount to any number.
"""

from __future__ import annotations

import os
from zlib import crc32

import shmcache

FULL = os.environ.get("SHMCACHE_FULL", "0") not in {"", "0"}


def amount(
    moderate: int,
    full: int,
    *,
    interpreted: tuple[int, int] | None = None,
    variable: str = "",
) -> int:
    """The amount that holds in this run.

    Args:
        moderate: The amount of a run without ``--full``.
        full: The amount of a run with it.
        interpreted: Both amounts on the interpreted engine, where they differ.
        variable: The environment variable that overrides all of these.
    """
    if given := os.environ.get(variable):
        return round(float(given))
    if interpreted and not shmcache.compiled:
        moderate, full = interpreted
    return full if FULL else moderate


# fmt: off
# --- storms ---------------------------------------------------------------------
KILLS = amount(300, 2_000, interpreted=(40, 200), variable="SHMCACHE_KILLS")
DAMAGES = amount(4_800, 24_000, interpreted=(480, 1_800), variable="SHMCACHE_DAMAGES")
HISTORIES = amount(20, 60, interpreted=(3, 6))
CREATIONS_WITH_KILLS = amount(10, 30, variable="SHMCACHE_CREATION_ROUNDS")
CREATIONS = amount(5, 20, interpreted=(2, 20))
SIGNALS_THAT_RAISE = amount(150, 400, interpreted=(60, 400))
SIGNALS_THAT_CALL = amount(150, 500, interpreted=(60, 500))
CLOSES = amount(100, 500, interpreted=(30, 500))
FAIRNESS_SECONDS = amount(2, 2, variable="SHMCACHE_FAIRNESS_SECONDS")
SPARE_PERMITS = amount(200_000, 200_000, interpreted=(3_000, 3_000))
# Seconds that each test of the fuzzers plays.
FUZZ_STORM_SECONDS = amount(
    4, 30, interpreted=(3, 20), variable="SHMCACHE_FUZZ_SECONDS"
)
FUZZ_HISTORY_SECONDS = amount(2, 20, variable="SHMCACHE_FUZZ_SECONDS")
FUZZ_LOCK_STEP_SECONDS = amount(1, 10, variable="SHMCACHE_FUZZ_SECONDS")
INCREMENTS = amount(2_000, 10_000, interpreted=(300, 1_000))
READS = amount(60_000, 250_000, interpreted=(8_000, 25_000))

# --- sweeps: every n-th point at which a process dies, is stopped, or is struck --
EVERY_DEATH = amount(6, 1, interpreted=(30, 1))
EVERY_STOP = amount(20, 2, interpreted=(40, 4))
EVERY_STRIKE = amount(7, 1)

# --- histories ------------------------------------------------------------------
MODEL_EXAMPLES = amount(20, 60, interpreted=(8, 30))
ACCESSES = amount(50_000, 250_000, interpreted=(3_000, 6_000))
# fmt: on


def points(total: int, every: int, scenario: str) -> range:
    """The points of a sweep that this run visits: every n-th, spread evenly.

    Args:
        total: How many points there are; the first has the number 0.
        every: The n of "every n-th"; 1 visits all of them.
        scenario: Its name decides where the sweep begins, so that the sweeps of
            different scenarios visit different points.  So does ``SHMCACHE_SEED``.
    """
    return range(offset(min(every, total), scenario), total, every)


def offset(every: int, scenario: str) -> int:
    """The first point of a sweep that visits every n-th point of a scenario."""
    seed = os.environ.get("SHMCACHE_SEED", "1")
    return crc32(f"{seed} {scenario}".encode()) % max(every, 1)
