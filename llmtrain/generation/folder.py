"""Interpret the generation settings (generation_config.json) of a model's folder. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config import show
from llmtrain.models.huggingface.generation_keys import HEEDED, OF_NO_EFFECT, PLAIN

TOP_K = 50
"""Default of transformers for top_k if a model is sampled."""


def end_ids(folder_settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a generated text; empty if the settings have none."""
    ends = folder_settings.get("eos_token_id")
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list) else (int(ends),)


def unsupported_settings(folder_settings: Mapping[str, Any]) -> list[str]:
    """Return key=value of settings that would affect the text and that `generate` does not support."""
    found = []
    for key, value in folder_settings.items():
        is_id = key.endswith("_token_id") and not key.startswith("forced_")
        if is_id or key in HEEDED or key in OF_NO_EFFECT or value in (None, [], {}, PLAIN.get(key)):
            continue
        found.append(f"{key}={show(value)}")
    if folder_settings.get("do_sample") and (folder_settings.get("num_beams") or 1) > 1:
        found.append("do_sample=True with num_beams")
    if folder_settings.get("early_stopping") == "never":
        found.append("early_stopping=never")
    return found
