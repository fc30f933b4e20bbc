"""Image classification: one label per sample.

Dim names: B samples, C channels, H and W height and width of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import DataError, Problem
from llmtrain.nn.model_config import Row
from llmtrain.objectives.augmentation import augmented, draw_changes
from llmtrain.objectives.base import Batch, ObjectiveConfig, tensors
from llmtrain.objectives.one_label import MEASURES, OneLabel

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset

CHANGES = "changes"
"""Key of a batch: how each image is changed in training, see augmentation.py."""


@dataclass(frozen=True)
class ImageClassificationConfig(ObjectiveConfig):
    """Predict the label of an image."""

    teaches: ClassVar = ("classifier",)
    data: ClassVar = "images"

    kind: Literal["image_classification"] = "image_classification"
    crop: int = 0
    """Pixels of padding on each side, out of which training cuts a part of the image's own size; 0: none."""
    flip: bool = False
    """Training mirrors each image with probability 1/2; not for digits or letters."""
    cutout: int = 0
    """Side, in pixels, of a square that training blanks at a random place (arXiv:1708.04552); 0: none."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.crop >= 0, "crop", self.crop, "0 or more")
        yield from require(self.cutout >= 0, "cutout", self.cutout, "0 or more")

    def measures(self) -> tuple[str, ...]:
        return MEASURES

    def row(self, sequence_length: int) -> Row:
        """Count an image as one token."""
        return Row(1, predicted=1)

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.images import Images

        if getattr(model, "inputs", None) not in (None, model.channels * model.image_size**2):
            got = f"{model.inputs} with images of {model.channels} × {model.image_size} × {model.image_size}"
            raise DataError(Problem("model.inputs", got, "null", "leave it out"))
        for key, values in (("data.mean", data.mean), ("data.std", data.std)):
            if len(values) not in (1, model.channels):
                allowed = f"one, or {model.channels} as model.channels has"
                raise DataError(Problem(key, f"{len(values)} numbers", allowed))
        images = Images.open(
            data.path,
            split,
            model.num_classes,
            size=model.image_size,
            channels=model.channels,
            resize=data.resize,
            mean=data.mean,
            std=data.std,
        )
        return {"": images}

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> ImageClassification:
        return ImageClassification(self)


class ImageClassification(OneLabel):
    """Cross-entropy of the label. Training changes images as the config says, evaluation leaves them
    alone."""

    key: ClassVar = "images"

    def __init__(self, config: ImageClassificationConfig | None = None) -> None:
        self.config = config or ImageClassificationConfig()
        self._changes = bool(self.config.crop or self.config.flip or self.config.cutout)

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "images" float32 (B, C, H, W), "labels" int64 (B), and "changes" if training makes any,
        drawn by the keys of the samples."""
        batch = super().collate(raw)
        if self._changes:
            height, width = raw["images"].shape[2:]
            batch |= tensors({CHANGES: draw_changes(raw["keys"], height, width, self.config)})
        return batch

    def inputs(self, batch: Batch) -> Tensor:
        if CHANGES not in batch:
            return batch["images"]
        return augmented(batch["images"], batch[CHANGES], self.config)
