"""Labelled pictures as arrays, and what is common to the files that they are read from.

Dim names: N pictures; H, W, C height, width and channels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil

from llmtrain.corpus.npy import parse_array
from llmtrain.errors import DataError, Problem
from llmtrain.prepare.folder_scan import short_name

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}
"""Extension → format name of Pillow."""
LARGEST_PICTURE = 64 << 20
"""Maximum bytes of a file of a picture; pictures of the most pixels allowed are smaller."""


@dataclass(frozen=True)
class Shape:
    """Size of the pictures that a model reads, and number of its classes."""

    size: int = 28
    """Height and width, in pixels."""
    channels: int = 1
    """1: grey, 3: color."""
    num_classes: int = 10
    resize: bool = True
    """Scale picture files to this size; false: refuse those of another size. Arrays of another size
    are always refused."""

    @property
    def numbers(self) -> int:
        return self.size**2 * self.channels

    def label(self, label: int, where: str) -> int:
        """Return a label. Raise DataError for one beyond the classes."""
        if not 0 <= label < self.num_classes:
            got, allowed = f"the label {short_name(str(label))}", f"0 to {self.num_classes - 1}"
            remedy = "give model.num_classes=… if the data has more classes"
            raise DataError(Problem(where, got, allowed, remedy if label >= 0 else ""))
        return label

    def array(self, pictures: np.ndarray, where: str) -> np.ndarray:
        """Return arrays of grey or color, uint8 (N, H, W) or (N, H, W, 3), as (N, H, W, C). Raise DataError
        for another size, channels or type."""
        side = self.size
        fits = pictures.ndim in (3, 4) and pictures.shape[1:3] == (side, side)
        if pictures.ndim == 4 and pictures.shape[3] not in (1, 3):
            fits = False
        if pictures.dtype != np.uint8 or not fits:
            sizes = " × ".join(map(str, pictures.shape[1:])) or "no size"
            allowed = f"uint8 of {side} × {side}, grey or × 3"
            remedy = "give model.image_size=…, or scale them"
            raise DataError(Problem(where, f"pictures of {sizes} as {pictures.dtype}", allowed, remedy))
        if pictures.ndim == 3:
            pictures = pictures[..., None]
        if self.channels == 3:
            return np.broadcast_to(pictures, (*pictures.shape[:3], 3))
        if pictures.shape[3] == 3:
            # As Pillow converts color to grey.
            weights = np.array([19595, 38470, 7471], np.uint32)
            pictures = ((pictures.astype(np.uint32) @ weights + 0x8000) >> 16)[..., None].astype(np.uint8)
        return pictures

    def decode(self, content: bytes, extension: str, where: str) -> np.ndarray:
        """Return the picture of a file (.jpg, .png, .npy), uint8 (H, W, C). Raise DataError for what is none,
        or has another size that may not be scaled."""
        from PIL import Image

        try:
            if extension == "npy":
                array = parse_array(content).squeeze()
                if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
                    raise ValueError(f"{array.dtype} of shape {array.shape}, not uint8 (H, W) or (H, W, 3)")
                picture = Image.fromarray(array)
            else:
                picture = _opened(content)
            if picture.size != (self.size, self.size) and not self.resize:
                got, allowed = "×".join(map(str, picture.size)), f"{self.size}×{self.size}"
                remedy = "give data.resize=true to scale them, or model.image_size=…"
                raise DataError(Problem(where, f"a picture of {got} pixels", allowed, remedy))
            picture = picture.convert("L" if self.channels == 1 else "RGB").resize((self.size, self.size))
        except (OSError, ValueError, TypeError, SyntaxError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise DataError(Problem(where, f"no picture ({reason})", f"a .{extension} file")) from error
        return np.asarray(picture, dtype=np.uint8).reshape(self.size, self.size, self.channels)


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures, held in memory."""

    images: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray
    """int64 (N,)."""
    splits: np.ndarray | None = None
    """Name of the split of each, where the files say it: train, validation or test, (N,)."""
    names: tuple[str, ...] | None = None
    """Names of the classes, where the files have them."""


def refuse_too_many(count: int, shape: Shape, where: str) -> None:
    """Raise DataError if so many pictures would take more than the memory that is free."""
    needed, free = count * shape.numbers, psutil.virtual_memory().available
    if needed > free:
        got = f"{count:,} pictures, which take {needed / 2**30:,.1f} GiB at {shape.size}×{shape.size}"
        raise DataError(Problem(where, got, f"the {free / 2**30:,.1f} GiB of memory that are free"))


def _opened(content: bytes) -> Image.Image:
    """Return the picture, not yet decoded. Raise OSError or ValueError if it is not one of FORMATS.

    Restrict formats by content, not by name: some formats that Pillow reads start external programs. Also
    bound the number of pixels, since a small file may decode to more than memory holds.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values())))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError("its content is neither JPEG nor PNG") from None
