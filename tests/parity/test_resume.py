"""A resumed run equals one that was never stopped, bit by bit, on the same number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.training import TINY_GPT, train

pytestmark = pytest.mark.slow

CASES = [
    *[(2, precision, "deepspeed", zero) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)],
    *[(2, precision, "local", 0) for precision in ("fp32", "bf16")],
    *[(1, precision, "local", 0) for precision in ("fp32", "bf16")],
    (1, "fp32", "deepspeed", 3),
]


def assert_bitwise_resume(size: int, overrides: list[str], folder: Path) -> None:
    """A run of 4 steps that saves after the second equals, from there on, one that goes on from there."""
    whole = train(size, overrides, 4, save_to=folder, save_at=2)[0]
    after = train(size, overrides, 4, resume_from=folder / "step-00000002")[0]
    assert after.losses == whole.losses[2:]
    assert after.grad_norms == whole.grad_norms[2:]
    assert after.validation_loss == whole.validation_loss
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(after.weights[name], expected, err_msg=name)


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(("size", "precision", "engine", "zero"), CASES)
def test_bit_exact(corpus: Path, tmp_path: Path, size: int, precision: str, engine: str, zero: int):
    assert_bitwise_resume(size, settings(corpus, precision, engine, zero), tmp_path)


def settings(corpus: Path, precision: str, engine: str, zero: int) -> list[str]:
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "optimizer.lr=3e-3", "model.dropout=0.1"]
    return [*overrides, f"precision={precision}", f"engine={engine}", f"parallel.zero={zero}"]


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(("engine", "zero"), [("local", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_saving_changes_nothing(corpus: Path, tmp_path: Path, engine: str, zero: int):
    overrides = settings(corpus, "bf16", engine, zero)
    saved = train(2, overrides, 3, save_to=tmp_path, save_at=1)[0]
    undisturbed = train(2, overrides, 3)[0]
    assert saved.losses == undisturbed.losses
    assert saved.grad_norms == undisturbed.grad_norms
    for name, expected in undisturbed.weights.items():
        np.testing.assert_array_equal(saved.weights[name], expected, err_msg=name)


@pytest.mark.in_turns(4)
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize(("size", "zero"), [(1, 0), (2, 2)])
def test_every_optimizer(corpus: Path, tmp_path: Path, name: str, size: int, zero: int):
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", f"optimizer={name}"]
    overrides += ["optimizer.weight_decay=0", f"parallel.zero={zero}"]
    assert_bitwise_resume(size, overrides, tmp_path)
