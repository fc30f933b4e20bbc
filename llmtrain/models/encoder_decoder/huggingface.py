"""Encoder-decoders: T5 ↔ `t5`, BART ↔ `bart`.

Dim names: N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
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

_SIDES = ("encoder", "decoder")

_T5_TASKS = TaskHeads(
    "T5",
    text="classification_head.out_proj",
    dense="classification_head.dense",
    encoder_only=("tags",),
)
_BART_TASKS = TaskHeads(
    "Bart",
    text="classification_head.out_proj",
    dense="classification_head.dense",
    has_tags=False,
)


def _sides(config: Seq2SeqConfig) -> tuple[str, ...]:
    return _SIDES if config.has_decoder else _SIDES[:1]


def _build(config: Seq2SeqConfig) -> nn.Module:
    from llmtrain.models.encoder_decoder.model import EncoderDecoder

    return EncoderDecoder(config)


def _misfits(config: Seq2SeqConfig, form: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in form.items() if getattr(config, key) != value}


def _layers(config: Seq2SeqConfig) -> Iterable[tuple[str, int]]:
    """Yield (side, layer number) of each layer."""
    for side, count in zip(_SIDES, (config.num_layers, config.decoder_layers), strict=True):
        yield from ((side, i) for i in range(count))


def _self_attention(config: Seq2SeqConfig, ours: str, theirs: Iterable[str]) -> Entry:
    return Heads(config.num_heads, config.num_heads, config.head_width).entry(ours, theirs)


def _keys_and_values(config: Seq2SeqConfig, ours: str, theirs: Iterable[str]) -> Entry:
    """Map our packed keys and values, whose rows are ordered by head: its key, then its value."""
    N, H = config.num_heads, config.head_width

    def split(t: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in t.view(N, 2, H, *t.shape[1:]).unbind(1)]

    def join(ts: list[Tensor]) -> Tensor:
        return torch.stack([t.reshape(N, H, *t.shape[1:]) for t in ts], dim=1).flatten(0, 2)

    return Entry(ours, tuple(theirs), split, join)


_HEADS = ("lm_head.", "final_logits", "classification_head.", "classifier.", "qa_outputs.")
"""Beginnings of the names of heads, which stand beside the model."""


def _special_ids(config: Seq2SeqConfig) -> dict[str, int]:
    """Return the special ids by Hugging Face's names. The start id is also the padding id, as in T5,
    unless it ends texts too."""
    ids = {"decoder_start_token_id": config.start_id, "eos_token_id": config.eos_id}
    if config.start_id != config.eos_id:
        ids["pad_token_id"] = config.start_id
    return {key: number for key, number in ids.items() if number is not None}


def _names(
    names: Collection[str], config: Seq2SeqConfig, shared: str, unused: tuple[str, ...], prefix: str = ""
) -> Names:
    """Add `prefix` to names of a model without head; drop copies of the embedding and buffers. If only a
    copy is stored, as by tools that save a shared tensor once, use it as the embedding."""
    copies = [shared.replace("shared", f"{side}.embed_tokens") for side in _SIDES]
    # The head of a task stands in place of the language model's.
    no_head = config.tie_embeddings or config.task is not None
    dropped = {*copies, *unused, *(["lm_head.weight"] if no_head else [])}
    is_bare = not any(name.startswith(prefix) for name in names)
    used: dict[str, str] = {}
    held: list[str] = []
    for name in sorted(names):
        theirs = prefix + name if is_bare and not name.startswith(_HEADS) else name
        if theirs not in dropped:
            used[name] = theirs
        elif theirs not in unused:
            held.append(name)
    if held and shared not in used.values():
        used[held[0]] = shared
    return Names(used, [])


# T5.

_T5 = {
    "norm": "rmsnorm",
    "norm_first": True,
    "embedding_norm": False,
    "positions": "relative",
    "scale_embedding": False,
    "scale_attention": False,
    "bias": False,
    "head_bias": False,
}
_T5_ACTIVATIONS = {"gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu", "gelu": "gelu"}


def _t5_projection(config: Seq2SeqConfig) -> str:
    """Return T5's name of the MLP's form; `gated-gelu` is the tanh approximation."""
    if config.gated_mlp and config.activation == "gelu_tanh":
        return "gated-gelu"
    return ("gated-" if config.gated_mlp else "") + _T5_ACTIVATIONS[config.activation]


_T5_PROJECTIONS = {
    "gated-gelu": (True, "gelu_tanh"),
    **{theirs: (False, ours) for ours, theirs in _T5_ACTIVATIONS.items()},
    "gated-silu": (True, "silu"),
    "gated-relu": (True, "relu"),
    "gated-gelu_new": (True, "gelu_tanh"),
}


def _t5_misfits(config: Seq2SeqConfig) -> dict[str, str]:
    misfits = _misfits(config, _T5)
    if config.gated_mlp and config.activation == "gelu":
        misfits["activation"] = "gelu_tanh"
    return misfits if config.task is None else {**misfits, **_T5_TASKS.misfits(config.task)}


def _t5_prefix(config: Seq2SeqConfig) -> str:
    """Return the module of the model within the class of its head."""
    return "" if config.task is None or config.task.kind == "span" else "transformer."


def _t5_entries(config: Seq2SeqConfig) -> list[Entry]:
    prefix = _t5_prefix(config)
    entries = [same("embedding.weight", f"{prefix}shared.weight")]
    for side, i in _layers(config):
        ours, theirs = f"{side}.{i}", f"{prefix}{side}.block.{i}.layer"
        attention, last = f"{theirs}.0.SelfAttention", 2 if side == "decoder" else 1
        norms = {"attention_norm": "0.layer_norm", "mlp_norm": f"{last}.layer_norm"}
        entries.append(
            _self_attention(
                config, f"{ours}.attention.qkv.weight", [f"{attention}.{x}.weight" for x in "qkv"]
            )
        )
        entries.append(same(f"{ours}.attention.output.weight", f"{attention}.o.weight"))
        if i == 0:
            bias = f"{attention}.relative_attention_bias.weight"
            entries.append(transposed(f"{ours}.attention.relative.weight", bias))
        if side == "decoder":
            mine, other = f"{ours}.cross_attention", f"{theirs}.1.EncDecAttention"
            norms["cross_attention_norm"] = "1.layer_norm"
            entries += [
                same(f"{mine}.query.weight", f"{other}.q.weight"),
                _keys_and_values(config, f"{mine}.key_value.weight", [f"{other}.{x}.weight" for x in "kv"]),
                same(f"{mine}.output.weight", f"{other}.o.weight"),
            ]
        mlp = {"down": "wo"} | ({"gate": "wi_0", "up": "wi_1"} if config.gated_mlp else {"up": "wi"})
        pairs = {f"mlp.{mine}": f"{last}.DenseReluDense.{other}" for mine, other in mlp.items()} | norms
        entries += same_all(
            {f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in pairs.items()}, parameters=("weight",)
        )
    norms = {f"{side}_norm": f"{prefix}{side}.final_layer_norm" for side in _sides(config)}
    entries += same_all(norms, ("weight",))
    if config.task is not None:
        return entries + _T5_TASKS.entries(config.task)
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


def _write_t5_config(config: Seq2SeqConfig) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": config.hidden_size,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers or config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": _t5_projection(config),
        # Before transformers 5, logits of tied embeddings are scaled, and no others.
        "tie_word_embeddings": config.tie_embeddings or config.scale_logits,
        "scale_decoder_outputs": config.scale_logits,
        **_special_ids(config),
        # Keys of our own, which keep the positions of the sentinels.
        "sentinel_id": config.sentinel_id,
        "num_sentinels": config.num_sentinels,
        **({} if config.task is None else _T5_TASKS.write(config.task)),
    }


def _read_t5_config(theirs: Settings) -> dict[str, Any]:
    hidden, heads = theirs.whole("d_model", 512), theirs.whole("num_heads", 8)
    projection = theirs.choice("feed_forward_proj", {name: name for name in _T5_PROJECTIONS}, "relu")
    gated, activation = _T5_PROJECTIONS[projection]
    layers, width = theirs.layers("num_layers", 6), theirs.whole("d_kv", 64)
    return {
        **_T5,
        "vocab_size": theirs.whole("vocab_size", 32128),
        "start_id": theirs.whole("decoder_start_token_id", theirs.whole("pad_token_id", 0)),
        "eos_id": next(iter(theirs.token_ids("eos_token_id")), 1),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_decoder_layers": unless(theirs.layers("num_decoder_layers", layers), layers),
        "num_heads": heads,
        "head_dim": None if width * heads == hidden else width,
        "mlp_hidden_size": unless(theirs.whole("d_ff", 2048), 4 * hidden),
        "activation": activation,
        "gated_mlp": gated,
        "norm_eps": theirs.number("layer_norm_epsilon", 1e-6),
        "relative_buckets": theirs.whole("relative_attention_num_buckets", 32),
        "relative_max_distance": theirs.whole("relative_attention_max_distance", 128),
        "scale_logits": theirs.flag("scale_decoder_outputs", theirs.flag("tie_word_embeddings", True)),
        "tie_embeddings": theirs.is_tied("lm_head.weight", "shared.weight", True),
        "dropout": theirs.number("dropout_rate", 0.1),
        "sentinel_id": theirs.content.get("sentinel_id"),
        "num_sentinels": theirs.whole("num_sentinels", 100),
        **_T5_TASKS.read(theirs),
    }


# BART.

_BART = {
    "norm": "layernorm",
    "norm_first": False,
    "embedding_norm": True,
    "positions": "learned",
    "position_offset": 2,
    "norm_eps": 1e-5,
    "gated_mlp": False,
    "scale_attention": True,
    "scale_logits": False,
    "bias": True,
}


def _bart_misfits(config: Seq2SeqConfig) -> dict[str, str]:
    misfits = _misfits(config, _BART)
    if config.head_width * config.num_heads != config.hidden_size:
        misfits["head_dim"] = "hidden_size / num_heads"
    return misfits if config.task is None else {**misfits, **_BART_TASKS.misfits(config.task)}


def _bart_entries(config: Seq2SeqConfig) -> list[Entry]:
    entries = [same("embedding.weight", "model.shared.weight")]
    for mine, side in (("source", "encoder"), ("target", "decoder")):
        entries.append(same(f"{mine}_positions.weight", f"model.{side}.embed_positions.weight"))
        entries += same_all({f"{mine}_norm": f"model.{side}.layernorm_embedding"})
    for side, i in _layers(config):
        ours, theirs = f"{side}.{i}", f"model.{side}.layers.{i}"
        pairs = {
            "attention.output": "self_attn.out_proj",
            "attention_norm": "self_attn_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
            "mlp_norm": "final_layer_norm",
        }
        if side == "decoder":
            pairs |= {
                "cross_attention.query": "encoder_attn.q_proj",
                "cross_attention.output": "encoder_attn.out_proj",
                "cross_attention_norm": "encoder_attn_layer_norm",
            }
        entries += same_all({f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in pairs.items()})
        for p in ("weight", "bias"):
            parts = [f"{theirs}.self_attn.{x}_proj.{p}" for x in "qkv"]
            entries.append(_self_attention(config, f"{ours}.attention.qkv.{p}", parts))
            if side == "decoder":
                parts = [f"{theirs}.encoder_attn.{x}_proj.{p}" for x in "kv"]
                entries.append(_keys_and_values(config, f"{ours}.cross_attention.key_value.{p}", parts))
    if config.task is not None:
        return entries + _BART_TASKS.entries(config.task)
    if config.head_bias:
        entries.append(Entry("head.bias", ("final_logits_bias",), lambda t: [t[None]], lambda ts: ts[0][0]))
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


def _write_bart_config(config: Seq2SeqConfig) -> dict[str, Any]:
    sides = {
        f"{side}_{key}": value
        for side in _SIDES
        for key, value in (("ffn_dim", config.mlp_width), ("attention_heads", config.num_heads))
    }
    return {
        "architectures": ["BartForConditionalGeneration"],
        "d_model": config.hidden_size,
        "encoder_layers": config.num_layers,
        "decoder_layers": config.decoder_layers,
        **sides,
        "max_position_embeddings": config.max_sequence_length,
        "activation_function": ACTIVATIONS[config.activation],
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "init_std": config.init_std,
        # The default is an id of BART's own tokenizer.
        "forced_eos_token_id": config.eos_id,
        **_special_ids(config),
        **({} if config.task is None else _BART_TASKS.write(config.task)),
    }


def _read_bart_config(theirs: Settings) -> dict[str, Any]:
    hidden, layers = theirs.whole("d_model", 1024), theirs.layers("encoder_layers", 12)
    heads, width = theirs.whole("encoder_attention_heads", 16), theirs.whole("encoder_ffn_dim", 4096)
    theirs.require("decoder_attention_heads", heads)
    theirs.require("decoder_ffn_dim", width)
    bias = theirs.tensors.get("final_logits_bias")
    return {
        **_BART,
        "vocab_size": theirs.whole("vocab_size", 50265),
        "start_id": theirs.whole("decoder_start_token_id", 2),
        "eos_id": next(iter(theirs.token_ids("eos_token_id")), 2),
        "mask_id": theirs.special_ids().get("mask"),
        "max_sequence_length": theirs.whole("max_position_embeddings", 1024),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_decoder_layers": unless(theirs.layers("decoder_layers", 12), layers),
        "num_heads": heads,
        "mlp_hidden_size": unless(width, 4 * hidden),
        "activation": theirs.choice("activation_function", ACTIVATIONS_BACK, "gelu"),
        "scale_embedding": theirs.flag("scale_embedding", False),
        # All models trained without it have a buffer of zeros.
        "head_bias": bias is not None and bool(bias.any()),
        "tie_embeddings": theirs.is_tied("lm_head.weight", "model.shared.weight", True),
        "dropout": theirs.number("dropout", 0.1),
        "init_std": theirs.number("init_std", 0.02),
        **_BART_TASKS.read(theirs),
    }


_T5_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def _t5_names(names: Collection[str], config: Seq2SeqConfig) -> Names:
    prefix = _t5_prefix(config)
    return _names(names, config, f"{prefix}shared.weight", (f"{prefix}{_T5_UNUSED}",), prefix)


def _bart_unused(config: Seq2SeqConfig) -> tuple[str, ...]:
    versions = tuple(f"model.{side}.version" for side in _SIDES)
    return versions if config.head_bias else (*versions, "final_logits_bias")


T5 = Form(
    model_type="t5",
    config=Seq2SeqConfig,
    build=_build,
    misfits=_t5_misfits,
    entries=_t5_entries,
    write_config=_write_t5_config,
    read_config=_read_t5_config,
    names=_t5_names,
)
BART = Form(
    model_type="bart",
    config=Seq2SeqConfig,
    build=_build,
    misfits=_bart_misfits,
    entries=_bart_entries,
    write_config=_write_bart_config,
    read_config=_read_bart_config,
    names=lambda names, config: _names(names, config, "model.shared.weight", _bart_unused(config), "model."),
)
