"""How tensor parallelism divides an encoder-decoder."""

from __future__ import annotations

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.nn.sharding import Role, Table, vocabulary


def table(config: Seq2SeqConfig) -> Table:
    """Return name pattern → role."""
    divided: dict[str, Role] = {
        **vocabulary(config),
        "*.attention.qkv": "column",
        "*.attention.output": "row",
        "*.mlp.up": "column",
        "*.mlp.down": "row",
    }
    if config.has_decoder:
        divided |= {
            "decoder.*.cross_attention.query": "column",
            "decoder.*.cross_attention.key_value": "column",
            "decoder.*.cross_attention.output": "row",
        }
    if config.gated_mlp:
        divided |= {"*.mlp.gate": "column", "*.mlp": "one_input"}
    if config.positions == "relative":
        divided["*.attention.relative"] = "heads"
    return divided
