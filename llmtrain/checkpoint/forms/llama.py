"""Llama's form ↔ `llama`, and what differs from it by a setting ↔ `mistral`, `qwen2`, `qwen3`, `smollm3`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmtrain.checkpoint.forms.base import ACTIVATIONS, ACTIVATIONS_BACK, Entry, Form, Settings, same, unless
from llmtrain.checkpoint.forms.gpt import build, heads_of, without_buffers_and_copies
from llmtrain.checkpoint.forms.rope import read_rope, write_rope
from llmtrain.models.config import GPTConfig


def _parameters(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _entries(config: GPTConfig) -> list[Entry]:
    heads = heads_of(config)
    entries = [same("embedding.weight", "model.embed_tokens.weight")]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        entries += [
            same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
            same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        ]
        for p in _parameters(config.has_qkv_bias):
            names = [f"{theirs}.self_attn.{x}_proj.{p}" for x in "qkv"]
            entries.append(heads.entry(f"{ours}.attention.qkv.{p}", names))
        if config.qk_norm:
            entries += [
                same(f"{ours}.attention.query_norm.weight", f"{theirs}.self_attn.q_norm.weight"),
                same(f"{ours}.attention.key_norm.weight", f"{theirs}.self_attn.k_norm.weight"),
            ]
        for p in _parameters(config.has_output_bias):
            entries.append(same(f"{ours}.attention.output.{p}", f"{theirs}.self_attn.o_proj.{p}"))
        for p in _parameters(config.bias):
            entries += [
                same(f"{ours}.mlp.{x}.{p}", f"{theirs}.mlp.{x}_proj.{p}") for x in ("gate", "up", "down")
            ]
    entries.append(same("norm.weight", "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


def _write_config(config: GPTConfig) -> dict[str, Any]:
    """What all of them say."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        **write_rope(config),
    }


def _read_config(theirs: Settings, *, rope_theta: float, tied: bool) -> dict[str, Any]:
    """What all of them say; rope_theta and tied where it is not said."""
    hidden, heads = theirs.whole("hidden_size"), theirs.whole("num_attention_heads")
    implied_width = hidden // max(heads, 1)
    prefix = "" if "embed_tokens.weight" in theirs.tensors else "model."
    return {
        "vocab_size": theirs.whole("vocab_size"),
        "hidden_size": hidden,
        "num_layers": theirs.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": unless(theirs.whole("num_key_value_heads", heads), heads),
        "head_dim": unless(theirs.whole("head_dim", implied_width), implied_width),
        "mlp_hidden_size": unless(theirs.whole("intermediate_size"), 4 * hidden),
        "activation": theirs.choice("hidden_act", ACTIVATIONS_BACK, "silu"),
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_eps": theirs.number("rms_norm_eps", 1e-6),
        "positions": "rope",
        **read_rope(theirs, theta=rope_theta, longest=2048),
        "bias": False,
        "tie_embeddings": theirs.is_tied("lm_head.weight", f"{prefix}embed_tokens.weight", tied),
        "dropout": theirs.number("attention_dropout", 0.0),
        "init_std": theirs.number("initializer_range", 0.02),
    }


# What each has of its own.

_ANY = object()


def _misfits(config: GPTConfig, **has: Any) -> dict[str, str]:
    """has: key → the value that the architecture has, or _ANY, where Llama without biases has another."""
    values = {
        "positions": "rope",
        "norm": "rmsnorm",
        "gated_mlp": True,
        "bias": False,
        "qkv_bias": False,
        "output_bias": False,
        "qk_norm": False,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "no_rope_layers": (),
        **has,
    }
    implied = {"qkv_bias": config.has_qkv_bias, "output_bias": config.has_output_bias}
    ours = {key: getattr(config, key) for key in values} | implied
    found = {key: str(has) for key, has in values.items() if has is not _ANY and ours[key] != has}
    if config.hidden_size % config.num_heads:
        found["hidden_size"] = "a multiple of num_heads"
    return found


def _write_biases(config: GPTConfig) -> dict[str, Any]:
    return {"attention_bias": config.has_qkv_bias, "mlp_bias": config.bias}


def _read_biases(theirs: Settings) -> dict[str, Any]:
    of_attention, bias = theirs.flag("attention_bias", False), theirs.flag("mlp_bias", False)
    own = unless(of_attention, bias)
    return {"bias": bias, "qkv_bias": own, "output_bias": own}


def _write_layers(config: GPTConfig) -> dict[str, Any]:
    """Qwen says of each layer whether it has a window."""
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0,
        "layer_types": [kind] * config.num_layers,
    }


def _read_layers(theirs: Settings) -> dict[str, Any]:
    if not theirs.flag("use_sliding_window", False):
        return {"sliding_window": None}
    layers, first = theirs.whole("num_hidden_layers"), theirs.whole("max_window_layers", 28)
    implied = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    kinds = set(theirs.content.get("layer_types") or implied)
    if kinds <= {"full_attention"}:
        return {"sliding_window": None}
    window, longest = theirs.whole("sliding_window", 4096), theirs.whole("max_position_embeddings", 32768)
    if kinds != {"sliding_attention"} and window < longest:
        key = "layer_types" if theirs.content.get("layer_types") else "max_window_layers"
        raise theirs.refusal(
            key,
            "a window in all layers or in none",
            f"set use_sliding_window to false and max_position_embeddings to {window}, the window, or less",
        )
    return {"sliding_window": window if window < longest else None}


def _read_window(theirs: Settings) -> dict[str, Any]:
    # Mistral's default is 4096, and null says none.
    window = theirs.content.get("sliding_window", 4096)
    return {"sliding_window": None if window is None else theirs.whole("sliding_window", 4096)}


def _read_qwen3(theirs: Settings) -> dict[str, Any]:
    own = unless(theirs.flag("attention_bias", False), False)
    width = theirs.whole("head_dim", 128)
    implied = theirs.whole("hidden_size") // max(theirs.whole("num_attention_heads"), 1)
    biases = {"qkv_bias": own, "output_bias": own}
    return {"qk_norm": True, "head_dim": unless(width, implied), **biases, **_read_layers(theirs)}


def _write_smollm3(config: GPTConfig) -> dict[str, Any]:
    has_rope = [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)]
    return {**_write_biases(config), "no_rope_layers": has_rope, "use_sliding_window": False}


def _read_smollm3(theirs: Settings) -> dict[str, Any]:
    theirs.require("use_sliding_window", False)
    layers, every = theirs.whole("num_hidden_layers"), theirs.whole("no_rope_layer_interval", 4)
    has_rope = theirs.content.get("no_rope_layers")  # of each layer, as opposed to its name
    if has_rope is None:
        has_rope = [(layer + 1) % max(every, 1) != 0 for layer in range(layers)]
    if not isinstance(has_rope, list) or len(has_rope) < layers:
        raise theirs.refusal("no_rope_layers", f"{layers} times 0 or 1")
    return {
        **_read_biases(theirs),
        "no_rope_layers": [layer for layer in range(layers) if not has_rope[layer]],
    }


def _form(
    model_type: str,
    architecture: str,
    misfits: Callable[[GPTConfig], dict[str, str]],
    write: Callable[[GPTConfig], dict[str, Any]],
    read: Callable[[Settings], dict[str, Any]],
    *,
    rope_theta: float = 10_000.0,
    tied: bool = False,
) -> Form:
    """write, read: what config.json says besides what all say."""

    def write_config(config: GPTConfig) -> dict[str, Any]:
        return {"architectures": [architecture], **_write_config(config), **write(config)}

    def read_config(theirs: Settings) -> dict[str, Any]:
        return {**_read_config(theirs, rope_theta=rope_theta, tied=tied), **read(theirs)}

    return Form(
        model_type=model_type,
        config=GPTConfig,
        build=build,
        misfits=misfits,
        entries=_entries,
        write_config=write_config,
        read_config=read_config,
        names=lambda names, config: without_buffers_and_copies(
            names, config, "model.", "embed_tokens.weight"
        ),
    )


LLAMA = _form(
    "llama",
    "LlamaForCausalLM",
    lambda config: _misfits(config, bias=_ANY, qkv_bias=_ANY, output_bias=config.has_qkv_bias),
    _write_biases,
    _read_biases,
)
MISTRAL = _form(
    "mistral",
    "MistralForCausalLM",
    lambda config: _misfits(config, sliding_window=_ANY),
    lambda config: {"sliding_window": config.sliding_window},
    _read_window,
)
QWEN2 = _form(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda config: _misfits(config, qkv_bias=True, sliding_window=_ANY),
    _write_layers,
    lambda theirs: {"qkv_bias": True, **_read_layers(theirs)},
)
QWEN3 = _form(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda config: _misfits(
        config, qk_norm=True, sliding_window=_ANY, qkv_bias=_ANY, output_bias=config.has_qkv_bias
    ),
    lambda config: {"attention_bias": config.has_qkv_bias, **_write_layers(config)},
    _read_qwen3,
)
SMOLLM3 = _form(
    "smollm3",
    "SmolLM3ForCausalLM",
    lambda config: _misfits(
        config, bias=_ANY, qkv_bias=_ANY, output_bias=config.has_qkv_bias, no_rope_layers=_ANY
    ),
    _write_smollm3,
    _read_smollm3,
    rope_theta=2_000_000.0,
    tied=True,
)
