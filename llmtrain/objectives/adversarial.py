"""A generator of images against a discriminator: the original game (Goodfellow et al. 2014, arXiv:1406.2661)
and WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028).

Dim names: B samples; Z numbers of the noise; H, W, K height, width and channels; D features; C classes.
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
    ObjectiveConfig,
    Shown,
    Terms,
    count_targets,
    ratio,
    tensors,
)
from llmtrain.objectives.draws import uniform
from llmtrain.scoring.samples import sample_figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report

_NOISE, _FIXED, _MIXED = 41, 43, 45
"""Purposes of the draws, as of `draws.uniform`; noise takes the next one too."""
CENTER = 0.5
"""Mean and standard deviation that pixels are normalized by, whatever the data say: values from −1 to 1,
which the generator's tanh gives."""
GRID = 64
"""Images of the grid that is drawn from the same noise each time."""
COLLAPSED_VARIETY, COLLAPSED_SHARE = 0.2, 0.5
"""Variety of samples over that of real images, and share of classes met, below which a warning is given."""


@dataclass(frozen=True)
class AdversarialConfig(ObjectiveConfig):
    """Generate images that a discriminator cannot tell from real ones. The discriminator takes a step on each
    micro-batch of a step, then the generator takes one."""

    teaches: ClassVar = ("generator",)
    data: ClassVar = "images"
    takes_turns: ClassVar = True
    has_stages: ClassVar = False

    kind: Literal["adversarial"] = "adversarial"
    loss: Literal["minimax", "wgan_gp"] = "minimax"
    """minimax: cross-entropy of real and generated, where the generator maximizes the error (arXiv:1406.2661,
    section 3); wgan_gp: difference of scores, with a penalty on the gradient (arXiv:1704.00028)."""
    penalty: float = 10.0
    """Factor of the gradient penalty (wgan_gp)."""
    smoothing: float = 0.0
    """By how much the discriminator's target for real images is below 1 (minimax; arXiv:1606.03498)."""
    classifier: str | None = None
    """A classifier trained here on such images: run or checkpoint folder. Evaluations give the Fréchet
    distance of its features and the share of classes met; null: neither."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.penalty >= 0.0, "penalty", self.penalty, "0 or more")
        yield from require(0.0 <= self.smoothing < 0.5, "smoothing", self.smoothing, "0 up to 0.5")

    def measures(self) -> tuple[str, ...]:
        of_classifier = ("frechet_distance", "classes_met") if self.classifier else ()
        return (*of_classifier, "generator_loss", "variety")

    def row(self, sequence_length: int) -> Row:
        """Count an image as one token."""
        return Row(1, predicted=1)

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        if self.loss == "wgan_gp" and model.layers == "convolutional" and model.discriminator_norm != "none":
            got = f"{model.discriminator_norm} with wgan_gp, which penalizes each image's gradient"
            yield Problem("model.discriminator_norm", got, "none")

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.images import Images

        images = Images.open(
            data.path,
            split,
            model.num_classes,
            size=model.image_size,
            channels=model.channels,
            resize=data.resize,
            mean=(CENTER,),
            std=(CENTER,),
        )
        return {"": images}

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> Adversarial:
        return Adversarial(self, model.latent_size)


class Adversarial:
    """The losses of both turns; noise follows from the keys of the real samples beside it."""

    pixel_mean = pixel_std = CENTER

    def __init__(self, config: AdversarialConfig, latent_size: int) -> None:
        self.config = config
        self._latent_size = latent_size
        self.classify: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        """Images → features (B, D) and logits (B, C) of the classifier; None: there is none."""

    @property
    def classifier(self) -> str | None:
        """Return where the classifier is."""
        return self.config.classifier

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "images" (B, K, H, W), "noise" and "further_noise" (B, Z), "mixed" (B,), all float32, and
        "labels" int64 (B), IGNORE_INDEX for empty samples."""
        labels_B = np.where(raw["labels"] < 0, IGNORE_INDEX, raw["labels"])
        keys_B = raw["keys"]
        drawn = uniform(keys_B, _MIXED, np.zeros(1))[:, 0].astype(np.float32)
        return tensors(
            {
                "images": raw["images"],
                "noise": gaussian(keys_B, _NOISE, self._latent_size),
                "further_noise": gaussian(~keys_B, _NOISE, self._latent_size),
                "mixed": drawn,
                "labels": labels_B,
            }
        )

    def target_count(self, batch: Batch) -> int:
        return int(count_targets(batch["labels"]))

    def discriminator_terms(self, model: Any, batch: Batch) -> Terms:
        """Return the loss of the discriminator's turn; the generator has no gradient of it."""
        import torch
        import torch.nn.functional as F

        real, keys_B = batch["images"], batch.get(DROPOUT_KEYS)
        with torch.no_grad():
            made = model(batch["noise"])
        on_real_B, on_made_B = model.score(real, keys_B), model.score(made, keys_B)
        if self.config.loss == "wgan_gp":
            loss_B = on_made_B - on_real_B + self.config.penalty * self._penalty(model, batch, made)
        else:
            # The cross-entropy of the logit z and the target t is softplus(z) − t·z.
            smoothed_B = F.softplus(on_real_B.float()) - (1.0 - self.config.smoothing) * on_real_B.float()
            loss_B = smoothed_B + F.softplus(on_made_B.float())
        count = count_targets(batch["labels"])
        is_there_B = batch["labels"] >= 0
        told = ((on_real_B > on_made_B) & is_there_B).float().sum()
        loss_sum = (loss_B.float() * is_there_B).sum()
        return Terms(loss_sum, count, {"told_apart": ratio(told, count)})

    def generator_terms(self, model: Any, batch: Batch) -> Terms:
        """Return the loss of the generator's turn, with further noise."""
        import torch.nn.functional as F

        score_B = model.score(model(batch["further_noise"]), batch.get(DROPOUT_KEYS)).float()
        loss_B = -score_B if self.config.loss == "wgan_gp" else F.softplus(-score_B)
        loss_sum = (loss_B * (batch["labels"] >= 0)).sum()
        return Terms(loss_sum, count_targets(batch["labels"]))

    def parts(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """Return discriminator and generator."""
        return model.discriminator, model.generator

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return self.discriminator_terms(model, batch)

    def _penalty(self, model: Any, batch: Batch, made: Tensor) -> Tensor:
        """Return (‖∇ score‖ − 1)² of each sample at random points between real and generated (algorithm
        1)."""
        import torch

        share = batch["mixed"].view(-1, 1, 1, 1)
        between = (share * batch["images"] + (1 - share) * made).detach().requires_grad_()
        score = model.score(between, batch.get(DROPOUT_KEYS)).sum()
        (gradient,) = torch.autograd.grad(score, between, create_graph=True)
        penalty_B: Tensor = (gradient.flatten(1).float().norm(dim=1) - 1).square()
        return penalty_B

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the metrics "generator_loss", "told_apart" and "variety"; with a classifier, as rows, features
        of a real and a generated image, and the class of the latter."""
        import torch

        with torch.enable_grad():
            terms = self.discriminator_terms(model, batch)
        generator = self.generator_terms(model, batch)
        made, count = model(batch["noise"]), terms.num_targets
        is_there_B = batch["labels"] >= 0
        metrics = dict(terms.metrics)
        if int(count) > 1:
            spread = [images[is_there_B].flatten(1).std(0).mean() for images in (made, batch["images"])]
            metrics["variety"] = ratio(spread[0] / spread[1].clamp_min(1e-12) * count, count)
        metrics["generator_loss"] = ratio(generator.loss_sum, count)
        rows = None
        if self.classify is not None:
            of_real_BD, _ = self.classify(batch["images"])
            of_made_BD, logits_BC = self.classify(made)
            classes_B1 = logits_BC.argmax(1, keepdim=True).float()
            found = torch.cat([of_real_BD, of_made_BD, classes_B1], 1)
            rows = list(found.detach().float().cpu().numpy())
        return Terms(terms.loss_sum.detach(), count, metrics, rows)

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return the Fréchet distance of generated images, and the share of the classes that they meet."""
        return sample_figures(np.stack(list(rows.values())), len(np.unique(dataset.labels)))

    def report(self, dataset: Any, rows: Mapping[int, np.ndarray]) -> Report | None:
        return None

    def samples(self, model: Any) -> np.ndarray:
        """Return GRID images of noise that is always the same, uint8 (GRID, H, W, K)."""
        import torch

        noise_BZ = gaussian(np.arange(GRID), _FIXED, self._latent_size)
        weight = next(model.parameters())
        made = model(torch.from_numpy(noise_BZ).to(weight.device, weight.dtype))
        pixels = ((made.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        """Yield a line for each sign that the generator makes the same few images (mode collapse)."""
        variety, met = figures.get("variety", 1.0), figures.get("classes_met", 1.0)
        if variety < COLLAPSED_VARIETY:
            yield f"mode collapse: generated images differ by {variety:.0%} of what real ones do"
        if met < COLLAPSED_SHARE:
            yield f"mode collapse: generated images are of {met:.0%} of the classes"

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the label; the image has no text."""
        return Shown(f"label {int(row['labels'])}", [])


def gaussian(keys_B: np.ndarray, what: int, count: int) -> np.ndarray:
    """Return normal numbers that follow from the keys alone, float32 (B, count), by Box and Muller (1958)."""
    places = np.arange(count)
    radius = np.sqrt(-2 * np.log1p(-uniform(keys_B, what, places)))
    angle = 2 * np.pi * uniform(keys_B, what + 1, places)
    return (radius * np.cos(angle)).astype(np.float32)
