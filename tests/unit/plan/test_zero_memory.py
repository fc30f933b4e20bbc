"""The estimated bytes of weights, gradients and optimizer against the tensors alive in a real engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import ranks

pytestmark = pytest.mark.slow

MODEL = (
    "model=gpt_tiny",
    "model.vocab_size=1000",
    "model.max_sequence_length=32",
    "model.num_layers=4",
    "model.num_heads=4",
    "batch.global_size=4",
    "batch.micro_size=1",
    "batch.sequence_length=16",
)


def live_and_planned(overrides: tuple[str, ...]) -> tuple[int, int, int]:
    """Bytes of all tensors alive just before the second optimizer step, when all gradients are there; the
    planned bytes without and with buffers and what is between the passes."""
    import gc

    import numpy as np
    import torch

    from llmtrain.data.loader import MicroBatch
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.objectives.causal_lm import CausalLM
    from llmtrain.plan.estimate import estimate
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose

    def live_tensors() -> list[torch.Tensor]:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        return [tensor for tensor in tensors if tensor.device.type != "meta"]

    # Held, so that what earlier tests left is neither counted nor freed and its place taken.
    earlier = live_tensors()
    earlier_places = {t.untyped_storage().data_ptr() for t in earlier}

    def live_bytes() -> int:
        storages = [t.untyped_storage() for t in live_tensors()]
        return sum(
            {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in earlier_places}.values()
        )

    resolved = resolve(compose([*MODEL, *overrides]), processes.world_size(), data_optional=True)
    config, layout = resolved.config, resolved.layout
    engine = build_engine(config, layout, torch.device("cpu"), CausalLM(), None)
    found = 0
    update = engine._update

    def measured_update(*arguments: Any) -> tuple[float, bool]:
        nonlocal found
        found = live_bytes()
        return update(*arguments)

    engine._update = measured_update  # type: ignore[method-assign]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    micro = MicroBatch({"tokens": tokens, "labels": tokens}, range(1), np.array([0]))
    for _ in range(2):
        engine.train_step([micro] * layout.accumulation, lr=1e-3)
    plan = estimate(config.model, layout, config, resolved.trainable)
    held = plan.memory.weights + plan.memory.gradients + plan.memory.optimizer
    return found, held, held + plan.memory.buffers


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    "overrides",
    [
        "precision=fp32",
        "precision=bf16 parallel.zero=1",
        "parallel.zero=2",
        "precision=bf16 parallel.zero=2",
        "parallel.zero=3",
        "precision=bf16 parallel.zero=3",
        "parallel.tensor=2",
        "parallel.tensor=2 parallel.zero=1 engine=deepspeed",
        "parallel.sequence=2 parallel.zero=3",
        "parallel.pipeline=2 parallel.zero=1",
        "train.freeze=[blocks.*]",
        "train.freeze=[blocks.*] precision=bf16 parallel.zero=1",
        "train.freeze=[blocks.*] parallel.zero=3",
    ],
)
def test_held_bytes(overrides: str) -> None:
    results = ranks.run(2, live_and_planned, tuple(overrides.split()))
    # The plan is of the pipeline stage that holds most.
    found, held, with_buffers = max(results)
    assert 0.98 * held <= found <= 1.02 * with_buffers


def gathered_and_held() -> tuple[int, int, int]:
    """Elements of the frozen weights that DeepSpeed does not keep gathered for being small: those gathered
    before the second step, those of this rank's shares, and all."""
    import numpy as np
    import torch

    from llmtrain.data.loader import MicroBatch
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.objectives.causal_lm import CausalLM
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose

    overrides = (*MODEL, "model.hidden_size=256", "parallel.zero=3", "train.freeze=['*.weight']")
    resolved = resolve(compose(overrides), processes.world_size(), data_optional=True)
    engine = build_engine(resolved.config, resolved.layout, torch.device("cpu"), CausalLM(), None)
    update, found = engine._update, (0, 0, 0)

    def measured_update(*arguments: Any) -> tuple[float, bool]:
        nonlocal found
        large = [p for _, p in engine.frozen if p.ds_numel > 10**5]  # type: ignore[attr-defined]
        held = sum(p.ds_tensor.numel() for p in large)  # type: ignore[attr-defined]
        found = sum(p.numel() for p in large), held, sum(p.ds_numel for p in large)  # type: ignore[attr-defined]
        return update(*arguments)

    engine._update = measured_update  # type: ignore[method-assign]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    micro = MicroBatch({"tokens": tokens, "labels": tokens}, range(1), np.array([0]))
    for _ in range(2):
        engine.train_step([micro] * resolved.layout.accumulation, lr=1e-3)
    return found


def test_zero_3_lets_go_of_frozen_weights() -> None:
    for gathered, held, whole in ranks.run(2, gathered_and_held):
        assert (gathered, held) == (0, whole // 2)
        assert whole > 3 * 10**6
