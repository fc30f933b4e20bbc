"""What networks of images keep for the backward pass, against what torch keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.models.adversarial.config import GANConfig
from llmtrain.models.convolutional.resnet_config import ResNetConfig
from llmtrain.models.feedforward.config import MLPConfig
from llmtrain.models.registry import family_of
from llmtrain.objectives.adversarial import Adversarial, AdversarialConfig
from tests.support.planned_memory import NUMBERS, built, kept_by, kept_bytes

IMAGES = 4


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(hidden=(300, 200)),
        MLPConfig(hidden=(300, 200), activation="gelu", dropout=0.5),
        ResNetConfig(depths=(1, 2), widths=(16, 32), image_size=48, num_classes=7, stem_width=16),
        ResNetConfig(block="bottleneck", depths=(2, 1), widths=(32, 64), image_size=40, num_classes=5),
        ResNetConfig(
            depths=(1, 2), widths=(16, 32), stem="cifar", stem_width=16, image_size=32, shortcut="padding"
        ),
    ],
    ids=["mlp", "mlp-gelu-dropout", "resnet", "bottleneck", "cifar"],
)
def test_classifiers(config: Any) -> None:
    model = built(family_of(config).build(config), "fp32")
    images = torch.randn(IMAGES, config.channels, config.image_size, config.image_size)
    labels, keys = torch.zeros(IMAGES, dtype=torch.long), torch.arange(IMAGES)
    expected = kept_by(config, NUMBERS["fp32"], IMAGES, 1)
    assert kept_bytes(model, lambda: model(images, labels, keys)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "config",
    [
        GANConfig(hidden=(128, 256)),
        GANConfig(hidden=(512, 1024), latent_size=1000, dropout=0.3),
        GANConfig(layers="convolutional", width=16, image_size=32, channels=3),
        GANConfig(layers="convolutional", width=16, image_size=16, discriminator_norm="none"),
    ],
    ids=["linear", "dropout", "dcgan", "no-norm"],
)
def test_the_turn_that_keeps_more(config: GANConfig) -> None:
    model = built(family_of(config).build(config), "fp32")
    objective = Adversarial(AdversarialConfig(), config.latent_size)
    side = config.image_size
    batch = {
        "images": torch.randn(IMAGES, config.channels, side, side),
        "noise": torch.randn(IMAGES, config.latent_size),
        "further_noise": torch.randn(IMAGES, config.latent_size),
        "labels": torch.zeros(IMAGES, dtype=torch.long),
    }
    kept = []
    for part, turn in (("generator", "discriminator_terms"), ("discriminator", "generator_terms")):
        model.requires_grad_(True)
        getattr(model, part).requires_grad_(False)
        kept.append(kept_bytes(model, lambda turn=turn: getattr(objective, turn)(model, batch).loss_sum))  # type: ignore[misc]
    expected = kept_by(config, NUMBERS["fp32"], IMAGES, 1)
    assert max(kept) == pytest.approx(expected, rel=0.05)
