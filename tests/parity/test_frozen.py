"""Parameters that do not train: the same under every layout, and in checkpoints that any layout takes up."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import TOLERANCES, Cell, deviation
from tests.support.training import Trace, train

pytestmark = pytest.mark.slow

STEPS, END = 2, 4
TRUNK = ("embedding.*", "positions.*", "blocks.0.*")
FREEZE = "train.freeze=[" + ",".join(TRUNK) + "]"
FIRST_STAGE = "train.freeze=[embedding.*,positions.*,blocks.*]"
"""All that the first of two stages holds, the tied head included: the last norm alone trains."""
CELLS = {
    "zero 1": Cell(2, zero=1),
    "zero 3": Cell(2, zero=3, recompute="offload"),
    "tensor 2": Cell(2, tensor=2, tensor_sequence=True),
    "pipeline 2": Cell(2, pipeline=2, zero=1),
}
ONE = Cell(1)


def run(
    corpus: Path,
    cell: Cell,
    *settings: str,
    save_to: Path | None = None,
    resume_from: Path | None = None,
) -> Trace:
    """Of END steps; save_to: the folder of a checkpoint after STEPS of them."""
    overrides = (*cell.overrides(corpus), *(settings or (FREEZE,)))
    return train(cell.ranks, overrides, END, save_to, resume_from, STEPS if save_to else None)[0]


def is_frozen(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in TRUNK)


def assert_kept(trace: Trace) -> None:
    for name, weight in trace.weights.items():
        same = np.array_equal(weight, trace.initial_weights[name])
        assert same == is_frozen(name), name


@pytest.fixture(scope="module")
def one_process(corpus: Path) -> dict[str, Trace]:
    """First, since pools of other sizes end each other."""
    return {
        "trunk": run(corpus, ONE),
        "norm": run(corpus, ONE, FIRST_STAGE),
    }


@pytest.fixture(scope="module")
def saved(
    corpus: Path, one_process: dict[str, Trace], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Trace, Path]]:
    """By layout: what END steps came to, and the checkpoint after STEPS of them."""
    root = tmp_path_factory.mktemp("frozen")
    traces = {name: run(corpus, cell, save_to=root / name) for name, cell in CELLS.items()}
    return {name: (trace, root / name / f"step-{STEPS:08d}") for name, trace in traces.items()}


@pytest.mark.parametrize("name", CELLS)
def test_layouts(one_process: dict[str, Trace], saved: dict[str, tuple[Trace, Path]], name: str):
    trace, checkpoint = saved[name]
    assert_kept(trace)
    assert deviation(trace, one_process["trunk"]).within(TOLERANCES["fp32"])
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    trained = {name for name in trace.weights if not is_frozen(name)}
    assert set(manifest["frozen"]) == set(trace.weights) - trained
    for kind, entries in manifest["tensors"].items():
        assert set(entries) == (set(trace.weights) if kind == "weight" else trained), kind


@pytest.mark.parametrize("name", ["zero 3", "pipeline 2"])
def test_goes_on_bit_by_bit_where_it_was(corpus: Path, saved: dict[str, tuple[Trace, Path]], name: str):
    whole, checkpoint = saved[name]
    resumed = run(corpus, CELLS[name], resume_from=checkpoint)
    assert resumed.losses == whole.losses[STEPS:]
    for weight, expected in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[weight], expected, err_msg=weight)


def test_a_stage_without_anything_that_trains(corpus: Path, one_process: dict[str, Trace]):
    trace = run(corpus, CELLS["pipeline 2"], FIRST_STAGE)
    assert deviation(trace, one_process["norm"]).within(TOLERANCES["fp32"])
    weights = trace.weights.items()
    moved = [name for name, weight in weights if not np.array_equal(weight, trace.initial_weights[name])]
    assert sorted(moved) == ["norm.bias", "norm.weight"]


def test_offload(corpus: Path, one_process: dict[str, Trace]):
    offload = ("parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu")
    trace = run(corpus, Cell(2, zero=3), FREEZE, *offload)
    assert_kept(trace)
    assert deviation(trace, one_process["trunk"]).within(TOLERANCES["fp32"])


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(
    ("zero", "more"),
    [(0, {}), (2, {}), (3, {}), (1, {"pipeline": 2})],
)
def test_low_precision(corpus: Path, one_process: dict[str, Trace], zero: int, more: dict[str, int]):
    freeze = FIRST_STAGE if more else FREEZE
    trace = run(corpus, Cell(2, zero=zero, precision="bf16", **more), freeze)
    assert deviation(trace, one_process["norm" if more else "trunk"]).within(TOLERANCES["bf16"])


@pytest.mark.parametrize("name", CELLS)
def test_goes_on_in_one_process(
    corpus: Path, one_process: dict[str, Trace], saved: dict[str, tuple[Trace, Path]], name: str
):
    resumed = run(corpus, ONE, resume_from=saved[name][1])
    np.testing.assert_allclose(resumed.losses, one_process["trunk"].losses[STEPS:], rtol=1e-5)
    assert_kept(resumed)
