"""Parameters that do not train: the same under every layout, and in checkpoints that any layout takes up."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import TOLERANCES, Cell, deviation
from tests.support import ranks
from tests.support.training import Trace, train_steps

pytestmark = pytest.mark.slow

STEPS, END = 3, 5
TRUNK = ("embedding.*", "positions.*", "blocks.0.*")
FREEZE = "train.freeze=[" + ",".join(TRUNK) + "]"
FIRST_STAGE = "train.freeze=[embedding.*,positions.*,blocks.*]"
"""All that the first of two stages holds, the tied head included: the last norm alone trains."""
CELLS = {
    "data 2": Cell(2),
    "zero 1": Cell(2, zero=1),
    "zero 3": Cell(2, zero=3),
    "zero 3, offload": Cell(2, zero=3, recompute="offload"),
    "tensor 2": Cell(2, tensor=2, tensor_sequence=True),
    "pipeline 2": Cell(2, pipeline=2, zero=1),
}
ONE = Cell(1)


def run(corpus: Path, cell: Cell, *more: str, stop: int = STEPS, **settings: str) -> Trace:
    overrides = (*cell.overrides(corpus), *(more or (FREEZE,)))
    names = ("save_to", "resume_from")
    return ranks.run(cell.ranks, train_steps, overrides, stop, *(settings.get(n) for n in names))[0]


def is_frozen(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in TRUNK)


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace, Trace]:
    """After STEPS steps, after END, and after STEPS with the last norm alone."""
    return (
        run(corpus, ONE),
        run(corpus, ONE, stop=END),
        run(corpus, ONE, FIRST_STAGE),
    )


def assert_kept(trace: Trace) -> None:
    for name, weight in trace.weights.items():
        same = np.array_equal(weight, trace.initial_weights[name])
        assert same == is_frozen(name), name


@pytest.mark.parametrize("name", CELLS)
def test_layouts(corpus: Path, one_process: tuple[Trace, Trace, Trace], name: str, tmp_path: Path):
    cell = CELLS[name]
    trace = run(corpus, cell, save_to=str(tmp_path))
    assert_kept(trace)
    assert deviation(trace, one_process[0]).within(TOLERANCES["fp32"])
    saved = tmp_path / f"step-{STEPS:08d}"
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["frozen"]) == {name for name in trace.weights if is_frozen(name)}
    for kind, entries in manifest["tensors"].items():
        trained = {name for name in trace.weights if not is_frozen(name)}
        assert set(entries) == (set(trace.weights) if kind == "weight" else trained), kind
    # Where it was, bit by bit; on one process, as the run that was never stopped.
    whole = run(corpus, cell, stop=END)
    resumed = run(corpus, cell, stop=END, resume_from=str(saved))
    assert resumed.losses == whole.losses[STEPS:]
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], expected, err_msg=name)
    elsewhere = run(corpus, ONE, stop=END, resume_from=str(saved))
    np.testing.assert_allclose(elsewhere.losses, one_process[1].losses[STEPS:], rtol=1e-5)
    assert_kept(elsewhere)


def test_a_stage_without_anything_that_trains(corpus: Path, one_process: tuple[Trace, Trace, Trace]):
    trace = run(corpus, CELLS["pipeline 2"], FIRST_STAGE)
    assert deviation(trace, one_process[2]).within(TOLERANCES["fp32"])
    moved = [
        name
        for name, weight in trace.weights.items()
        if not np.array_equal(weight, trace.initial_weights[name])
    ]
    assert moved == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_low_precision(corpus: Path, one_process: tuple[Trace, Trace, Trace], zero: int):
    trace = run(corpus, Cell(2, zero=zero, precision="bf16"))
    assert deviation(trace, one_process[0]).within(TOLERANCES["bf16"])
