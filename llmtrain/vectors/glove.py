"""GloVe: co-occurrences counted in bounded memory, and vectors whose products are their logarithms
(Pennington, Socher, Manning 2014)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llmtrain import files
from llmtrain.reading import parse_object, read_bytes
from llmtrain.vectors import kernel
from llmtrain.vectors.config import GloveConfig
from llmtrain.vectors.pair_counts import PairCounts
from llmtrain.vectors.text import Text
from llmtrain.vectors.trainer import Setting, Trained, cut, draws

RECORD = np.dtype([("word", np.int32), ("other", np.int32), ("count", np.float32)])
PAIRS, FACTS = "pairs.bin", "pairs.json"
FACTS_BYTES = 1 << 16
PIECE_TOKENS = 1 << 19
SQUARE = "square"
_VECTORS, _BIASES = ("words", "contexts"), ("word_biases", "context_biases")


def count_pairs(text: Text, config: GloveConfig, folder: Path, seed: int) -> Path:
    """Return the file of the co-occurrences of the text, RECORD, in random order: made anew unless the folder
    holds it. Words that are d apart count 1/d, in both directions if the context is symmetric."""
    made_of = {
        "text": text.fingerprint,
        "seed": seed,
        "window": config.window,
        "symmetric": config.symmetric,
        "memory_pairs": config.memory_pairs,
    }
    path = folder / PAIRS
    if _is_held(folder, made_of):
        return path
    (folder / FACTS).unlink(missing_ok=True)
    counts = PairCounts(len(text.words), folder / "pairs", config.memory_pairs)
    tokens = text.tokens
    for start in range(0, len(tokens), PIECE_TOKENS):
        # Pairs belong to the piece of their first word.
        piece = np.array(tokens[start : start + PIECE_TOKENS + config.window])
        is_border = np.concatenate([[0], np.cumsum(piece < 0)])
        for apart in range(1, min(config.window, len(piece) - 1) + 1):
            first = np.arange(min(PIECE_TOKENS, len(piece) - apart))
            # No border between the two, nor at either of them.
            first = first[is_border[first + apart + 1] == is_border[first]]
            a, b = piece[first], piece[first + apart]
            counts.add(b, a, 1 / apart)  # the first word is the context of the second
            if config.symmetric:
                counts.add(a, b, 1 / apart)
    _shuffle(counts, path, folder, config.memory_pairs, seed)
    facts = {"made_of": made_of, "size": path.stat().st_size, "checksum": files.checksum(path)}
    files.write_json_atomically(folder / FACTS, facts)
    return path


def _is_held(folder: Path, made_of: Mapping[str, object]) -> bool:
    try:
        facts = parse_object(read_bytes(folder / FACTS, FACTS_BYTES))
        size = (folder / PAIRS).stat().st_size
        is_same = facts.get("made_of") == made_of and facts.get("size") == size
        return bool(is_same and facts["checksum"] == files.checksum(folder / PAIRS))
    except (OSError, ValueError, KeyError):
        return False


def _shuffle(counts: PairCounts, path: Path, folder: Path, most: int, seed: int) -> None:
    """Write the pairs in random order: each goes to one of several files, which are shuffled in memory."""
    drawn = draws(seed, "pairs")
    boxes: list[Path] = []
    held: list[np.ndarray] = []
    for first, second, value in counts.ranges():
        records = np.empty(len(first), RECORD)
        records["word"], records["other"], records["count"] = first, second, value
        held.append(records)
        if sum(map(len, held)) > most:
            boxes = _deal(held, boxes, folder, drawn)
            held = []
    if boxes and held:
        boxes = _deal(held, boxes, folder, drawn)
    with files.atomic_writer(path) as file:
        for box in boxes:
            records = np.fromfile(box, RECORD)
            drawn.shuffle(records)
            file.write(records.tobytes())
            box.unlink()
        if not boxes and held:
            records = np.concatenate(held)
            drawn.shuffle(records)
            file.write(records.tobytes())


def _deal(held: list[np.ndarray], boxes: list[Path], folder: Path, drawn: np.random.Generator) -> list[Path]:
    records = np.concatenate(held)
    if not boxes:
        boxes = [folder / f"box-{number:03d}.pairs" for number in range(32)]
        for box in boxes:
            box.unlink(missing_ok=True)
    chosen = drawn.integers(len(boxes), size=len(records))
    for number, box in enumerate(boxes):
        with open(box, "ab") as file:
            file.write(records[chosen == number].tobytes())
    return boxes


class Glove:
    """Vectors of words and of contexts, with a bias each, and AdaGrad's sums of squared gradients."""

    counts = "pairs"

    def __init__(self, config: GloveConfig, setting: Setting) -> None:
        self._config, self._setting = config, setting
        self._library = kernel.library(kernel.width_of(config.dimensions))
        setting.say(f"counting the pairs of words up to {config.window} apart")
        path = count_pairs(setting.text, config, setting.folder, setting.seed)
        self._records = np.memmap(path, RECORD, mode="r")
        setting.say(f"{len(self._records):,} different pairs")
        num_words = len(setting.text.words)
        self._values = {name: kernel.rows(num_words, config.dimensions) for name in _VECTORS}
        self._values |= {name: np.zeros((1, num_words), np.float32) for name in _BIASES}
        self._squares = {name: np.ones_like(rows) for name, rows in self._values.items()}
        for name in _VECTORS:  # as the reference program begins
            self._squares[name] = kernel.rows(num_words, config.dimensions)
            self._squares[name][:] = 1
        for name in (*_VECTORS, *_BIASES):
            part = self._own(self._values[name], name)
            part[:] = (draws(setting.seed, name).random(part.shape, np.float32) - 0.5) / config.dimensions

    def _own(self, rows: np.ndarray, name: str) -> np.ndarray:
        """Return rows without what lies behind their dimensions."""
        return rows[:, : self._config.dimensions] if name in _VECTORS else rows

    @property
    def steps_per_epoch(self) -> int:
        return max(1, -(-len(self._records) // self._setting.words_per_step))

    def weights(self) -> Mapping[str, np.ndarray]:
        return {name: self._own(rows, name) for name, rows in self._values.items()}

    def optimizer_state(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        return {SQUARE: {name: self._own(rows, name) for name, rows in self._squares.items()}}

    def load(self, read: Callable[[str, str], np.ndarray]) -> None:
        for name in self._values:
            self._own(self._values[name], name)[:] = read("", name)
            self._own(self._squares[name], name)[:] = read(SQUARE, name)

    def step(self, number: int, steps: int, threads: int) -> Trained:
        epoch, at = divmod(number, self.steps_per_epoch)
        # The pairs lie in random order; each epoch takes their blocks in another one.
        order = draws(self._setting.seed, "order", epoch).permutation(self.steps_per_epoch)
        size = self._setting.words_per_step
        begin = int(order[at]) * size
        block = np.array(self._records[begin : begin + size])
        columns = [np.ascontiguousarray(block[name]) for name in ("word", "other", "count")]
        pieces = [self._pairs(columns, a, b) for a, b in cut(0, len(block), threads)]
        kernel.run_all(self._library.train_pairs, pieces)
        loss = sum(piece.loss for piece in pieces) / max(1, len(block))
        return Trained(loss, len(block), {"lr": self._setting.rate})

    def _pairs(self, columns: list[np.ndarray], begin: int, end: int) -> kernel.Pairs:
        values, squares = self._values, self._squares
        return kernel.Pairs(
            **{
                name: kernel.address(column)
                for name, column in zip(("word", "other", "count"), columns, strict=True)
            },
            begin=begin,
            end=end,
            rate=self._setting.rate,
            x_max=self._config.x_max,
            power=self._config.power,
            in_rows=kernel.address(values["words"]),
            out_rows=kernel.address(values["contexts"]),
            in_bias=kernel.address(values["word_biases"]),
            out_bias=kernel.address(values["context_biases"]),
            in_square=kernel.address(squares["words"]),
            out_square=kernel.address(squares["contexts"]),
            in_bias_square=kernel.address(squares["word_biases"]),
            out_bias_square=kernel.address(squares["context_biases"]),
        )
