"""Next-token prediction over packed documents.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from llmtrain.nn.head import IGNORE_INDEX
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    Terms,
    positions_in_documents,
)


class CausalLM(LossOfModel):
    """Loss of each token given those before it in its own document.

    A document's first token is never a target: its predecessor belongs to another document.
    """

    names: ClassVar = {
        "tokens": "tokens_BT",
        "positions": "positions_BT",
        "documents": "documents_BT",
        "labels": "labels_BT",
        DROPOUT_KEYS: "dropout_keys_B",
    }

    def __init__(self, document_mask: bool = True) -> None:
        """document_mask: packed documents don't attend to each other, and positions count from 0 in
        each. Without it a row reads as one text; the targets stay the same."""
        self._document_mask = document_mask

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """{"tokens": (B, W), "documents": (B, W), negative where no token is; and, where tokens are seen that
        are no targets, "contexts": (B, W) bool, True there} →
        {"tokens": (B, T), "labels": (B, T), IGNORE_INDEX where no loss is borne}, int64; and, when some
        row holds more than one document and they are masked, "positions": (B, T) int64 and
        "documents": (B, T) int32."""
        tokens_BW, documents_BW = raw["tokens"], raw["documents"]
        inputs_BT, targets_BT = documents_BW[:, :-1], documents_BW[:, 1:]
        is_target_BT = (inputs_BT == targets_BT) & (targets_BT >= 0)
        if "contexts" in raw:
            is_target_BT &= ~raw["contexts"][:, 1:]
        batch = {
            "tokens": torch.from_numpy(np.ascontiguousarray(tokens_BW[:, :-1])),
            "labels": torch.from_numpy(np.where(is_target_BT, tokens_BW[:, 1:], IGNORE_INDEX)),
        }
        # Padding after the last token needs no mask of its own: attention is causal.
        has_boundary = bool((documents_BW[:, :-1] > 0).any())
        if self._document_mask and has_boundary:
            batch["positions"] = torch.from_numpy(positions_in_documents(inputs_BT))
            batch["documents"] = torch.from_numpy(np.ascontiguousarray(inputs_BT))
        return batch

    def part_of_sequences(self, batch: Batch, part: int, parts: int) -> Batch:
        """Every row's tokens from part · T / parts on, T / parts of them, each with the label that it
        has in the whole row and its place there. Documents stay whole: attention is over all tokens."""
        T = batch["tokens"].shape[1]
        here = slice(part * (T // parts), (part + 1) * (T // parts))
        positions = batch.get("positions", torch.arange(T, device=batch["tokens"].device)[None])
        sliced = {"tokens": batch["tokens"], "labels": batch["labels"], "positions": positions}
        return {**batch, **{key: value[:, here] for key, value in sliced.items()}}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        return self(model, batch)
