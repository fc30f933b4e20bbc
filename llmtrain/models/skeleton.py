"""A model of a config, with what fine-tuning adds to it: its module without values, and how it is divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.sharding import Table

if TYPE_CHECKING:
    from torch import nn


def skeleton_of(model: ModelConfig) -> nn.Module:
    """Return the module on the meta device, with what an adaptation adds to it: parameters have shapes but no
    values."""
    from llmtrain.nn.initialize import on_meta

    with on_meta():
        skeleton = family_of(model).build(model)
        adaptation = model.adaptation
        if adaptation is not None:
            from llmtrain.adapt.apply import adapt

            adapt(skeleton, adaptation)
    return skeleton


def sharding_of(model: ModelConfig) -> Table:
    """Return how tensor parallelism divides the model, whose family can be divided."""
    table = family_of(model).sharding
    assert table is not None
    adaptation = model.adaptation
    added: Table = {} if adaptation is None else adaptation.sharding
    return {**table(model), **added}


def of_vocabulary(model: ModelConfig, skeleton: nn.Module) -> list[str]:
    """Return the names of the parameters with a row for each token: of the embedding, and of a head that is
    not tied to it."""
    size = model.vocab_size
    return [name for name, p in skeleton.named_parameters() if p.ndim and len(p) == size]
