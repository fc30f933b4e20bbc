"""States that rows carry from step to step: which row of a batch has which state, and what checkpoints
keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llmtrain.nn.carried import CarriedStates, CarriesStates
from llmtrain.tensor_boxes import Shard

if TYPE_CHECKING:
    from llmtrain.data.loader import MicroBatch
    from llmtrain.objectives.base import Batch

CARRIED = "carried"
"""Kind, in checkpoints, of the states that rows carry; and the name of the tensor."""


def carried_by(model: nn.Module) -> CarriedStates | None:
    """Return the states that the model carries; None: none."""
    return model.carried if isinstance(model, CarriesStates) else None


def with_lanes(batch: Batch, model: nn.Module, micro: MicroBatch) -> Batch:
    """Return the batch with the number of each row within its step, "lanes", and in the corpus, "places", if
    the model carries states."""
    states = carried_by(model)
    if states is None:
        return batch
    lanes = torch.tensor([sample % states.rows for sample in micro.samples])
    return {**batch, "lanes": lanes, "places": torch.from_numpy(micro.indices)}


def share_of(states: CarriedStates, rank: int, ranks: int) -> tuple[Shard, torch.Tensor]:
    """Return the rows that one data-parallel rank has, as a part of the whole and as flat values."""
    packed_GC = states.packed()
    shard = Shard((states.rows, states.width + 2), 0, rank, ranks)
    rows = states.rows // ranks
    return shard, packed_GC[rank * rows : (rank + 1) * rows].reshape(-1)
