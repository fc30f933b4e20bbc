"""Skip-gram and CBOW, over words or over words and their n-grams, by slices of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmtrain.vectors import kernel
from llmtrain.vectors.config import PredictionKeys
from llmtrain.vectors.ngrams import bucket_table
from llmtrain.vectors.sampling import alias_table, huffman, keep_table
from llmtrain.vectors.trainer import Setting, Trained, cut, draws, seed_of

WORDS, TARGETS, GRAMS = "words", "targets", "grams"


class Prediction:
    """Vectors of words that predict, `words`, and of what is predicted, `targets`: words, or the inner nodes
    of a Huffman tree; with FastText those of n-grams, `grams`."""

    counts = "words"

    def __init__(self, config: PredictionKeys, setting: Setting) -> None:
        self._config, self._setting, text = config, setting, setting.text
        self.dimensions = config.dimensions
        num_words = len(text.words)
        self._library = kernel.library(kernel.width_of(config.dimensions))
        self._rows = {
            WORDS: kernel.rows(num_words, config.dimensions),
            TARGETS: kernel.rows(num_words, config.dimensions),
        }
        self._keep = keep_table(text.counts, config.subsample)
        self._alias = alias_table(text.counts, config.negative_power)
        self._paths = huffman(text.counts) if config.loss == "hierarchical_softmax" else None
        self._grams: tuple[np.ndarray, np.ndarray] | None = None
        if (grams := config.grams) is not None:
            self._grams = bucket_table(text.words, grams.shortest, grams.longest, grams.buckets)
            self._rows[GRAMS] = kernel.rows(grams.buckets, config.dimensions)
        self._begin()

    def _begin(self) -> None:
        """Draw the first vectors evenly from ±1/dimensions, as gensim and fastText do. What is predicted
        begins at 0."""
        reach = 1 / self.dimensions
        for name in {WORDS, GRAMS} & self._rows.keys():
            drawn = draws(self._setting.seed, name)
            rows = self._rows[name]
            for start in range(0, len(rows), 1 << 16):
                part = rows[start : start + (1 << 16), : self.dimensions]
                part[:] = drawn.random(part.shape, np.float32) * (2 * reach) - reach

    @property
    def steps_per_epoch(self) -> int:
        return max(1, -(-len(self._setting.text.tokens) // self._setting.words_per_step))

    def weights(self) -> Mapping[str, np.ndarray]:
        return {name: rows[:, : self.dimensions] for name, rows in self._rows.items()}

    def optimizer_state(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        return {}

    def load(self, read: Callable[[str, str], np.ndarray]) -> None:
        for name, rows in self.weights().items():
            rows[:] = read("", name)

    def step(self, number: int, steps: int, threads: int) -> Trained:
        setting, size = self._setting, self._setting.words_per_step
        begin = number % self.steps_per_epoch * size
        end = min(begin + size, len(setting.text.tokens))
        rates = [
            max(setting.last_rate, setting.rate + (setting.last_rate - setting.rate) * at / steps)
            for at in (number, number + 1)
        ]
        pieces = [
            self.slice_of(a, b, rates[0], rates[1], seed_of(setting.seed, number, piece))
            for piece, (a, b) in enumerate(cut(begin, end, threads))
        ]
        kernel.run_all(self._library.train_slice, pieces)
        losses = sum(piece.losses for piece in pieces)
        loss = sum(piece.loss for piece in pieces) / losses if losses else None
        kept = sum(piece.trained for piece in pieces)
        return Trained(loss, end - begin, {"lr": rates[0], "words_kept": float(kept)})

    def slice_of(self, begin: int, end: int, rate: float, last_rate: float, seed: int) -> kernel.Slice:
        """Return the arguments of the kernel for a slice of the text."""
        config, (limit, alias) = self._config, self._alias
        paths = self._paths or (None, None, None)
        grams, gram_starts = self._grams or (None, None)
        return kernel.Slice(
            tokens=self._setting.text.tokens.ctypes.data,
            begin=begin,
            end=end,
            seed=seed,
            rate=rate,
            last_rate=last_rate,
            window=config.window,
            negatives=config.negatives,
            is_cbow=config.architecture == "cbow",
            is_dynamic=config.dynamic_window,
            is_shared=config.shared_negatives,
            keep=kernel.address(self._keep, np.uint32),
            num_words=len(self._setting.text.words),
            alias_limit=kernel.address(limit, np.uint32),
            alias=kernel.address(alias, np.int32),
            path_start=kernel.address(paths[0], np.int64),
            path_node=kernel.address(paths[1], np.int32),
            path_label=kernel.address(paths[2], np.float32),
            gram_start=kernel.address(gram_starts, np.int64),
            gram=kernel.address(grams, np.int32),
            in_rows=kernel.address(self._rows[WORDS]),
            out_rows=kernel.address(self._rows[TARGETS]),
            gram_rows=kernel.address(self._rows.get(GRAMS)),
        )
