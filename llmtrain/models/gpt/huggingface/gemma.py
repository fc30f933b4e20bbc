"""Gemma ↔ `gemma`, `gemma2` and `gemma3_text`; also the text model of the multimodal `gemma3`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.huggingface.llama import (
    ANY,
    form,
    implied_head_width,
    misfits,
    read_attention_biases,
)
from llmtrain.models.huggingface.form import ACTIVATIONS, ACTIVATIONS_BACK, Names, Settings, unless
from llmtrain.models.huggingface.keys import Asked
from llmtrain.models.huggingface.rope import read_rope
from llmtrain.models.huggingface.rotary_by_kind import read_rope_by_kind, write_rope_by_kind
from llmtrain.models.huggingface.windows import SLIDING, every, read_window, read_windows, write_windows

_HAS = {"norm_adds_one": True, "scale_embedding": True}
_ROPE = partial(read_rope, theta=10_000.0, longest=8192)
_THEIRS = ACTIVATIONS | {"gelu_tanh": "gelu_pytorch_tanh"}


def _read_gemma(theirs: Settings) -> dict[str, Any]:
    """Read the keys in which all Gemma models differ from Llama."""
    theirs.require("use_bidirectional_attention", False)
    return {
        **_HAS,
        "head_dim": unless(theirs.whole("head_dim", 256), implied_head_width(theirs)),
        **read_attention_biases(theirs),
    }


def _misfits(config: GPTConfig, **has: Any) -> dict[str, str]:
    return misfits(config, **_HAS, qkv_bias=ANY, output_bias=config.has_qkv_bias, **has)


def _write_gemma1(config: GPTConfig) -> dict[str, Any]:
    return {"hidden_act": _THEIRS[config.activation], "attention_bias": config.has_qkv_bias}


def _read_gemma1(theirs: Settings) -> dict[str, Any]:
    # The first releases say gelu but mean its tanh approximation.
    names = ACTIVATIONS_BACK | {"gelu": "gelu_tanh"}
    return {
        **_read_gemma(theirs),
        "activation": theirs.choice("hidden_act", names, "gelu_pytorch_tanh"),
    }


def _write_caps(config: GPTConfig) -> dict[str, Any]:
    """Return the keys of Gemma 2 and 3."""
    scalar = config.query_pre_attn_scalar
    return {
        "hidden_activation": _THEIRS[config.activation],
        "attention_bias": config.has_qkv_bias,
        "query_pre_attn_scalar": config.head_width if scalar is None else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **write_windows(config),
    }


def _read_caps(theirs: Settings, *, attention: float | None, logits: float | None) -> dict[str, Any]:
    """Read the keys of Gemma 2 and 3 except windows. attention, logits: soft caps if the keys are missing;
    null means none."""
    return {
        **_read_gemma(theirs),
        "norm_place": "both",
        "activation": theirs.choice("hidden_activation", ACTIVATIONS_BACK, "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": unless(
            theirs.whole("query_pre_attn_scalar", 256), theirs.whole("head_dim", 256)
        ),
        "attention_softcap": _cap(theirs, "attn_logit_softcapping", attention),
        "logit_softcap": _cap(theirs, "final_logit_softcapping", logits),
    }


def _cap(theirs: Settings, key: str, default: float | None) -> float | None:
    if theirs.content.get(key, default) is None:
        return None
    return theirs.number(key, default)


def _read_gemma2(theirs: Settings) -> dict[str, Any]:
    windows = read_windows(theirs, read_window(theirs, 4096), every(theirs.layers(), 2))
    return {**_read_caps(theirs, attention=50.0, logits=30.0), **windows}


_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
"""Values of keys that a text_config omits."""


_OF_BOTH = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys beside a text_config that take precedence over those in it."""


def _text_settings(theirs: Settings) -> Settings:
    """Return the settings of a multimodal model's text model."""
    text = _GEMMA3_DEFAULTS | dict(theirs.section("text_config").content)
    text |= {key: theirs.content[key] for key in _OF_BOTH if theirs.content.get(key) is not None}
    # transformers reads it only in a text model on its own.
    text["final_logit_softcapping"] = None
    text["model_type"] = GEMMA3.model_type
    return replace(theirs, content=Asked(text), prefix="text_config.")


def _names_of_text(names: Collection[str], config: GPTConfig) -> Names:
    """Select the names of the text model, whose prefix differs between releases."""
    used = {}
    for name in names:
        text = name.replace("model.language_model.", "model.").removeprefix("language_model.")
        if text != name or name == "lm_head.weight":
            used[name] = text
    of_text = GEMMA3.names(used.values(), config).used
    kept = {name: of_text[text] for name, text in used.items() if text in of_text}
    return Names(kept, [name for name in names if name not in used])


def _read_gemma3_windows(theirs: Settings) -> dict[str, Any]:
    period = theirs.whole("sliding_window_pattern", 6)
    return read_windows(theirs, read_window(theirs, 4096), every(theirs.layers(), period))


def _read_gemma3_rope(theirs: Settings) -> dict[str, Any]:
    windows = _read_gemma3_windows(theirs)
    return read_rope_by_kind(theirs, windows, theta=1_000_000.0, local_theta=10_000.0, longest=131_072)


def _read_gemma3(theirs: Settings) -> dict[str, Any]:
    return {
        **_read_caps(theirs, attention=None, logits=None),
        **_read_gemma3_windows(theirs),
        # transformers ignores this key.
        "attention_softcap": None,
        "qk_norm": True,
    }


def _write_gemma3(config: GPTConfig) -> dict[str, Any]:
    rope = write_rope_by_kind(config)
    # Read by releases before transformers 5.
    local_theta = rope["rope_parameters"][SLIDING]["rope_theta"]
    return {**_write_caps(config), **rope, "rope_local_base_freq": local_theta}


GEMMA = form(
    "gemma",
    "GemmaForCausalLM",
    _misfits,
    _write_gemma1,
    _read_gemma1,
    rope=_ROPE,
    tied=True,
)
GEMMA2 = form(
    "gemma2",
    "Gemma2ForCausalLM",
    lambda config: _misfits(
        config,
        norm_place="both",
        sliding_window=ANY,
        full_attention_layers=ANY,
        query_pre_attn_scalar=ANY,
        attention_softcap=ANY,
        logit_softcap=ANY,
    ),
    _write_caps,
    _read_gemma2,
    rope=_ROPE,
    tied=True,
)
GEMMA3 = form(
    "gemma3_text",
    "Gemma3ForCausalLM",
    lambda config: _misfits(
        config,
        norm_place="both",
        qk_norm=True,
        sliding_window=ANY,
        full_attention_layers=ANY,
        query_pre_attn_scalar=ANY,
        logit_softcap=ANY,
        local_rope_theta=ANY,
    ),
    _write_gemma3,
    _read_gemma3,
    rope=_read_gemma3_rope,
    tied=True,
    has_tags=False,
    stem="Gemma3Text",
)
GEMMA3_WITH_IMAGES = replace(
    GEMMA3,
    model_type="gemma3",
    part=_text_settings,
    names=_names_of_text,
)
