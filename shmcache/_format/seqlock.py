"""Reading what a writer may change meanwhile: ``stable_read``.

Problem: a shard's words are read without its lock, and a copy that a writer changed
half-way is of no moment at all.

Mechanism: the shard's ``seq`` word is odd while a writer is inside, and each write
section leaves it two higher.  A copy is of one moment if ``seq`` was even before it
and is the same after it.  The reader tries a bounded number of times, because a writer
that was stopped, or died, leaves ``seq`` odd; and the result says whether the last
copy is stable, because only the caller knows what an unstable one is good for.

Death in the middle: a reader writes nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

# Attempts that follow each other at once; the later ones leave the writer some time.
AT_ONCE = 20
PAUSE = 0.000_1  # seconds


def stable_read(
    words: memoryview,
    base: int,
    copy: Callable[[], _T],
    *,
    attempts: int = 200,
    pause: float = PAUSE,
) -> tuple[_T, bool]:
    """Call ``copy`` until no writer was inside the shard meanwhile.

    Args:
        words: The segment as 64-bit words.
        base: The first word of the shard.
        copy: Reads what is wanted.  What it reads may change meanwhile, so it must
            cope with any value; it runs at least once and at most ``attempts`` times.
        attempts: After so many the last copy is returned as it is.
        pause: Seconds between two attempts, after the first ``AT_ONCE``.

    Returns:
        The last copy, and whether it is of one moment.
    """
    for attempt in range(attempts):
        before = words[base + L.S_SEQ]
        value = copy()
        if not before & 1 and words[base + L.S_SEQ] == before:
            return value, True
        if attempt >= AT_ONCE:
            time.sleep(pause)
    return value, False
