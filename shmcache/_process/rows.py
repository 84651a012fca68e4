"""Worker rows: which processes use a segment, and what each of them has counted.

Problem: the sums over all workers, living and dead, must be exact: nothing that a
worker counted is lost or counted twice, even if the process that reaps a dead worker's
row dies in the middle of it.

Mechanism: each process counts in a row of its own, so no counter has two writers.  A
row's *token* is its number and a generation that is never used again, so a row that
was handed on is not mistaken for its former owner.  When a worker goes, its counters
are added to the *retired counters*, of which there are two copies: ``retire`` writes
the new sums, with the row's token, to the copy that does not count, and then makes it
the one that counts by a single store.

Death in the middle: before that store nothing has happened.  After it the token in the
retired counters tells that the row's counts are in the sums already, so readers skip
the row, and the next process that retires a row only clears it.

Rows are handed out and retired under the admin lock (see lockfile.py).  The functions
here take a view of the segment's 64-bit words, so that a process that merely looks at
a segment can use those that read.
"""

from __future__ import annotations

import os
import time

from shmcache._format import layout as L
from shmcache._format.fields import make_token, row_of

# All rows are read at most ATTEMPTS times; then the last sum is taken as it is.  After
# the first AT_ONCE times there is a pause (s) in between.  Rows are hardly ever retired
# for so long without a break.
ATTEMPTS = 200
AT_ONCE = 20
PAUSE = 0.000_1


# --- reading ----------------------------------------------------------------------


def tokens_in(words: memoryview) -> list[int]:
    """Return the tokens in all rows, dead workers not yet reaped included."""
    first = L.ROWS_AT // 8 + L.R_TOKEN
    last = first + L.ROWS * L.ROW_WORDS
    return [token for token in words[first : last : L.ROW_WORDS] if token]


def has_row(words: memoryview, token: int) -> bool:
    """Return whether the row that a token names still belongs to it.

    Args:
        words: The segment as 64-bit words.
        token: Any number; it may come from a damaged word.
    """
    row = row_of(token)
    return 0 <= row < L.ROWS and words[L.row_at(row) + L.R_TOKEN] == token


def pid_of(words: memoryview, token: int) -> int:
    """Return the PID that a worker wrote into its row; 0 if it has lost the row."""
    row = row_of(token)
    if not 0 <= row < L.ROWS:
        return 0
    at = L.row_at(row)
    pid: int = words[at + L.R_PID]
    return pid if words[at + L.R_TOKEN] == token else 0


def held_by(words: memoryview, token: int) -> tuple[int, int]:
    """Return how many handles and how many leases a worker has."""
    at = L.row_at(row_of(token))
    return (
        max(0, words[at + L.R_OPENED] - words[at + L.R_CLOSED]),
        max(0, words[at + L.R_LEASES] - words[at + L.R_RETURNED]),
    )


def sum_counters(words: memoryview) -> tuple[list[int], bool]:
    """Add up the counters of all workers, living and dead.

    If rows are retired meanwhile, all is read again, at most ATTEMPTS times.

    Args:
        words: The segment as 64-bit words.

    Returns:
        The sums, and whether they are exact: if not, a worker that was retired during
        the last attempt may be missing or counted twice.
    """
    totals: list[int] = []
    for attempt in range(ATTEMPTS):
        totals, exact = _try_sum(words)
        if exact:
            return totals, True
        if attempt >= AT_ONCE:
            time.sleep(PAUSE)
    return totals, False


def _try_sum(words: memoryview) -> tuple[list[int], bool]:
    n = L.ROW_WORDS - L.R_COUNTERS
    freed = words[L.H_FREED]
    counting = words[L.H_RETIRED] & 1
    at = _retired_at(counting)
    totals = words[at : at + n].tolist()
    retired = words[at + L.RETIRED_TOKEN]
    rows = words[L.ROWS_AT // 8 : L.row_at(L.ROWS)].tolist()
    # There are two tests, because after two retired rows the same copy counts again.
    exact = (words[L.H_RETIRED] & 1, words[L.H_FREED]) == (counting, freed)
    for row in range(0, len(rows), L.ROW_WORDS):
        if rows[row + L.R_TOKEN] not in (0, retired):
            for i in range(n):
                totals[i] += rows[row + L.R_COUNTERS + i]
    return totals, exact


def _retired_at(copy: int) -> int:
    return L.RETIRED_AT + copy * L.RETIRED_WORDS


# --- under the admin lock ---------------------------------------------------------


def occupy(words: memoryview, row: int) -> int:
    """Write this process into a row that it has locked; return its token."""
    at = L.row_at(row)
    # This is stored first, so that no generation is ever given out twice.
    words[L.H_GENERATION] += 1
    token: int = make_token(words[L.H_GENERATION], row)
    words[at + L.R_PID] = os.getpid()
    words[at + L.R_STARTED] = time.time_ns()
    words[at + L.R_TOKEN] = token
    return token


def retire(words: memoryview, row: int) -> None:
    """Add the counters of a row to the retired counters, and free the row.

    The head of the module explains the two copies, and a death in the middle.
    """
    at = L.row_at(row)
    token = words[at + L.R_TOKEN]
    counting = words[L.H_RETIRED] & 1
    old = _retired_at(counting)
    last = words[old + L.RETIRED_TOKEN]
    if last != token and has_row(words, last):
        # The process that retired that row died before it cleared it.  The row must be
        # cleared before the copies change places: the other copy has another token, so
        # nothing would show any more that the counts are in the sums already.
        _clear(words, L.row_at(row_of(last)))
    if token and last != token:
        _add_to_retired(words, at, old, _retired_at(1 - counting), token)
        words[L.H_RETIRED] = 1 - counting
    _clear(words, at)


def _add_to_retired(words: memoryview, at: int, old: int, new: int, token: int) -> None:
    for i in range(L.ROW_WORDS - L.R_COUNTERS):
        total = words[old + i] + words[at + L.R_COUNTERS + i]
        words[new + i] = total & L.MASK64
    words[new + L.RETIRED_TOKEN] = token


def _clear(words: memoryview, at: int) -> None:
    for i in range(L.R_COUNTERS, L.ROW_WORDS):
        words[at + i] = 0
    words[L.H_FREED] = (words[L.H_FREED] + 1) & L.MASK64
    # This is stored last: until then the row is not handed out again.
    words[at + L.R_TOKEN] = 0
