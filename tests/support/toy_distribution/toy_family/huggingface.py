"""A toy language model ↔ `toy`."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmtrain.models.huggingface.form import Entry, Form, Settings, same

from .config import ToyConfig


def _build(config: ToyConfig) -> nn.Module:
    from .model import Toy

    return Toy(config)


def _entries(config: ToyConfig) -> list[Entry]:
    entries = [same("embedding.weight", "toy.embedding.weight"), same("mix.weight", "toy.mix.weight")]
    return entries if config.tie_embeddings else [*entries, same("head.weight", "lm_head.weight")]


def _write_config(config: ToyConfig) -> dict[str, Any]:
    return {"hidden_size": config.hidden_size, "hidden_dropout_prob": config.dropout}


def _read_config(theirs: Settings) -> dict[str, Any]:
    return {
        "vocab_size": theirs.whole("vocab_size"),
        "hidden_size": theirs.whole("hidden_size"),
        "dropout": theirs.number("hidden_dropout_prob"),
        "init_std": theirs.number("initializer_range"),
        "tie_embeddings": theirs.is_tied("lm_head.weight", "toy.embedding.weight", True),
    }


FORM = Form(
    model_type="toy",
    config=ToyConfig,
    build=_build,
    misfits=lambda config: {},
    entries=_entries,
    write_config=_write_config,
    read_config=_read_config,
)
