"""Rotary positions in config.json, read by transformers' rules of precedence and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llmtrain.config import LARGEST_INT
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import Settings
from llmtrain.nn.rotary import yarn_attention_factor

_KINDS = {kind: kind for kind in ("linear", "dynamic", "yarn", "llama3", "longrope")}
_OF_ORIGINAL = ("yarn", "llama3", "longrope")
"""Kinds with a key for the original context; `dynamic` has it in max_position_embeddings."""


def read_rope(
    theirs: Settings,
    *,
    theta: float,
    longest: int,
    original: int | None = None,
    kinds: Mapping[str, str] = MappingProxyType(_KINDS),
    partial: bool = False,
) -> dict[str, Any]:
    """Return our keys. theta, longest: defaults of rope_theta and max_position_embeddings.
    original: original_max_position_embeddings, in architectures that have it beside the section.
    kinds: scaling kinds of the architecture besides the plain one, by its names.
    partial: whether it can rotate a part of a head's dims."""
    # Before transformers 5, rope_scaling with rope_theta beside it; it takes precedence if both exist.
    scaled = theirs.section("rope_scaling")
    rope = scaled if scaled.content else theirs.section("rope_parameters")
    for key, value in rope.content.items():
        if isinstance(value, Mapping):
            raise rope.refusal(key, "a number or a name: rotary positions are the same in all layers here")
    beside = theirs.content.get("rope_theta", theta)
    if "rope_theta" not in rope.content:
        rope = rope.with_keys(rope_theta=beside)
    kind = _kind(rope, kinds)
    longest = theirs.whole("max_position_embeddings", longest)
    if kind in _OF_ORIGINAL:
        # The key beside the section takes precedence too.
        key = "original_max_position_embeddings"
        original = theirs.whole(key, rope.whole(key, longest) if original is None else original)
    else:
        original = longest
    scaling = None if kind == "default" else _read_scaling(kind, rope, longest, original)
    if kind in ("dynamic", "yarn"):
        # The intended context; in many folders the key still has the original context.
        stretched = original * rope.number("factor", 1.0)
        if stretched > LARGEST_INT:
            raise rope.refusal("factor", "so much that positions are whole numbers below 2^63")
        longest = max(longest, int(stretched))
    return {
        "max_sequence_length": longest,
        "rope_theta": rope.number("rope_theta"),
        "rope_scaling": scaling,
        **_read_share(theirs, rope, partial),
    }


def kind_key(rope: Settings) -> str:
    """Return the key of the kind of scaling: `rope_type`, or `type` in older folders."""
    return "rope_type" if "rope_type" in rope.content else "type"


def _kind(rope: Settings, kinds: Mapping[str, str]) -> str:
    key = kind_key(rope)
    kind = rope.content.get(key, "default")
    if kind != "default" and kind not in list(kinds):
        raise rope.refusal(key, ", ".join(("default", *kinds)))
    return "default" if kind == "default" else kinds[kind]


def _read_share(theirs: Settings, rope: Settings, partial: bool) -> dict[str, Any]:
    if not partial:
        for settings in (theirs, rope):
            settings.require("partial_rotary_factor", 1)
        return {}
    key = "partial_rotary_factor"
    return {key: rope.number(key, theirs.number(key, 1.0))}


def _read_scaling(kind: str, rope: Settings, longest: int, original: int) -> dict[str, Any]:
    if kind == "linear":
        return {"kind": kind, "factor": rope.number("factor")}
    implied = longest / max(original, 1)
    scaling: dict[str, Any] = {"kind": kind, "original_max_sequence_length": original}
    if kind == "longrope":
        return scaling | {
            "factor": max(rope.number("factor", implied), 1.0),
            "attention_factor": _optional(rope, "attention_factor"),
            "short_factors": rope.numbers("short_factor"),
            "long_factors": rope.numbers("long_factor"),
        }
    scaling["factor"] = rope.number("factor", implied if "factor" in rope.content else None)
    if kind == "llama3":
        scaling["low_frequency_factor"] = rope.number("low_freq_factor")
        scaling["high_frequency_factor"] = rope.number("high_freq_factor")
    if kind == "yarn":
        scaling |= {
            "beta_slow": rope.number("beta_slow", 1.0) or 1.0,
            "beta_fast": rope.number("beta_fast", 32.0) or 32.0,
            # transformers reads null as false here.
            "truncate": rope.flag("truncate", rope.content.get("truncate", True) is not None),
            "attention_factor": _yarn_attention_factor(rope, scaling["factor"]),
        }
    return scaling


def _yarn_attention_factor(rope: Settings, factor: float) -> float | None:
    given = _optional(rope, "attention_factor")
    scale, all_dims = _optional(rope, "mscale"), _optional(rope, "mscale_all_dim")
    if given is not None or not scale or not all_dims:
        return given
    above, below = yarn_attention_factor(factor, scale), yarn_attention_factor(factor, all_dims)
    if below <= 0:
        raise rope.refusal("mscale_all_dim", "more than 0")
    return above / below


def _optional(rope: Settings, key: str) -> float | None:
    return None if rope.content.get(key) is None else rope.number(key)


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Return their keys."""
    rope: dict[str, Any] = {"rope_type": "default"}
    beside: dict[str, Any] = {}
    longest = config.max_sequence_length
    if scaling := config.rope_scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        original = scaling.original_max_sequence_length
        if scaling.kind in _OF_ORIGINAL:
            beside = {"original_max_position_embeddings": original}
            rope |= beside
        elif scaling.kind == "dynamic":
            longest = original
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_frequency_factor
            rope["high_freq_factor"] = scaling.high_frequency_factor
        elif scaling.kind == "yarn":
            kept = ("beta_slow", "beta_fast", "truncate", "attention_factor")
            rope |= {key: getattr(scaling, key) for key in kept}
        elif scaling.kind == "longrope":
            rope["short_factor"] = list(scaling.short_factors)
            rope["long_factor"] = list(scaling.long_factors)
            rope["attention_factor"] = scaling.attention_factor
    share = config.partial_rotary_factor
    partial = {} if share == 1 else {"partial_rotary_factor": share}
    rope |= partial
    beside |= partial
    return {
        "max_position_embeddings": longest,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        # Read by releases before transformers 5.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        **beside,
    }
