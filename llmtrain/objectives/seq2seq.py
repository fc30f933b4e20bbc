"""Sequence to sequence: what a decoder writes, given what an encoder read (arXiv:1706.03762).

Dim names: B rows, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.nn.head import IGNORE_INDEX
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    Terms,
    count_targets,
    positions_in_documents,
)

NO_PAIR = -1
"""Pair of a place without a token."""


class Examples(NamedTuple):
    """Pairs of a source and a target, one or several in a row."""

    sources: np.ndarray
    """int64 (B, S)."""
    source_documents: np.ndarray
    """int32 (B, S): the number of the pair within the row, NO_PAIR where no token is."""
    targets: np.ndarray
    """int64 (B, T): what the decoder is to write."""
    documents: np.ndarray
    """int32 (B, T), as of the sources."""


class Seq2Seq(LossOfModel, ABC):
    """Loss of each token of a target given those before it and its source."""

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

    def __init__(self, config: Seq2SeqConfig) -> None:
        """Raises ValueError before the vocabulary is resolved."""
        if config.start_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._start_id = config.start_id

    @abstractmethod
    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """What a dataset's samples and their "keys", int64 (B,), make."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """→ {"sources": (B, S); "tokens": (B, T), the start and then the targets but for the last; "labels":
        (B, T), the targets, IGNORE_INDEX where there are none}, int64; and, when a row holds padding or more
        than one pair, "source_documents" (B, S) and "documents" (B, T), int32, with the pair of each
        place, −1 where no token is, and "source_positions" and "positions", int64, its place within its
        side of the pair."""
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
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Adds "token_accuracy", of targets that are the likeliest token, and "token_loss", their
        cross-entropy without what label smoothing adds to the loss."""
        num_targets = count_targets(batch["labels"], IGNORE_INDEX)
        # A pipeline's stages before the last have a single 0.
        sums = model(**self.arguments(batch), with_metrics=True).expand(3)
        loss_sum, token_loss, correct = sums
        metrics = {
            "token_accuracy": torch.stack([correct, num_targets]),
            "token_loss": torch.stack([token_loss, num_targets]),
        }
        return Terms(loss_sum, num_targets, metrics)


class PairedText(Seq2Seq):
    """Pairs as the corpus holds them, several in a row; each attends to itself alone."""

    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """{"sources": int64 (B, S), "targets": int64 (B, T), "source_documents": int32 (B, S), "documents":
        int32 (B, T)}, as of Examples."""
        return Examples(raw["sources"], raw["source_documents"], raw["targets"], raw["documents"])


class OneText(Seq2Seq):
    """What makes both sides out of a row of text.

    A row counts as one text whatever documents are packed into it, as in T5 and BART: the ends of documents
    stand in it as tokens.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        """Raises ValueError before the vocabulary is resolved."""
        super().__init__(config)
        if config.eos_id is None:
            raise ValueError("the special ids are not resolved yet")
        self._eos_id = config.eos_id
        self._config = config.objective

    def examples(self, raw: dict[str, np.ndarray]) -> Examples:
        """{"tokens", "documents": (B, W), documents negative behind the last token; "keys": (B,)}; all tokens
        of a row but the last are taken. S and T depend on W."""
        L = raw["tokens"].shape[1] - 1
        _, S, T = self._config.lengths_of_text(L)
        is_text_BL = raw["documents"][:, :L] >= 0
        lengths_B = is_text_BL.sum(axis=1)
        # Of a single token nothing can be asked.
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
        """The rows' tokens one behind the other → the sources' and how many are whose, the targets' and how
        many are whose, without their ends."""

    def _rows(
        self, flat: np.ndarray, sizes_B: np.ndarray, width: int, is_row_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens one behind the other → rows with their ends, (B, width), and the pair of each place."""
        places = np.arange(width)
        tokens = np.zeros((len(sizes_B), width), dtype=np.int64)
        tokens[places < sizes_B[:, None]] = flat
        rows = np.flatnonzero(is_row_B)
        tokens[rows, sizes_B[rows]] = self._eos_id
        is_token = (places <= sizes_B[:, None]) & is_row_B[:, None]
        return tokens, np.where(is_token, 0, NO_PAIR).astype(np.int32)


def numbers_within(sizes: np.ndarray) -> np.ndarray:
    """0, 1, … of each of consecutive groups of these sizes, int64 (sum,)."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
