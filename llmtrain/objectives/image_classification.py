"""Image classification: one label per sample.

Dim names: B samples, C classes, H and W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    ObjectiveConfig,
    Shown,
    Terms,
    count_targets,
    ratio,
    tensors,
)

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling


@dataclass(frozen=True)
class ImageClassificationConfig(ObjectiveConfig):
    """Predict the label of an image."""

    teaches: ClassVar = ("classifier",)
    data: ClassVar = "images"

    kind: Literal["image_classification"] = "image_classification"

    def measures(self) -> tuple[str, ...]:
        return ("accuracy",)

    def row(self, sequence_length: int) -> Row:
        """Count an image as one token."""
        return Row(1, predicted=1)

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.images import Images

        return {"": Images.open(data.path, split, model.num_classes)}

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> ImageClassification:
        return ImageClassification()


class ImageClassification:
    """Cross-entropy of the label; evaluation also measures the accuracy."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "images" float32 (B, 1, H, W) and "labels" int64 (B) as tensors, with IGNORE_INDEX in
        place of the negative labels of empty samples."""
        labels_B = np.where(raw["labels"] < 0, IGNORE_INDEX, raw["labels"])
        return tensors({"images": raw["images"], "labels": labels_B})

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"]))

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        loss_sum = model(batch["images"], labels_B=batch["labels"], dropout_keys_B=batch.get(DROPOUT_KEYS))
        return Terms(loss_sum, count_targets(batch["labels"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the metric "accuracy"."""
        import torch.nn.functional as F

        labels_B = batch["labels"]
        logits_BC = model(batch["images"]).float()
        loss_sum = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
        # No class equals IGNORE_INDEX, so an empty sample never counts as correct.
        correct = (logits_BC.argmax(dim=-1) == labels_B).sum()
        num_targets = count_targets(labels_B)
        return Terms(loss_sum, num_targets, {"accuracy": ratio(correct, num_targets)})

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the label; the image has no text."""
        return Shown(f"label {int(row['labels'])}", [])
