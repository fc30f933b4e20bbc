"""Labelled images of one split, held in memory.

Dim names: N images; M images of a micro-batch; H, W, C height, width and channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.picture_files import read_pictures
from llmtrain.data.datasets.pictures import Pictures, Shape
from llmtrain.errors import DataError, Problem, nearest

VALIDATION = 0.1
"""Share of the training images that is held out where the files have a test part alone."""


class Images:
    """Labelled images, held in memory as bytes."""

    SIDE = 28
    MEAN, STD = 0.1307, 0.3081
    """Mean and standard deviation of MNIST's training pixels, scaled to [0, 1]."""

    SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # noqa: RUF012
    """Range of hashes of each split, where the files say none. A hash in [0, 1) of an image's pixels and
    label decides its split."""

    def __init__(
        self,
        name: str,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        names: tuple[str, ...] = tuple(map(str, range(10))),
        mean: Sequence[float] = (MEAN,),
        std: Sequence[float] = (STD,),
    ) -> None:
        """images: uint8; labels: int64; names: of the classes; mean, std: of the pixels, scaled to [0, 1], of
        each channel, or one for all."""
        self.name = name
        self.pictures_NHWC = images_NHWC
        self.labels = labels_N
        self.names = names
        self._mean, self._std = np.array(mean, np.float32), np.array(std, np.float32)

    @classmethod
    def open(
        cls,
        path: str,
        split: str,
        num_classes: int = 10,
        *,
        size: int = SIDE,
        channels: int = 1,
        resize: bool = True,
        mean: Sequence[float] = (MEAN,),
        std: Sequence[float] = (STD,),
    ) -> Images:
        """Return one split of the images at `path`, which is

        - a .csv or .csv.gz file with the pixels (0 to 255) and the label per row, without a header;
        - webdataset tar files, such as `…/{000..009}.tar` for ten, with a picture (.jpg, .png, or .npy of
          uint8) and a label (.cls) per sample; a tar may be a URL;
        - a folder with a folder of pictures for each class, or with folders train, validation (or val) and
          test of such;
        - a folder with idx files as MNIST has, or one of them: train-images-idx3-ubyte, .gz or not;
        - an .npz file with the arrays images and labels, or x_train, y_train, x_test and y_test.

        `package:NAME/path` is a file of an installed Python package. Pictures are converted to grey or color.

        Raise DataError if the file is missing or undecodable, a row or sample is malformed, a picture has
        another size, or the split is unknown or empty.
        """
        if split not in cls.SPLITS:
            raise DataError(Problem(path, f"no split {split!r}", nearest(split, list(cls.SPLITS))))
        found = read_pictures(path, Shape(size, channels, num_classes, resize))
        chosen = _members(found, split)
        if not chosen.any():
            raise DataError(Problem(path, f"an empty split {split!r}", "1 row or more", "give more rows"))
        names = found.names or ()
        names += tuple(map(str, range(len(names), num_classes)))
        return cls(split, found.images[chosen], found.labels[chosen], names, mean, std)

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128(self.pictures_NHWC.tobytes())
        digest.update(_narrow(self.labels).tobytes())
        return digest.hexdigest()

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "images" float32 (M, C, H, W), normalized by mean and standard deviation, and "labels" int64
        (M), −1 for EMPTY samples."""
        # EMPTY is −1, which reads the last image; its label is overwritten below.
        images_MHWC = (
            self.pictures_NHWC[indices].astype(np.float32) / np.float32(255) - self._mean
        ) / self._std
        labels_M = np.where(indices == EMPTY, -1, self.labels[indices])
        return {"images": np.ascontiguousarray(images_MHWC.transpose(0, 3, 1, 2)), "labels": labels_M}

    def describe(self) -> str:
        height, width, channels = self.pictures_NHWC.shape[1:]
        return f"{self.name}: {len(self):,} images of {height}×{width}" + (
            " in color" if channels == 3 else ""
        )


def _members(found: Pictures, split: str) -> np.ndarray:
    """Return which images are of the split, bool (N,)."""
    if found.splits is None:
        low, high = Images.SPLITS[split]
        places = _places(found)
        chosen: np.ndarray = (low <= places) & (places < high)
        return chosen
    if split == "test" or "validation" in found.splits:
        return found.splits == split
    is_held_out = _places(found) >= 1 - VALIDATION
    return (found.splits == "train") & (is_held_out if split == "validation" else ~is_held_out)


def _places(found: Pictures) -> np.ndarray:
    """Return a hash in [0, 1) of each image's pixels and label, float64 (N,)."""
    labels = _narrow(found.labels)
    pairs = zip(found.images, labels, strict=True)
    hashes = (xxhash.xxh3_64_intdigest(image.tobytes() + label.tobytes()) for image, label in pairs)
    return np.array([number / 2**64 for number in hashes])


def _narrow(labels: np.ndarray) -> np.ndarray:
    """Return the labels in the bytes that are hashed: one each, where that is enough."""
    return labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.int64)
