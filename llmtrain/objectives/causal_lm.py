"""Next-token prediction over packed documents.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.labels import IGNORE_INDEX
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    ObjectiveConfig,
    Shown,
    Terms,
    positions_in_documents,
    tensors,
)
from llmtrain.objectives.text import Spelling, indented

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.trace import Part


@dataclass(frozen=True)
class CausalLMConfig(ObjectiveConfig):
    """Predict each token from the preceding tokens of its document."""

    teaches: ClassVar = ("decoder",)
    paired: ClassVar = "taken"
    continues: ClassVar = True

    kind: Literal["causal_lm"] = "causal_lm"
    """Next-token prediction."""

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> CausalLM:
        return CausalLM(document_mask=data.document_mask, continued=data.continued)


class CausalLM(LossOfModel):
    """Loss of each token given the preceding tokens of its document.

    The first token of a document is never a target, since its predecessor belongs to another document.
    """

    names: ClassVar = {
        "tokens": "tokens_BT",
        "positions": "positions_BT",
        "documents": "documents_BT",
        "labels": "labels_BT",
        DROPOUT_KEYS: "dropout_keys_B",
        "lanes": "lanes_B",
        "places": "places_B",
        "ends": "ends_B",
    }

    def __init__(self, document_mask: bool = True, continued: bool = False) -> None:
        """Without document_mask, packed documents attend to each other and positions count from the start
        of the row; the targets stay the same. continued: rows go on where those of the step before ended."""
        self._document_mask, self._continued = document_mask, continued

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return the batch of stacked windows.

        raw: "tokens" (B, W); "documents" (B, W), negative at padding; and, if documents overlap, "contexts"
        (B, W) bool, True at tokens that are context only.
        Returns "tokens" (B, T) and "labels" (B, T), IGNORE_INDEX where no loss is borne, both int64. If
        some row holds several documents and they are masked, also "positions" (B, T) int64 and "documents"
        (B, T) int32. If rows go on, "ends" (B) bool: whether the next row begins another text.
        """
        tokens_BW, documents_BW = raw["tokens"], raw["documents"]
        inputs_BT, targets_BT = documents_BW[:, :-1], documents_BW[:, 1:]
        is_target_BT = (inputs_BT == targets_BT) & (targets_BT >= 0)
        if "contexts" in raw:
            is_target_BT &= ~raw["contexts"][:, 1:]
        batch = {
            "tokens": tokens_BW[:, :-1],
            "labels": np.where(is_target_BT, tokens_BW[:, 1:], IGNORE_INDEX),
        }
        # Padding at the end needs no mask of its own: attention is causal.
        has_boundary = bool((documents_BW[:, :-1] > 0).any())
        if self._document_mask and has_boundary:
            batch["positions"] = positions_in_documents(inputs_BT)
            batch["documents"] = inputs_BT
        if self._continued:
            # The last token of a row is the first of the next.
            last_B, before_B = documents_BW[:, -1], documents_BW[:, -2]
            batch["ends"] = (last_B < 0) | (self._document_mask & (last_B != before_B))
        return tensors(batch)

    def part_of_sequences(self, batch: Batch, part: int, parts: int) -> Batch:
        """Return T / parts tokens of each row from part · T / parts on, with their labels and positions in
        the whole row. Keep documents whole, since attention sees all tokens."""
        T = batch["tokens"].shape[1]
        here = slice(part * (T // parts), (part + 1) * (T // parts))
        positions = batch.get("positions")
        if positions is None:
            positions = (batch["tokens"][:1] * 0 + 1).cumsum(dim=1) - 1
        sliced = {"tokens": batch["tokens"], "labels": batch["labels"], "positions": positions}
        return {**batch, **{key: value[:, here] for key, value in sliced.items()}}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        return self(model, batch)

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        """Add "perplexity", and "bits_per_byte" of the text of the targets."""
        bits = loss * num_targets / math.log(2) / max(1, num_bytes)
        return {**super().figures(loss, num_targets, metrics, num_bytes), "bits_per_byte": bits}

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return each document separately, with marks around tokens that bear no loss."""
        tokens_W = raw["tokens"][0]
        # The first token of a row has no predecessor in the row.
        bears_loss_W = np.concatenate([[False], row["labels"] != IGNORE_INDEX])
        lines, position = [], 0
        for part in parts():
            here = slice(position, position + part.tokens)
            position += part.tokens
            file = PurePosixPath(part.tar).name
            lines.append(f"  document {part.document} of {file}, {part.tokens} tokens")
            lines += indented(text.with_marks(tokens_W[here], bears_loss_W[here]))
        if position < len(tokens_W):
            lines.append(f"  padding, {len(tokens_W) - position} tokens without loss")
        return Shown(f"{int(bears_loss_W.sum())} tokens with loss", lines)
