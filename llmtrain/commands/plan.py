"""`llmtrain plan`: what a run will need, without starting it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.errors import ConfigError, Problem
from llmtrain.plan.estimate import estimate
from llmtrain.plan.fit import refuse_if_too_large
from llmtrain.plan.report import table
from llmtrain.train.resolve import resolve
from llmtrain.train.vectors_config import refuse_word_vectors


def run(mapping: Mapping[str, Any]) -> None:
    """Print the plan. Raise ConfigError when the run would be refused or does not fit."""
    refuse_word_vectors(mapping, "plan")
    settings = dict(mapping)
    world_size = settings.pop("world_size", None)
    if world_size is not None and (not isinstance(world_size, int) or world_size < 1):
        raise ConfigError(Problem("world_size", repr(world_size), "1 or more, or null"))
    resolved = resolve(settings, world_size, data_optional=True)
    plan = estimate(resolved.config.model, resolved.layout, resolved.config, resolved.trainable)
    print(table(plan))
    refuse_if_too_large(plan)
