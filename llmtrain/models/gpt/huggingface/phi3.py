"""Phi 3 ↔ `phi3`: Llama with one matrix for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.huggingface.gpt2 import heads_of
from llmtrain.models.gpt.huggingface.llama import ANY, LLAMA, form, misfits
from llmtrain.models.huggingface.form import Entry, Settings
from llmtrain.models.huggingface.rope import read_rope
from llmtrain.models.huggingface.windows import read_window


def _entries(config: GPTConfig) -> list[Entry]:
    entries = []
    for entry in LLAMA.entries(config):
        prefix = entry.theirs[0].rpartition(".self_attn.")[0] or entry.theirs[0].rpartition(".mlp.")[0]
        if entry.ours.endswith(".qkv.weight"):
            entry = _joint_heads(config, entry.ours, f"{prefix}.self_attn.qkv_proj.weight")
        elif entry.ours.endswith(".gate.weight"):
            up = entry.ours.replace(".gate.", ".up.")
            theirs = (f"{prefix}.mlp.gate_up_proj.weight",)
            entry = Entry(entry.ours, theirs, lambda t: [t], lambda ts: ts[0], also=(up,))
        elif entry.ours.endswith(".up.weight"):
            continue
        entries.append(entry)
    return entries


def _joint_heads(config: GPTConfig, ours: str, theirs: str) -> Entry:
    """Map packed queries, keys and values: all queries, then all keys, then all values."""
    heads = heads_of(config)
    sizes = [number * heads.head_width for number in (heads.num_heads, heads.kv_heads, heads.kv_heads)]

    def join(ts: list[Tensor]) -> Tensor:
        return heads.join(list(ts[0].split(sizes)))

    return Entry(ours, (theirs,), lambda t: [torch.cat(heads.split(t))], join)


def _misfits(config: GPTConfig) -> dict[str, str]:
    found = misfits(config, sliding_window=ANY, partial_rotary_factor=ANY)
    if config.rope_scaling is not None and config.rope_scaling.kind != "longrope":
        found["rope_scaling"] = "null, or of kind longrope"
    if config.head_width * config.num_heads != config.hidden_size:
        found["head_dim"] = "hidden_size / num_heads"
    return found


def _write(config: GPTConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "resid_pdrop": config.dropout}


def _read(theirs: Settings) -> dict[str, Any]:
    return {
        "sliding_window": read_window(theirs, None),
        "norm_eps": theirs.number("rms_norm_eps", 1e-5),
    }


PHI3 = form(
    "phi3",
    "Phi3ForCausalLM",
    _misfits,
    _write,
    _read,
    # The first releases name longrope by these.
    rope=partial(
        read_rope,
        theta=10_000.0,
        longest=4096,
        original=4096,
        kinds={"longrope": "longrope", "su": "longrope", "yarn": "longrope"},
        partial=True,
    ),
    entries=_entries,
)
