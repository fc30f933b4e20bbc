"""One dimension for each word. Nothing is learned: a run counts the vocabulary, and its one step is to save
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmtrain.vectors.config import OneHotConfig
from llmtrain.vectors.trainer import Setting, Trained

DIAGONAL = "diagonal"


class OneHot:
    """The diagonal of the identity matrix."""

    counts = "words"
    steps_per_epoch = 1

    def __init__(self, config: OneHotConfig, setting: Setting) -> None:
        self._num_words = len(setting.text.words)

    def weights(self) -> Mapping[str, np.ndarray]:
        return {DIAGONAL: np.ones((1, self._num_words), np.float32)}

    def optimizer_state(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        return {}

    def load(self, read: Callable[[str, str], np.ndarray]) -> None:
        pass

    def step(self, number: int, steps: int, threads: int) -> Trained:
        return Trained(None, self._num_words, {})
