"""How tensor parallelism divides a GPT."""

from __future__ import annotations

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.sharding import LAYERS, Role, Table, vocabulary


def table(config: GPTConfig) -> Table:
    """Return name pattern → role."""
    divided: dict[str, Role] = {**vocabulary(config), **LAYERS}
    if config.gated_mlp:
        divided |= {"blocks.*.mlp.gate": "column", "blocks.*.mlp": "one_input"}
    if config.qk_norm:
        norm: Role = "shared" if config.qk_norm_over == "head" else "all_heads"
        divided["blocks.*.attention.query_norm"] = norm
        divided["blocks.*.attention.key_norm"] = norm
    return divided
