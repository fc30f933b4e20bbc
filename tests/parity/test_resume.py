"""A resumed run equals one that was never stopped, bit by bit, on the same number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import ranks
from tests.support.training import TINY_GPT, train_steps

pytestmark = pytest.mark.slow

CASES = [
    *[(2, precision, "deepspeed", zero) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)],
    *[(2, precision, "local", 0) for precision in ("fp32", "bf16")],
    *[(1, precision, "local", 0) for precision in ("fp32", "bf16")],
    (1, "fp32", "deepspeed", 3),
]


def assert_bitwise_resume(size: int, overrides: list[str], folder: Path) -> None:
    whole = ranks.run(size, train_steps, overrides, 7)[0]
    before = ranks.run(size, train_steps, overrides, 4, str(folder))[0]
    after = ranks.run(size, train_steps, overrides, 7, None, str(folder / "step-00000004"))[0]
    assert before.losses + after.losses == whole.losses
    assert before.grad_norms + after.grad_norms == whole.grad_norms
    assert after.validation_loss == whole.validation_loss
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(after.weights[name], expected, err_msg=name)


@pytest.mark.parametrize(("size", "precision", "engine", "zero"), CASES)
def test_bit_exact(corpus: Path, tmp_path: Path, size: int, precision: str, engine: str, zero: int):
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "optimizer.lr=3e-3", "model.dropout=0.1"]
    overrides += [f"precision={precision}", f"engine={engine}", f"parallel.zero={zero}"]
    assert_bitwise_resume(size, overrides, tmp_path)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize(("size", "zero"), [(1, 0), (2, 2)])
def test_every_optimizer(corpus: Path, tmp_path: Path, name: str, size: int, zero: int):
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", f"optimizer={name}"]
    overrides += ["optimizer.weight_decay=0", f"parallel.zero={zero}"]
    assert_bitwise_resume(size, overrides, tmp_path)
