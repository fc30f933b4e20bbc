"""Tagging: one label a word, such as the entities of a text (BIO)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.task_config import Pooling
from llmtrain.objectives.fields import given_names, in_order, kind_of, label_of
from llmtrain.objectives.task import Task, TaskConfig, Trunk, frame_of
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.data.datasets.examples import Examples
    from llmtrain.objectives.base import Batch
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import TableSplit
    from llmtrain.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class TaggingConfig(TaskConfig):
    """Predict a tag for each word."""

    head_kind: ClassVar = "tags"

    kind: Literal["tagging"] = "tagging"
    labels: tuple[str, ...] = ()
    """Tags in the order of the outputs; empty: those of the rows to train on, or of the model's head."""
    trunk: Trunk | None = None
    """What of an encoder-decoder the head reads. both: the decoder's states, which reads the text that the
    encoder reads; encoder: those of the encoder, without a decoder; null: encoder."""
    pooling: Pooling | None = None
    """Not used: each word has a tag of its own."""
    head_dropout: float = 0.1
    """Dropout probability before the outputs."""
    new_head: bool = False
    """Start with a new head where the model has one for this task already."""

    def measures(self) -> tuple[str, ...]:
        from llmtrain.scoring.tagging import FIGURES

        return FIGURES

    def build(self, model: Any, data: Any, corpora: Any = None) -> Tagging:
        return Tagging(model)

    def examples_of_split(
        self, model: Any, split: TableSplit, tokenizer: Tokenizer, sequence_length: int, group: int = 1
    ) -> Examples:
        from llmtrain.data.datasets.examples import TaggedExamples

        pad_id = tokenizer.special_ids.get("pad", tokenizer.eos_id)
        return TaggedExamples(split, sequence_length, frame_of(model, tokenizer), pad_id, group)

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        words, tags = self.content(values, data), _items(values, data.label_field)
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words and {len(tags)} tags", "as many tags as words")
        if not words:
            return None
        found = tuple(label_of(tag, data.label_field) for tag in tags)
        return Example((" ".join(words),), words, found)

    def content(self, values: Mapping[str, Any], data: TableDataConfig) -> Any:
        return [str(word) for word in _items(values, data.text_field)]

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        return {"tags": Ragged.of([np.zeros(len(words)) for words in contents], np.int32)}

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        """Encode each word by itself, all but the first with a space before it, as they stand in a text."""
        from llmtrain.tables.ragged import Ragged

        spaced = [word if i == 0 else f" {word}" for words in contents for i, word in enumerate(words)]
        pieces = tokenizer.encode_arrays(spaced)
        ids, starts = [], []
        first = 0
        for words in contents:
            # A word may be nothing to a tokenizer, such as one of unprintable characters: it stays a word.
            own = [
                piece if len(piece) else _unknown(tokenizer) for piece in pieces[first : first + len(words)]
            ]
            first += len(words)
            ids.append(np.concatenate(own))
            starts.append(np.cumsum([0, *(len(piece) for piece in own[:-1])]))
        return {"first": Ragged.of(ids, np.int32), "word_starts": Ragged.of(starts, np.int32)}

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        found = in_order(tag for tags in labels for tag in tags)
        if len(found) == 1 and not self.labels:
            raise ValueError(f"one tag only, {found[0]}", "two tags or more")
        return given_names(found, self.labels)

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        numbers = {name: number for number, name in enumerate(names)}
        return {"tags": Ragged.of([np.array([numbers[t] for t in tags]) for tags in labels], np.int32)}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        counts = Counter(tag for tags in labels for tag in tags)
        return {name: counts[name] for name in in_order(counts)}


def _items(values: Mapping[str, Any], name: str) -> list[Any]:
    """Return a field as a list: a text is divided at white space."""
    value = field_of(values, name)
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list):
        raise ValueError(f"{kind_of(value)} in the field {name}", "a list of words, or text")
    return value


def _unknown(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([tokenizer.eos_id if tokenizer.unk_id is None else tokenizer.unk_id], np.int32)


class Tagging(Task):
    """Cross-entropy of the tag at the first token of each word."""

    def labels_of(self, raw: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        return raw["tag_labels"][:, :width]

    def predictions(self, logits: Tensor, batch: Batch) -> list[np.ndarray]:
        """Return the number of the best tag of each word of each row, int16, and its probability in another
        row, fp32: (2, words)."""
        probabilities, tags = logits.softmax(-1).max(-1)
        both = np.stack([tags.cpu().numpy().astype(np.float32), probabilities.cpu().numpy()], axis=1)
        is_word = (batch["labels"] != IGNORE_INDEX).cpu().numpy()
        return [row[:, words] for row, words in zip(both, is_word, strict=True)]

    def scores(
        self, dataset: Examples, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        from llmtrain.scoring.tagging import tag_figures

        return tag_figures(*self._judged(dataset, rows), intervals)

    def report(self, dataset: Examples, rows: Mapping[int, np.ndarray]) -> Report:
        from llmtrain.scoring.tagging import tag_report

        return tag_report(*self._judged(dataset, rows), self.head.labels)

    def _judged(
        self, dataset: Examples, rows: Mapping[int, np.ndarray]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Return the tags of each row that were predicted, and its own."""
        names, tags = self.head.labels, dataset.split.columns["tags"]
        outside = "O" if "O" in names else names[0]
        predicted, truth = [], []
        for index, row in rows.items():
            truth.append([names[tag] for tag in tags[index]])
            said = [names[int(tag)] for tag in row[0]]
            # Words beyond the length of a sequence are outside of all entities.
            predicted.append(said + [outside] * (len(truth[-1]) - len(said)))
        return predicted, truth

    def said(self, row: np.ndarray) -> dict[str, Any]:
        tags, probabilities = row
        return {
            "prediction": [self.head.labels[int(tag)] for tag in tags],
            "probabilities": [float(p) for p in probabilities],
        }

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        return " ".join(self.head.labels[tag] for tag in row["labels"].tolist() if tag != IGNORE_INDEX)
