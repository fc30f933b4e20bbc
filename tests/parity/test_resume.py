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


def test_checkpoint_fits_other_layouts(corpus: Path, tmp_path: Path):
    """Saved at ZeRO 3 on two ranks, taken up by one plain process and by ZeRO 1: the same curve."""
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "optimizer.lr=3e-3"]
    whole = ranks.run(1, train_steps, overrides, 7)[0]
    ranks.run(2, train_steps, [*overrides, "parallel.zero=3"], 4, str(tmp_path))
    saved = str(tmp_path / "step-00000004")
    for size, zero in ((2, 1), (2, 0), (1, 0), (1, 2)):
        trace = ranks.run(size, train_steps, [*overrides, f"parallel.zero={zero}"], 7, None, saved)[0]
        np.testing.assert_allclose(trace.losses, whole.losses[4:], rtol=1e-5)
