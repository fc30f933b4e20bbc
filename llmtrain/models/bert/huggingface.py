"""Encoders: BERT ↔ `bert`, RoBERTa ↔ `roberta`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.huggingface.form import (
    ACTIVATIONS,
    Entry,
    Form,
    Heads,
    Names,
    Settings,
    same_all,
    unless,
)
from llmtrain.models.huggingface.task_heads import TaskHeads

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_PAIR_HEAD = "cls.seq_relationship."
_BARE = ("embeddings.", "encoder.", "pooler.")
"""Prefixes of the names in a model without heads."""
_ROLES = ("mask", "cls", "sep")
_FRESH = ("transform.*", "transform_norm.*", "head.*")


_BERT_TASKS = TaskHeads("Bert", text="classifier", dense="bert.pooler.dense", pooling="first")
_ROBERTA_TASKS = TaskHeads("Roberta", text="classifier.out_proj", dense="classifier.dense", pooling="first")


def _build(config: BertConfig) -> nn.Module:
    from llmtrain.models.bert.model import Bert

    return Bert(config)


# Tensors.


def _encoder_entries(config: BertConfig, prefix: str) -> list[Entry]:
    heads = Heads(config.num_heads, config.num_heads, config.head_width)
    embeddings = f"{prefix}.embeddings"
    entries = same_all(
        {
            "embedding": f"{embeddings}.word_embeddings",
            "positions": f"{embeddings}.position_embeddings",
        },
        parameters=("weight",),
    )
    norm, segments = f"{embeddings}.LayerNorm", f"{embeddings}.token_type_embeddings"
    if config.num_segments:
        entries += same_all({"segments": segments}, parameters=("weight",))
        entries += same_all({"embedding_norm": norm})
    else:
        entries.append(
            _with_segment_of_zeros("embedding_norm.weight", f"{norm}.weight", f"{segments}.weight")
        )
        entries += same_all({"embedding_norm": norm}, parameters=("bias",))
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{prefix}.encoder.layer.{i}"
        for p in ("weight", "bias"):
            names = [f"{theirs}.attention.self.{part}.{p}" for part in ("query", "key", "value")]
            entries.append(heads.entry(f"{ours}.attention.qkv.{p}", names))
        entries += same_all(
            {
                f"{ours}.attention.output": f"{theirs}.attention.output.dense",
                f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
                f"{ours}.mlp.up": f"{theirs}.intermediate.dense",
                f"{ours}.mlp.down": f"{theirs}.output.dense",
                f"{ours}.mlp_norm": f"{theirs}.output.LayerNorm",
            }
        )
    return entries


def _with_segment_of_zeros(ours: str, theirs: str, segments: str) -> Entry:
    """Map segment embeddings. Hugging Face models always add one to each token, so write zeros if our
    model has none; `ours` gives the width."""

    def split(weight_D: Tensor) -> list[Tensor]:
        return [weight_D, torch.zeros_like(weight_D)[None]]

    return Entry(ours, (theirs, segments), split, lambda parts: parts[0])


def _head_entries(config: BertConfig, bias: str, decoder: str) -> list[Entry]:
    """Map the vocabulary head, whose bias Hugging Face stores twice."""
    if config.tie_embeddings:
        return [Entry("head.bias", (bias,), lambda t: [t], lambda ts: ts[0])]
    return [
        Entry("head.weight", (f"{decoder}.weight",), lambda t: [t], lambda ts: ts[0]),
        # The copy of a tied head; if the embeddings are not tied, only this one is read.
        Entry("head.bias", (bias, f"{decoder}.bias"), lambda t: [t, t.clone()], lambda ts: ts[1]),
    ]


def _bert_entries(config: BertConfig) -> list[Entry]:
    entries = _encoder_entries(config, "bert")
    if config.task is not None:
        return entries + _BERT_TASKS.entries(config.task)
    entries += same_all(
        {
            "transform": "cls.predictions.transform.dense",
            "transform_norm": "cls.predictions.transform.LayerNorm",
        }
    )
    entries += _head_entries(config, "cls.predictions.bias", "cls.predictions.decoder")
    if config.pair_head:
        entries += same_all({"pooler": "bert.pooler.dense", "pair_head": "cls.seq_relationship"})
    return entries


def _roberta_entries(config: BertConfig) -> list[Entry]:
    entries = _encoder_entries(config, "roberta")
    if config.task is not None:
        return entries + _ROBERTA_TASKS.entries(config.task)
    entries += same_all({"transform": "lm_head.dense", "transform_norm": "lm_head.layer_norm"})
    return entries + _head_entries(config, "lm_head.bias", "lm_head.decoder")


def _names(names: Collection[str], config: BertConfig, prefix: str, bias: str, decoder: str) -> Names:
    """Add the prefix to names of a model without heads, and translate TensorFlow's norm names. Drop copies
    of tied weights; leave out a pooler without a pair head."""
    used: dict[str, str] = {}
    left_out: list[str] = []
    for name in names:
        theirs = f"{prefix}.{name}" if name.startswith(_BARE) else name
        if theirs.endswith((".LayerNorm.gamma", ".LayerNorm.beta")):
            theirs = theirs.replace(".gamma", ".weight").replace(".beta", ".bias")
        if config.tie_embeddings and theirs == f"{decoder}.weight":
            continue
        if config.tie_embeddings and theirs == f"{decoder}.bias":
            if bias in names:
                continue
            theirs = bias
        has_pooler = config.pair_head if config.task is None else config.task.dense
        if theirs.startswith(f"{prefix}.pooler.") and not has_pooler:
            left_out.append(name)
            continue
        used[name] = theirs
    return Names(used, left_out)


# Configs.


def _misfits(config: BertConfig) -> dict[str, str]:
    misfits = {"position_offset": "0"} if config.position_offset else {}
    return misfits if config.task is None else {**misfits, **_BERT_TASKS.misfits(config.task)}


def _roberta_misfits(config: BertConfig) -> dict[str, str]:
    misfits = {} if config.position_offset else {"position_offset": "1 or more"}
    if config.activation != "gelu":
        misfits["activation"] = "gelu"
    if config.task is not None:
        return {**misfits, **_ROBERTA_TASKS.misfits(config.task)}
    if config.pair_head:
        misfits["pair_head"] = "false"
    return misfits


def _write_config(config: BertConfig) -> dict[str, Any]:
    """Return the keys common to BERT and RoBERTa."""
    return {
        "max_position_embeddings": config.max_sequence_length + config.position_offset,
        "type_vocab_size": max(1, config.num_segments),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": ACTIVATIONS[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.norm_eps,
        **{f"{role}_token_id": i for role in _ROLES if (i := getattr(config, f"{role}_id")) is not None},
    }


def _write_bert_config(config: BertConfig) -> dict[str, Any]:
    architecture = "BertForPreTraining" if config.pair_head else "BertForMaskedLM"
    of_task = {} if config.task is None else _BERT_TASKS.write(config.task)
    return {"architectures": [architecture], **_write_config(config), **of_task}


def _write_roberta_config(config: BertConfig) -> dict[str, Any]:
    return {
        "architectures": ["RobertaForMaskedLM"],
        **_write_config(config),
        # Positions are counted from the one after it.
        "pad_token_id": config.position_offset - 1,
        **({} if config.task is None else _ROBERTA_TASKS.write(config.task)),
    }


def _read_config(theirs: Settings, prefix: str, decoder: str, offset: int) -> dict[str, Any]:
    """Read the keys common to BERT and RoBERTa."""
    theirs.require("position_embedding_type", "absolute")
    theirs.require("is_decoder", False)
    theirs.require("add_cross_attention", False)
    hidden = theirs.whole("hidden_size", 768)
    embeddings = (
        "embeddings." if "embeddings.word_embeddings.weight" in theirs.tensors else f"{prefix}.embeddings."
    )
    segments = theirs.whole("type_vocab_size", 2)
    stored = theirs.tensors.get(f"{embeddings}token_type_embeddings.weight")
    if segments == 1 and stored is not None and not stored.any():
        segments = 0  # as ours without segments are written
    return {
        **_special_ids(theirs),
        "vocab_size": theirs.whole("vocab_size"),
        "max_sequence_length": theirs.whole("max_position_embeddings", 512) - offset,
        "position_offset": offset,
        "num_segments": segments,
        "hidden_size": hidden,
        "num_layers": theirs.layers(default=12),
        "num_heads": theirs.whole("num_attention_heads", 12),
        "mlp_hidden_size": unless(theirs.whole("intermediate_size", 3072), 4 * hidden),
        "norm_eps": theirs.number("layer_norm_eps", 1e-12),
        "tie_embeddings": theirs.is_tied(f"{decoder}.weight", f"{embeddings}word_embeddings.weight", True),
        "dropout": theirs.number("hidden_dropout_prob", 0.1),
        "init_std": theirs.number("initializer_range", 0.02),
    }


def _special_ids(theirs: Settings) -> dict[str, int]:
    """Return the ids in an export of ours, or the tokenizer's; none unless all three are known."""
    if all(f"{role}_token_id" in theirs.content for role in _ROLES):
        return {f"{role}_id": theirs.whole(f"{role}_token_id") for role in _ROLES}
    ids = theirs.special_ids()
    return {f"{role}_id": ids[role] for role in _ROLES} if ids.keys() >= set(_ROLES) else {}


def _read_bert_config(theirs: Settings) -> dict[str, Any]:
    has_pairs = any(name.startswith(_PAIR_HEAD) for name in theirs.tensors)
    return {
        **_read_config(theirs, "bert", "cls.predictions.decoder", 0),
        "activation": theirs.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "pair_head": has_pairs,
        **_BERT_TASKS.read(theirs),
    }


def _read_roberta_config(theirs: Settings) -> dict[str, Any]:
    # The head uses gelu whatever the config says.
    theirs.require("hidden_act", "gelu")
    offset = theirs.whole("pad_token_id", 1) + 1
    said = _read_config(theirs, "roberta", "lm_head.decoder", offset)
    return {**said, "activation": "gelu", "pair_head": False, **_ROBERTA_TASKS.read(theirs)}


BERT = Form(
    model_type="bert",
    config=BertConfig,
    build=_build,
    misfits=_misfits,
    entries=_bert_entries,
    write_config=_write_bert_config,
    read_config=_read_bert_config,
    names=lambda names, config: _names(
        names, config, "bert", "cls.predictions.bias", "cls.predictions.decoder"
    ),
    fresh=_FRESH,
)
ROBERTA = Form(
    model_type="roberta",
    config=BertConfig,
    build=_build,
    misfits=_roberta_misfits,
    entries=_roberta_entries,
    write_config=_write_roberta_config,
    read_config=_read_roberta_config,
    names=lambda names, config: _names(names, config, "roberta", "lm_head.bias", "lm_head.decoder"),
    fresh=_FRESH,
)
