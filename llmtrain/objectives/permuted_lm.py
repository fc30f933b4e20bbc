"""Permuted language modelling: tokens predicted in a random order, each given those before it in that order
(arXiv:1906.08237).

All choices are hashes of a sample's key: the same at any number of processes, others in each epoch.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window, M predicted places of a row.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.head import IGNORE_INDEX
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, LossOfModel, Terms, count_targets
from llmtrain.objectives.draws import uniform, uniform_of_rows

_LENGTH, _PLACE, _ORDER, _BEGIN = range(4)
"""What a hash decides."""


class PermutedLM(LossOfModel):
    """Loss of the tokens at the predicted places, which come last in the factorization order.

    The others come first and see each other (section 2.3, partial prediction). A place that is drawn and
    holds no token to predict, as padding and the ends of documents, is one of these, and has no label.
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

    def __init__(self, config: XLNetConfig, *, document_mask: bool = True) -> None:
        """document_mask: packed documents don't attend to each other."""
        self._document_mask = document_mask
        self._config = config.objective
        self._has_segments = config.has_segments

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """{"keys": int64 (B,); "tokens", "documents": (B, W), documents negative where no token is; and,
        where tokens are seen that are not predicted, "contexts": (B, W) bool}, of which the first T are
        taken → {"tokens": (B, T); "order": (B, T), 0 for what is not predicted, then a number each;
        "targets": (B, M), the drawn places, ascending; "labels": (B, M), their tokens or IGNORE_INDEX},
        int64; where a row holds more than one document or padding, "documents": (B, T) int32; and for a
        config with segments "segments": (B, T) int64, all 0: each of a row's texts is one."""
        keys_B, tokens_BT = raw["keys"], raw["tokens"][:, :-1]
        documents_BT, following_BT = raw["documents"][:, :-1], raw["documents"][:, 1:]
        # Where a document ends is seen anyway.
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
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Adds "permuted_accuracy": predicted tokens that were right, and all."""
        num_targets = count_targets(batch["labels"], IGNORE_INDEX)
        # A pipeline's stages before the last have a single 0.
        loss_sum, correct = model(**self.arguments(batch), with_metrics=True).expand(2)
        return Terms(loss_sum, num_targets, {"permuted_accuracy": torch.stack([correct, num_targets])})

    def _places(self, keys_B: np.ndarray, T: int) -> np.ndarray:
        """Spans of 1 to max_span neighbours, each of L anywhere in a context of K·L tokens, K being
        predict_every (section 3.1, span-based prediction). The contexts are laid one behind the other, the
        first anywhere and round the row's end, so that every place is as likely. They leave a rest of less
        than K tokens, so that a row's places are always T // K: int64 (B, M), ascending."""
        K, M = self._config.predict_every, self._config.num_predicted(T)
        units_M = np.arange(M)
        # As many contexts as can be; the last ones hold nothing.
        lengths_BC = 1 + np.floor(uniform(keys_B, _LENGTH, units_M) * self._config.max_span).astype(np.int64)
        ends_BC = np.minimum(lengths_BC.cumsum(axis=1), M)
        starts_BC = np.concatenate([np.zeros_like(ends_BC[:, :1]), ends_BC[:, :-1]], axis=1)
        room_BC = (K - 1) * (ends_BC - starts_BC) + 1
        shifts_BC = np.floor(uniform(keys_B, _PLACE, units_M) * room_BC).astype(np.int64)
        begins_B = np.floor(uniform_of_rows(keys_B, _BEGIN) * T).astype(np.int64)
        # The m-th place belongs to the context whose m-th part of 1 / K of the row it is.
        context_BM = (ends_BC[:, None, :] <= units_M[:, None]).sum(-1)
        spans_BC = (K - 1) * starts_BC + shifts_BC + begins_B[:, None]
        return np.sort((np.take_along_axis(spans_BC, context_BM, axis=1) + units_M) % T, axis=1)
