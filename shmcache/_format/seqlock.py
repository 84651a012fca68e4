"""Reading what a writer may change meanwhile: ``stable_read``.

Problem: some readers copy a shard's words without its lock.  If a writer changes them
meanwhile, the copy mixes the state before the write with the state after it.

Mechanism: the shard's ``seq`` word is odd while a writer is inside, and each write
section leaves it two higher.  If ``seq`` was even before the copy and is the same after
it, the copy is stable: it shows one moment.  Otherwise the reader tries again, but only
a bounded number of times, because a writer that was stopped, or died, leaves ``seq``
odd.  The result tells whether the last copy is stable, because only the caller knows
what an unstable one is good for.

Death in the middle: a reader writes nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

# The first attempts follow each other at once; the later ones give the writer time.
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
        base: The number of the first word of the shard.
        copy: Reads what the caller wants and returns it.  A writer may change the words
            meanwhile, so it must cope with any value.
        attempts: How often ``copy`` is called at most; at least 1.
        pause: Seconds between two attempts, after the first ``AT_ONCE``.

    Returns:
        The last copy, and whether it is stable.
    """
    for attempt in range(attempts):
        before = words[base + L.S_SEQ]
        value = copy()
        if not before & 1 and words[base + L.S_SEQ] == before:
            return value, True
        if attempt >= AT_ONCE:
            time.sleep(pause)
    return value, False
