"""XLNet ↔ `xlnet`.

Dim names: N heads, H head width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.huggingface.form import (
    ACTIVATIONS,
    ACTIVATIONS_BACK,
    Entry,
    Form,
    Names,
    Settings,
    same,
    same_all,
    unless,
)
from llmtrain.models.huggingface.task_heads import TaskHeads
from llmtrain.models.xlnet.config import XLNetConfig

_PREFIX = "transformer."
_TASKS = TaskHeads(
    "XLNet", text="logits_proj", dense="sequence_summary.summary", span_class="ForQuestionAnsweringSimple"
)
_HEADS_OF_TASKS = ("sequence_summary.", "logits_proj.", "qa_outputs.", "classifier.")


def _build(config: XLNetConfig) -> nn.Module:
    from llmtrain.models.xlnet.model import XLNet

    return XLNet(config)


def _entries(config: XLNetConfig) -> list[Entry]:
    N, H, D = config.num_heads, config.head_width, config.hidden_size

    def theirs_of(rows: Tensor) -> Tensor:
        """Return (N, H, D) as (D, N, H), the layout of all their projections."""
        return rows.permute(2, 0, 1)

    def projection(ours: str, theirs: str) -> Entry:
        return Entry(
            ours,
            (theirs,),
            lambda t: [theirs_of(t.view(N, H, D))],
            lambda ts: ts[0].permute(1, 2, 0).reshape(N * H, D),
        )

    def split_key_value(t: Tensor) -> list[Tensor]:
        return [theirs_of(part) for part in t.view(N, 2, H, D).unbind(1)]

    def join_key_value(ts: list[Tensor]) -> Tensor:
        return torch.stack([t.permute(1, 2, 0) for t in ts], dim=1).reshape(2 * N * H, D)

    if config.task is not None:
        # Theirs always has a query stream, whose embedding no task reads.
        embedding = ("transformer.word_embedding.weight", "transformer.mask_emb")
        entries = [
            Entry("embedding.weight", embedding, lambda t: [t, t.new_zeros(1, 1, D)], lambda ts: ts[0]),
            *_TASKS.entries(config.task),
        ]
    else:
        entries = [
            same("embedding.weight", "transformer.word_embedding.weight"),
            Entry(
                "target_embedding.weight", ("transformer.mask_emb",), lambda t: [t[None]], lambda ts: ts[0][0]
            ),
            same("head.bias", "lm_loss.bias"),
        ]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"transformer.layer.{i}"
        mine, other = f"{ours}.attention", f"{theirs}.rel_attn"
        entries += [
            projection(f"{mine}.query.weight", f"{other}.q"),
            Entry(f"{mine}.key_value.weight", (f"{other}.k", f"{other}.v"), split_key_value, join_key_value),
            projection(f"{mine}.position.weight", f"{other}.r"),
            Entry(
                f"{mine}.output.weight",
                (f"{other}.o",),
                lambda t: [t.view(D, N, H)],
                lambda ts: ts[0].reshape(D, N * H),
            ),
            same(f"{mine}.position_bias.weight", f"{other}.r_r_bias"),
            *_segments(config, mine, other),
            *same_all(
                {
                    f"{ours}.attention_norm": f"{other}.layer_norm",
                    f"{ours}.mlp.up": f"{theirs}.ff.layer_1",
                    f"{ours}.mlp.down": f"{theirs}.ff.layer_2",
                    f"{ours}.mlp_norm": f"{theirs}.ff.layer_norm",
                }
            ),
        ]
    if config.task is None and not config.tie_embeddings:
        entries.append(same("head.weight", "lm_loss.weight"))
    return entries


def _segments(config: XLNetConfig, mine: str, other: str) -> list[Entry]:
    """Map the biases of contents and of segments. Theirs always has those of segments, so write zeros,
    which add nothing, if ours has none."""
    N, H = config.num_heads, config.head_width
    content, bias, segments = f"{other}.r_w_bias", f"{other}.r_s_bias", f"{other}.seg_embed"
    if not config.has_segments:
        return [
            Entry(
                f"{mine}.content_bias.weight",
                (content, bias, segments),
                lambda t: [t, torch.zeros_like(t), t.new_zeros(2, N, H)],
                lambda ts: ts[0],
            )
        ]
    return [
        same(f"{mine}.content_bias.weight", content),
        same(f"{mine}.segment_bias.weight", bias),
        Entry(
            f"{mine}.segments.weight",
            (segments,),
            lambda t: [t.view(N, 2, H).transpose(0, 1)],
            lambda ts: ts[0].transpose(0, 1).reshape(N, 2 * H),
        ),
    ]


def _write_config(config: XLNetConfig) -> dict[str, Any]:
    written = {
        "architectures": ["XLNetLMHeadModel"],
        "d_model": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "d_head": config.head_width,
        "d_inner": config.mlp_width,
        "ff_activation": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "attn_type": "bi",
        "mem_len": None,
        "reuse_len": None,
    }
    if config.task is not None:
        written |= _TASKS.write(config.task)
    # A key of our own: an import then knows that these zeros mean no segments.
    return written if config.has_segments else written | {"has_segments": False}


def _read_config(theirs: Settings) -> dict[str, Any]:
    theirs.require("attn_type", "bi")
    theirs.require("bi_data", False)
    theirs.require("untie_r", True)
    hidden, heads = theirs.whole("d_model", 1024), theirs.whole("n_head", 16)
    theirs.require("d_head", hidden // max(heads, 1))
    if theirs.whole("clamp_len", -1) > 0:
        raise theirs.refusal("clamp_len", "-1: distances are not cut")
    return {
        "vocab_size": theirs.whole("vocab_size", 32000),
        "hidden_size": hidden,
        "num_layers": theirs.layers("n_layer", 24),
        "num_heads": heads,
        "mlp_hidden_size": unless(theirs.whole("d_inner", 4 * hidden), 4 * hidden),
        "has_segments": theirs.flag("has_segments", True),
        "activation": theirs.choice("ff_activation", ACTIVATIONS_BACK, "gelu"),
        "norm_eps": theirs.number("layer_norm_eps", 1e-12),
        "tie_embeddings": theirs.flag("tie_word_embeddings", True),
        "dropout": theirs.number("dropout", 0.1),
        "init_std": theirs.number("initializer_range", 0.02),
        **_TASKS.read(theirs),
    }


def _names(names: Collection[str], config: XLNetConfig) -> Names:
    """Add `transformer.` to names of a model without head; drop a tied head's copy; leave out heads of
    other tasks."""
    is_bare = not any(name.startswith(_PREFIX) for name in names)
    left_out = [] if config.task is not None else [n for n in names if n.startswith(_HEADS_OF_TASKS)]
    used = {
        name: _PREFIX + name if is_bare and not name.startswith("lm_loss.") else name
        for name in names
        if name not in left_out and not (config.tie_embeddings and name == "lm_loss.weight")
    }
    return Names(used, left_out)


XLNET = Form(
    model_type="xlnet",
    config=XLNetConfig,
    build=_build,
    misfits=lambda config: {} if config.task is None else _TASKS.misfits(config.task),
    entries=_entries,
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    fresh=("head.bias",),
)
