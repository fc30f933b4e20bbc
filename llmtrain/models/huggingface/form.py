"""How a model family is stored in a Hugging Face folder: names, tensors, config. "Theirs" means Hugging
Face's.

Dim names: K key-value heads, G query heads per key-value head, H head width.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config import LARGEST_INT, show
from llmtrain.errors import CheckpointError, Problem

MOST_LAYERS = 4096
"""Upper bound on the number of layers, since each takes time and memory to build; no known model has as
many."""
LARGEST_ID = 2**31 - 1
"""The largest id that a token may have."""

# Tensors: ours ↔ theirs.


@dataclass(frozen=True)
class Entry:
    """One or several of our tensors (concatenated), and those of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    """Ours → theirs. It also runs on the meta device."""
    join: Callable[[list[Tensor]], Tensor]
    """Theirs → ours; undoes `split` bit for bit."""
    also: tuple[str, ...] = ()
    """Further tensors of ours of the same shape, whose rows are concatenated after those of `ours`."""

    @property
    def all_ours(self) -> tuple[str, ...]:
        return (self.ours, *self.also)

    def split_all(self, ours: list[Tensor]) -> list[Tensor]:
        """Return theirs from `all_ours`."""
        return self.split(torch.cat(ours) if self.also else ours[0])


def same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda t: [t], lambda ts: ts[0])


def same_all(pairs: Mapping[str, str], parameters: Iterable[str] = ("weight", "bias")) -> list[Entry]:
    """Return entries for the given parameters of each module, ours → theirs."""
    return [same(f"{ours}.{p}", f"{theirs}.{p}") for ours, theirs in pairs.items() for p in parameters]


def transposed(ours: str, theirs: str) -> Entry:
    """Return an entry for GPT-2's Conv1D, which stores (inputs, outputs)."""
    return Entry(ours, (theirs,), lambda t: [t.T], lambda ts: ts[0].T)


@dataclass(frozen=True)
class Heads:
    """Layout of the rows of our `qkv`: for each key-value head its G queries, its key, its value."""

    num_heads: int
    kv_heads: int
    head_width: int

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Return all queries, all keys, all values."""
        grouped = qkv.view(
            self.kv_heads, self.num_heads // self.kv_heads + 2, self.head_width, *qkv.shape[1:]
        )
        return [part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return `qkv`; the inverse of `split`."""
        grouped = [part.reshape(self.kv_heads, -1, self.head_width, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    def entry(self, ours: str, theirs: Iterable[str]) -> Entry:
        """Return an entry for our packed tensor and their queries, keys and values."""
        return Entry(ours, tuple(theirs), self.split, self.join)


class Names(NamedTuple):
    """Which stored tensors are read. Buffers and copies of tied weights are in neither field."""

    used: dict[str, str]
    """Stored name → name in entries; unknown names stay unchanged."""
    left_out: list[str]
    """Stored weights that our model does not use, which the user is told."""


# Configs: ours ↔ theirs.

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}
"""Ours → theirs."""
ACTIVATIONS_BACK = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


@dataclass(frozen=True)
class Settings:
    """Contents of config.json. Getters raise CheckpointError with the file and the key."""

    where: Path
    """Path of the file."""
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights beside it, each read on access."""
    special_ids: Callable[[], Mapping[str, int]] = dict
    """Return role (mask, cls, sep, pad, bos, eos, unk) → id for the special tokens of the tokenizer beside
    it."""
    prefix: str = ""
    """Prefix of keys in error messages: the section's name."""

    def whole(self, key: str, default: int | None = None) -> int:
        """Return an integer, or the default if it is missing or null."""
        value = self._value(key, default)
        if not _is_finite(value) or value % 1 != 0:
            raise self.refusal(key, "a whole number")
        if abs(value) > LARGEST_INT:
            raise self.refusal(key, "a whole number between -2^63 and 2^63")
        return int(value)

    def layers(self, key: str = "num_hidden_layers", default: int | None = None) -> int:
        """Return a number of layers. Refuse more than any model has, before anything is made for each."""
        layers = self.whole(key, default)
        if self.tensors and layers > len(self.tensors):
            raise self.refusal(key, f"no more than its {len(self.tensors):,} tensors, each layer's own")
        if not 1 <= layers <= MOST_LAYERS:
            raise self.refusal(key, f"1 to {MOST_LAYERS:,}")
        return layers

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number, or the default if it is missing or null."""
        value = self._value(key, default)
        if not _is_finite(value):
            raise self.refusal(key, "a number")
        return float(value)

    def token_ids(self, key: str) -> list[int]:
        """Return an id or several as a list; empty if missing or null."""
        value = self.content.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or abs(i) > LARGEST_ID for i in ids):
            raise self.refusal(key, "an id, or a list of them")
        return ids

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers."""
        values = self._value(key, None)
        if not isinstance(values, list) or not all(map(_is_finite, values)):
            raise self.refusal(key, "a list of numbers")
        return [float(value) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean, or the default if it is missing or null."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def choice(self, key: str, names: Mapping[str, str], default: str) -> str:
        """Return our name of a value, which must be one of `names`."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in names:
            raise self.refusal(key, ", ".join(names))
        return names[value]

    def section(self, key: str) -> Settings:
        """Return the settings under a key; empty if missing or null."""
        value = self.content.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.refusal(key, "a section of keys")
        return Settings(self.where, value, prefix=f"{self.prefix}{key}.")

    def with_keys(self, **keys: Any) -> Settings:
        """Return a copy with additional keys."""
        # A chain reads nothing that is not requested, so that keys.py can count what was.
        return replace(self, content=ChainMap(keys, self.content))  # type: ignore[arg-type]

    def require(self, key: str, *allowed: Any, remedy: str = "") -> None:
        """Refuse a given value that is not in `allowed`, since it would change what is computed."""
        value = self.content.get(key)
        if value is not None and value not in allowed:
            raise self.refusal(key, ", ".join(map(str, allowed)) or "nothing", remedy)

    def is_tied(self, head: str, embedding: str, default: bool) -> bool:
        """Return whether the head shares the embedding's weight: `tie_word_embeddings`, unless both
        tensors are stored and differ, which transformers treats as two weights."""
        tied = self.flag("tie_word_embeddings", default)
        if not tied or not {head, embedding} <= self.tensors.keys():
            return tied
        return torch.equal(self.tensors[head], self.tensors[embedding])

    def refusal(self, key: str, allowed: str, remedy: str = "") -> CheckpointError:
        got = show(self.content[key]) if key in self.content else "nothing"
        return CheckpointError(Problem(f"{self.where}: {self.prefix}{key}", got, allowed, remedy))

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(Problem(str(self.where), f"no key '{self.prefix}{key}'", "a whole config"))
        return value


def _is_finite(value: Any) -> bool:
    """Return whether `value` is a finite number that a float can hold; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def unless(value: Any, implied: Any) -> Any:
    """Return None if the value is the one that our config implies, else the value."""
    return None if value == implied else value


def keep_all(names: Collection[str], config: Any) -> Names:
    """Keep all tensors under their own names."""
    return Names({name: name for name in names}, [])


@dataclass(frozen=True)
class Form:
    """One architecture of transformers, and which models of ours have it."""

    model_type: str
    """`model_type` of config.json."""
    config: type
    """Config class of our models."""
    build: Callable[[Any], nn.Module]
    """Config → module; on the meta device it gives names and shapes."""
    misfits: Callable[[Any], dict[str, str]]
    """Config → keys whose values this architecture does not support, with the supported value; empty: the
    model fits."""
    entries: Callable[[Any], list[Entry]]
    """Config → entries of all tensors."""
    write_config: Callable[[Any], dict[str, Any]]
    """Config → keys of config.json, besides those common to all forms."""
    read_config: Callable[[Settings], dict[str, Any]]
    """config.json → mapping that our config is decoded from. Raise CheckpointError for unsupported values."""
    names: Callable[[Collection[str], Any], Names] = keep_all
    """(stored names, config) → alternative names."""
    part: Callable[[Settings], Settings] | None = None
    """Select the settings of our model in a folder that holds more, such as an image encoder; exports have
    the form that these settings name."""
    fresh: tuple[str, ...] = ()
    """Our tensors that a folder may lack, all together: heads that are then newly initialized."""

    def is_of(self, config: Any) -> bool:
        """Return whether it is a form of the family of this config."""
        return isinstance(config, self.config)
