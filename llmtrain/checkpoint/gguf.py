"""GGUF files of the Llama family: `llama` (Mistral and SmolLM among them), `qwen2`, `qwen3`, `smollm3`.

The `gguf` package knows the layout and every quantized format; tensors come out of it one by one, as fp32.
Names and settings are those of the same model's Hugging Face form, spelled otherwise
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoint.forms import FORMS
from llmtrain.checkpoint.forms.base import Entry, Form, Names, Settings
from llmtrain.checkpoint.huggingface import Imported, import_stored
from llmtrain.checkpoint.huggingface_weights import Stored
from llmtrain.checkpoint.origin import Origin
from llmtrain.errors import CheckpointError, Problem
from llmtrain.models.rope_config import RopeScaling
from llmtrain.models.rotary import rotary_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
_INTERLEAVED = ("llama", "smollm3")
"""Whose queries and keys have the two dims of a rotation side by side."""
_SETTINGS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Key of config.json → key behind the architecture's name; all must be there."""
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
"""Keys of what our decoder does not compute."""
_PLAIN_SCALING = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "alpha": 0.0}
"""Key behind rope.scaling → the value that changes nothing; ours has no such key."""
_YARN = {"original_context_length": "original_max_position_embeddings"} | {
    f"yarn_{key}": key for key in ("beta_fast", "beta_slow")
}
"""Key behind rope.scaling → of config.json."""
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
"""Module of the Hugging Face form → of GGUF."""
_LAYER = "model.layers."


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that says it is GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class GgufFile:
    """What a file says, and its tensors."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError, one line, for a file that is damaged or a part of a whole, and where the
        package that reads it is not installed."""
        try:
            reader = import_module("gguf").GGUFReader
        except ImportError:
            problem = Problem(str(path), "a GGUF file", "", 'pip install "llmtrain[gguf]", which reads it')
            raise CheckpointError(problem) from None
        self.path = path
        try:
            self._reader = reader(path)
            self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            self.architecture = self.get("general.architecture")
        except Exception as error:  # whatever its parser stumbles over
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            got = f"a damaged GGUF file ({reason})"
            raise CheckpointError(Problem(str(path), got, "a whole file", "download it again")) from error
        if (self.get("split.count") or 1) > 1:
            remedy = "join them with llama-gguf-split --merge"
            raise CheckpointError(Problem(str(path), "one of several files", "a single file", remedy))

    def get(self, key: str) -> Any:
        """The value of a metadata key, or None."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def setting(self, key: str) -> Any:
        """The value behind the architecture's name, or None."""
        return self.get(f"{self.architecture}.{key}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """As config.json of the same model says it. Raises CheckpointError for what is missing, or has no
        place in our decoder."""
        where = str(self.path)
        if self.architecture not in ARCHITECTURES:
            got, allowed = f"general.architecture {self.architecture!r}", ", ".join(ARCHITECTURES)
            raise CheckpointError(Problem(where, got, allowed))
        problems = [
            Problem(where, f"no key '{self.architecture}.{key}'", "a whole file")
            for key in _SETTINGS.values()
            if self.setting(key) is None
        ]
        problems += [
            Problem(f"{where}: {self.architecture}.{key}", str(self.setting(key)), "nothing")
            for key in _CHANGING
            if self.setting(key)
        ]
        if "token_embd.weight" not in self.tensors:
            problems.append(Problem(where, "no tensor token_embd.weight", "a whole file"))
        if problems:
            raise CheckpointError(problems)
        heads = self.setting("attention.head_count")
        head_dim = self.setting("attention.key_length") or self.setting("embedding_length") // max(heads, 1)
        for key in ("rope.dimension_count", "attention.value_length"):
            if (self.setting(key) or head_dim) != head_dim:
                got = str(self.setting(key))
                raise CheckpointError(Problem(f"{where}: {self.architecture}.{key}", got, str(head_dim)))
        kv_heads = self.setting("attention.head_count_kv")
        window = self.setting("attention.sliding_window")
        return {
            "model_type": "mistral" if window and self.architecture == "llama" else self.architecture,
            **{theirs: self.setting(key) for theirs, key in _SETTINGS.items()},
            "rms_norm_eps": _as_written(self.setting(_SETTINGS["rms_norm_eps"])),
            "vocab_size": int(self.tensors["token_embd.weight"].shape[-1]),
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "sliding_window": window,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "rope_theta": (theta := _as_written(self.setting("rope.freq_base") or 10_000.0)),
            "rope_scaling": self._rope_scaling(head_dim, theta),
        }

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        """As `rope_scaling` of config.json. Of Llama 3.1's there are only the numbers that it comes to."""
        kind, factor = self.setting("rope.scaling.type"), self.setting("rope.scaling.factor")
        kind = kind or ("linear" if self.setting("rope.scale_linear") else None)
        if _ROTARY_FACTORS not in self.tensors:
            if kind in (None, "none"):
                return None
            for key, allowed in _PLAIN_SCALING.items():
                if (given := self.setting(f"rope.scaling.{key}") or allowed) != allowed:
                    where = f"{self.path}: {self.architecture}.rope.scaling.{key}"
                    raise CheckpointError(Problem(where, str(given), str(allowed)))
            scaling = {"rope_type": kind, "factor": factor or self.setting("rope.scale_linear")}
            return scaling | {
                theirs: value
                for key, theirs in _YARN.items()
                if kind == "yarn" and (value := self.setting(f"rope.scaling.{key}")) is not None
            }
        stored = torch.from_numpy(np.array(self.dequantized(_ROTARY_FACTORS)).reshape(-1))
        # Nothing says the other three: they are these in all of Meta's models.
        llama3 = RopeScaling("llama3", float(stored.max()))
        plain = rotary_frequencies(head_dim, theta, None, torch.device("cpu"))
        factors = plain / rotary_frequencies(head_dim, theta, llama3, torch.device("cpu"))
        if factors.shape != stored.shape or not torch.allclose(factors, stored, rtol=1e-3):
            where, got = f"{self.path}: {_ROTARY_FACTORS}", "stretched rotary wavelengths"
            raise CheckpointError(Problem(where, got, "none, or those of Llama 3.1 and later"))
        return {
            "rope_type": "llama3",
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_frequency_factor,
            "high_freq_factor": llama3.high_frequency_factor,
            "original_max_position_embeddings": llama3.original_max_sequence_length,
        }

    def dequantized(self, name: str) -> np.ndarray:
        """A tensor's numbers, fp32. Raises CheckpointError for a format that the package cannot read."""
        stored = self.tensors[name]
        try:
            return import_module("gguf").quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            got = f"quantized as {stored.tensor_type.name}"
            allowed = "what the package gguf reads"
            raise CheckpointError(Problem(f"{self.path}: {name}", got, allowed, "upgrade gguf")) from error


class GgufTensors(Stored):
    """GGUF's name → fp32 tensor, laid out as in a Hugging Face folder."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in file.tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        # A copy: what is not quantized lies in the file itself, which is read only.
        tensor = torch.from_numpy(np.array(self._file.dequantized(name), np.float32))
        part = name.split(".")[-2]
        if part not in ("attn_q", "attn_k") or self._file.architecture not in _INTERLEAVED:
            return tensor
        config = self._file.config
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # A head's dims (0, 1), (2, 3), … are rotated together; here they are (0, H/2), (1, H/2 + 1), ….
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def import_gguf(file: GgufFile) -> Imported:
    """The model of one of `ARCHITECTURES`, its weights as fp32.

    Raises CheckpointError for an architecture, setting or tensor that can't be taken.
    """
    stored = GgufTensors(file)
    theirs = Settings(file.path, file.config, stored)
    imported = import_stored(file.path, _respelled(FORMS[file.config["model_type"]]), theirs, stored)
    # Its settings are no whole config.json.
    return dataclasses.replace(imported, origin=Origin.of({}, imported.config, _generation(file)))


def _generation(file: GgufFile) -> dict[str, Any]:
    """As generation_config.json says it: the ids of tokens that end a text, a turn of a talk, or a message
    that awaits an answer, and of those that begin or fill one."""
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    listed = list(dict.fromkeys(token for token in ends if token is not None))
    said = {"eos_token_id": listed if len(listed) > 1 else next(iter(listed), None)}
    for role, name in (("bos", "bos"), ("pad", "padding")):
        said[f"{role}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id")
    return {key: value for key, value in said.items() if value is not None}


def _respelled(form: Form) -> Form:
    """The form with GGUF's names for its tensors."""

    def entries(config: Any) -> list[Entry]:
        return [
            dataclasses.replace(entry, theirs=tuple(map(_gguf_name, entry.theirs)))
            for entry in form.entries(config)
        ]

    def names(given: Any, config: Any) -> Names:
        return Names({name: name for name in given if name != _ROTARY_FACTORS}, [])

    return dataclasses.replace(form, entries=entries, names=names)


def _gguf_name(name: str) -> str:
    """Of a tensor of the Hugging Face form."""
    module, _, parameter = name.rpartition(".")
    if not module.startswith(_LAYER):
        return f"{_NAMES[module]}.{parameter}"
    layer, _, part = module.removeprefix(_LAYER).partition(".")
    return f"blk.{layer}.{_NAMES[part]}.{parameter}"


def _as_written(value: float) -> float:
    """The shortest decimal of a number that was stored as fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
