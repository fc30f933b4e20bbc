"""What a layout asks of a model."""

from __future__ import annotations

from typing import Any

from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.parallel.layout import ModelShape


def shape_of(model: ModelConfig) -> ModelShape:
    """Return the sizes that decide over which axes, and by what, the model can be divided."""
    family = family_of(model)
    if not family.has_stages:
        has_statistics = model.statistics_count() > 0
        return ModelShape(
            model.family,
            family.axes,
            dropout=model.dropout,
            steps_by_token=model.steps_by_token,
            has_statistics=has_statistics,
        )
    config: Any = model
    scaling = model.rotary_scaling
    return ModelShape(
        model.family,
        family.axes,
        config.blocks.num_layers,
        config.kv_heads,
        config.mlp_width,
        model.dropout,
        shares_tokens=family.shares_sequences,
        reads_lengths=bool(scaling and scaling.depends_on_length),
    )
