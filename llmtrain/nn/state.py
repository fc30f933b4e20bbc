"""The state of a model: what training changes, by name. Parameters are changed by the optimizer, statistics
by forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def named_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model, such as the running averages of batch norm, by name."""
    return dict(model.named_buffers())


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and statistics by name: what a checkpoint holds of a model."""
    return {**dict(model.named_parameters()), **named_statistics(model)}
