"""Presets of conf/model/ without Hydra, and what an objective makes of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llmtrain.config import decode
from llmtrain.models.registry import family_of, model_config_type
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.registry import objective_config_type


def preset_section(path: Path) -> dict[str, Any]:
    """Return the keys of a preset, without what it chooses besides."""
    mapping: dict[str, Any] = yaml.safe_load(path.read_text())
    mapping.pop("defaults")
    return mapping


def preset(path: Path) -> Any:
    mapping = preset_section(path)
    return decode(model_config_type(mapping), mapping)


def usual_objective(model: ModelConfig) -> ObjectiveConfig:
    section = family_of(model).objective(model)
    return decode(objective_config_type(section), section)


def row_of(model: ModelConfig, sequence_length: int) -> Row:
    """Return a row as the usual objective of the model's family lays it out."""
    return usual_objective(model).row(sequence_length)
