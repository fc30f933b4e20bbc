"""How tensor parallelism divides an XLNet."""

from __future__ import annotations

from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.sharding import Role, Table, vocabulary


def table(config: XLNetConfig) -> Table:
    """Return name pattern → role."""
    divided: dict[str, Role] = {
        **vocabulary(config),
        "blocks.*.attention.query": "column",
        "blocks.*.attention.key_value": "column",
        "blocks.*.attention.position": "column",
        "blocks.*.attention.*_bias": "heads",
        "blocks.*.attention.output": "row",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
    }
    if config.has_segments:
        divided["blocks.*.attention.segments"] = "heads"
    return divided
