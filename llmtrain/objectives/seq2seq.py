"""Sequence to sequence: predict a target, given a source that the encoder reads (arXiv:1706.03762).

Dim names: B rows, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from llmtrain.errors import Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    ObjectiveConfig,
    Shown,
    SpecialIds,
    Terms,
    count_targets,
    positions_in_documents,
    ratio,
    tensors,
)
from llmtrain.objectives.text import indented

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.tokenizers.base import Tokenizer

SHORTEST_TEXT = 8
"""Minimum tokens of text in a row that is corrupted."""

NO_PAIR = -1
"""Pair number of padding."""


class Widths(NamedTuple):
    """Token counts of a row. They depend only on the config, never on the text, since pipelines need fixed
    shapes and a row must be the same in any batch."""

    text: int
    """Tokens of the corpus, if both sides are made from one text; 0 for pairs."""
    source: int
    """Tokens of the encoder's input."""
    target: int
    """Tokens of the decoder's input, and of the labels."""


def start_and_end_ids(model: Any, corpora: TextSource) -> SpecialIds:
    """Resolve the ids that begin a decoder's input and that end a text: those of the tokenizer; if it has no
    start, the first id after the corpus' vocabulary. The start differs from the end id, which as a document's
    end would mean that nothing follows."""
    own, needed = corpora.special_ids, corpora.vocab_size
    eos_id = corpora.eos_id if model.eos_id is None else model.eos_id
    start_id = model.start_id
    if start_id is None:
        start_id = own["bos"] if own.get("bos", eos_id) != eos_id else needed
        needed = max(needed, start_id + 1)
    needed = max(needed, start_id + 1, eos_id + 1)
    return SpecialIds(replace(model, start_id=start_id, eos_id=eos_id), needed, " with a start id")


class SourceTargetConfig(ObjectiveConfig):
    """Base of the objectives of encoder-decoders."""

    teaches: ClassVar = ("encoder_decoder",)

    def widths(self, sequence_length: int) -> Widths:
        """Return the widths of a row whose encoder input has at most `sequence_length` tokens."""
        raise NotImplementedError

    def measures(self) -> tuple[str, ...]:
        return ("token_accuracy", "token_loss")

    def row(self, sequence_length: int) -> Row:
        _, source, target = self.widths(sequence_length)
        return Row(source, target, predicted=target)

    def special_ids(self, model: Any, corpora: TextSource) -> SpecialIds:
        """Resolve the start and end ids and the objective's marks; use ids after the corpus' vocabulary if
        the tokenizer has none."""
        model, needed, _ = start_and_end_ids(model, corpora)
        model, needed = self._marks(model, corpora, needed)
        ids = (model.start_id, model.mask_id, model.sentinel_id, model.eos_id)
        needed = max(needed, *(i + 1 for i in ids if i is not None))
        return SpecialIds(model, needed, f" with what objective={self.kind} marks texts by")

    def _marks(self, model: Any, corpora: TextSource, needed: int) -> tuple[Any, int]:
        """Return the model's config with further special ids, and the number of embedding rows needed."""
        return model, needed

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        eos_id = tokenizer.eos_id
        names = {eos_id: tokenizer.pieces()[eos_id]}
        if model.mask_id is not None:
            names[model.mask_id] = "[MASK]"
        if model.sentinel_id is not None:
            names |= {model.sentinel_id - i: f"<extra_{i}>" for i in range(model.num_sentinels or 0)}
        return names


class OneTextConfig(SourceTargetConfig):
    """Base of the objectives that make source and target from one text."""

    def widths_of_text(self, text: int) -> Widths:
        """Return the widths of a row made from `text` tokens of the corpus, end tokens included."""
        raise NotImplementedError

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        text = self.widths(sequence_length).text
        if text < SHORTEST_TEXT:
            least = next(n for n in range(SHORTEST_TEXT, 1 << 12) if self.widths(n).text >= SHORTEST_TEXT)
            allowed = f"{least} or more with {self.kind}"
            yield Problem("batch.sequence_length", str(sequence_length), allowed)

    def data_problems(self, data: Any) -> Iterator[Problem]:
        if data.overlap:
            allowed = f"0 with objective={self.kind}, else tokens shared by two rows are predicted twice"
            yield Problem("data.overlap", str(data.overlap), allowed)

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        return super().open(model, data, corpora, split, self.widths(sequence_length).text)


class Examples(NamedTuple):
    """Rows of one or several pairs of source and target."""

    sources: np.ndarray
    """int64 (B, S)."""
    source_documents: np.ndarray
    """int32 (B, S): number of the pair within the row, NO_PAIR at padding."""
    targets: np.ndarray
    """int64 (B, T): tokens that the decoder must predict."""
    documents: np.ndarray
    """int32 (B, T): as source_documents, for the targets."""


class Seq2Seq(LossOfModel, ABC):
    """Loss of each target token given the preceding target tokens and the source."""

    perplexity_of: ClassVar = "token_loss"
    names: ClassVar = {
        "sources": "sources_BS",
        "tokens": "tokens_BT",
        "source_positions": "source_positions_BS",
        "positions": "positions_BT",
        "source_documents": "source_documents_BS",
        "documents": "documents_BT",
        "labels": "labels_BT",
        DROPOUT_KEYS: "dropout_keys_B",
    }

    def __init__(self, model: Any) -> None:
        """model: config of an encoder-decoder. Raise ValueError if its special ids are not resolved."""
        if model.start_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._start_id = model.start_id

    @abstractmethod
    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """Return the pairs of stacked samples; `raw` also holds "keys", int64 (B,)."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return the batch of stacked samples.

        As int64: "sources" (B, S); "tokens" (B, T), the start id followed by all targets but the last;
        "labels" (B, T), the targets, IGNORE_INDEX at padding. If a row holds padding or several pairs,
        also "source_documents" (B, S) and "documents" (B, T), int32, the pair number of each token, −1 at
        padding, and "source_positions" and "positions", int64, each token's position within its side of
        the pair.
        """
        sources_BS, source_documents_BS, targets_BT, documents_BT = self.examples(raw)
        begins_BT = np.ones(documents_BT.shape, dtype=bool)
        begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        tokens_BT = np.roll(targets_BT, 1, axis=1)
        tokens_BT[begins_BT] = self._start_id
        is_token_BT = documents_BT != NO_PAIR
        batch = {
            "sources": sources_BS,
            "tokens": np.where(is_token_BT, tokens_BT, 0),
            "labels": np.where(is_token_BT, targets_BT, IGNORE_INDEX),
        }
        if source_documents_BS.any() or documents_BT.any():
            batch["source_documents"] = source_documents_BS
            batch["documents"] = documents_BT
            batch["source_positions"] = positions_in_documents(source_documents_BS)
            batch["positions"] = positions_in_documents(documents_BT)
        return tensors(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add "token_accuracy", and "token_loss", the cross-entropy without label smoothing."""
        num_targets = count_targets(batch["labels"])
        sums = model(**self.arguments(batch), with_metrics=True)
        metrics = {
            "token_accuracy": ratio(sums["correct"], num_targets),
            "token_loss": ratio(sums["token_loss"], num_targets),
        }
        return Terms(sums["loss"], num_targets, metrics)

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return each pair's source and target."""
        sources, targets = row["sources"], row["labels"]
        source_documents = row.get("source_documents", np.zeros(len(sources), np.int32))
        documents = row.get("documents", np.zeros(len(targets), np.int32))
        pairs = int(source_documents.max(initial=-1)) + 1
        lines = []
        for pair in range(pairs):
            if pairs > 1:
                lines.append(f"  pair {pair}")
            for side, tokens, numbers in (
                ("source", sources, source_documents),
                ("target", targets, documents),
            ):
                lines += indented(text.spell(tokens[numbers == pair], {}), f"{side}  ")
        counts = int((source_documents >= 0).sum()), int((documents >= 0).sum())
        named = f", {pairs} pairs" if pairs > 1 else ""
        return Shown(f"{counts[0]} tokens of source, {counts[1]} of target{named}", lines)


class OneText(Seq2Seq):
    """Base of objectives that make both sides from a row of text.

    A row counts as one text whatever documents are packed into it, as in T5 and BART; documents' end
    tokens are ordinary tokens of it.
    """

    def __init__(self, model: Any, widths: Callable[[int], Widths]) -> None:
        """widths: number of text tokens → widths of a row. Raise ValueError if special ids are not
        resolved."""
        super().__init__(model)
        if model.eos_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._eos_id = model.eos_id
        self._widths = widths

    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """Corrupt all tokens of each row but the last. raw: "tokens" and "documents" (B, W), documents
        negative at trailing padding; "keys" (B,). S and T depend on W."""
        L = raw["tokens"].shape[1] - 1
        _, S, T = self._widths(L)
        is_text_BL = raw["documents"][:, :L] >= 0
        lengths_B = is_text_BL.sum(axis=1)
        # A text of one token leaves nothing to predict.
        is_text_BL = is_text_BL & (lengths_B > 1)[:, None]
        lengths_B = np.where(lengths_B > 1, lengths_B, 0)
        text = raw["tokens"][:, :L][is_text_BL]
        (source, sources_B), (target, targets_B) = self.corrupt(text, lengths_B, raw["keys"])
        sources_BS, source_documents_BS = self._rows(source, sources_B, S, lengths_B > 0)
        targets_BT, documents_BT = self._rows(target, targets_B, T, lengths_B > 0)
        return Examples(sources_BS, source_documents_BS, targets_BT, documents_BT)

    @abstractmethod
    def corrupt(
        self, text: np.ndarray, lengths_B: np.ndarray, keys_B: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Return (sources, tokens per source), (targets, tokens per target), both concatenated and without
        end tokens. text: the tokens of all rows, concatenated."""

    def _rows(
        self, flat: np.ndarray, sizes_B: np.ndarray, width: int, is_row_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Split concatenated tokens into rows with end tokens, and return them with the pair number of
        each position, both (B, width)."""
        positions = np.arange(width)
        tokens = np.zeros((len(sizes_B), width), dtype=np.int64)
        tokens[positions < sizes_B[:, None]] = flat
        rows = np.flatnonzero(is_row_B)
        tokens[rows, sizes_B[rows]] = self._eos_id
        is_token = (positions <= sizes_B[:, None]) & is_row_B[:, None]
        return tokens, np.where(is_token, 0, NO_PAIR).astype(np.int32)


def numbers_within(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, … within each of consecutive groups of these sizes, int64 (sum,)."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
