"""Roles that say how tensor parallelism divides the modules of a model, by name pattern. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llmtrain.nn.model_config import OfVocabulary

Role = Literal[
    "column", "row", "embedding", "head", "heads", "all_heads", "added_heads", "shared", "one_input"
]
"""How parallel/tensor.py divides a module; its docstring has the table."""

Table = Mapping[str, Role]
"""fnmatch pattern of module names → role."""

LAYERS: dict[str, Role] = {
    "blocks.*.attention.qkv": "column",
    "blocks.*.attention.output": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
}
"""Attention with packed queries, keys and values, and an MLP."""


def vocabulary(config: OfVocabulary) -> dict[str, Role]:
    """Return the roles of token embedding and head; the head of a fine-tuning task is whole on each rank."""
    roles: dict[str, Role] = {"embedding": "embedding"}
    if not config.predicts_tokens:
        return roles
    return {**roles, "head" if config.task is None else "token_head": "head"}
