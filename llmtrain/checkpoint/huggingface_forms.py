"""GPT-2's form ↔ `gpt2` and Llama's form ↔ `llama` of transformers: names, tensors, configs.

Dim names: K key-value heads, G query heads a key-value head, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.models.config import GPTConfig

MARK = "exported_by"
"""Key of config.json that tells our folders from others'."""


# Tensors: ours ↔ theirs.


@dataclass(frozen=True)
class Entry:
    """One of our tensors and those of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


def _same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda t: [t], lambda ts: ts[0])


def _transposed(ours: str, theirs: str) -> Entry:
    """GPT-2's Conv1D stores (inputs, outputs)."""
    return Entry(ours, (theirs,), lambda t: [t.T], lambda ts: ts[0].T)


def _split_qkv(config: GPTConfig, qkv: Tensor) -> list[Tensor]:
    """Rows grouped by key-value head → all queries, all keys, all values."""
    K, H = config.kv_heads, config.head_width
    grouped = qkv.view(K, config.num_heads // K + 2, H, *qkv.shape[1:])
    return [part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])]


def _join_qkv(config: GPTConfig, parts: list[Tensor]) -> Tensor:
    K, H = config.kv_heads, config.head_width
    return torch.cat([part.reshape(K, -1, H, *part.shape[1:]) for part in parts], dim=1).flatten(0, 2)


def _gpt2_entries(config: GPTConfig) -> list[Entry]:
    entries = [
        _same("embedding.weight", "transformer.wte.weight"),
        _same("positions.weight", "transformer.wpe.weight"),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for norm, ln in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            entries += [_same(f"{ours}.{norm}.{p}", f"{theirs}.{ln}.{p}") for p in ("weight", "bias")]
        entries += [
            Entry(
                f"{ours}.attention.qkv.weight",
                (f"{theirs}.attn.c_attn.weight",),
                lambda t: [torch.cat(_split_qkv(config, t)).T],
                lambda ts: _join_qkv(config, list(ts[0].T.chunk(3))),
            ),
            Entry(
                f"{ours}.attention.qkv.bias",
                (f"{theirs}.attn.c_attn.bias",),
                lambda t: [torch.cat(_split_qkv(config, t))],
                lambda ts: _join_qkv(config, list(ts[0].chunk(3))),
            ),
        ]
        for linear, conv in (
            ("attention.output", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            entries.append(_transposed(f"{ours}.{linear}.weight", f"{theirs}.{conv}.weight"))
            entries.append(_same(f"{ours}.{linear}.bias", f"{theirs}.{conv}.bias"))
    entries += [_same(f"norm.{p}", f"transformer.ln_f.{p}") for p in ("weight", "bias")]
    if not config.tie_embeddings:
        entries.append(_same("head.weight", "lm_head.weight"))
    return entries


def _llama_entries(config: GPTConfig) -> list[Entry]:
    entries = [_same("embedding.weight", "model.embed_tokens.weight")]
    parameters = ("weight", "bias") if config.bias else ("weight",)
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        entries += [
            _same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
            _same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        ]
        for p in parameters:
            entries.append(
                Entry(
                    f"{ours}.attention.qkv.{p}",
                    tuple(f"{theirs}.self_attn.{x}_proj.{p}" for x in "qkv"),
                    lambda t: _split_qkv(config, t),
                    lambda ts: _join_qkv(config, ts),
                )
            )
            entries.append(_same(f"{ours}.attention.output.{p}", f"{theirs}.self_attn.o_proj.{p}"))
            entries += [
                _same(f"{ours}.mlp.{x}.{p}", f"{theirs}.mlp.{x}_proj.{p}") for x in ("gate", "up", "down")
            ]
    entries.append(_same("norm.weight", "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(_same("head.weight", "lm_head.weight"))
    return entries


ENTRIES: dict[str, Callable[[GPTConfig], list[Entry]]] = {"gpt2": _gpt2_entries, "llama": _llama_entries}


# Configs: ours ↔ theirs.

_FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "gated_mlp": False, "bias": True},
    "llama": {"positions": "rope", "norm": "rmsnorm", "gated_mlp": True},
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}
_ACTIVATIONS_BACK = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


def architecture_of(config: GPTConfig) -> str:
    """The transformers architecture that computes the same; ConfigError names the keys in the way."""
    misfits = {name: [k for k, v in form.items() if getattr(config, k) != v] for name, form in _FORMS.items()}
    if config.head_width * config.num_heads != config.hidden_size:
        misfits["gpt2"].append("head_dim")
    if config.kv_heads != config.num_heads:
        misfits["gpt2"].append("num_kv_heads")
    if config.hidden_size % config.num_heads:
        misfits["llama"].append("hidden_size")
    for name, keys in misfits.items():
        if not keys:
            return name
    name = min(misfits, key=lambda name: len(misfits[name]))
    got = ", ".join(f"{key}={getattr(config, key)}" for key in misfits[name])
    allowed = ", ".join(f"{k}={v}" for k, v in _FORMS[name].items() if k in misfits[name])
    raise ConfigError(
        Problem(
            "model",
            f"{got}: a form that transformers has not",
            allowed or f"what {name} has",
            f"the nearest is {name}; such a model can be trained and sampled here, not exported",
        )
    )


def common_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        # Their defaults are ids of their own tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        MARK: f"llmtrain {version('llmtrain')}",
    }


def _write_gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.max_sequence_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _write_llama_config(config: GPTConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_sequence_length,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.max_sequence_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        # What releases before transformers 5 read.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
    }


CONFIG_WRITERS = {"gpt2": _write_gpt2_config, "llama": _write_llama_config}


def _require(where: Path, theirs: Mapping[str, Any], key: str, allowed: Collection[Any]) -> None:
    """Raises CheckpointError unless `key`, None where missing, has an allowed value."""
    if theirs.get(key) not in allowed:
        names = ", ".join(str(value) for value in allowed if value is not None)
        raise CheckpointError(Problem(f"{where}: {key}", repr(theirs.get(key)), names))


def _unless(value: Any, implied: Any) -> Any:
    """None, which our config reads as `implied`, or the value."""
    return None if value == implied else value


def _read_gpt2_config(given: dict[str, Any], where: Path) -> dict[str, Any]:
    theirs: dict[str, Any] = {"activation_function": "gelu_new", "n_embd": 768, "n_inner": None} | given
    _require(where, theirs, "activation_function", list(_ACTIVATIONS_BACK))
    _require(where, theirs, "scale_attn_weights", (None, True))
    _require(where, theirs, "scale_attn_by_inverse_layer_idx", (None, False))
    _require(where, theirs, "add_cross_attention", (None, False))
    hidden = theirs["n_embd"]
    return {
        "vocab_size": theirs.get("vocab_size", 50257),
        "max_sequence_length": theirs.get("n_positions", 1024),
        "hidden_size": hidden,
        "num_layers": theirs.get("n_layer", 12),
        "num_heads": theirs.get("n_head", 12),
        "mlp_hidden_size": _unless(theirs["n_inner"], 4 * hidden),
        "activation": _ACTIVATIONS_BACK[theirs["activation_function"]],
        "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "dropout": theirs.get("resid_pdrop", 0.1),
        "init_std": theirs.get("initializer_range", 0.02),
    }


def _read_llama_config(given: dict[str, Any], where: Path) -> dict[str, Any]:
    theirs: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | given
    _require(where, theirs, "hidden_act", list(_ACTIVATIONS_BACK))
    _require(where, theirs, "mlp_bias", (theirs["attention_bias"],))
    rope: dict[str, Any] = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    _require(where, {"rope_type": rope_type}, "rope_type", (None, "default", "llama3"))
    scaling = None
    if rope_type == "llama3":
        scaling = {
            "factor": rope["factor"],
            "low_frequency_factor": rope["low_freq_factor"],
            "high_frequency_factor": rope["high_freq_factor"],
            "original_max_sequence_length": rope["original_max_position_embeddings"],
        }
    hidden, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    return {
        "vocab_size": theirs["vocab_size"],
        "max_sequence_length": theirs.get("max_position_embeddings", 2048),
        "hidden_size": hidden,
        "num_layers": theirs["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": _unless(theirs.get("num_key_value_heads"), heads),
        "head_dim": _unless(theirs.get("head_dim"), hidden // heads),
        "mlp_hidden_size": _unless(theirs["intermediate_size"], 4 * hidden),
        "activation": _ACTIVATIONS_BACK[theirs["hidden_act"]],
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "positions": "rope",
        "rope_theta": rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0),
        "rope_scaling": scaling,
        "bias": theirs["attention_bias"],
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "dropout": theirs.get("attention_dropout", 0.0),
        "init_std": theirs.get("initializer_range", 0.02),
    }


CONFIG_READERS = {"gpt2": _read_gpt2_config, "llama": _read_llama_config}
