"""A step that is rejected never was: weights and all other state are those of a run without it, in every
engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks
from tests.support.training import TINY_GPT, compose, open_loader

pytestmark = pytest.mark.slow
LSTM = (
    *("model=lstm", "model.num_layers=1", "model.hidden_size=32", "model.embedding_size=32"),
    *(
        "data.continued=true",
        "data.drop_last=true",
        "batch.global_size=8",
        "batch.micro_size=2",
        "batch.sequence_length=32",
    ),
)
TAKEN = (0, 1, 4)
SPOILED = 2
"""Step whose gradient is NaN on the first rank."""
REFUSED = 3
"""Step of finite numbers that is not accepted."""


def state_after(
    mapping: dict[str, Any], steps: tuple[int, ...], root: str
) -> tuple[list[Any], list[bool], dict[str, float]]:
    """Train these steps; → the checkpoint's files with their checksums, which steps were rejected, and the
    loss scale."""
    from llmtrain.checkpoint import store
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    resolved = resolve(mapping)
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    device = torch.device("cpu")
    processes.start(device, single_process_group=config.engine == "deepspeed")
    engine = build_engine(config, layout, device, objective, None)
    current = 0
    if processes.is_main():
        _, parameter = engine.trainable[-1]
        parameter.register_hook(lambda gradient: gradient * (math.nan if current == SPOILED else 1.0))
    loader = open_loader(resolved)
    rejected = []
    for step in steps:
        current = step

        def accepts(loss: float, norm: float, step: int = step) -> bool:
            return step != REFUSED and math.isfinite(loss) and math.isfinite(norm)

        result = engine.train_step(next(loader.steps(step)).micro_batches, lr=1e-2, accepts=accepts)
        assert result.skipped == result.rejected
        rejected.append(result.rejected)
    saved = store.save(Path(root), 5, engine, {}, None)
    files = Checkpoint.open(saved).manifest["files"]
    processes.barrier()
    return files, rejected, engine.scaler_state()


@pytest.mark.in_turns(4)
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, (*TINY_GPT, "engine=local")),
        (1, (*LSTM, "engine=local")),
        (2, (*TINY_GPT, "engine=local", "precision=bf16")),
        (2, (*TINY_GPT, "engine=deepspeed", "parallel.zero=0")),
        (2, (*TINY_GPT, "parallel.zero=1", "precision=bf16")),
        (2, (*TINY_GPT, "parallel.zero=2")),
        (2, (*TINY_GPT, "parallel.zero=2", "precision=bf16")),
        (2, (*TINY_GPT, "parallel.zero=3", "precision=bf16")),
        (2, (*TINY_GPT, "engine=local", "parallel.tensor=2")),
        (2, (*TINY_GPT, "parallel.tensor=2", "parallel.zero=1")),
        (2, (*TINY_GPT, "parallel.pipeline=2", "optimizer.max_grad_norm=0")),
        (2, (*TINY_GPT, "parallel.pipeline=2", "parallel.zero=1")),
        (2, (*TINY_GPT, "parallel.zero=2", "parallel.offload_optimizer=cpu")),
        (2, (*TINY_GPT, "parallel.zero=3", "parallel.offload_optimizer=cpu")),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else str(value),
)
def test_a_rejected_step_never_was(corpus: Path, tmp_path: Path, size: int, overrides: tuple[str, ...]):
    mapping = compose([*overrides, f"data.path={corpus}", "train.steps=20"])
    steps = (*range(SPOILED), SPOILED, REFUSED, TAKEN[-1])
    with_them = ranks.run(size, state_after, mapping, steps, str(tmp_path / "with"))
    without = ranks.run(size, state_after, mapping, TAKEN, str(tmp_path / "without"))
    for (files, rejected, scale), (expected, none, scale_without) in zip(with_them, without, strict=True):
        assert rejected == [False, False, True, True, False]
        assert not any(none)
        assert files == expected
        assert scale == scale_without
