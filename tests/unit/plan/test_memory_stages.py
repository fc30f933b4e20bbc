"""What a process holds of a model that others share: tensor, sequence and pipeline parallelism."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.registry import family_of
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.pipeline import PipelineStage
from llmtrain.parallel.tensor import shard_tensors
from llmtrain.plan.memory import (
    held_parameter_count,
    stage_steps,
)
from tests.support.planned_memory import (
    CONF,
    PRESETS,
    of_layout,
)
from tests.support.presets import preset


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    ("path", "tensor"),
    [(path, tensor) for path in PRESETS for tensor in (1, 2, 4) if preset(path).kv_heads % tensor == 0],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_parameters_of_each_step_and_stage(path: Path, tensor: int) -> None:
    """Against real modules on the meta device, divided by the family's table; every preset, so that heads,
    vocabularies and biases of all kinds are met."""
    config = replace(preset(path), num_layers=5)
    if config.vocab_size is None:
        config = replace(config, vocab_size=8191)
    with torch.device("meta"):
        model: Any = family_of(config).build(config)
    shape = Layout(tensor, 1, tensor, 1, 1, 0, 1, 1, 1, 16)
    mesh: Any = SimpleNamespace(layout=shape, coordinates=shape.coordinates(tensor - 1))
    table = family_of(config).sharding
    assert table is not None
    shard_tensors(model, table(config), mesh)
    counts = [
        sum(p.numel() for module in stage.modules.values() for p in module.parameters())
        for stage in model.stages()
    ]
    assert config.step_parameter_counts(tensor) == counts
    assert config.largest_parameter_count(tensor) == max(p.numel() for p in model.parameters())
    steps = range(len(counts))
    assert held_parameter_count(config, shape, steps) == sum(p.numel() for p in model.parameters())
    for by in ("parameters", "time"):
        pipelined = replace(shape, world_size=3 * tensor, pipeline=3, balance=by)
        for run, stage in built_and_planned(model, pipelined):
            assert len(run) == len(stage.steps)
            assert held_parameter_count(config, pipelined, run) == parameter_count(stage)


def built_and_planned(model: Any, layout: Layout) -> list[tuple[range, PipelineStage]]:
    """Of each stage, the steps that the plan counts and what the engine would build."""
    stages = []
    for number in range(layout.pipeline):
        rank = number * layout.world_size // layout.pipeline
        mesh: Any = SimpleNamespace(layout=layout, coordinates=layout.coordinates(rank))
        stages.append(PipelineStage(model, mesh))
    return list(zip(stage_steps(model.config, layout), stages, strict=True))


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_largest_of_16_stages_of_llama_3() -> None:
    """Embedding and head share their stages with blocks."""
    config = preset(CONF / "model" / "llama3_8b.yaml")
    with torch.device("meta"):
        model = family_of(config).build(config)
    shape = Layout(16, 1, 1, 16, 1, 1, 1, 1, 1, 8192)
    stages = built_and_planned(model, shape)
    counts = [held_parameter_count(config, shape, run) for run, _ in stages]
    assert counts == [parameter_count(stage) for _, stage in stages]
    assert max(counts) == 128_256 * 4096 + 218_112_000 + 4096


@pytest.mark.parametrize("config", [LSTMConfig(vocab_size=300, hidden_size=32), SimpleCNNConfig()])
def test_largest_parameter_of_other_families(config: Any) -> None:
    with torch.device("meta"):
        model = family_of(config).build(config)
    assert config.largest_parameter_count() == max(p.numel() for p in model.parameters())


def test_tensor_parallelism_divides_matrices_and_what_they_make() -> None:
    one, four = of_layout(), of_layout(tensor=4)
    assert one.optimizer / 4 < four.optimizer < 1.01 * one.optimizer / 4
    assert one.activations / 4 < four.activations < 0.55 * one.activations
    shared = of_layout(tensor=4, tensor_sequence=True)
    assert shared.activations < four.activations
    assert shared.optimizer == four.optimizer


def test_sequence_parallelism_divides_tokens_and_zero_shards_over_it() -> None:
    one, four = of_layout(zero=3, data=2), of_layout(zero=3, data=2, sequence=4)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-6)
    assert of_layout(zero=3, data=8).optimizer == four.optimizer
    assert four.activations == one.activations / 4


def test_the_stage_that_holds_most_is_planned() -> None:
    """The first has most micro-batches in flight; where activations are few, the last has the head."""
    one, four = of_layout(zero=1), of_layout(zero=1, pipeline=4)
    assert 0.7 * one.activations < four.activations < one.activations, (
        "4 micro-batches of 5 or 6 blocks of 24"
    )
    assert four.logits == 0
    fewer = of_layout(zero=1, pipeline=4, accumulation=2)
    assert fewer.activations < 0.6 * four.activations
    recomputing = of_layout("full", zero=1, pipeline=4, accumulation=1)
    assert recomputing.logits > 0
