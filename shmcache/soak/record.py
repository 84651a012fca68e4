"""``Record``: what a run has seen, which reports and plots are made of."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcache.soak.options import Options
    from shmcache.soak.sampling import CacheSample, Sample
    from shmcache.soak.verdict import Judgement


@dataclass
class Record:
    """What a run has seen, and the verdict on it."""

    options: Options
    began: float = field(default_factory=time.time)  # by the wall clock, in s
    samples: list[Sample] = field(default_factory=list)
    # What was done and when, in s since the beginning: kill, recycle, died.
    marks: list[tuple[float, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)  # what does not add up
    judgements: list[Judgement] = field(default_factory=list)
    seconds: float = 0.0  # how long it really ran
    stopped_by: int = 0  # the signal that ended it early
    checks: int = 0
    died: int = 0  # handles that killed workers had open when they were killed
    final: dict[str, CacheSample] = field(default_factory=dict)  # after the last worker

    @property
    def leaks(self) -> list[Judgement]:
        """The quantities that grow."""
        return [j for j in self.judgements if j.leak]

    @property
    def status(self) -> int:
        """The exit code."""
        if self.findings or self.leaks:
            return 1
        if self.stopped_by and self.options.pid is None:
            return 128 + self.stopped_by
        return 0

    def count(self, kind: str) -> int:
        """How many marks of a kind there are."""
        return sum(kind == known for _, known in self.marks)
