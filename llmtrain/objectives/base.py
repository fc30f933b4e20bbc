"""What a batch means: samples → batch, (model, batch) → loss sum and target count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

DROPOUT_KEYS = "dropout_keys"
"""In a batch: a key for each row, (B,) int64, from which dropout's masks are made; absent: torch's generator
makes them."""


@dataclass(frozen=True)
class Terms:
    """Sums over one batch; whoever divides, divides once, by the count over everything summed."""

    loss_sum: Tensor
    """Nats, 0-d fp32."""
    num_targets: Tensor
    """0-d int64, on the batch's device."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the targets, 0-d."""


class Objective(Protocol):
    """How a kind of model learns from a kind of sample."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """A dataset's samples, stacked → the tensors that the model takes and their labels."""

    def target_count(self, batch: Batch) -> int:
        """How many predictions the batch' loss sums; known before the forward pass."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """The loss to train on."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """The loss and all metrics; the caller turns gradients and dropout off."""


@runtime_checkable
class SharesSequences(Protocol):
    """An objective whose batches several processes can share token by token."""

    def part_of_sequences(self, batch: Batch, part: int, parts: int) -> Batch:
        """What process `part` of `parts` takes of each sequence."""


@runtime_checkable
class NamesArguments(Protocol):
    """An objective whose loss is what the model's forward gives: pipelines run that in stages."""

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """What forward is given, by name."""


def count_targets(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels that bear a loss, 0-d int64."""
    return (labels != ignore_index).sum(dtype=torch.int64)
