"""Which layers have a sliding window: `layer_types` of config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import Settings

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(theirs: Settings, default: int | None) -> int | None:
    """Return the window in tokens. A null means none; a missing key means the default."""
    if theirs.content.get("sliding_window", default) is None:
        return None
    return theirs.whole("sliding_window", default)


def read_windows(theirs: Settings, window: int | None, implied: Sequence[str]) -> dict[str, Any]:
    """Return our keys. window: of the layers that have one; implied: default of layer_types."""
    layers = theirs.layers()
    kinds = implied if theirs.content.get("layer_types") is None else theirs.content["layer_types"]
    is_list = isinstance(kinds, Sequence) and len(kinds) == layers
    if not is_list or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise theirs.refusal("layer_types", f"{layers} times {FULL} or {SLIDING}")
    if window is None and theirs.content.get("layer_types") is not None and SLIDING in kinds:
        raise theirs.refusal("layer_types", f"{FULL} alone, where no window is said")
    if window is None or SLIDING not in kinds:
        return {"sliding_window": None, "full_attention_layers": []}
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    return {"sliding_window": window, "full_attention_layers": full}


def every(layers: int, period: int) -> list[str]:
    """Return layer types with a window in all layers but each `period`-th."""
    return [FULL if period > 0 and (layer + 1) % period == 0 else SLIDING for layer in range(layers)]


def write_windows(config: GPTConfig) -> dict[str, Any]:
    kinds = [FULL if config.window_of(i) is None else SLIDING for i in range(config.num_layers)]
    return {"sliding_window": config.sliding_window, "layer_types": kinds}
