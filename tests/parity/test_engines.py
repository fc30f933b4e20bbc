"""Every engine and number of ranks computes what one plain process computes.

Tolerances: fp32 sums run in another order, which moves a loss of about 6 by some 1e-7 relative; 1e-5
leaves room for the drift of a few steps. The weights' distance is measured as a whole: single
parameters whose gradient is zero but for rounding (a key's bias) go where rounding leads them. bf16
keeps 3 digits: there only nearness is asked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import ranks
from tests.support.training import TINY_GPT, Trace, train_steps

STEPS = 5
pytestmark = pytest.mark.slow


def settings(corpus: Path, *overrides: str) -> list[str]:
    return [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "optimizer.lr=3e-3", "seed=7", *overrides]


def assert_same(trace: Trace, reference: Trace, *, loss: float, norm: float, update: float = 0.01) -> None:
    """`update` bounds the distance of the weights, as a share of how far training moved them."""
    np.testing.assert_allclose(trace.losses, reference.losses, rtol=loss)
    np.testing.assert_allclose(trace.grad_norms, reference.grad_norms, rtol=norm)
    np.testing.assert_allclose(trace.validation_loss, reference.validation_loss, rtol=loss)
    assert set(trace.weights) == set(reference.weights)
    distance, moved = 0.0, 0.0
    for name, expected in reference.weights.items():
        distance += float(np.square(trace.weights[name] - expected).sum())
        moved += float(np.square(expected - reference.initial_weights[name]).sum())
    assert moved > 0
    assert distance**0.5 <= update * moved**0.5


@pytest.fixture(scope="module")
def reference(corpus: Path) -> Trace:
    return ranks.run(1, train_steps, settings(corpus, "model.dropout=0.1"), STEPS)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_equals_one_plain_process(corpus: Path, reference: Trace, size: int, zero: int):
    overrides = settings(corpus, "model.dropout=0.1", "engine=deepspeed", f"parallel.zero={zero}")
    for trace in ranks.run(size, train_steps, overrides, STEPS):
        assert_same(trace, reference, loss=1e-5, norm=1e-4)


def test_two_local_ranks_equal_one(corpus: Path, reference: Trace):
    for trace in ranks.run(2, train_steps, settings(corpus, "model.dropout=0.1"), STEPS):
        assert_same(trace, reference, loss=1e-5, norm=1e-4)


def test_four_ranks_with_other_micro_batches(corpus: Path):
    """Accumulation is only a way to divide the batch; without dropout it leaves no trace."""
    expected = ranks.run(1, train_steps, settings(corpus), STEPS)[0]
    for overrides in (["batch.micro_size=1"], ["batch.micro_size=1", "parallel.zero=2"]):
        for trace in ranks.run(4, train_steps, settings(corpus, *overrides), STEPS):
            assert_same(trace, expected, loss=1e-5, norm=1e-4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_stays_near_fp32(corpus: Path, reference: Trace, zero: int):
    overrides = settings(
        corpus, "model.dropout=0.1", "precision=bf16", "engine=deepspeed", f"parallel.zero={zero}"
    )
    for trace in ranks.run(2, train_steps, overrides, STEPS):
        assert_same(trace, reference, loss=5e-3, norm=5e-2, update=0.25)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam"])
def test_other_optimizers_under_zero(corpus: Path, name: str):
    overrides = settings(corpus, f"optimizer={name}", "optimizer.weight_decay=0", "optimizer.lr=1e-3")
    expected = ranks.run(1, train_steps, overrides, STEPS)[0]
    for trace in ranks.run(2, train_steps, [*overrides, "parallel.zero=2"], STEPS):
        assert_same(trace, expected, loss=1e-5, norm=1e-3)


@pytest.mark.parametrize("model", ["llama_tiny", "lstm"])
def test_other_families(corpus: Path, model: str):
    overrides = [f"model={model}", "model.num_layers=1", f"data.path={corpus}", "train.steps=20"]
    overrides += ["batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=32"]
    expected = ranks.run(1, train_steps, overrides, STEPS)[0]
    for trace in ranks.run(2, train_steps, [*overrides, "parallel.zero=3"], STEPS):
        assert_same(trace, expected, loss=1e-5, norm=1e-4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_images_in_bf16(zero: int):
    overrides = [
        "model=simple_cnn",
        "data=mnist",
        "train.steps=20",
        "batch.global_size=16",
        "batch.micro_size=4",
    ]
    expected = ranks.run(1, train_steps, overrides, STEPS)[0]
    low = [*overrides, "precision=bf16", "engine=deepspeed", f"parallel.zero={zero}"]
    for trace in ranks.run(2, train_steps, low, STEPS):
        assert_same(trace, expected, loss=2e-2, norm=1e-1, update=0.5)
