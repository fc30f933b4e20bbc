"""Every optimizer steps alike on whole parameters and on the flat pieces that ZeRO makes of them."""

from __future__ import annotations

import pytest

from tests.support import ranks

pytestmark = pytest.mark.slow

NAMES = ["adamw", "adam", "sgd", "adagrad", "rmsprop"]


def losses(name: str, zero: int | None) -> list[float]:
    """Three steps of a tiny GPT on this rank's part; zero None: plain torch, on all ranks."""
    import numpy as np
    import torch

    from llmtrain.data.loader import MicroBatch
    from llmtrain.distributed import processes
    from llmtrain.engine.deepspeed import DeepSpeedEngine
    from llmtrain.engine.local import LocalEngine
    from llmtrain.models.gpt.config import GPTConfig
    from llmtrain.models.gpt.model import GPT
    from llmtrain.nn.initialize import initialize
    from llmtrain.optim.config import OptimizerConfig
    from llmtrain.parallel.layout import Layout
    from tests.support.engines import whole_setup

    size, rank = processes.world_size(), processes.rank()
    model = GPT(GPTConfig(vocab_size=100, max_sequence_length=16, hidden_size=32, num_layers=2, num_heads=4))
    initialize(model, 0)
    layout = Layout(size, size, 1, 1, 1, zero or 0, 1, 2, 2 * size, 16)
    config = OptimizerConfig(name, lr=0.02, weight_decay=0.3, momentum=0.5)  # type: ignore[arg-type]
    setup = whole_setup(model, layout, config)
    engine = LocalEngine(setup) if zero is None else DeepSpeedEngine(setup)

    def micro_batch(sample: int) -> MicroBatch:
        tokens = torch.randint(100, (1, 17), generator=torch.Generator().manual_seed(sample))
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        return MicroBatch(batch, range(sample, sample + 1), np.array([sample]))

    found = []
    for step in range(3):
        first = 2 * (step * size + rank)
        found.append(engine.train_step([micro_batch(first), micro_batch(first + 1)], lr=0.02).loss)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_zero_equals_plain_torch(name: str) -> None:
    expected = ranks.run(2, losses, name, None)[0]
    assert expected[-1] != pytest.approx(expected[0], rel=1e-5), "the steps must move the loss"
    for zero in (1, 2, 3):
        for found in ranks.run(2, losses, name, zero):
            assert found == pytest.approx(expected, rel=1e-6), f"ZeRO {zero}"
