"""What objectives of generators are asked, besides what all objectives are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from llmtrain.objectives.base import Batch, Terms

if TYPE_CHECKING:
    from torch import Tensor, nn


@runtime_checkable
class TakesTurns(Protocol):
    """An objective of two parts of a model, each with a loss of its own."""

    def parts(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """Return the part that takes a step on each micro-batch, and the one that follows."""

    def discriminator_terms(self, model: Any, batch: Batch) -> Terms:
        """Return the loss of the first part's turn."""

    def generator_terms(self, model: Any, batch: Batch) -> Terms:
        """Return the loss of the second part's turn."""


@runtime_checkable
class Classifies(Protocol):
    """An objective whose samples a trained classifier looks at."""

    pixel_mean: float
    pixel_std: float
    """By which pixels, scaled to [0, 1], are normalized in its images."""
    classify: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    """Images → features and logits."""

    @property
    def classifier(self) -> str | None:
        """Return the folder of the classifier; None: there is none."""


@runtime_checkable
class HasFeatures(Protocol):
    """A classifier that says what its last layer reads."""

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of images, (B, F)."""

    def logits(self, features_BF: Tensor) -> Tensor:
        """Return the logits of the classes, (B, C)."""


@runtime_checkable
class DrawsSamples(Protocol):
    """An objective whose model makes images."""

    def samples(self, model: Any) -> np.ndarray:
        """Return images of noise that is always the same, uint8 (N, height, width, channels)."""

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        """Yield a line for each sign in the figures of an evaluation that the model has failed."""
