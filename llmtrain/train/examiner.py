"""The classifier by whose features generated images are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import decode
from llmtrain.data.config import data_config_type
from llmtrain.errors import ConfigError, Problem
from llmtrain.interchange.trained import describe, load_trained
from llmtrain.objectives.turns import Classifies, HasFeatures

KEY = "objective.classifier"


def give_classifier(objective: Any, model: Any, device: torch.device) -> None:
    """Give an objective that names a classifier its features and logits.

    Raise ConfigError for a model that has none, or that reads images of another size.
    """
    if not isinstance(objective, Classifies) or objective.classifier is None:
        return
    path = Path(objective.classifier)
    described, trained = describe(path), load_trained(path)
    theirs: Any = described.config
    if theirs.image_shape is None:
        raise ConfigError(Problem(KEY, f"a model of family {theirs.family}", "a classifier of images"))
    sizes = [theirs.image_shape, (model.image_size, model.channels)]
    if sizes[0] != sizes[1]:
        got, allowed = (f"images of {size}×{size} with {channels} channels" for size, channels in sizes)
        raise ConfigError(Problem(KEY, got, allowed, "train one on images of this size"))
    classifier = trained.build(device)
    if not isinstance(classifier, HasFeatures):
        raise ConfigError(Problem(KEY, f"a model of family {theirs.family}", "simple_cnn, resnet"))
    section = described.data or {"kind": "images"}
    read: Any = decode(data_config_type(section), section)
    mean, std = objective.pixel_mean, objective.pixel_std
    their_mean, their_std = (_of_channels(values, device) for values in (read.mean, read.std))

    @torch.no_grad()
    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        features = classifier.features((images * std + mean - their_mean) / their_std)
        return features, classifier.logits(features)

    objective.classify = classify


def _of_channels(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
