"""`llmtrain finetune`: `llmtrain train` for a task over labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.commands import train
from llmtrain.errors import ConfigError, Problem
from llmtrain.objectives.registry import OBJECTIVES
from llmtrain.train.vectors_config import refuse_word_vectors


def run(mapping: Mapping[str, Any]) -> int:
    """Train as `mapping`, the composed conf/finetune.yaml, says; return the exit code. All ranks call it.

    Raise UserError for whatever a user can fix.
    """
    refuse_word_vectors(mapping, "finetune")
    section = mapping.get("objective") or {}
    tasks = [name for name, config in OBJECTIVES.items() if config.reads("table") or config.has_task_head]
    if section.get("kind") not in tasks:
        got = str(section.get("kind", "nothing"))
        raise ConfigError(Problem("objective", got, ", ".join(tasks), "give objective=classification"))
    return train.run(mapping)
