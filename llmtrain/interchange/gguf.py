"""Import GGUF files of the Llama family: `llama` (including Mistral and SmolLM), `qwen2`, `qwen3`, `smollm3`.

gguf_header.py reads header and metadata; the `gguf` package dequantizes one tensor at a time to fp32. Tensors
and settings correspond to the Hugging Face form of the same model, under other names
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import dataclasses
import mmap
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.config import show
from llmtrain.errors import CheckpointError, Problem
from llmtrain.interchange.forms import forms
from llmtrain.interchange.gguf_header import MAGIC, Metadata, read_header
from llmtrain.interchange.huggingface import Imported, import_stored
from llmtrain.interchange.huggingface_weights import Stored
from llmtrain.models.huggingface.form import Entry, Form, Names, Settings
from llmtrain.models.huggingface.origin import Origin
from llmtrain.nn.rope_config import RopeScaling
from llmtrain.nn.rotary import rotary_frequencies
from llmtrain.reading import open_regular

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose queries and keys store the two dims of a rotation next to each other."""
_SETTINGS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Key of config.json → GGUF key after the name of the architecture; all are required."""
_CHANGING = (
    "expert_count",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Keys of operations that the decoder here does not have."""
_PLAIN_SCALING = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "alpha": 0.0}
"""Key after rope.scaling → the only supported value, which has no effect."""
_YARN = {"original_context_length": "original_max_position_embeddings"} | {
    f"yarn_{key}": key for key in ("beta_fast", "beta_slow")
}
"""Key after rope.scaling → key of config.json."""
_ROTARY_FACTORS = "rope_freqs.weight"
_NAMES = {
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
"""Module of the Hugging Face form → module of GGUF."""
_LAYER = "model.layers."


def is_gguf(path: Path) -> bool:
    """Return whether the name of the file ends in .gguf, or its contents begin with the GGUF magic."""
    if path.is_dir() or not path.exists():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class GgufFile:
    """The metadata and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if the file is damaged or one of several parts, or the package `gguf` is not
        installed."""
        try:
            gguf = import_module("gguf")
        except ImportError:
            problem = Problem(str(path), "a GGUF file", "", 'pip install "llmtrain[gguf]", which reads it')
            raise CheckpointError(problem) from None
        self.path = path
        formats = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
        try:
            with open(path, "rb", opener=open_regular) as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = read_header(self._content, formats)
        except OSError as error:
            raise CheckpointError(Problem(str(path), str(error.strerror), "a GGUF file")) from error
        except ValueError as error:  # also raised by mmap for an empty file
            got = f"a damaged GGUF file ({error})"
            raise CheckpointError(Problem(str(path), got, "a whole file", "download it again")) from error
        self.said = Metadata(path, header.values)
        self.tensors = header.tensors
        self.architecture = self.said.text("general.architecture")
        if (self.said.whole("split.count") or 1) > 1:
            remedy = "join them with llama-gguf-split --merge"
            raise CheckpointError(Problem(str(path), "one of several files", "a single file", remedy))

    def _whole(self, key: str) -> int | None:
        """Return the integer under the key after the name of the architecture, or None."""
        return self.said.whole(f"{self.architecture}.{key}")

    def _number(self, key: str) -> float | None:
        return self.said.number(f"{self.architecture}.{key}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings in the form of config.json. Raise CheckpointError for missing or unsupported
        settings."""
        where, said = str(self.path), self.said
        if self.architecture not in ARCHITECTURES:
            got, allowed = f"general.architecture {show(self.architecture)}", ", ".join(ARCHITECTURES)
            raise CheckpointError(Problem(where, got, allowed))
        own = f"{self.architecture}."
        problems = [
            Problem(where, f"no key '{own}{key}'", "a whole file")
            for key in _SETTINGS.values()
            if own + key not in said
        ]
        problems += [
            Problem(f"{where}: {own}{key}", said.shown(own + key), "nothing")
            for key in _CHANGING
            if own + key in said and said.number(own + key)
        ]
        if "token_embd.weight" not in self.tensors:
            problems.append(Problem(where, "no tensor token_embd.weight", "a whole file"))
        if problems:
            raise CheckpointError(problems)
        heads, hidden = self._whole("attention.head_count"), self._whole("embedding_length")
        assert heads is not None
        assert hidden is not None
        head_dim = self._whole("attention.key_length") or hidden // max(heads, 1)
        for key in ("rope.dimension_count", "attention.value_length"):
            if (self._whole(key) or head_dim) != head_dim:
                raise CheckpointError(Problem(f"{where}: {own}{key}", said.shown(own + key), str(head_dim)))
        kv_heads = self._whole("attention.head_count_kv")
        window = self._whole("attention.sliding_window")
        theta = _as_written(self._number("rope.freq_base") or 10_000.0)
        epsilon = self._number(_SETTINGS["rms_norm_eps"])
        assert epsilon is not None
        return {
            "model_type": "mistral" if window and self.architecture == "llama" else self.architecture,
            **{theirs: self._number(key) for theirs, key in _SETTINGS.items()},
            "rms_norm_eps": _as_written(epsilon),
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "sliding_window": window,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(head_dim, theta),
        }

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        """Return the settings in the form of `rope_scaling` of config.json. For Llama 3.1 the file contains
        only the resulting factors, from which the settings are inferred."""
        kind = self.said.text(f"{self.architecture}.rope.scaling.type")
        kind = kind or ("linear" if self._number("rope.scale_linear") else None)
        if _ROTARY_FACTORS not in self.tensors:
            if kind in (None, "none"):
                return None
            for key, allowed in _PLAIN_SCALING.items():
                if (given := self._number(f"rope.scaling.{key}") or allowed) != allowed:
                    where = f"{self.path}: {self.architecture}.rope.scaling.{key}"
                    raise CheckpointError(Problem(where, str(given), str(allowed)))
            factor = self._number("rope.scaling.factor") or self._number("rope.scale_linear")
            return {"rope_type": kind, "factor": factor} | {
                theirs: value
                for key, theirs in _YARN.items()
                if kind == "yarn" and (value := self._number(f"rope.scaling.{key}")) is not None
            }
        refusal = CheckpointError(
            Problem(
                f"{self.path}: {_ROTARY_FACTORS}",
                "stretched rotary wavelengths",
                "none, or those of Llama 3.1 and later",
            )
        )
        # Check the size before allocating what the file states.
        if prod(self.tensors[_ROTARY_FACTORS].shape) * 2 != head_dim:
            raise refusal
        stored = torch.from_numpy(np.array(self.dequantized(_ROTARY_FACTORS)).reshape(-1))
        # The other three settings are not stored; they have these values in all models of Meta.
        llama3 = RopeScaling("llama3", float(stored.max()))
        plain = rotary_frequencies(head_dim, theta, None, torch.device("cpu"))
        factors = plain / rotary_frequencies(head_dim, theta, llama3, torch.device("cpu"))
        if not torch.allclose(factors, stored, rtol=1e-3):
            raise refusal
        return {
            "rope_type": "llama3",
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_frequency_factor,
            "high_freq_factor": llama3.high_frequency_factor,
            "original_max_position_embeddings": llama3.original_max_sequence_length,
        }

    def dequantized(self, name: str) -> np.ndarray:
        """Return a tensor as fp32. Raise CheckpointError for a format that the package `gguf` cannot read."""
        gguf, place = import_module("gguf"), self.tensors[name]
        kind = gguf.GGMLQuantizationType(place.kind)
        stored = np.frombuffer(self._content, np.uint8, place.size, place.start)
        try:
            read: np.ndarray = gguf.quants.dequantize(stored.reshape(*place.shape[:-1], -1), kind)
        except NotImplementedError as error:
            got, allowed = f"quantized as {kind.name}", "what the package gguf reads"
            raise CheckpointError(Problem(f"{self.path}: {name}", got, allowed, "upgrade gguf")) from error
        return read


class GgufTensors(Stored):
    """GGUF name → fp32 tensor, in the layout of a Hugging Face folder."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.shapes = {name: place.shape for name, place in file.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        # Copy: an unquantized tensor is a view of the file, which is read-only.
        tensor = torch.from_numpy(np.array(self._file.dequantized(name), np.float32))
        part = name.split(".")[-2]
        if part not in ("attn_q", "attn_k") or self._file.architecture not in _INTERLEAVED:
            return tensor
        config = self._file.config
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # GGUF rotates the dims (0, 1), (2, 3), … of a head together; here these are (0, H/2), (1, H/2 + 1),
        # ….
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def import_gguf(file: GgufFile) -> Imported:
    """Import a model of one of `ARCHITECTURES`, with weights as fp32.

    Raise CheckpointError for an unsupported architecture, setting or tensor.
    """
    stored = GgufTensors(file)
    theirs = Settings(file.path, file.config, stored)
    imported = import_stored(file.path, _respelled(forms()[file.config["model_type"]]), theirs, stored)
    # The settings are not a complete config.json.
    return dataclasses.replace(imported, origin=Origin.of({}, imported.config, _generation(file)))


def _generation(file: GgufFile) -> dict[str, Any]:
    """Return the settings in the form of generation_config.json: the ids that end a text, a turn or a
    message, and the ids of bos and padding."""
    ends = [file.said.whole(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    listed = list(dict.fromkeys(token for token in ends if token is not None))
    said: dict[str, Any] = {"eos_token_id": listed if len(listed) > 1 else next(iter(listed), None)}
    for role, name in (("bos", "bos"), ("pad", "padding")):
        said[f"{role}_token_id"] = file.said.whole(f"tokenizer.ggml.{name}_token_id")
    return {key: value for key, value in said.items() if value is not None}


def _respelled(form: Form) -> Form:
    """Return the form with the GGUF names of its tensors."""

    def entries(config: Any) -> list[Entry]:
        return [
            dataclasses.replace(entry, theirs=tuple(map(_gguf_name, entry.theirs)))
            for entry in form.entries(config)
        ]

    def names(given: Any, config: Any) -> Names:
        return Names({name: name for name in given if name != _ROTARY_FACTORS}, [])

    return dataclasses.replace(form, entries=entries, names=names)


def _gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of the Hugging Face form."""
    module, _, parameter = name.rpartition(".")
    if not module.startswith(_LAYER):
        return f"{_NAMES[module]}.{parameter}"
    layer, _, part = module.removeprefix(_LAYER).partition(".")
    return f"blk.{layer}.{_NAMES[part]}.{parameter}"


def _as_written(value: float) -> float:
    """Return the shortest decimal of a number that was stored as fp32: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
