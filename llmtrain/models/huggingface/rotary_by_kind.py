"""Different rotary positions for layers with and without a window: Gemma 3, OLMo 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import Settings
from llmtrain.models.huggingface.rope import kind_key, read_rope, write_rope
from llmtrain.models.huggingface.windows import FULL, SLIDING


def read_rope_by_kind(
    theirs: Settings, windows: Mapping[str, Any], *, theta: float, local_theta: float, longest: int
) -> dict[str, Any]:
    """Return our keys. windows: result of read_windows; theta, local_theta, longest: defaults of the bases
    and of max_position_embeddings."""
    both = theirs.section("rope_parameters")
    for key in both.content.keys() - {FULL, SLIDING}:
        raise both.refusal(key, f"{FULL} and {SLIDING}")
    # Before transformers 5, rope_scaling applies to layers without a window.
    scaling = theirs.section("rope_scaling")
    if not both.section(FULL).content and kind_key(scaling) == "type":
        scaling.require("type", "default", remedy="transformers releases read it differently: set rope_type")
    full = {**both.section(FULL).content, **scaling.content}
    full.setdefault("rope_theta", theirs.number("rope_theta", theta))
    local = both.section(SLIDING)
    if local.content != full:
        local.require(kind_key(local), "default")
        local.require("partial_rotary_factor", 1)
    local_theta = local.number("rope_theta", theirs.number("rope_local_base_freq", local_theta))
    # If layers differ, only their sections say what the original context was.
    merged = theirs.with_keys(rope_parameters=full, rope_scaling=None, original_max_position_embeddings=None)
    rope = read_rope(merged, theta=theta, longest=longest)
    differs = local_theta != rope["rope_theta"] or rope["rope_scaling"] is not None
    is_apart = windows["sliding_window"] is not None and local.content != full and differs
    return {**rope, "local_rope_theta": local_theta if is_apart else None}


def write_rope_by_kind(config: GPTConfig) -> dict[str, Any]:
    written = write_rope(config)
    full = written["rope_parameters"]
    theta = config.local_rope_theta
    local = full if theta is None else {"rope_type": "default", "rope_theta": theta}
    return {**written, "rope_parameters": {FULL: full, SLIDING: local}}
