"""GPT-2 ↔ `gpt2`. Llama and its descendants are in llama.py."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import (
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
from llmtrain.models.huggingface.task_heads import TaskHeads


def build(config: GPTConfig) -> nn.Module:
    from llmtrain.models.gpt.model import GPT

    return GPT(config)


def heads_of(config: GPTConfig) -> Heads:
    return Heads(config.num_heads, config.kv_heads, config.head_width)


def without_buffers_and_copies(
    names: Collection[str], config: GPTConfig, prefix: str, embedding: str
) -> Names:
    """Add `prefix` to names of a model without head; drop buffers and a tied head's copy. If only the head
    is stored, use it as the embedding."""
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    is_bare = not any(name.startswith(prefix) for name in names)
    used = {
        name: name if name.startswith("lm_head.") or not is_bare else prefix + name
        for name in names
        if not name.endswith(buffers) and not (config.tie_embeddings and name == "lm_head.weight")
    }
    if config.tie_embeddings and "lm_head.weight" in names and prefix + embedding not in used.values():
        used["lm_head.weight"] = prefix + embedding
    return Names(used, [])


OF_OTHERS: dict[str, Any] = {
    key: getattr(GPTConfig, key)
    for key in (
        "norm_place",
        "norm_adds_one",
        "position_offset",
        "local_rope_theta",
        "full_attention_layers",
        "query_pre_attn_scalar",
        "attention_softcap",
        "logit_softcap",
        "qk_norm_over",
        "scale_embedding",
    )
}
"""Defaults of options that only Gemma and OLMo 2 change; GPT-2 and Llama have these values."""
_TASKS = TaskHeads("GPT2", text="score", bias=False)
_HAS = {
    **OF_OTHERS,
    "positions": "learned",
    "norm": "layernorm",
    "gated_mlp": False,
    "bias": True,
    "qk_norm": False,
    "sliding_window": None,
}


def _misfits(config: GPTConfig) -> dict[str, str]:
    misfits = {key: str(value) for key, value in _HAS.items() if getattr(config, key) != value}
    for key, has in (("qkv_bias", config.has_qkv_bias), ("output_bias", config.has_output_bias)):
        if not has:
            misfits[key] = "True"
    if config.head_width * config.num_heads != config.hidden_size:
        misfits["head_dim"] = "hidden_size / num_heads"
    if config.kv_heads != config.num_heads:
        misfits["num_kv_heads"] = "num_heads"
    return misfits if config.task is None else {**misfits, **_TASKS.misfits(config.task)}


def _entries(config: GPTConfig) -> list[Entry]:
    heads = heads_of(config)
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
    if config.task is not None:
        entries += _TASKS.entries(config.task)
    elif not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


def _write_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.max_sequence_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_hidden_size,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        **({} if config.task is None else _TASKS.write(config.task)),
    }


def _read_config(theirs: Settings) -> dict[str, Any]:
    theirs.require("scale_attn_weights", True)
    theirs.require("scale_attn_by_inverse_layer_idx", False)
    theirs.require("add_cross_attention", False)
    hidden = theirs.whole("n_embd", 768)
    prefix = "" if "wte.weight" in theirs.tensors else "transformer."
    return {
        "vocab_size": theirs.whole("vocab_size", 50257),
        "max_sequence_length": theirs.whole("n_positions", 1024),
        "hidden_size": hidden,
        "num_layers": theirs.layers("n_layer", 12),
        "num_heads": theirs.whole("n_head", 12),
        "mlp_hidden_size": unless(theirs.whole("n_inner", 4 * hidden), 4 * hidden),
        "activation": theirs.choice("activation_function", ACTIVATIONS_BACK, "gelu_new"),
        "norm_eps": theirs.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": theirs.is_tied("lm_head.weight", f"{prefix}wte.weight", True),
        "dropout": theirs.number("resid_pdrop", 0.1),
        "init_std": theirs.number("initializer_range", 0.02),
        **_TASKS.read(theirs),
    }


GPT2 = Form(
    model_type="gpt2",
    config=GPTConfig,
    build=build,
    misfits=_misfits,
    entries=_entries,
    write_config=_write_config,
    read_config=_read_config,
    names=lambda names, config: without_buffers_and_copies(names, config, "transformer.", "wte.weight"),
)
