"""Llama ↔ `llama`, and variants that differ by a setting ↔ `mistral`, `qwen2`, `qwen3`, `smollm3`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.huggingface.gpt2 import OF_OTHERS, build, heads_of, without_buffers_and_copies
from llmtrain.models.huggingface.form import (
    ACTIVATIONS,
    ACTIVATIONS_BACK,
    Entry,
    Form,
    Settings,
    same,
    unless,
)
from llmtrain.models.huggingface.rope import read_rope, write_rope
from llmtrain.models.huggingface.task_heads import TaskHeads
from llmtrain.models.huggingface.windows import FULL, SLIDING, read_window, read_windows, write_windows

_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
"""norm_place → our norm of a layer → Hugging Face's."""


def _parameters(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _entries(config: GPTConfig) -> list[Entry]:
    heads = heads_of(config)
    entries = [same("embedding.weight", "model.embed_tokens.weight")]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for mine, other in _NORMS[config.norm_place].items():
            entries.append(same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight"))
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
    if config.task is not None:
        return entries + _TASKS.entries(config.task)
    if not config.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries


_TASKS = TaskHeads("", text="score", tags="score", bias=False)
"""The heads of tasks of all architectures, whose classes have names of their own."""


def _write_config(config: GPTConfig) -> dict[str, Any]:
    """Return the keys common to all."""
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


Read = Callable[[Settings], dict[str, Any]]
"""config.json → some of our keys."""
_ROPE: Read = partial(read_rope, theta=10_000.0, longest=2048)
_ROPE_32K: Read = partial(read_rope, theta=10_000.0, longest=32_768)
_ROPE_128K: Read = partial(read_rope, theta=10_000.0, longest=131_072)


def implied_head_width(theirs: Settings) -> int:
    return theirs.whole("hidden_size") // max(theirs.whole("num_attention_heads"), 1)


def _read_config(theirs: Settings, rope: Read, tied: bool) -> dict[str, Any]:
    """Read the keys common to all. rope: reads rotary positions; tied: default of tied embeddings."""
    hidden, heads = theirs.whole("hidden_size"), theirs.whole("num_attention_heads")
    implied_width = implied_head_width(theirs)
    prefix = "" if "embed_tokens.weight" in theirs.tensors else "model."
    return {
        "vocab_size": theirs.whole("vocab_size"),
        "hidden_size": hidden,
        "num_layers": theirs.layers(),
        "num_heads": heads,
        "num_kv_heads": unless(theirs.whole("num_key_value_heads", heads), heads),
        "head_dim": unless(theirs.whole("head_dim", implied_width), implied_width),
        "mlp_hidden_size": unless(theirs.whole("intermediate_size"), 4 * hidden),
        "activation": theirs.choice("hidden_act", ACTIVATIONS_BACK, "silu"),
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_eps": theirs.number("rms_norm_eps", 1e-6),
        "positions": "rope",
        **rope(theirs),
        "bias": False,
        "tie_embeddings": theirs.is_tied("lm_head.weight", f"{prefix}embed_tokens.weight", tied),
        "dropout": theirs.number("attention_dropout", 0.0),
        "init_std": theirs.number("initializer_range", 0.02),
    }


# Keys of each architecture.

ANY = object()


def misfits(config: GPTConfig, **has: Any) -> dict[str, str]:
    """Return the keys in which a config differs from an architecture. has: key → the architecture's value,
    or ANY, where it differs from Llama without biases."""
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
        **OF_OTHERS,
        **has,
    }
    implied = {"qkv_bias": config.has_qkv_bias, "output_bias": config.has_output_bias}
    ours = {key: getattr(config, key) for key in values} | implied
    found = {key: str(has) for key, has in values.items() if has is not ANY and ours[key] != has}
    if config.hidden_size % config.num_heads:
        found["hidden_size"] = "a multiple of num_heads"
    return found


def _write_biases(config: GPTConfig) -> dict[str, Any]:
    return {"attention_bias": config.has_qkv_bias, "mlp_bias": config.bias}


def _read_biases(theirs: Settings) -> dict[str, Any]:
    bias = theirs.flag("mlp_bias", False)
    return {"bias": bias, **read_attention_biases(theirs, bias)}


def read_attention_biases(theirs: Settings, bias: bool = False) -> dict[str, Any]:
    """Read which projections have biases. bias: whether MLPs have them."""
    own = unless(theirs.flag("attention_bias", False), bias)
    return {"qkv_bias": own, "output_bias": own}


def _write_layers(config: GPTConfig) -> dict[str, Any]:
    """Return which layers have windows, in Qwen's keys."""
    windows = write_windows(config)
    return {
        "use_sliding_window": config.sliding_window is not None,
        # Releases that know no layer_types: the first layer with a window, if all that follow have it too.
        "max_window_layers": (*windows["layer_types"], SLIDING).index(SLIDING),
        **windows,
    }


def _read_layers(theirs: Settings) -> dict[str, Any]:
    """Read which layers have windows, from Qwen's keys."""
    layers, first = theirs.layers(), theirs.whole("max_window_layers", 28)
    window = read_window(theirs, 4096)
    if not theirs.flag("use_sliding_window", False):
        window = None
    implied = [FULL if window is None or layer < first else SLIDING for layer in range(layers)]
    return read_windows(theirs, window, implied)


def _read_window(theirs: Settings) -> dict[str, Any]:
    """Read a window of all layers; if layers differ, transformers treats the model as `ministral`."""
    window = read_window(theirs, 4096)
    implied = [FULL if window is None else SLIDING] * theirs.layers()
    return read_windows(theirs, window, implied)


def _read_qwen3(theirs: Settings) -> dict[str, Any]:
    return {
        "qk_norm": True,
        "head_dim": unless(theirs.whole("head_dim", 128), implied_head_width(theirs)),
        **read_attention_biases(theirs),
        **_read_layers(theirs),
    }


def _write_smollm3(config: GPTConfig) -> dict[str, Any]:
    has_rope = [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)]
    return {**_write_biases(config), **_write_layers(config), "no_rope_layers": has_rope}


def _read_smollm3(theirs: Settings) -> dict[str, Any]:
    layers, every = theirs.layers(), theirs.whole("no_rope_layer_interval", 4)
    has_rope = theirs.content.get("no_rope_layers")  # a list per layer, despite the key's name
    if has_rope is None:
        has_rope = [(layer + 1) % max(every, 1) != 0 for layer in range(layers)]
    if not isinstance(has_rope, list) or len(has_rope) < layers or any(n not in (0, 1) for n in has_rope):
        raise theirs.refusal("no_rope_layers", f"{layers} times 0 or 1")
    window = read_window(theirs, None)
    if not theirs.flag("use_sliding_window", False):
        window = None
    implied = [FULL if window is None or has_rope[layer] else SLIDING for layer in range(layers)]
    return {
        **_read_biases(theirs),
        **read_windows(theirs, window, implied),
        "no_rope_layers": [layer for layer in range(layers) if not has_rope[layer]],
    }


def form(
    model_type: str,
    architecture: str,
    misfits: Callable[[GPTConfig], dict[str, str]],
    write: Callable[[GPTConfig], dict[str, Any]],
    read: Read,
    *,
    rope: Read = _ROPE,
    tied: bool = False,
    entries: Callable[[GPTConfig], list[Entry]] = _entries,
    answers: str | None = None,
    has_tags: bool = True,
    stem: str | None = None,
) -> Form:
    """Return the form of an architecture. write, read: keys besides the common ones. rope, tied: as in
    _read_config. answers: module of the model in its class for answers, elsewhere "model"; None: it has no
    such class. has_tags: whether it has one for tags; stem: of the names of these classes; None: Llama, of
    LlamaForCausalLM."""
    heads = replace(
        _TASKS,
        stem=stem or architecture.removesuffix("ForCausalLM"),
        span_class=None if answers is None else "ForQuestionAnswering",
        has_tags=has_tags,
    )

    def model_of(config: GPTConfig) -> str:
        has_answers = config.task is not None and config.task.kind == "span"
        return answers if has_answers and answers is not None else "model"

    def entries_of(config: GPTConfig) -> list[Entry]:
        def renamed(name: str) -> str:
            return f"{model_of(config)}.{name.removeprefix('model.')}" if name.startswith("model.") else name

        return [replace(entry, theirs=tuple(map(renamed, entry.theirs))) for entry in entries(config)]

    def write_config(config: GPTConfig) -> dict[str, Any]:
        written = {"architectures": [architecture], **_write_config(config), **write(config)}
        return written if config.task is None else written | heads.write(config.task)

    def misfits_of_all(config: GPTConfig) -> dict[str, str]:
        of_task = {} if config.task is None else heads.misfits(config.task)
        return {**misfits(config), **of_task}

    def read_config(theirs: Settings) -> dict[str, Any]:
        return {**_read_config(theirs, rope, tied), **read(theirs), **heads.read(theirs)}

    return Form(
        model_type=model_type,
        config=GPTConfig,
        build=build,
        misfits=misfits_of_all,
        entries=entries_of,
        write_config=write_config,
        read_config=read_config,
        names=lambda names, config: without_buffers_and_copies(
            names, config, f"{model_of(config)}.", "embed_tokens.weight"
        ),
    )


LLAMA = form(
    "llama",
    "LlamaForCausalLM",
    lambda config: misfits(config, bias=ANY, qkv_bias=ANY, output_bias=config.has_qkv_bias),
    _write_biases,
    _read_biases,
    answers="transformer",
)
MISTRAL = form(
    "mistral",
    "MistralForCausalLM",
    lambda config: misfits(config, sliding_window=ANY),
    lambda config: {"sliding_window": config.sliding_window},
    _read_window,
    rope=_ROPE_128K,
    answers="model",
)
MINISTRAL = form(
    "ministral",
    "MinistralForCausalLM",
    lambda config: misfits(config, sliding_window=ANY, full_attention_layers=ANY),
    write_windows,
    _read_window,
    rope=_ROPE_128K,
    answers="transformer",
)
QWEN2 = form(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda config: misfits(config, qkv_bias=True, sliding_window=ANY, full_attention_layers=ANY),
    _write_layers,
    lambda theirs: {"qkv_bias": True, **_read_layers(theirs)},
    rope=_ROPE_32K,
    answers="transformer",
)
QWEN3 = form(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda config: misfits(
        config,
        qk_norm=True,
        sliding_window=ANY,
        full_attention_layers=ANY,
        qkv_bias=ANY,
        output_bias=config.has_qkv_bias,
    ),
    lambda config: {"attention_bias": config.has_qkv_bias, **_write_layers(config)},
    _read_qwen3,
    rope=_ROPE_32K,
    answers="transformer",
)
SMOLLM3 = form(
    "smollm3",
    "SmolLM3ForCausalLM",
    lambda config: misfits(
        config,
        bias=ANY,
        qkv_bias=ANY,
        output_bias=config.has_qkv_bias,
        no_rope_layers=ANY,
        sliding_window=ANY,
        full_attention_layers=ANY,
    ),
    _write_smollm3,
    _read_smollm3,
    rope=partial(read_rope, theta=2_000_000.0, longest=2048),
    tied=True,
    answers="transformer",
)
