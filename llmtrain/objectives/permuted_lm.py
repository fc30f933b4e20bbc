"""Permuted language modeling: predict tokens in a random order, each given the preceding ones in that order
(XLNet, arXiv:1906.08237).

All choices are hashes of a sample's key: the same for any number of ranks, different in each epoch.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window, M predicted positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    ObjectiveConfig,
    Shown,
    Terms,
    count_targets,
    ratio,
    tensors,
)
from llmtrain.objectives.draws import uniform, uniform_of_rows

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling

_LENGTH, _PLACE, _ORDER, _BEGIN = range(4)
"""Purposes of random draws."""


@dataclass(frozen=True)
class PermutedLMConfig(ObjectiveConfig):
    """Predict some tokens in a random order (arXiv:1906.08237, sections 2.2, 2.3 and 3.1)."""

    teaches: ClassVar = ("permuted_encoder",)

    kind: Literal["permuted_lm"] = "permuted_lm"
    predict_every: int = 6
    """One token in this many is predicted; K in the paper."""
    max_span: int = 5
    """Maximum tokens of a span that is predicted together; lengths are uniform from 1."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.predict_every >= 2, "predict_every", self.predict_every, "2 or more")
        yield from require(self.max_span >= 1, "max_span", self.max_span, "1 or more")

    def measures(self) -> tuple[str, ...]:
        return ("permuted_accuracy",)

    def num_predicted(self, sequence_length: int) -> int:
        """Return the number of predicted positions M, equal for all rows; 0 for rows shorter than
        predict_every."""
        return sequence_length // self.predict_every

    def row(self, sequence_length: int) -> Row:
        return Row(sequence_length, predicted=self.num_predicted(sequence_length))

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        shortest = self.predict_every
        yield from require(
            sequence_length >= shortest,
            "batch.sequence_length",
            sequence_length,
            f"{shortest} or more, objective.predict_every",
        )

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> PermutedLM:
        return PermutedLM(self, document_mask=data.document_mask, has_segments=model.has_segments)


class PermutedLM(LossOfModel):
    """Loss of the tokens at the predicted positions, which come last in the factorization order.

    The other tokens come first and see each other (section 2.3, partial prediction). A chosen position
    without a token to predict (padding, the end of a document) counts as one of these and has no label.
    """

    names: ClassVar = {
        "tokens": "tokens_BT",
        "order": "order_BT",
        "targets": "targets_BM",
        "documents": "documents_BT",
        "segments": "segments_BT",
        "labels": "labels_BM",
        DROPOUT_KEYS: "dropout_keys_B",
    }

    def __init__(
        self, config: PermutedLMConfig, *, document_mask: bool = True, has_segments: bool = True
    ) -> None:
        """document_mask: packed documents don't attend to each other. has_segments: whether the model has
        segments."""
        self._document_mask = document_mask
        self._config = config
        self._has_segments = has_segments

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Choose positions to predict in stacked samples and return the batch.

        raw: "keys" int64 (B,); "tokens" and "documents" (B, W), documents negative at padding, of which the
        first T are taken; and, if documents overlap, "contexts" (B, W) bool, True at tokens that are not
        predicted.
        Returns, as int64, "tokens" (B, T); "order" (B, T), 0 for tokens that are not predicted, distinct
        positive numbers for the others; "targets" (B, M), the chosen positions, ascending; "labels" (B,
        M), their tokens or IGNORE_INDEX. If a row holds several documents or padding, also "documents" (B,
        T) int32; for a model with segments also "segments" (B, T) int64, all 0, since a row is one text.
        """
        keys_B, tokens_BT = raw["keys"], raw["tokens"][:, :-1]
        documents_BT, following_BT = raw["documents"][:, :-1], raw["documents"][:, 1:]
        # The document mask already reveals where a document ends.
        may_predict_BT = (documents_BT >= 0) & (documents_BT == following_BT)
        if "contexts" in raw:
            may_predict_BT &= ~raw["contexts"][:, :-1]
        if not self._document_mask:
            documents_BT = np.minimum(documents_BT, 0)

        targets_BM = self._places(keys_B, tokens_BT.shape[1])
        is_asked_BM = np.take_along_axis(may_predict_BT, targets_BM, axis=1)
        labels_BM = np.where(is_asked_BM, np.take_along_axis(tokens_BT, targets_BM, axis=1), IGNORE_INDEX)
        drawn_BM = uniform(keys_B, _ORDER, np.arange(targets_BM.shape[1]))
        ranks_BM = drawn_BM.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1
        order_BT = np.zeros(tokens_BT.shape, dtype=np.int64)
        np.put_along_axis(order_BT, targets_BM, np.where(is_asked_BM, ranks_BM, 0), axis=1)
        arrays = {"tokens": tokens_BT, "order": order_BT, "targets": targets_BM, "labels": labels_BM}
        if (documents_BT != documents_BT[:, :1]).any():
            arrays["documents"] = documents_BT
        if self._has_segments:
            arrays["segments"] = np.zeros_like(order_BT)
        return tensors(arrays)

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the metric "permuted_accuracy"."""
        num_targets = count_targets(batch["labels"])
        sums = model(**self.arguments(batch), with_metrics=True)
        return Terms(sums["loss"], num_targets, {"permuted_accuracy": ratio(sums["correct"], num_targets)})

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the row, each predicted token with its rank in the order of prediction."""
        tokens, order = row["tokens"], row["order"]
        documents = row.get("documents", np.zeros(len(tokens), np.int32))
        predicted = np.flatnonzero(order > 0)
        ranks = {i: rank for rank, i in enumerate(np.argsort(order[predicted], kind="stable"), 1)}
        marked = {p: f"⟦{ranks[i]}: {text.name(tokens[p])}⟧" for i, p in enumerate(predicted.tolist())}
        facts = f"{int((documents >= 0).sum())} tokens, {len(predicted)} of them predicted"
        return Shown(facts, text.documents(tokens, documents, marked))

    def _places(self, keys_B: np.ndarray, T: int) -> np.ndarray:
        """Return the positions to predict, T // K of each row, K = predict_every: int64 (B, M), ascending.

        Each is in a span of 1 to max_span tokens; a span of L tokens is at a random offset in a context of
        K·L tokens (section 3.1, span-based prediction). Contexts are concatenated from a random position
        on and wrap around the row's end, so that all positions are equally likely. Fewer than K tokens are
        left over.
        """
        K, M = self._config.predict_every, self._config.num_predicted(T)
        units_M = np.arange(M)
        # The largest possible number of contexts; the last ones are empty.
        lengths_BC = 1 + np.floor(uniform(keys_B, _LENGTH, units_M) * self._config.max_span).astype(np.int64)
        ends_BC = np.minimum(lengths_BC.cumsum(axis=1), M)
        starts_BC = np.concatenate([np.zeros_like(ends_BC[:, :1]), ends_BC[:, :-1]], axis=1)
        room_BC = (K - 1) * (ends_BC - starts_BC) + 1
        shifts_BC = np.floor(uniform(keys_B, _PLACE, units_M) * room_BC).astype(np.int64)
        begins_B = np.floor(uniform_of_rows(keys_B, _BEGIN) * T).astype(np.int64)
        # The m-th position belongs to the context that holds the m-th of the row's M equal parts.
        context_BM = (ends_BC[:, None, :] <= units_M[:, None]).sum(-1)
        spans_BC = (K - 1) * starts_BC + shifts_BC + begins_B[:, None]
        return np.sort((np.take_along_axis(spans_BC, context_BM, axis=1) + units_M) % T, axis=1)
