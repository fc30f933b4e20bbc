"""One label a sample.

Dim names: B samples, C classes, H and W the image's sides.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmtrain.nn.head import IGNORE_INDEX
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, Terms, count_targets


class Classification:
    """Cross-entropy of the label; evaluation also gives the accuracy."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """{"images": float32 (B, 1, H, W), "labels": int64 (B), negative for an empty sample} → the same
        as tensors, with IGNORE_INDEX for negative labels."""
        labels_B = np.where(raw["labels"] < 0, IGNORE_INDEX, raw["labels"])
        return {"images": torch.from_numpy(raw["images"]), "labels": torch.from_numpy(labels_B)}

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"], IGNORE_INDEX))

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        loss_sum = model(batch["images"], labels_B=batch["labels"], dropout_keys_B=batch.get(DROPOUT_KEYS))
        return Terms(loss_sum, count_targets(batch["labels"], IGNORE_INDEX))

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Adds the metric "accuracy": correct predictions and all."""
        labels_B = batch["labels"]
        logits_BC = model(batch["images"]).float()
        loss_sum = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
        # No class is IGNORE_INDEX, so an empty sample is never correct.
        correct = (logits_BC.argmax(dim=-1) == labels_B).sum()
        num_targets = count_targets(labels_B, IGNORE_INDEX)
        return Terms(loss_sum, num_targets, {"accuracy": torch.stack([correct, num_targets])})
