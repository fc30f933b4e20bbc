"""Evaluation and generation on several ranks that share a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmtrain.config import require
from llmtrain.distributed import launcher
from llmtrain.distributed.agreement import Fact, run_facts
from llmtrain.errors import ConfigError, Problem
from llmtrain.nn.model_config import ModelConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.model_shape import shape_of
from llmtrain.parallel.planning import plan_layout

if TYPE_CHECKING:
    import torch

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.parallel.mesh import Mesh


class Trained(Protocol):
    """The properties of a trained model that sharing needs."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def source(self) -> Path: ...
    @property
    def step(self) -> int | None: ...


def stage_problems(objective: ObjectiveConfig, parallel: SharingConfig) -> list[Problem]:
    """Return a problem if the objective cannot be run in the stages of a pipeline."""
    stages, allowed = parallel.pipeline, f"1 with objective={objective.kind}"
    return list(require(stages == 1 or objective.has_stages, "parallel.pipeline", stages, allowed))


@dataclass(frozen=True)
class SharingConfig:
    """Number of ranks that a model for evaluation or generation is divided over; further ranks share the
    samples."""

    tensor: int = 1
    """Number of tensor-parallel ranks, which share each matrix."""
    pipeline: int = 1
    """Number of pipeline stages, which share the layers."""


def start_sharing(
    sharing: SharingConfig,
    trained: Trained,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    micro_size: int,
    sequence_length: int,
    corpora: TextSource | None = None,
    shares_samples: bool = False,
    timeout_minutes: float = 10.0,
) -> Mesh:
    """Join the other ranks, which must have found the same weights and have the same encoded `config`, and
    return the mesh.

    shares_samples: ranks beyond the model's size process other samples; otherwise they are refused.
    timeout_minutes: how long a rank waits for another one.

    Raise ConfigError if the ranks don't match the division, LaunchError if ranks differ.
    """
    from llmtrain.distributed import processes
    from llmtrain.parallel.mesh import Mesh

    world_size, model_size = launcher.world_size(), sharing.tensor * sharing.pipeline
    if not shares_samples and model_size > 0 and world_size != model_size:
        raise ConfigError(
            Problem(
                "parallel",
                f"tensor {sharing.tensor} · pipeline {sharing.pipeline} = {model_size}",
                f"a product of {world_size}, the processes started: each holds a part of the model",
                f"start {model_size} processes, or give parallel.tensor={world_size} parallel.pipeline=1",
            )
        )
    replicas = max(1, world_size // max(1, model_size))
    layout = plan_layout(
        ParallelConfig(tensor=sharing.tensor, pipeline=sharing.pipeline),
        BatchConfig(micro_size * replicas, micro_size, sequence_length),
        engine="deepspeed" if sharing.pipeline > 1 else "local",
        precision="fp32",
        world_size=world_size,
        device=device.type,
        model=shape_of(trained.config),
    )
    facts = run_facts(config, device.type, None if corpora is None else corpora.fingerprint)
    remedy = "name one checkpoint's folder, the same on all ranks"
    facts["checkpoint found"] = Fact(trained.source.name, remedy)
    facts["step of the checkpoint"] = Fact(trained.step, remedy)
    processes.start(device, timeout_minutes=timeout_minutes, facts=facts)
    return Mesh(layout)
