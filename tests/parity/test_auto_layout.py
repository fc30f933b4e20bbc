"""`parallel=auto` trains to what one process trains to, whatever layout it chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.train.resolve import resolve
from tests.support.training import TINY_GPT, compose, train

pytestmark = pytest.mark.slow
STEPS = 2


def test_two_ranks_train_as_the_planner_says(corpus: Path) -> None:
    words = (*TINY_GPT, f"data.path={corpus}", "device=cpu")
    [alone] = train(1, words, STEPS)
    chosen = resolve(compose([*words, "parallel=auto"]), 2)
    assert chosen.layout.data * chosen.layout.model * chosen.layout.sequence == 2
    assert chosen.config.parallel.auto
    for trace in train(2, (*words, "parallel=auto"), STEPS):
        assert trace.losses == pytest.approx(alone.losses, rel=1e-4)
