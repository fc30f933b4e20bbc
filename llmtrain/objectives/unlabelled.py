"""What objectives over tables without labels have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtrain.tables.ragged import Column


class Unlabelled:
    """Base of configs whose rows are texts alone: the part of TaskReader about labels."""

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        if not labels:
            raise ValueError("no row to train on", "rows of the training split")
        return ()

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        return {}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        return {}
