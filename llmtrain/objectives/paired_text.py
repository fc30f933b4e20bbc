"""Sequence to sequence from pairs of texts: those of a corpus, or the rows of a table.

Dim names: B rows, S source tokens, T target tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.files import expand_home
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.fields import text_of
from llmtrain.objectives.seq2seq import Examples, Seq2Seq, SourceTargetConfig, Widths
from llmtrain.objectives.unlabelled import Unlabelled
from llmtrain.tables.config import TableDataConfig
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.datasets.text_pairs import TextPairs
    from llmtrain.tables.build import Example
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import TableSplit
    from llmtrain.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class PairedTextConfig(SourceTargetConfig, Unlabelled):
    """Predict targets from sources: of a corpus of paired texts, or of a table. It also reads the rows of its
    table (TaskReader)."""

    paired: ClassVar = "needed"
    also_reads: ClassVar = ("table",)
    labels: ClassVar[tuple[str, ...]] = ()

    kind: Literal["seq2seq"] = "seq2seq"
    target_length: int | None = None
    """Tokens of the decoder's input; null: batch.sequence_length, as for the encoder."""
    prefix: str = ""
    """Text before each source of a table, such as "summarize: "."""
    first_ids: tuple[int, ...] | None = field(default=None, metadata={INTERNAL: True})
    """Ids before each source of a table, which its tokenizer says; null: not known yet, or none."""

    def problems(self) -> Iterator[Problem]:
        length = self.target_length
        yield from require(length is None or length >= 2, "target_length", length, "2 or more, or null")

    def widths(self, sequence_length: int) -> Widths:
        return Widths(0, sequence_length, self.target_length or sequence_length)

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        longest, target = model.max_sequence_length, self.target_length or 0
        yield from require(
            longest is None or target <= longest,
            "objective.target_length",
            target,
            f"1 to model.max_sequence_length={longest}",
        )

    def data_problems(self, data: Any) -> Iterator[Problem]:
        if isinstance(data, TableDataConfig):
            pair = data.text_pair_field
            allowed = "null with objective=seq2seq, whose rows have one source"
            yield from require(pair is None, "data.text_pair_field", pair, allowed)
            return
        if self.prefix:
            allowed = "empty with a corpus, whose tokens are made already"
            yield Problem("objective.prefix", repr(self.prefix), allowed, "put it into the texts")
        if data.packing != "concat":
            allowed = "concat with objective=seq2seq, which puts whole pairs into rows"
            yield Problem("data.packing", data.packing, allowed, "leave it out")
        if not data.document_mask:
            allowed = "true with objective=seq2seq: the pairs of a row are separate texts"
            yield Problem("data.document_mask", "false", allowed, "leave it out")

    def with_labels(self, texts: Any) -> ObjectiveConfig:
        """Return the config with the ids before each source, as checkpoints store it; of a corpus, as it
        is."""
        from llmtrain.tables.table import Table

        if self.first_ids is not None or not isinstance(texts, Table):
            return self
        return replace(self, first_ids=_first_ids(texts.load_tokenizer()))

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        if isinstance(data, TableDataConfig):
            tokenizer, of_split = corpora.load_tokenizer(), corpora.split(split)
            return {"": self.examples_of_split(model, of_split, tokenizer, sequence_length, data.group)}
        from llmtrain.data.datasets.paired_rows import PairedRows

        _, source, target = self.widths(sequence_length)
        cache = expand_home(data.cache.dir)
        splits = self.splits(data, corpora, split)
        return {name: PairedRows(tokens, source, target, cache=cache) for name, tokens in splits.items()}

    def examples_of_split(
        self, model: Any, split: TableSplit, tokenizer: Tokenizer, sequence_length: int, group: int = 1
    ) -> TextPairs:
        """Return rows as the model reads them; those to train on once for each of their targets. group: see
        OrdersByLength."""
        from llmtrain.data.datasets.text_pairs import TextPairs

        _, source, target = self.widths(sequence_length)
        first_ids = _first_ids(tokenizer) if self.first_ids is None else self.first_ids
        eos_id = tokenizer.eos_id if model.eos_id is None else model.eos_id
        return TextPairs(
            split, source, target, first_ids, eos_id, group=group, each_target=split.name == "train"
        )

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> PairedText:
        return RowsOfPairs(model) if isinstance(data, TableDataConfig) else PairedText(model)

    # How rows of a table are read (see TaskReader).

    def identity(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "prefix": self.prefix}

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        source, _ = self.content(values, data)
        targets = _targets(values, data.label_field)
        if not source.strip() or not targets:
            return None
        return Example((source,), (source, targets), None)

    def content(self, values: Mapping[str, Any], data: TableDataConfig) -> tuple[str, tuple[str, ...]]:
        """Return the source of a row, without its targets. Raise ValueError as `read` does."""
        return text_of(values, data.text_field), ()

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        """Return the columns "first" of sources, "target" of all targets of a row one after another,
        "target_ends" of each of them, and "references", their texts as JSON."""
        from llmtrain.tables.ragged import Ragged

        sources = tokenizer.encode_arrays([self.prefix + source for source, _ in contents])
        flat = [target for _, targets in contents for target in targets]
        encoded = iter(tokenizer.encode_arrays(flat) if flat else [])
        of_rows = [[next(encoded) for _ in targets] for _, targets in contents]
        whole = [np.concatenate([np.zeros(0, np.int32), *ids]) for ids in of_rows]
        ends = [np.cumsum([len(each) for each in ids]) for ids in of_rows]
        return {
            "first": Ragged.of(sources, np.int32),
            "target": Ragged.of(whole, np.int32),
            "target_ends": Ragged.of(ends, np.int64),
            "references": Ragged.of_texts([json.dumps(targets) for _, targets in contents]),
        }

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        return {}


def _first_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the special ids that models of this tokenizer read before a text: none but for folders whose
    tokenizer says so, such as BART's."""
    return () if tokenizer.frame is None else tokenizer.frame.one.first


def _targets(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the targets of a row: a text, or a list of texts, any of which is right."""
    value = field_of(values, name)
    items = value if isinstance(value, list) else [value]
    texts = (text_of({name: item}, name) for item in items)
    return tuple(text for text in texts if text.strip())


class PairedText(Seq2Seq):
    """Pairs of the corpus, several per row; attention stays within a pair."""

    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """Return the dataset's arrays, which already have the form of Examples."""
        return Examples(raw["sources"], raw["source_documents"], raw["targets"], raw["documents"])


class RowsOfPairs(PairedText):
    """Pairs of a table, one a row. A batch is as wide as its longest source and its longest target."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._pads_fully = False

    def pad_fully(self) -> None:
        self._pads_fully = True

    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """Return the dataset's arrays without what is padding in all rows."""
        whole = super().examples(raw)
        if self._pads_fully:
            return whole
        S, T = _width(whole.source_documents), _width(whole.documents)
        return Examples(
            whole.sources[:, :S], whole.source_documents[:, :S], whole.targets[:, :T], whole.documents[:, :T]
        )


def _width(documents: np.ndarray) -> int:
    """Return the width that holds all tokens. documents: (B, W)."""
    from llmtrain.data.datasets.examples import padded_width

    return min(documents.shape[1], padded_width(int((documents >= 0).sum(1).max(initial=1))))
