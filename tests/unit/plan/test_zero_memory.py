"""The estimated bytes of weights, gradients and optimizer against the tensors alive in a real engine."""

from __future__ import annotations

import pytest

from tests.support import ranks

pytestmark = pytest.mark.slow


def live_and_planned(zero: int, precision: str) -> tuple[int, int, int]:
    """Bytes of all tensors alive just before the second optimizer step, when all gradients are there; the
    planned bytes without and with buffers."""
    import gc

    import numpy as np
    import torch

    from llmtrain.data.loader import MicroBatch
    from llmtrain.engine.deepspeed import DeepSpeedEngine
    from llmtrain.engine.local import LocalEngine
    from llmtrain.models.config import GPTConfig
    from llmtrain.models.gpt import GPT
    from llmtrain.models.initialize import initialize
    from llmtrain.objectives.causal_lm import CausalLM
    from llmtrain.optim.config import OptimizerConfig
    from llmtrain.parallel import distributed
    from llmtrain.parallel.layout import Layout
    from llmtrain.plan.activations import Conditions
    from llmtrain.plan.memory import memory_per_process

    def live_tensors() -> list[torch.Tensor]:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        return tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None]

    # Held, so that what earlier tests left is neither counted nor freed and its place taken.
    earlier = live_tensors()
    earlier_places = {t.untyped_storage().data_ptr() for t in earlier}

    def live_bytes() -> int:
        storages = [t.untyped_storage() for t in live_tensors()]
        return sum(
            {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in earlier_places}.values()
        )

    size = distributed.world_size()
    config = GPTConfig(vocab_size=1000, max_sequence_length=32, hidden_size=256, num_layers=4, num_heads=4)
    model = GPT(config)
    initialize(model, 0)
    layout = Layout(size, size, 1, 1, 1, zero, 1, 1, size, 16)
    engine_type = DeepSpeedEngine if zero else LocalEngine
    settings = (layout, torch.device("cpu"), 0, precision, OptimizerConfig())
    engine = engine_type(model, CausalLM(), *settings)  # type: ignore[arg-type]
    found = 0
    update = engine._update

    def measured_update(lr: float) -> tuple[float, bool]:
        nonlocal found
        found = live_bytes()
        return update(lr)

    engine._update = measured_update  # type: ignore[method-assign]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    micro = MicroBatch({"tokens": tokens, "labels": tokens}, range(1), np.array([0]))
    for _ in range(2):
        engine.train_step([micro], lr=1e-3)
    plan = memory_per_process(
        config,
        layout,
        precision=precision,  # type: ignore[arg-type]
        optimizer=OptimizerConfig(),
        conditions=Conditions("cpu"),
    )
    held = plan.weights + plan.gradients + plan.optimizer
    return found, held, held + plan.buffers


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_held_bytes(zero: int, precision: str) -> None:
    for found, held, with_buffers in ranks.run(2, live_and_planned, zero, precision):
        assert 0.98 * held <= found <= 1.02 * with_buffers
