"""Layouts of a model wide enough for oneDNN's products equal one process with torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.nn import linear
from tests.parity.matrix import TOLERANCES, deviation
from tests.support import ranks
from tests.support.training import Trace, composed, train_composed

pytestmark = pytest.mark.slow

STEPS = 2
WIDE = (
    "model=gpt_tiny",
    "model.num_layers=2",
    "model.hidden_size=512",
    "model.num_heads=8",
    "batch.global_size=4",
    "batch.sequence_length=32",
    "optimizer.lr=1e-4",
    "data.workers=0",
)
LAYOUTS = (
    (1, ("recompute=selective",)),
    (2, ("parallel.zero=3",)),
    (2, ("parallel.tensor=2",)),
    (2, ("parallel.tensor=2", "recompute=selective")),
    (2, ("parallel.tensor=2", "parallel.tensor_sequence=true", "recompute=full")),
    (2, ("parallel.pipeline=2", "parallel.zero=1")),
)


def train_by_torch(mapping: dict[str, Any], stop: int) -> Trace:
    return _train_by("torch", mapping, stop)


def train_by_onednn(mapping: dict[str, Any], stop: int) -> Trace:
    return _train_by("onednn", mapping, stop)


def _train_by(way: linear.Way, mapping: dict[str, Any], stop: int) -> Trace:
    own, linear.way_of = linear.way_of, lambda dtype: way  # type: ignore[assignment]
    try:
        return train_composed(mapping, stop)
    finally:
        linear.way_of = own


@pytest.fixture(scope="module")
def reference(corpus: Path) -> Trace:
    overrides = (*WIDE, f"data.path={corpus}", "batch.micro_size=2")
    return ranks.run(1, train_by_torch, composed(overrides), STEPS)[0]


@pytest.mark.parametrize(
    ("size", "layout"), LAYOUTS, ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value)
)
def test_layouts(reference: Trace, corpus: Path, size: int, layout: tuple[str, ...]) -> None:
    overrides = (*WIDE, f"data.path={corpus}", "batch.micro_size=2", *layout)
    for trace in ranks.run(size, train_by_onednn, composed(overrides), STEPS):
        found = deviation(trace, reference)
        assert found.within(TOLERANCES["fp32"]), found
