"""Worker rows: the sums of their counters while rows are freed all the time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from shmcache._format import layout as L
from shmcache._process import rows
from shmcache._process.attachment import Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache import Cache

pytestmark = pytest.mark.once


class Restless:
    """The words of a segment in which a row is freed during each read of a slice."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.quiet = False
        self.reads = 0

    def __getitem__(self, at: Any) -> Any:
        """Reads a word, or a slice of them."""
        found = self.words[at]
        if isinstance(at, slice):
            self.reads += 1
            if not self.quiet:
                self.words[L.H_FREED] += 1
        return found

    def __setitem__(self, at: int, value: int) -> None:
        """Writes a word."""
        self.words[at] = value


@pytest.fixture
def restless(make_cache: Callable[..., Cache]) -> Iterator[tuple[Cache, Restless]]:
    """A cache with some counts, and its words, which change during each read."""
    cache = make_cache(max_entries=10)
    cache["a"] = 1
    cache._attachment.count(L.R_CALLBACKS, 7)
    words = Restless(cache._attachment.words)
    yield cache, words
    del words.words  # a view keeps the mapping alive


def test_sums_say_whether_they_are_exact(restless: tuple[Cache, Restless]) -> None:
    """Reading the counters ends although rows are freed all the time, and the result
    says that it may be wrong; when all is quiet, one attempt is enough."""
    _, words = restless
    _, exact = rows.sum_counters(words)  # type: ignore[arg-type]
    assert not exact
    assert words.reads == 2 * rows.ATTEMPTS
    words.quiet, words.reads = True, 0
    sums, exact = rows.sum_counters(words)  # type: ignore[arg-type]
    assert exact
    assert words.reads == 2
    assert sums[L.R_CALLBACKS - L.R_COUNTERS] == 7


def test_an_attached_process_gets_exact_sums(
    restless: tuple[Cache, Restless], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are freed all the time, the admin lock keeps them for a moment."""
    cache, words = restless
    attachment: Any = cache._attachment
    admin = Attachment.admin

    @contextmanager
    def quiet(attachment: Attachment) -> Iterator[None]:
        with admin(attachment):
            words.quiet = True
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Attachment, "admin", quiet)
        patch.setattr(attachment, "words", words)
        assert attachment.counters()[L.R_CALLBACKS - L.R_COUNTERS] == 7
    assert words.quiet
    assert words.reads == 2 * rows.ATTEMPTS + 2
