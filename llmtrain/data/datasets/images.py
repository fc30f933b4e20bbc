"""Labeled images from a CSV file or from webdataset tar files."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import psutil
import xxhash

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.config import CacheConfig
from llmtrain.corpus.npy import parse_array
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.corpus.transport import is_remote
from llmtrain.data.datasets.base import EMPTY
from llmtrain.errors import DataError, Problem, nearest
from llmtrain.prepare.decompress import GZIP_MAGIC, unpacked
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.tar_members import tar_members
from llmtrain.reading import open_regular

if TYPE_CHECKING:
    from PIL import Image

PICTURES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}
"""Extension → format name of Pillow."""
LONGEST_ROW = 1 << 14
"""Maximum bytes of a CSV row; 785 numbers up to 255 take 3,140."""
LARGEST_MEMBER = 64 << 20
"""Maximum bytes of a picture in a tar; pictures of the most pixels allowed are smaller."""


class Images:
    """Labeled 28×28 grayscale images, held in memory as bytes."""

    SIDE = 28
    MEAN, STD = 0.1307, 0.3081
    """Mean and standard deviation of MNIST's training pixels, scaled to [0, 1]."""

    SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # noqa: RUF012
    """Range of hashes of each split. A hash in [0, 1) of an image's pixels and label decides its split."""

    def __init__(self, name: str, images_NHW: np.ndarray, labels_N: np.ndarray) -> None:
        """images: uint8 (N, 28, 28), labels: uint8 (N)."""
        self.name = name
        self._images_NHW = images_NHW
        self._labels_N = labels_N

    @classmethod
    def open(cls, path: str, split: str, num_classes: int = 10) -> Images:
        """Return one split of the images at `path`.

        `path` is a .csv or .csv.gz file with 784 pixels (0 to 255) and the label per row, without a header;
        or webdataset tar files, such as `…/{000..009}.tar` for ten, with a picture (.jpg, .png, or .npy of
        uint8) and a label (.cls) per sample. Pictures are converted to grayscale and 28×28.
        `package:NAME/path` is a file of an installed Python package; a tar may be a URL.

        Raise DataError if the file is missing or undecodable, a row or sample is malformed, or the split
        is unknown or empty.
        """
        if split not in cls.SPLITS:
            raise DataError(Problem(path, f"no split {split!r}", nearest(split, list(cls.SPLITS))))
        rows = _read_tars(path, num_classes) if ".tar" in path else _read_csv(path, num_classes)
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

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self._labels_N)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "images" float32 (M, 1, 28, 28), normalized to mean 0 and standard deviation 1 over
        MNIST, and "labels" int64 (M), −1 for EMPTY samples."""
        # EMPTY is −1, which reads the last image; its label is overwritten below.
        images_MHW = (self._images_NHW[indices].astype(np.float32) / 255.0 - self.MEAN) / self.STD
        labels_M = np.where(indices == EMPTY, -1, self._labels_N[indices].astype(np.int64))
        return {"images": images_MHW[:, None].astype(np.float32), "labels": labels_M}

    def describe(self) -> str:
        return f"{self.name}: {len(self):,} images of {self.SIDE}×{self.SIDE}"


# -------------------------------------------------------------------------------------------- one CSV


def _read_csv(name: str, num_classes: int) -> np.ndarray:
    """Return all rows, uint8 (N, pixels + 1)."""
    path, num_pixels = resolve_package_path(name), Images.SIDE**2
    rows: list[np.ndarray] = []
    try:
        packed = open(path, "rb", opener=open_regular)  # noqa: SIM115
        compression, size = "gz" if path.suffix == ".gz" else "", os.fstat(packed.fileno()).st_size
        binary = io.BufferedReader(unpacked(packed, compression, name, size))
        with io.TextIOWrapper(binary, encoding="ascii") as lines:
            while line := lines.readline(LONGEST_ROW + 1):
                where = f"{path}, row {len(rows) + 1}"
                if len(line) > LONGEST_ROW:
                    got = f"a row of more than {LONGEST_ROW:,} bytes"
                    raise DataError(Problem(where, got, f"{num_pixels} pixels and a label"))
                values = _parse_row(line.rstrip("\n"), where, num_pixels, num_classes)
                rows.append(np.array(values, dtype=np.uint8))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"an unreadable file ({error})"
        raise DataError(
            Problem(str(path), what, ".csv, .csv.gz or .tar", "check data.path, or download it again")
        ) from error
    if not rows:
        raise DataError(Problem(str(path), "an empty file", f"rows of {num_pixels} pixels and a label"))
    return np.stack(rows)


def _parse_row(line: str, where: str, num_pixels: int, num_classes: int) -> list[int]:
    try:
        values = [int(value) for value in line.split(",")]
    except ValueError as error:
        got = f"a value that is not an integer ({short_name(str(error))})"
        raise DataError(Problem(where, got, "integers separated by commas, without a header")) from None
    if len(values) != num_pixels + 1:
        raise DataError(Problem(where, f"{len(values)} values", f"{num_pixels} pixels and a label"))
    if min(values) < 0 or max(values) > 255:
        wrong = next(value for value in values if not 0 <= value <= 255)
        raise DataError(Problem(where, f"the value {short_name(str(wrong))}", "0 to 255"))
    if values[-1] >= num_classes:
        raise DataError(Problem(where, f"the label {values[-1]}", f"0 to {num_classes - 1}"))
    return values


# --------------------------------------------------------------------------------------- webdataset


def _read_tars(pattern: str, num_classes: int) -> np.ndarray:
    """Return all samples with a picture and a label, uint8 (N, pixels + 1)."""
    from webdataset.shardlists import expand_urls

    rows = []
    for name in expand_urls(pattern):
        rows += [_row_of(sample, name, num_classes) for sample in _samples(name)]
    if not rows:
        allowed = f"samples of .{', .'.join(PICTURES)} or .npy, each with its .cls"
        raise DataError(Problem(pattern, "no labeled picture", allowed))
    return np.stack(rows)


def _samples(name: str) -> Iterator[dict[str, Any]]:
    """Yield each sample of a tar as extension → bytes, with its key as `__key__`."""
    from webdataset.tariterators import group_by_keys

    try:
        if is_remote(name):
            # The whole tar is held in memory.
            free = psutil.virtual_memory().available
            packed: IO[bytes] = io.BytesIO(Cache(CacheConfig()).read_small(name, free))
        else:
            packed = open(resolve_package_path(name), "rb", opener=open_regular)  # noqa: SIM115
        # Detect compression by content: webdataset names a tar .tar, compressed or not.
        compression = "gz" if packed.read(len(GZIP_MAGIC)) == GZIP_MAGIC else ""
        size = packed.seek(0, os.SEEK_END)
        packed.seek(0)
        with io.BufferedReader(unpacked(packed, compression, name, size)) as stream:
            yield from group_by_keys(_members(stream, name))
    except FileNotFoundError as error:
        remedy = "check data.path; {000..009} stands for ten"
        raise DataError(Problem(name, "no such file", "a webdataset tar", remedy)) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        got = f"a truncated or damaged tar ({str(error) or type(error).__name__})"
        raise DataError(Problem(name, got, "", "copy or download it again")) from error


def _members(stream: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """Yield the pictures and labels of a tar, in the form that webdataset groups."""
    for member, content in tar_members(stream, name, _is_wanted, LARGEST_MEMBER):
        # A link may have a wanted name, but has no content.
        if content is not None or not _is_wanted(member):
            yield {"__url__": name, "fname": member, "data": content or b""}


def _is_wanted(member: str) -> bool:
    return member.lower().endswith((*(f".{extension}" for extension in PICTURES), ".npy", ".cls"))


def _row_of(sample: dict[str, Any], name: str, num_classes: int) -> np.ndarray:
    """Return pixels and label, uint8 (pixels + 1,)."""
    where = f"{name}, sample {short_name(sample['__key__'])}"
    extension = next((e for e in (*PICTURES, "npy") if e in sample), None)
    if extension is None or "cls" not in sample:
        found = ", ".join(f".{short_name(key)}" for key in list(sample)[:24] if not key.startswith("__"))
        allowed = f"a picture (.{', .'.join(PICTURES)}, .npy) and its label (.cls)"
        raise DataError(Problem(where, f"members {found}", allowed))
    try:
        label = int(sample["cls"])
    except ValueError:
        raise DataError(Problem(where, f"the label {sample['cls'][:20]!r}", "a whole number")) from None
    if not 0 <= label < num_classes:
        raise DataError(Problem(where, f"the label {short_name(str(label))}", f"0 to {num_classes - 1}"))
    return np.append(_pixels(sample[extension], extension, where), np.uint8(label))


def _pixels(content: bytes, extension: str, where: str) -> np.ndarray:
    """Return gray values, uint8 (pixels,)."""
    from PIL import Image

    try:
        if extension == "npy":
            array = parse_array(content).squeeze()
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
                raise ValueError(f"{array.dtype} of shape {array.shape}, not uint8 (H, W) or (H, W, 3)")
            picture = Image.fromarray(array)
        else:
            picture = _opened(content)
        grey = picture.convert("L").resize((Images.SIDE, Images.SIDE))
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(Problem(where, f"no picture ({reason})", f"a .{extension} file")) from error
    return np.asarray(grey, dtype=np.uint8).reshape(-1)


def _opened(content: bytes) -> Image.Image:
    """Return the picture, not yet decoded. Raise OSError or ValueError if it is not one of PICTURES.

    Restrict formats by content, not by name: some formats that Pillow reads start external programs. Also
    bound the number of pixels, since a small file may decode to more than memory holds.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content), formats=sorted(set(PICTURES.values())))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError("its content is neither JPEG nor PNG") from None
