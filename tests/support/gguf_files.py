"""GGUF files as llama.cpp's converters write them, of small transformers models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def small_model(model_type: str, **changes: Any) -> Any:
    """Random weights, of norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "head_dim": 16,
        "tie_word_embeddings": False,
        **{f"{role}_token_id": None for role in ("bos", "eos", "pad")},
    }
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gguf_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    layer = ""
    if module.startswith("model.layers."):
        number, _, module = module.removeprefix("model.layers.").partition(".")
        layer = f"blk.{number}."
    return f"{layer}{MODULES[module]}.{parameter}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs (0, H/2), (1, H/2 + 1), … of each head → side by side."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(config: Any) -> np.ndarray:
    """What rotary wavelengths are multiplied by (Llama 3.1), as the converter stores it."""
    rope = config.rope_parameters
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    shortest = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for wavelength in wavelengths:
        if wavelength < shortest:
            factors.append(1.0)
        elif wavelength > longest:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(
    path: Path,
    model: Any,
    quantization: str = "F32",
    *,
    tokenizer: Any = None,
    cut: str = "gpt-2",
    tensors: dict[str, np.ndarray | None] | None = None,
    raw: dict[str, tuple[np.ndarray, str]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """tokenizer: a `tokenizers` BPE, cut as `cut` names it, or (tokens, scores, types) of sentencepiece.
    tensors: others by their GGUF names, None leaves one out. raw: others as (bytes, quantization).
    metadata: strings and numbers that are added or replaced, by whole key; None leaves one out."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    values = {f"{architecture}.{key}": value for key, value in values.items()} | (metadata or {})
    for key, value in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        if value is not None:
            add[type(value)](key, value)
    arrays: dict[str, np.ndarray | None] = {}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        array = tensor.numpy()
        if architecture in ("llama", "smollm3") and "q_proj" in name:
            array = permuted(array, config.num_attention_heads)
        if architecture in ("llama", "smollm3") and "k_proj" in name:
            array = permuted(array, config.num_key_value_heads)
        arrays[gguf_name(name)] = array
    if config.rope_parameters.get("rope_type") == "llama3":
        arrays["rope_freqs.weight"] = llama3_factors(config)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, (content, quantized_as) in (raw or {}).items():
        arrays.pop(name)
        writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType[quantized_as])
    for name, array in (arrays | (tensors or {})).items():
        if array is not None and array.ndim == 2 and array.dtype == np.float32:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(name, array)
    if isinstance(tokenizer, tuple):
        _add_sentencepiece(writer, *tokenizer)
    elif tokenizer is not None:
        _add_byte_level(writer, tokenizer, cut)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer: gguf.GGUFWriter, tokenizer: Any, cut: str) -> None:
    content = json.loads(tokenizer.to_str())
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(pieces)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if p in special else gguf.TokenType.NORMAL for p in pieces]
    )
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    end = tokenizer.token_to_id("<|endoftext|>")
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)


def _add_sentencepiece(
    writer: gguf.GGUFWriter, tokens: list[str], scores: list[float], types: list[int]
) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for role, add in (
        ("<s>", writer.add_bos_token_id),
        ("</s>", writer.add_eos_token_id),
        ("<unk>", writer.add_unk_token_id),
    ):
        add(tokens.index(role))
