"""What a run needs to know of a way to train word vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from llmtrain.vectors.text import Say, Text


class Trained(NamedTuple):
    """The results of a step."""

    loss: float | None
    """Mean loss in nats of the predictions that were looked at; of GloVe, of the weighted squares. None:
    there is no loss."""
    words: int
    """Number of words of the text, or of pairs, that it trained on."""
    metrics: Mapping[str, float]


class Trainer(Protocol):
    """Trains vectors. The result of a step depends only on (seed, number of the step, threads) and the
    state."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def counts(self) -> str:
        """What a step is measured in: words or pairs."""

    def weights(self) -> Mapping[str, np.ndarray]:
        """Return name → values that a checkpoint holds, (rows, dimensions) float32; views where possible."""

    def optimizer_state(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Return kind → name → values of the same shapes, of which the next step is a function too."""

    def load(self, read: Callable[[str, str], np.ndarray]) -> None:
        """Take over the state of a checkpoint; read: (kind, name) → values, with the kind "" of weights."""

    def step(self, number: int, steps: int, threads: int) -> Trained:
        """Train step `number`, counted from 0, of a run of `steps`."""


@dataclass(frozen=True)
class Setting:
    """The inputs of a trainer."""

    text: Text
    folder: Path
    """Files of the run that may be made anew."""
    seed: int
    words_per_step: int
    rate: float
    last_rate: float
    say: Say


Build = Callable[[Any, Setting], Trainer]


def draws(seed: int, *what: int | str) -> np.random.Generator:
    """Return a generator that is a function of the seed and of what is drawn."""
    return np.random.Generator(np.random.Philox(seed_of(seed, *what)))


def seed_of(seed: int, *what: int | str) -> int:
    """Return 64 bits that are a function of the seed and of what is drawn."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, (seed, *what))).encode())


def cut(begin: int, end: int, pieces: int) -> list[tuple[int, int]]:
    """Return [begin, end) in as many pieces of about the same length."""
    borders = np.linspace(begin, end, pieces + 1).astype(np.int64).tolist()
    return [(a, b) for a, b in itertools.pairwise(borders) if a < b]
