"""What says how one of our model families stands in a Hugging Face folder: names, tensors, config.

Dim names: K key-value heads, G query heads a key-value head, H head width.
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
"""No known model has as many. Each takes time and memory to build."""
LARGEST_ID = 2**31 - 1
"""The largest id that a token may have."""

# Tensors: ours ↔ theirs.


@dataclass(frozen=True)
class Entry:
    """One of our tensors, or several behind one another, and those of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    """Ours → theirs. It runs on the meta device too."""
    join: Callable[[list[Tensor]], Tensor]
    """Theirs → ours; undoes `split` bit for bit."""
    also: tuple[str, ...] = ()
    """Others of ours, of the same shape: their rows stand behind its own in what is split and joined."""

    @property
    def all_ours(self) -> tuple[str, ...]:
        return (self.ours, *self.also)

    def split_all(self, ours: list[Tensor]) -> list[Tensor]:
        """`all_ours` → theirs."""
        return self.split(torch.cat(ours) if self.also else ours[0])


def same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda t: [t], lambda ts: ts[0])


def same_all(pairs: Mapping[str, str], parameters: Iterable[str] = ("weight", "bias")) -> list[Entry]:
    """Of each module, ours → theirs, the parameters named."""
    return [same(f"{ours}.{p}", f"{theirs}.{p}") for ours, theirs in pairs.items() for p in parameters]


def transposed(ours: str, theirs: str) -> Entry:
    """GPT-2's Conv1D stores (inputs, outputs)."""
    return Entry(ours, (theirs,), lambda t: [t.T], lambda ts: ts[0].T)


@dataclass(frozen=True)
class Heads:
    """How the rows of our `qkv` are laid out: by key-value head its G queries, its key, its value."""

    num_heads: int
    kv_heads: int
    head_width: int

    def split(self, qkv: Tensor) -> list[Tensor]:
        """→ all queries, all keys, all values."""
        grouped = qkv.view(
            self.kv_heads, self.num_heads // self.kv_heads + 2, self.head_width, *qkv.shape[1:]
        )
        return [part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Undoes `split`."""
        grouped = [part.reshape(self.kv_heads, -1, self.head_width, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    def entry(self, ours: str, theirs: Iterable[str]) -> Entry:
        """Our packed tensor as theirs of queries, keys and values."""
        return Entry(ours, tuple(theirs), self.split, self.join)


class Names(NamedTuple):
    """Stored tensors by what becomes of them. Buffers and copies of a tied weight are in neither."""

    used: dict[str, str]
    """Stored name → the name that entries have for it; unknown ones stay as they are."""
    left_out: list[str]
    """Stored weights that our model has no use for, which the user is told."""


# Configs: ours ↔ theirs.

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}
"""Ours → theirs."""
ACTIVATIONS_BACK = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


@dataclass(frozen=True)
class Settings:
    """A config.json. Its getters raise CheckpointError that names the file and the key."""

    where: Path
    """The file."""
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights beside it, each read when asked for."""
    special_ids: Callable[[], Mapping[str, int]] = dict
    """→ role (mask, cls, sep, pad, bos, eos, unk) → id, of those that the tokenizer beside it has."""
    prefix: str = ""
    """Of keys in a refusal: the section's name."""

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number, the default where it is missing or null."""
        value = self._value(key, default)
        if not _is_finite(value) or value % 1 != 0:
            raise self.refusal(key, "a whole number")
        if abs(value) > LARGEST_INT:
            raise self.refusal(key, "a whole number between -2^63 and 2^63")
        return int(value)

    def layers(self, key: str = "num_hidden_layers", default: int | None = None) -> int:
        """A number of layers; refused beyond what the folder can have, before anything is made of each."""
        layers = self.whole(key, default)
        if self.tensors and layers > len(self.tensors):
            raise self.refusal(key, f"no more than its {len(self.tensors):,} tensors, each layer's own")
        if not 1 <= layers <= MOST_LAYERS:
            raise self.refusal(key, f"1 to {MOST_LAYERS:,}")
        return layers

    def number(self, key: str, default: float | None = None) -> float:
        """A number, the default where it is missing or null."""
        value = self._value(key, default)
        if not _is_finite(value):
            raise self.refusal(key, "a number")
        return float(value)

    def token_ids(self, key: str) -> list[int]:
        """An id, or a list of them; none where it is missing or null."""
        value = self.content.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or abs(i) > LARGEST_ID for i in ids):
            raise self.refusal(key, "an id, or a list of them")
        return ids

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        values = self._value(key, None)
        if not isinstance(values, list) or not all(map(_is_finite, values)):
            raise self.refusal(key, "a list of numbers")
        return [float(value) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        """true or false, the default where it is missing or null."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def choice(self, key: str, names: Mapping[str, str], default: str) -> str:
        """Our name of a value, which is one of their `names`."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in names:
            raise self.refusal(key, ", ".join(names))
        return names[value]

    def section(self, key: str) -> Settings:
        """The settings under a key, none where it is missing or null."""
        value = self.content.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.refusal(key, "a section of keys")
        return Settings(self.where, value, prefix=f"{self.prefix}{key}.")

    def with_keys(self, **keys: Any) -> Settings:
        """The same, with these keys besides."""
        # In a chain, what is not asked for is not read, of which keys.py keeps count.
        return replace(self, content=ChainMap(keys, self.content))  # type: ignore[arg-type]

    def require(self, key: str, *allowed: Any, remedy: str = "") -> None:
        """Refuse a value that is given and is none of `allowed`: it would change what is computed."""
        value = self.content.get(key)
        if value is not None and value not in allowed:
            raise self.refusal(key, ", ".join(map(str, allowed)) or "nothing", remedy)

    def is_tied(self, head: str, embedding: str, default: bool) -> bool:
        """Whether the head shares the embedding's weight: as `tie_word_embeddings` says, unless both tensors
        are stored and differ, which transformers takes for two weights too."""
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
    """Return whether `value` is a finite number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def unless(value: Any, implied: Any) -> Any:
    """None, which our config reads as `implied`, or the value."""
    return None if value == implied else value


def keep_all(names: Collection[str], config: Any) -> Names:
    """All tensors under the names that they have."""
    return Names({name: name for name in names}, [])


@dataclass(frozen=True)
class Form:
    """One architecture of transformers, and the models of ours that are it."""

    model_type: str
    """As config.json says it."""
    config: type
    """Of our models."""
    build: Callable[[Any], nn.Module]
    """Config → module; on the meta device it tells names and shapes."""
    misfits: Callable[[Any], dict[str, str]]
    """Key of our config whose value this architecture has not → what it has; nothing: the model is of it."""
    entries: Callable[[Any], list[Entry]]
    """All tensors of a model."""
    write_config: Callable[[Any], dict[str, Any]]
    """What config.json says of a model, besides what all share."""
    read_config: Callable[[Settings], dict[str, Any]]
    """config.json → what our config is decoded from. Raises CheckpointError for what has no place in it."""
    names: Callable[[Collection[str], Any], Names] = keep_all
    """(stored names, config): other spellings."""
    part: Callable[[Settings], Settings] | None = None
    """For a folder of more than our model, such as one with an image encoder: pick the settings of the model
    that is imported. Its export has the form that these settings name."""
    fresh: tuple[str, ...] = ()
    """Our tensors that a folder may lack, all together: heads that are then begun anew."""
