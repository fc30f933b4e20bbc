"""What a batch means: samples → batch, (model, batch) → loss sum and target count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.nn.head import IGNORE_INDEX

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
    """Each a sum and the count that it is divided by, (2,)."""


class Objective(Protocol):
    """How a kind of model learns from a kind of sample."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """A dataset's samples, stacked, and "keys", a random number of each sample, int64 (B,) → the tensors
        that the model takes and their labels. A pure function."""

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


class LossOfModel:
    """Objectives whose loss is what the model's forward gives: the sum over the batch' "labels"."""

    names: ClassVar[Mapping[str, str]]
    """Key of a batch → forward's argument; those that a batch lacks are not given."""

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"], IGNORE_INDEX))

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's forward, or its `context` and stages, are given by name."""
        return {name: batch[key] for key, name in self.names.items() if key in batch}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return Terms(model(**self.arguments(batch)), count_targets(batch["labels"], IGNORE_INDEX))


def positions_in_documents(documents_BT: np.ndarray) -> np.ndarray:
    """Each token's place in its document's part of the row, int64 (B, T)."""
    places_T = np.arange(documents_BT.shape[1])
    starts_BT = np.zeros(documents_BT.shape, dtype=np.int64)
    changes_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT[:, 1:] = np.where(changes_BT, places_T[1:], 0)
    return places_T - np.maximum.accumulate(starts_BT, axis=1)


def count_targets(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels that bear a loss, 0-d int64."""
    return (labels != ignore_index).sum(dtype=torch.int64)
