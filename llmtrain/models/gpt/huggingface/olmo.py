"""OLMo ↔ `olmo2`, `olmo3`."""

from __future__ import annotations

from typing import Any

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.huggingface.llama import ANY, form, misfits, read_attention_biases
from llmtrain.models.huggingface.form import Settings
from llmtrain.models.huggingface.rotary_by_kind import read_rope_by_kind, write_rope_by_kind
from llmtrain.models.huggingface.windows import every, read_window, read_windows, write_windows

_HAS = {"norm_place": "after", "qk_norm": True, "qk_norm_over": "all_heads"}


def _read(theirs: Settings) -> dict[str, Any]:
    return {**_HAS, "norm_eps": theirs.number("rms_norm_eps", 1e-5), **read_attention_biases(theirs)}


def _misfits(config: GPTConfig, **has: Any) -> dict[str, str]:
    return misfits(config, **_HAS, qkv_bias=ANY, output_bias=config.has_qkv_bias, **has)


def _write(config: GPTConfig) -> dict[str, Any]:
    return {"attention_bias": config.has_qkv_bias}


def _write_olmo3(config: GPTConfig) -> dict[str, Any]:
    return {**_write(config), **write_windows(config), **write_rope_by_kind(config)}


def _read_windows(theirs: Settings) -> dict[str, Any]:
    implied = every(theirs.layers(), 4)
    return read_windows(theirs, read_window(theirs, 4096), implied)


def _read_rope(theirs: Settings) -> dict[str, Any]:
    windows = _read_windows(theirs)
    return read_rope_by_kind(theirs, windows, theta=500_000.0, local_theta=500_000.0, longest=2048)


OLMO2 = form(
    "olmo2",
    "Olmo2ForCausalLM",
    _misfits,
    _write,
    _read,
    has_tags=False,
)
OLMO3 = form(
    "olmo3",
    "Olmo3ForCausalLM",
    lambda config: _misfits(config, sliding_window=ANY, full_attention_layers=ANY, local_rope_theta=ANY),
    _write_olmo3,
    lambda theirs: {**_read(theirs), **_read_windows(theirs)},
    rope=_read_rope,
    has_tags=False,
)
