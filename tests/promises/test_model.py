"""The cache against a plain model (model.py), with histories by Hypothesis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from amounts import MODEL_EXAMPLES
from model import ManyShards, OneShard, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Clock


@pytest.mark.counted
@pytest.mark.parametrize("machine", [OneShard, ManyShards])
def test_cache_agrees_with_the_model(
    machine: type[OneShard],
    new_name: Callable[[], str],
    clock: Clock,
    checker: None,
) -> None:
    """In any history every result is the model's, and the segment is sound."""
    run(machine, new_name, type(clock), MODEL_EXAMPLES)
