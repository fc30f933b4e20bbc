"""A checkpoint written at any layout goes on at any other: the curve of a run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.parity.matrix import T5, Cell
from tests.support.training import Trace, train

pytestmark = pytest.mark.slow

STEPS, END = 2, 4
UNEVEN = ("model.vocab_size=323",)
LAYOUTS = {
    "one process": Cell(1, model=UNEVEN),
    "data 2": Cell(2, model=UNEVEN),
    "zero 3 of 2": Cell(2, zero=3, model=UNEVEN),
    "tensor 2": Cell(2, tensor=2, model=UNEVEN),
    "pipeline 2": Cell(2, pipeline=2, zero=1, model=UNEVEN),
    "sequence 2, zero 2": Cell(2, sequence=2, zero=2, model=UNEVEN),
    "zero 3 of 4": Cell(4, zero=3, micro=1, model=UNEVEN),
    "tensor 4": Cell(4, tensor=4, model=UNEVEN),
    "tensor 2, zero 3 of 2": Cell(4, tensor=2, zero=3, model=UNEVEN),
    "tensor 2, pipeline 2": Cell(4, tensor=2, pipeline=2, zero=1, model=UNEVEN),
    "3D of 8": Cell(8, tensor=2, pipeline=2, zero=1, model=UNEVEN),
}
PAIRS = [
    ("3D of 8", "zero 3 of 4"),
    ("3D of 8", "one process"),
    ("tensor 2, pipeline 2", "3D of 8"),
    ("tensor 4", "sequence 2, zero 2"),
    ("tensor 2, zero 3 of 2", "pipeline 2"),
    ("tensor 2, zero 3 of 2", "zero 3 of 4"),
    ("zero 3 of 4", "tensor 2, zero 3 of 2"),
    ("zero 3 of 2", "tensor 2"),
    ("pipeline 2", "tensor 4"),
    ("pipeline 2", "data 2"),
    ("sequence 2, zero 2", "pipeline 2"),
    ("tensor 2", "zero 3 of 2"),
    ("one process", "3D of 8"),
]
"""(saved at, resumed at); each run of the suite takes the first and some others."""
PAIRS_IN_TURNS = [
    pytest.param(*pair, marks=[pytest.mark.in_turns(4)] if pair != PAIRS[0] else [])
    for pair in sorted(PAIRS, key=lambda pair: LAYOUTS[pair[1]].ranks)
]


class Run(NamedTuple):
    """A run of END steps that saved after STEPS of them."""

    trace: Trace
    checkpoint: Path


@pytest.fixture(scope="module")
def runs(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Run]:
    """By layout, those that the chosen tests ask for; in order of the number of ranks, so that each pool
    starts once."""
    tests = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {parameters.get("origin", parameters.get("layout")) for parameters in tests} & LAYOUTS.keys()
    root = tmp_path_factory.mktemp("saved")
    made = {}
    for name in sorted({"one process", *asked}, key=lambda name: LAYOUTS[name].ranks):
        cell = LAYOUTS[name]
        trace = train(cell.ranks, cell.overrides(corpus), END, save_to=root / name, save_at=STEPS)[0]
        made[name] = Run(trace, root / name / f"step-{STEPS:08d}")
    return made


def resume(corpus: Path, layout: str, checkpoint: Path) -> Trace:
    cell = LAYOUTS[layout]
    return train(cell.ranks, cell.overrides(corpus), END, resume_from=checkpoint)[0]


@pytest.mark.parametrize(("origin", "target"), PAIRS_IN_TURNS)
def test_goes_on_elsewhere(corpus: Path, runs: dict[str, Run], origin: str, target: str):
    resumed, whole = resume(corpus, target, runs[origin].checkpoint), runs["one process"].trace
    np.testing.assert_allclose(resumed.losses, whole.losses[STEPS:], rtol=1e-5)
    np.testing.assert_allclose(resumed.grad_norms, whole.grad_norms[STEPS:], rtol=1e-4)
    np.testing.assert_allclose(resumed.validation_loss, whole.validation_loss, rtol=1e-5)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize(
    "layout", ["tensor 2", "pipeline 2", "sequence 2, zero 2", "tensor 2, zero 3 of 2", "3D of 8"]
)
def test_goes_on_bit_by_bit_where_it_was(corpus: Path, runs: dict[str, Run], layout: str):
    """Data parallelism and ZeRO: see test_resume.py."""
    never_stopped, checkpoint = runs[layout]
    resumed = resume(corpus, layout, checkpoint)
    assert resumed.losses == never_stopped.losses[STEPS:]
    assert resumed.grad_norms == never_stopped.grad_norms[STEPS:]
    for name, expected in never_stopped.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], expected, err_msg=name)


def test_weights_that_several_stages_hold_go_on_elsewhere(corpus: Path, tmp_path: Path):
    """T5's biases of distances, which stand on all stages with blocks of their side."""
    saved_at, others = Cell(4, T5, pipeline=4, zero=1, micro=1), (Cell(2, T5, tensor=2), Cell(1, T5))
    train(4, saved_at.overrides(corpus), STEPS, tmp_path)
    checkpoint = tmp_path / f"step-{STEPS:08d}"
    resumed = [train(cell.ranks, cell.overrides(corpus), END, None, checkpoint)[0] for cell in others]
    whole = train(1, others[1].overrides(corpus), END)[0]
    for trace in resumed:
        np.testing.assert_allclose(trace.losses, whole.losses[STEPS:], rtol=1e-5)
        np.testing.assert_allclose(trace.grad_norms, whole.grad_norms[STEPS:], rtol=1e-4)
