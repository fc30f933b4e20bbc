"""Prompts in every layout equal one process, of one token and of several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import TOLERANCES, deviation
from tests.parity.test_finetune import rows, settings
from tests.support.training import Trace, train

pytestmark = pytest.mark.slow

__all__ = ["rows"]
STEPS = 3
WORDS = {"BERT": "{0: a, 1: the, 2: and}", "GPT": "{0: a fine film, 1: old, 2: of two men}"}
LAYOUTS = {
    "DDP": (2, ()),
    "ZeRO 1": (2, ("parallel.zero=1",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "ZeRO 2, bf16": (2, ("parallel.zero=2", "precision=bf16")),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Trace]:
    return {}


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("model", list(WORDS))
def test_equals_one_process(
    layout: str,
    model: str,
    rows: Path,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
    references: dict[str, Trace],
) -> None:
    words = settings(model, "prompted", rows, corpus, tmp_path_factory.getbasetemp() / "tables")
    words += ("objective.template={text} it was {answer}.", f"objective.verbalizer={WORDS[model]}")
    if model not in references:
        [references[model]] = train(1, words, STEPS)
    size, more = LAYOUTS[layout]
    for trace in train(size, (*words, *more), STEPS):
        found = deviation(trace, references[model])
        assert found.within(TOLERANCES["bf16" if "precision=bf16" in more else "fp32"]), found


def test_a_resume_is_bit_exact(rows: Path, corpus: Path, tmp_path: Path) -> None:
    words = settings("GPT", "prompted", rows, corpus, tmp_path / "tables")
    words += ("objective.template={text} it was {answer}", f"objective.verbalizer={WORDS['GPT']}")
    [whole] = train(1, words, STEPS, save_to=tmp_path / "saved", save_at=2)
    [rest] = train(1, words, STEPS, resume_from=tmp_path / "saved" / "step-00000002")
    assert rest.losses == whole.losses[2:]
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
