"""Rotary angles of a config.json against those that transformers makes of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmtrain.config import decode
from llmtrain.interchange.forms import FORMS
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import Settings
from llmtrain.nn.rotary import rotary_tables

SIZES = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + i / 9 for i in range(8)], "long_factor": [2.0] * 8}
KEYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta on top": {"rope_theta": 5e5},
    "theta on top and within": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
    "the older section wins": {
        "rope_theta": 5e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": YARN,
    },
    "the older section wins, without a theta": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "the older section says default": {
        "rope_parameters": {**YARN, "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "default"},
    },
    "an older section that is empty": {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {}},
    "an older section that is null": {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": None},
    "both names of the kind": {"rope_scaling": {**YARN, "type": "linear"}},
    "the older name of the kind": {"rope_scaling": {**YARN, "rope_type": ..., "type": "yarn"}},
    "yarn, the original context on top": {"original_max_position_embeddings": 8, "rope_scaling": YARN},
    "yarn, no original context": {"rope_scaling": {**YARN, "original_max_position_embeddings": ...}},
    "yarn, an implied factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, scales of attention": {"rope_scaling": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.8}},
    "yarn, one scale of attention": {"rope_scaling": {**YARN, "mscale": 1.5}},
    "yarn, whole dims": {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 0.5}},
    "yarn, null": {"rope_scaling": {**YARN, "truncate": None, "beta_fast": None, "attention_factor": None}},
    "llama3, the original context on top": {"original_max_position_embeddings": 8, "rope_scaling": LLAMA3},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, the original context on top": {
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "longrope": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}},
    "longrope, a factor": {"rope_scaling": {**LONGROPE, "factor": 6.0, "attention_factor": 1.3}},
}


def without_ellipses(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_ellipses(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value is not ...
    }


def tables(config: GPTConfig, length: int) -> Tensor:
    """Cosines and sines of a text of `length` tokens, (2, T, R/2)."""
    return torch.stack(rotary_tables(config, torch.arange(length)[None]))[:, 0, :, 0]


@pytest.mark.parametrize("length", [12, 100])
@pytest.mark.parametrize("keys", KEYS)
def test_angles_are_theirs(keys: str, length: int, tmp_path: Path) -> None:
    content = without_ellipses({**SIZES, **KEYS[keys]})
    (tmp_path / "config.json").write_text(json.dumps(content))
    embedding = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    expected = torch.stack(embedding(torch.zeros(1), torch.arange(length)[None]))[:, 0, :, :8]

    form = FORMS["llama"]
    config = decode(GPTConfig, form.read_config(Settings(tmp_path / "config.json", content)))
    torch.testing.assert_close(tables(config, length), expected, atol=1e-5, rtol=0)
    # And what an export says is read alike, by both.
    again = {**SIZES, **form.write_config(config)}
    (tmp_path / "config.json").write_text(json.dumps(again))
    embedding = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    found = torch.stack(embedding(torch.zeros(1), torch.arange(length)[None]))[:, 0, :, :8]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert decode(GPTConfig, form.read_config(Settings(tmp_path / "config.json", again))) == config
