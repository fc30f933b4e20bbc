"""A model and its objective as one module, in the run's precision and on its device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from llmtrain.objectives.base import Batch, Objective
from llmtrain.parallel.config import Precision

EXACT = ("labels", "factors")
"""Floating-point parts of a batch that keep their dtype, by what precedes a slash in their names."""
AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ObjectiveModule(nn.Module):
    """A model and its objective as one module whose forward returns the loss, as DeepSpeed expects.

    Returns a plain tuple, since DeepSpeed finds output tensors in no other container and would silently
    skip its work before the backward pass.
    """

    def __init__(self, model: nn.Module, objective: Objective, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._autocast = autocast

    def forward(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[np.ndarray] | None]:
        """Return the fields of the objective's Terms."""
        # Under ZeRO in low precision the weights have low precision, so floating-point inputs must have it
        # too.
        dtype = next(self.model.parameters()).dtype
        batch = {
            name: x.to(dtype) if x.is_floating_point() and name.split("/")[0] not in EXACT else x
            for name, x in batch.items()
        }
        with self._autocast:
            compute = self._objective if self.training else self._objective.evaluate
            terms = compute(self.model, batch)
        return terms.loss_sum, terms.num_targets, terms.metrics, terms.rows


def weight_dtype(precision: Precision, zero: int) -> torch.dtype:
    """Return the dtype of the weights: low precision under ZeRO, which keeps fp32 masters; fp32 for
    autocast."""
    return AUTOCAST_DTYPE[precision] if zero > 0 and precision != "fp32" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which matrix products have low precision over fp32 weights; a null context for
    fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPE[precision])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`. Copies from pinned memory don't block."""
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
