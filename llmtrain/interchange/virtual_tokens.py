"""Prefixes and soft prompts in our form and in PEFT's, where both are one matrix `prompt_embeddings`.

Dim names: P virtual tokens, L layers, K key-value heads, H head width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.adapt.config import Addition
from llmtrain.adapt.virtual import Prefix
from llmtrain.errors import CheckpointError, Problem

KEY = "prompt_embeddings"
KINDS = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
"""Method → `peft_type`."""
_VECTORS = "embedding.prompt.vectors"


def to_peft(weights: Mapping[str, Tensor], model: nn.Module, config: Addition) -> Tensor:
    """Return their matrix: (P, D) of a prompt; (P, L·2·K·H) of a prefix, a layer's keys before its values."""
    if config.is_in_rows:
        return weights[_VECTORS]
    held_LK2PH = torch.stack(
        [weights[f"{name}.weight"].unflatten(1, (2, config.virtual_tokens, -1)) for name in _prefixes(model)]
    )
    return held_LK2PH.permute(3, 0, 2, 1, 4).flatten(1)


def from_peft(matrix: Tensor, model: nn.Module, config: Addition) -> dict[str, Tensor]:
    """Return our parameters by name; the inverse of `to_peft`. Raise CheckpointError for another shape."""
    if config.is_in_rows:
        expected = tuple(model.get_parameter(_VECTORS).shape)
        _require(matrix, expected)
        return {_VECTORS: matrix.contiguous()}
    names = _prefixes(model)
    heads, width = model.get_parameter(f"{names[0]}.weight").shape
    length = config.virtual_tokens
    _require(matrix, (length, len(names) * heads * width // length))
    held_PL2KH = matrix.view(length, len(names), 2, heads, -1)
    held_LK2PH = held_PL2KH.permute(1, 3, 2, 0, 4)
    return {f"{name}.weight": held_LK2PH[i].flatten(1).contiguous() for i, name in enumerate(names)}


def settings(config: Addition, model: Any) -> dict[str, Any]:
    """Return the keys of adapter_config.json that say the sizes."""
    heads = model.config.kv_heads
    width = heads * model.config.head_width if not config.is_in_rows else model.config.hidden_size
    keys = {
        "peft_type": KINDS[config.method],
        "num_virtual_tokens": config.virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": model.config.num_layers,
    }
    return keys | ({} if config.is_in_rows else {"prefix_projection": False})


def _prefixes(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Prefix)]


def _require(matrix: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(matrix.shape) != expected:
        remedy = "give the base that it was trained over: base=…"
        raise CheckpointError(
            Problem(KEY, f"shape {tuple(matrix.shape)}", f"{expected}, as the base has", remedy)
        )
