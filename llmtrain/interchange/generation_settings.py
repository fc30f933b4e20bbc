"""Read generation_config.json of a Hugging Face folder, and write it again on export."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.config import LARGEST_INT
from llmtrain.interchange.huggingface_weights import read_json
from llmtrain.models.huggingface.form import Settings
from llmtrain.models.huggingface.generation_keys import HEEDED, PLAIN

FILE = "generation_config.json"
_NUMBERS = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, math.inf),
    "length_penalty": (-math.inf, math.inf),
}
"""Key of a number → (minimum, maximum)."""
_WHOLE = {
    "top_k": (0, LARGEST_INT),
    "num_beams": (1, 1024),
    "max_length": (0, LARGEST_INT),
    # The cache for all new tokens is allocated in advance.
    "max_new_tokens": (0, 1 << 20),
    "min_new_tokens": (0, 1 << 20),
}
"""Key of an integer → (minimum, maximum)."""
_OUT = ("_from_model_config", "transformers_version")
"""Keys that are not valid for another folder."""


def read_generation(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the generation settings; from config.json if the file is missing, as transformers does.

    Raise CheckpointError for invalid values of keys that `generate` uses.
    """
    if not os.path.exists(path / FILE):
        where, content = path / "config.json", _said_by(config)
    else:
        where, content = path / FILE, read_json(path / FILE)
    check_generation(Settings(where, content))
    return {key: value for key, value in content.items() if key not in _OUT}


def check_generation(settings: Settings) -> None:
    """Raise CheckpointError for invalid values of keys that `generate` uses."""
    settings.token_ids("eos_token_id")
    settings.flag("do_sample", False)
    settings.require("early_stopping", True, False, "never")
    for key, (least, most) in _NUMBERS.items():
        if not least <= settings.number(key, 1.0) <= most:
            raise settings.refusal(
                key, f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            )
    for key, (fewest, limit) in _WHOLE.items():
        if not fewest <= settings.whole(key, 1) <= limit:
            raise settings.refusal(key, f"{fewest} to {limit:,}")


def _said_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation settings in config.json, where older releases stored them."""
    keys = (*HEEDED, *PLAIN)
    return {key: value for key, value in config.items() if key in keys and value is not None} | ids_of(config)


def ids_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token ids in config.json, which generation needs."""
    return {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}


def write_generation(
    said: Mapping[str, Any], config: Mapping[str, Any], end_id: int | None
) -> dict[str, Any]:
    """Return the generation_config.json of an export.

    said: generation settings of the folder that the model was imported from; config: its config.json.
    end_id: id of the end token in the training data; None: the model was not trained here.
    """
    content = {**ids_of(config), **said}
    ends = content.get("eos_token_id")
    if end_id is not None and ends is not None:
        listed = ends if isinstance(ends, list) else [ends]
        content["eos_token_id"] = ends if end_id in listed else [*listed, end_id]
    return content
