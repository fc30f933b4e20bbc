"""How tensor parallelism divides the modules of a model: roles, by name pattern. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Role = Literal["column", "row", "embedding", "head", "heads", "all_heads", "shared"]
"""What parallel/tensor.py does with a module; its docstring has the table."""

Table = Mapping[str, Role]
"""fnmatch pattern of module names → role."""

LAYERS: dict[str, Role] = {
    "blocks.*.attention.qkv": "column",
    "blocks.*.attention.output": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
}
"""Layers of attention with packed queries, keys and values, and an MLP."""

VOCABULARY: dict[str, Role] = {"embedding": "embedding", "head": "head"}
"""A language model's token embedding and head."""
