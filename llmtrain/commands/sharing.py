"""Evaluation and generation on many processes: how they share a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtrain.families import model_shape
from llmtrain.parallel import launcher
from llmtrain.parallel.layout import BatchConfig, ParallelConfig, plan_layout
from llmtrain.train.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from llmtrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class SharingConfig:
    """Over how many processes a model for use is divided; those that are left share the samples."""

    tensor: int = 1
    """Processes that share each matrix."""
    pipeline: int = 1
    """Stages that share the layers."""


def start_sharing(
    sharing: SharingConfig,
    model: ModelConfig,
    device: torch.device,
    *,
    micro_size: int,
    sequence_length: int,
    data: int | None = None,
) -> Mesh:
    """Join the other processes and take a place among them.

    data: processes that each see samples of their own; None: all that are left. Raises ConfigError for
    a division that does not add up.
    """
    from llmtrain.parallel import distributed
    from llmtrain.parallel.mesh import Mesh

    world_size = launcher.world_size()
    replicas = data or max(1, world_size // (sharing.tensor * sharing.pipeline))
    layout = plan_layout(
        ParallelConfig(data=data, tensor=sharing.tensor, pipeline=sharing.pipeline),
        BatchConfig(micro_size * replicas, micro_size, sequence_length),
        engine="deepspeed",
        precision="fp32",
        world_size=world_size,
        device=device.type,
        model=model_shape(model),
    )
    distributed.start(device)
    return Mesh(layout)
