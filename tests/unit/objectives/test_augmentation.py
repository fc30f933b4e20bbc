"""Changes of images follow from the key of the sample, and are what they are said to be."""

from __future__ import annotations

import numpy as np
import torch

from llmtrain.objectives.augmentation import augmented, draw_changes
from llmtrain.objectives.image_classification import ImageClassification, ImageClassificationConfig

CONFIG = ImageClassificationConfig(crop=2, flip=True, cutout=4)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 10, 12)).astype(np.float32)


def by_hand(image: np.ndarray, change: list[int]) -> np.ndarray:
    top, left, mirrored, y, x = change
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
    cut = padded[:, top : top + 10, left : left + 12].copy()
    if mirrored:
        cut = cut[:, :, ::-1].copy()
    cut[:, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 0
    return cut


def test_each_change_as_by_hand() -> None:
    whole = images(50)
    changes = draw_changes(np.arange(50), 10, 12, CONFIG)
    found = augmented(torch.from_numpy(whole), torch.from_numpy(changes), CONFIG).numpy()
    for image, change, got in zip(whole, changes.tolist(), found, strict=True):
        np.testing.assert_array_equal(got, by_hand(image, change))
    assert changes.min(0).tolist() == [0] * 5
    assert changes.max(0).tolist() == [4, 4, 1, 9, 11]


def test_only_training_changes_images_and_by_the_key_alone() -> None:
    objective, whole = ImageClassification(CONFIG), images(8)
    raw = {"images": whole, "labels": np.zeros(8, np.int64), "keys": np.arange(8)}
    batch = objective.collate(raw)
    changed = objective.inputs(batch)
    assert not torch.equal(changed, batch["images"])
    order = np.array([3, 1, 7])
    part = objective.inputs(objective.collate({name: values[order] for name, values in raw.items()}))
    torch.testing.assert_close(part, changed[order], rtol=0, atol=0)

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor, labels_B: torch.Tensor | None = None, **_: object) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3)) if labels_B is None else x.sum()

    seen: list[torch.Tensor] = []
    objective.evaluate(Mean(), batch)
    objective(Mean(), batch)
    assert torch.equal(seen[0], batch["images"])
    assert torch.equal(seen[1], changed)
