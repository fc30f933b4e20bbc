"""Changes of images in training: cut out of a padded image, mirrored, with a blank square. What is changed
follows from the key of the sample alone, that is from (seed, epoch, sample).

Dim names: B samples, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmtrain.objectives.draws import uniform

if TYPE_CHECKING:
    from torch import Tensor

_CHANGES = 40
"""Purpose of the draws, as of `draws.uniform`."""
TOP, LEFT, MIRRORED, BLANK_Y, BLANK_X = range(5)


class Changes(Protocol):
    """How far images are changed; see ImageClassificationConfig."""

    @property
    def crop(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def cutout(self) -> int: ...


def draw_changes(keys_B: np.ndarray, height: int, width: int, config: Changes) -> np.ndarray:
    """Return for each image where it is cut, in pixels from the padded image's corner; whether it is
    mirrored; and the center of the blank square: int64 (B, 5)."""
    drawn_B5 = uniform(keys_B, _CHANGES, np.arange(5))
    counts = np.array([2 * config.crop + 1, 2 * config.crop + 1, 2, height, width])
    changes_B5 = (drawn_B5 * counts).astype(np.int64)
    if not config.flip:
        changes_B5[:, MIRRORED] = 0
    return changes_B5


def augmented(images_BCHW: Tensor, changes_B5: Tensor, config: Changes) -> Tensor:
    """Return the images changed as `draw_changes` says. Padding and squares have the value 0, which is the
    mean of normalized images (as He et al., arXiv:1512.03385, section 4.2)."""
    import torch

    B, C, H, W = images_BCHW.shape
    device = images_BCHW.device
    y_H, x_W = torch.arange(H, device=device), torch.arange(W, device=device)
    rows_BH = changes_B5[:, TOP, None] - config.crop + y_H
    columns_BW = changes_B5[:, LEFT, None] - config.crop + x_W
    columns_BW = torch.where(changes_B5[:, MIRRORED, None] > 0, columns_BW.flip(1), columns_BW)
    is_inside = ((rows_BH >= 0) & (rows_BH < H))[:, :, None] & ((columns_BW >= 0) & (columns_BW < W))[:, None]
    if config.cutout:
        half = config.cutout // 2
        is_row = _is_within(y_H - changes_B5[:, BLANK_Y, None] + half, config.cutout)
        is_column = _is_within(x_W - changes_B5[:, BLANK_X, None] + half, config.cutout)
        is_inside &= ~(is_row[:, :, None] & is_column[:, None])
    # Two gathers rather than an index of four dims, which takes five times as long on a CPU.
    rows = rows_BH.clamp(0, H - 1)[:, None, :, None].expand(B, C, H, W)
    columns = columns_BW.clamp(0, W - 1)[:, None, None, :].expand(B, C, H, W)
    return images_BCHW.gather(2, rows).gather(3, columns) * is_inside[:, None]


def _is_within(distance: Tensor, length: int) -> Tensor:
    return (distance >= 0) & (distance < length)
