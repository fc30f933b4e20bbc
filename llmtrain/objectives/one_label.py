"""What classifiers of images and of rows have in common: one class for each sample.

Dim names: B samples, C classes, N rows of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmtrain.data.datasets.base import EMPTY
from llmtrain.labels import IGNORE_INDEX
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, Shown, Terms, count_targets, ratio, tensors
from llmtrain.scoring.classification import CLASS_FIGURES, class_figures, class_report
from llmtrain.scoring.figure import Figure
from llmtrain.scoring.images import MOST_CLASSES, top_figures, worst_mistakes
from llmtrain.scoring.report import Report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling

MEASURES = (*CLASS_FIGURES, "top5_accuracy")


class OneLabel:
    """Cross-entropy of the label; evaluation measures accuracy and further figures of all rows."""

    key: ClassVar[str]
    """Of the model's inputs in a batch."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return the inputs, float32, and "labels", int64 (B), as tensors, with IGNORE_INDEX in place of the
        negative labels of empty samples."""
        labels_B = np.where(raw["labels"] < 0, IGNORE_INDEX, raw["labels"])
        return tensors({self.key: raw[self.key], "labels": labels_B})

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"]))

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the model is trained on."""
        return batch[self.key]

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        keys_B = batch.get(DROPOUT_KEYS)
        loss_sum = model(self.inputs(batch), labels_B=batch["labels"], dropout_keys_B=keys_B)
        return Terms(loss_sum, count_targets(batch["labels"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the metric "accuracy", and as rows the log-probabilities of the classes."""
        import torch.nn.functional as F

        labels_B = batch["labels"]
        logits_BC = model(batch[self.key]).float()
        loss_sum = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
        # No class equals IGNORE_INDEX, so an empty sample never counts as correct.
        correct = (logits_BC.argmax(dim=-1) == labels_B).sum()
        num_targets = count_targets(labels_B)
        rows = list(F.log_softmax(logits_BC, -1).cpu().numpy())
        return Terms(loss_sum, num_targets, {"accuracy": ratio(correct, num_targets)}, rows)

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return accuracy and top-5 accuracy, and of up to MOST_CLASSES classes the other figures of
        classification."""
        log_NC, labels_N, _ = _of_rows(dataset, rows)
        found = top_figures(log_NC, labels_N, intervals)
        if log_NC.shape[1] <= MOST_CLASSES:
            found |= class_figures(np.exp(log_NC), labels_N, intervals)
        return found

    def report(self, dataset: Any, rows: Mapping[int, np.ndarray]) -> Report:
        """Return the confusion of the classes, and of images the worst mistakes."""
        log_NC, labels_N, numbers_N = _of_rows(dataset, rows)
        mistakes = worst_mistakes(log_NC, labels_N, numbers_N, getattr(dataset, "pictures_NHWC", None))
        names = tuple(dataset.names[: log_NC.shape[1]])
        return class_report(np.exp(log_NC), labels_N, names, mistakes)

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the label; the sample has no text."""
        return Shown(f"label {int(row['labels'])}", [])


def _of_rows(dataset: Any, rows: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log-probabilities (N, C), labels (N,) and numbers (N,) of the rows that were evaluated."""
    numbers_N = np.array([number for number in rows if number != EMPTY], np.int64)
    return np.stack([rows[number] for number in numbers_N.tolist()]), dataset.labels[numbers_N], numbers_N
