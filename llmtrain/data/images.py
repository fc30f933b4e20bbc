"""Labelled images in one CSV file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import xxhash

from llmtrain.data.datasets import EMPTY
from llmtrain.data.packages import resolve_package_path
from llmtrain.errors import DataError, Problem, nearest


class Images:
    """Labelled 28×28 grey images, held in memory as bytes."""

    SIDE = 28
    MEAN, STD = 0.1307, 0.3081
    """Of MNIST's training pixels, scaled to [0, 1]."""

    SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # noqa: RUF012
    """Each row's place in [0, 1) comes from a hash of the row alone."""

    def __init__(self, name: str, images_NHW: np.ndarray, labels_N: np.ndarray) -> None:
        """images: uint8 (N, 28, 28), labels: uint8 (N)."""
        self.name = name
        self._images_NHW = images_NHW
        self._labels_N = labels_N

    @classmethod
    def open(cls, path: str, split: str, num_classes: int = 10) -> Images:
        """One split of a .csv or .csv.gz file: 784 pixels (0 to 255) and the label a row, no header.

        `package:NAME/path` is a file inside an installed Python package.
        Raises DataError: file missing or undecodable, malformed row (named), unknown or empty split.
        """
        if split not in cls.SPLITS:
            raise DataError(Problem(path, f"no split {split!r}", nearest(split, list(cls.SPLITS))))
        rows = _read_rows(resolve_package_path(path), cls.SIDE**2, num_classes)
        low, high = cls.SPLITS[split]
        places = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) / 2**64 for row in rows])
        chosen = rows[(low <= places) & (places < high)]
        if len(chosen) == 0:
            raise DataError(Problem(path, f"an empty split {split!r}", "1 row or more", "give more rows"))
        return cls(split, chosen[:, :-1].reshape(-1, cls.SIDE, cls.SIDE), chosen[:, -1])

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128(self._images_NHW.tobytes())
        digest.update(self._labels_N.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels_N)

    @property
    def shard_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"images": float32 (M, 1, 28, 28), mean 0 and deviation 1 over MNIST; "labels": int64 (M),
        −1 for an EMPTY sample}."""
        # EMPTY is −1 too: it reads the last image, whose label is then taken away.
        images_MHW = (self._images_NHW[indices].astype(np.float32) / 255.0 - self.MEAN) / self.STD
        labels_M = np.where(indices == EMPTY, -1, self._labels_N[indices].astype(np.int64))
        return {"images": images_MHW[:, None].astype(np.float32), "labels": labels_M}

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} images of {self.SIDE}×{self.SIDE}"


def _read_rows(path: Path, num_pixels: int, num_classes: int) -> np.ndarray:
    """All rows, uint8 (N, num_pixels + 1)."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        lines = content.decode("ascii").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"an unreadable file ({error})"
        raise DataError(
            Problem(str(path), what, ".csv or .csv.gz", "check data.path, or download it again")
        ) from error
    if not lines:
        raise DataError(Problem(str(path), "an empty file", f"rows of {num_pixels} pixels and a label"))
    rows = np.empty((len(lines), num_pixels + 1), dtype=np.uint8)
    for number, line in enumerate(lines, start=1):
        rows[number - 1] = _parse_row(line, f"{path}, row {number}", num_pixels, num_classes)
    return rows


def _parse_row(line: str, where: str, num_pixels: int, num_classes: int) -> list[int]:
    try:
        values = [int(value) for value in line.split(",")]
    except ValueError as error:
        allowed = "whole numbers between commas, and no header"
        raise DataError(Problem(where, f"a value that is no whole number ({error})", allowed)) from None
    if len(values) != num_pixels + 1:
        raise DataError(Problem(where, f"{len(values)} values", f"{num_pixels} pixels and a label"))
    if min(values) < 0 or max(values) > 255:
        wrong = next(value for value in values if not 0 <= value <= 255)
        raise DataError(Problem(where, f"the value {wrong}", "0 to 255"))
    if values[-1] >= num_classes:
        raise DataError(Problem(where, f"the label {values[-1]}", f"0 to {num_classes - 1}"))
    return values
