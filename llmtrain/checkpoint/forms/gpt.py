"""Decoders: GPT-2's form ↔ `gpt2`, Llama's form ↔ `llama`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from llmtrain.checkpoint.forms.base import (
    ACTIVATIONS,
    ACTIVATIONS_BACK,
    Entry,
    Form,
    Heads,
    Names,
    Settings,
    same,
    same_all,
    transposed,
    unless,
)
from llmtrain.models.config import GPTConfig


def _build(config: GPTConfig) -> nn.Module:
    from llmtrain.models.gpt import GPT

    return GPT(config)


def _heads(config: GPTConfig) -> Heads:
    return Heads(config.num_heads, config.kv_heads, config.head_width)


def _without_buffers_and_copies(names: Collection[str], config: GPTConfig, prefix: str) -> Names:
    """Names of a bare model, which lacks `prefix`, get it; buffers and a tied head's copy go."""
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    is_bare = not any(name.startswith(prefix) for name in names)
    used = {
        name: name if name.startswith("lm_head.") or not is_bare else prefix + name
        for name in names
        if not name.endswith(buffers) and not (config.tie_embeddings and name == "lm_head.weight")
    }
    return Names(used, [])


# GPT-2.

_GPT2 = {"positions": "learned", "norm": "layernorm", "gated_mlp": False, "bias": True}


def _gpt2_misfits(config: GPTConfig) -> dict[str, str]:
    misfits = {key: str(value) for key, value in _GPT2.items() if getattr(config, key) != value}
    if config.head_width * config.num_heads != config.hidden_size:
        misfits["head_dim"] = "hidden_size / num_heads"
    if config.kv_heads != config.num_heads:
        misfits["num_kv_heads"] = "num_heads"
    return misfits


def _gpt2_entries(config: GPTConfig) -> list[Entry]:
    heads = _heads(config)
    entries = same_all(
        {"embedding": "transformer.wte", "positions": "transformer.wpe"}, parameters=("weight",)
    )
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        entries += same_all(
            {f"{ours}.attention_norm": f"{theirs}.ln_1", f"{ours}.mlp_norm": f"{theirs}.ln_2"}
        )
        entries += [
            Entry(
                f"{ours}.attention.qkv.weight",
                (f"{theirs}.attn.c_attn.weight",),
                lambda t: [torch.cat(heads.split(t)).T],
                lambda ts: heads.join(list(ts[0].T.chunk(3))),
            ),
            Entry(
                f"{ours}.attention.qkv.bias",
                (f"{theirs}.attn.c_attn.bias",),
                lambda t: [torch.cat(heads.split(t))],
                lambda ts: heads.join(list(ts[0].chunk(3))),
            ),
        ]
        for linear, conv in (
            ("attention.output", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            entries.append(transposed(f"{ours}.{linear}.weight", f"{theirs}.{conv}.weight"))
            entries.append(same(f"{ours}.{linear}.bias", f"{theirs}.{conv}.bias"))
    entries += same_all({"norm": "transformer.ln_f"})
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


def _write_gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.max_sequence_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _read_gpt2_config(theirs: Settings) -> dict[str, Any]:
    theirs.require("scale_attn_weights", True)
    theirs.require("scale_attn_by_inverse_layer_idx", False)
    theirs.require("add_cross_attention", False)
    hidden = theirs.whole("n_embd", 768)
    return {
        "vocab_size": theirs.whole("vocab_size", 50257),
        "max_sequence_length": theirs.whole("n_positions", 1024),
        "hidden_size": hidden,
        "num_layers": theirs.whole("n_layer", 12),
        "num_heads": theirs.whole("n_head", 12),
        "mlp_hidden_size": unless(theirs.whole("n_inner", 4 * hidden), 4 * hidden),
        "activation": theirs.choice("activation_function", ACTIVATIONS_BACK, "gelu_new"),
        "norm_eps": theirs.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": theirs.flag("tie_word_embeddings", True),
        "dropout": theirs.number("resid_pdrop", 0.1),
        "init_std": theirs.number("initializer_range", 0.02),
    }


# Llama.

_LLAMA = {"positions": "rope", "norm": "rmsnorm", "gated_mlp": True}


def _llama_misfits(config: GPTConfig) -> dict[str, str]:
    misfits = {key: str(value) for key, value in _LLAMA.items() if getattr(config, key) != value}
    if config.hidden_size % config.num_heads:
        misfits["hidden_size"] = "a multiple of num_heads"
    return misfits


def _llama_entries(config: GPTConfig) -> list[Entry]:
    heads = _heads(config)
    entries = [same("embedding.weight", "model.embed_tokens.weight")]
    parameters = ("weight", "bias") if config.bias else ("weight",)
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        entries += [
            same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
            same(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        ]
        for p in parameters:
            entries.append(
                heads.entry(f"{ours}.attention.qkv.{p}", [f"{theirs}.self_attn.{x}_proj.{p}" for x in "qkv"])
            )
            entries.append(same(f"{ours}.attention.output.{p}", f"{theirs}.self_attn.o_proj.{p}"))
            entries += [
                same(f"{ours}.mlp.{x}.{p}", f"{theirs}.mlp.{x}_proj.{p}") for x in ("gate", "up", "down")
            ]
    entries.append(same("norm.weight", "model.norm.weight"))
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


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
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.max_sequence_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        # What releases before transformers 5 read.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
    }


def _read_llama_config(theirs: Settings) -> dict[str, Any]:
    bias = theirs.flag("attention_bias", False)
    theirs.require("mlp_bias", bias)
    # Releases before transformers 5 had rope_scaling, and rope_theta on top.
    rope = theirs.section("rope_parameters" if theirs.content.get("rope_parameters") else "rope_scaling")
    type_key = "rope_type" if "rope_type" in rope.content else "type"
    rope.require(type_key, "default", "llama3")
    scaling = None
    if rope.content.get(type_key) == "llama3":
        scaling = {
            "factor": rope.number("factor"),
            "low_frequency_factor": rope.number("low_freq_factor"),
            "high_frequency_factor": rope.number("high_freq_factor"),
            "original_max_sequence_length": rope.whole("original_max_position_embeddings"),
        }
    hidden, heads = theirs.whole("hidden_size"), theirs.whole("num_attention_heads")
    implied_width = hidden // max(heads, 1)
    return {
        "vocab_size": theirs.whole("vocab_size"),
        "max_sequence_length": theirs.whole("max_position_embeddings", 2048),
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
        "rope_theta": rope.number("rope_theta", theirs.number("rope_theta", 10_000.0)),
        "rope_scaling": scaling,
        "bias": bias,
        "tie_embeddings": theirs.flag("tie_word_embeddings", False),
        "dropout": theirs.number("attention_dropout", 0.0),
        "init_std": theirs.number("initializer_range", 0.02),
    }


GPT2 = Form(
    model_type="gpt2",
    config=GPTConfig,
    build=_build,
    misfits=_gpt2_misfits,
    entries=_gpt2_entries,
    write_config=_write_gpt2_config,
    read_config=_read_gpt2_config,
    names=lambda names, config: _without_buffers_and_copies(names, config, "transformer."),
)
LLAMA = Form(
    model_type="llama",
    config=GPTConfig,
    build=_build,
    misfits=_llama_misfits,
    entries=_llama_entries,
    write_config=_write_llama_config,
    read_config=_read_llama_config,
    names=lambda names, config: _without_buffers_and_copies(names, config, "model."),
)
