"""Readers of labelled pictures: a CSV file, webdataset tars, folders of classes, idx files, an npz file.

Each returns all pictures of its path, or raises DataError that names the file, and the row or sample in it.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from llmtrain.corpus.cache import Cache
from llmtrain.corpus.config import CacheConfig
from llmtrain.corpus.npy import parse_array
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.corpus.transport import is_remote
from llmtrain.data.datasets.pictures import FORMATS, LARGEST_PICTURE, Pictures, Shape, refuse_too_many
from llmtrain.errors import DataError, Problem
from llmtrain.prepare.decompress import GZIP_MAGIC, unpacked
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.tar_members import tar_members
from llmtrain.reading import open_regular, read_bytes

ALLOWED = ".csv, .csv.gz or .tar"
CHECK = "check data.path, or download it again"
SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation"}
SPLIT_FOLDERS |= {"test": "test"}
"""Name of a folder → its split."""
IDX_PARTS = {"train": "train", "t10k": "test", "test": "test"}
"""Beginning of the names of idx files → their split."""
IDX = "-images-idx3-ubyte"
LONGEST_ROW = 1 << 14
"""Bytes up to which a CSV row is always read; 785 numbers up to 255 take 3,140."""
WRITTEN = {str(number): number for number in range(256)}
"""Each pixel as a CSV file usually writes it → its value: looked up in a third of the time of int()."""


def read_pictures(path: str, shape: Shape) -> Pictures:
    """Return the pictures at `path`, in whichever form it has."""
    if ".tar" in path:
        return _read_tars(path, shape)
    local = resolve_package_path(path)
    if local.suffix == ".npz":
        return _read_npz(local, shape)
    if IDX in local.name:
        return _read_idx([local], shape)
    if local.is_dir():
        found = sorted(each for each in local.iterdir() if IDX in each.name)
        if found:
            return _read_idx(found, shape)
        if any(each.is_dir() for each in local.iterdir()):
            return _read_folder(local, shape)
    return _read_csv(local, shape)


# -------------------------------------------------------------------------------------------- one CSV


def _read_csv(path: Path, shape: Shape) -> Pictures:
    num_pixels = shape.numbers
    rows: list[np.ndarray] = []
    longest = max(LONGEST_ROW, 4 * (num_pixels + 1))
    try:
        with _unpacked(path, path.suffix == ".gz") as binary, io.TextIOWrapper(binary, "ascii") as lines:
            while line := lines.readline(longest + 1):
                where = f"{path}, row {len(rows) + 1}"
                if len(line) > longest:
                    got = f"a row of more than {longest:,} bytes"
                    raise DataError(Problem(where, got, f"{num_pixels} pixels and a label"))
                rows.append(_parse_row(line.rstrip("\n"), where, shape))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"an unreadable file ({error})"
        raise DataError(Problem(str(path), what, ALLOWED, CHECK)) from error
    if not rows:
        raise DataError(Problem(str(path), "an empty file", f"rows of {num_pixels} pixels and a label"))
    table = np.stack(rows)
    images = table[:, :-1].astype(np.uint8).reshape(-1, shape.size, shape.size, shape.channels)
    return Pictures(images, table[:, -1].astype(np.int64))


def _unpacked(path: Path, is_packed: bool) -> io.BufferedReader:
    packed = open(path, "rb", opener=open_regular)  # noqa: SIM115
    size = os.fstat(packed.fileno()).st_size
    return io.BufferedReader(unpacked(packed, "gz" if is_packed else "", str(path), size))


def _parse_row(line: str, where: str, shape: Shape) -> np.ndarray:
    """Return the pixels and the label, uint8 or uint16."""
    num_pixels = shape.numbers
    fields = line.split(",")
    if len(fields) == num_pixels + 1:
        with suppress(KeyError):
            row = [WRITTEN[field] for field in fields]
            shape.label(row[-1], where)
            return np.frombuffer(bytes(row), np.uint8)
    try:
        values = [int(value) for value in fields]
    except ValueError as error:
        got = f"a value that is not an integer ({short_name(str(error))})"
        raise DataError(Problem(where, got, "integers separated by commas, without a header")) from None
    if len(values) != num_pixels + 1:
        raise DataError(Problem(where, f"{len(values)} values", f"{num_pixels} pixels and a label"))
    *pixels, label = values
    if min(values) < 0 or max(pixels) > 255:
        wrong = next(value for value in values if not 0 <= value <= 255)
        raise DataError(Problem(where, f"the value {short_name(str(wrong))}", "0 to 255"))
    shape.label(label, where)
    return np.array(values, dtype=np.uint16)


# --------------------------------------------------------------------------------------- webdataset


def _read_tars(pattern: str, shape: Shape) -> Pictures:
    from webdataset.shardlists import expand_urls

    images, labels = [], []
    for name in expand_urls(pattern):
        for sample in _samples(name):
            image, label = _of_sample(sample, name, shape)
            images.append(image)
            labels.append(label)
    if not images:
        allowed = f"samples of .{', .'.join(FORMATS)} or .npy, each with its .cls"
        raise DataError(Problem(pattern, "no labeled picture", allowed))
    return Pictures(np.stack(images), np.array(labels, np.int64))


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
    for member, content in tar_members(stream, name, _is_wanted, LARGEST_PICTURE):
        # A link may have a wanted name, but has no content.
        if content is not None or not _is_wanted(member):
            yield {"__url__": name, "fname": member, "data": content or b""}


def _is_wanted(member: str) -> bool:
    return member.lower().endswith((*(f".{extension}" for extension in FORMATS), ".npy", ".cls"))


def _of_sample(sample: dict[str, Any], name: str, shape: Shape) -> tuple[np.ndarray, int]:
    where = f"{name}, sample {short_name(sample['__key__'])}"
    extension = next((e for e in (*FORMATS, "npy") if e in sample), None)
    if extension is None or "cls" not in sample:
        found = ", ".join(f".{short_name(key)}" for key in list(sample)[:24] if not key.startswith("__"))
        allowed = f"a picture (.{', .'.join(FORMATS)}, .npy) and its label (.cls)"
        raise DataError(Problem(where, f"members {found}", allowed))
    try:
        label = int(sample["cls"])
    except ValueError:
        raise DataError(Problem(where, f"the label {sample['cls'][:20]!r}", "a whole number")) from None
    shape.label(label, where)
    return shape.decode(sample[extension], extension, where), label


# ------------------------------------------------------------------------------- folders of classes


def _read_folder(root: Path, shape: Shape) -> Pictures:
    """Read root/CLASS/picture, or root/SPLIT/CLASS/picture; classes are numbered in the order of their
    names."""
    folders = sorted(each for each in root.iterdir() if each.is_dir())
    has_splits = all(each.name in SPLIT_FOLDERS for each in folders)
    if not has_splits:
        of_split: list[tuple[str, Path]] = [("", root)]
    else:
        of_split = [(SPLIT_FOLDERS[each.name], each) for each in folders]
    files = [
        (split, each.parent.name, each)
        for split, folder in of_split
        for each in sorted(folder.glob("*/*"))
        if each.suffix.lower().removeprefix(".") in FORMATS
    ]
    names = sorted({name for _, name, _ in files})
    if not files:
        allowed = f"CLASS/NAME.{', '.join(FORMATS)}, or such folders in train, validation and test"
        raise DataError(Problem(str(root), "no folder of pictures", allowed))
    if len(names) > shape.num_classes:
        got, allowed = f"{len(names)} folders of classes", f"model.num_classes={shape.num_classes}"
        raise DataError(Problem(str(root), got, allowed, f"give model.num_classes={len(names)}"))
    refuse_too_many(len(files), shape, str(root))
    images = np.empty((len(files), shape.size, shape.size, shape.channels), np.uint8)
    for i, (_, _, path) in enumerate(files):
        try:
            content = read_bytes(path, LARGEST_PICTURE)
        except OSError as error:
            raise DataError(Problem(str(path), f"an unreadable file ({error.strerror})")) from error
        images[i] = shape.decode(content, path.suffix.lower().removeprefix("."), str(path))
    labels = np.array([names.index(name) for _, name, _ in files], np.int64)
    splits = np.array([split for split, _, _ in files]) if has_splits else None
    return Pictures(images, labels, splits, tuple(names))


# ----------------------------------------------------------------------------------- idx and npz


def _read_idx(paths: list[Path], shape: Shape) -> Pictures:
    """Read files in the form of MNIST (http://yann.lecun.com/exdb/mnist): of pictures, and beside each that
    of its labels."""
    images, labels, splits = [], [], []
    for path in paths:
        pictures = shape.array(_idx(path, 3), str(path))
        beside = path.with_name(path.name.replace(IDX, "-labels-idx1-ubyte"))
        of_path = _idx(beside, 1)
        if len(of_path) != len(pictures):
            got = f"{len(of_path):,} labels"
            raise DataError(Problem(str(beside), got, f"{len(pictures):,}, as {path.name} has pictures"))
        _check_labels(of_path, shape, str(beside))
        images.append(pictures)
        labels.append(of_path.astype(np.int64))
        splits += [IDX_PARTS.get(path.name.split("-")[0], "train")] * len(of_path)
    known = np.array(splits) if len(paths) > 1 else None
    return Pictures(np.concatenate(images), np.concatenate(labels), known)


def _idx(path: Path, dims: int) -> np.ndarray:
    try:
        free = psutil.virtual_memory().available
        with _unpacked(path, path.suffix == ".gz") as stream:
            content = stream.read(free)
    except FileNotFoundError as error:
        raise DataError(Problem(str(path), "no such file", "beside the other", CHECK)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(Problem(str(path), f"an unreadable file ({error})", "an idx file", CHECK)) from error
    start = content[: 4 + 4 * dims]
    header = np.frombuffer(start, ">u4", len(start) // 4)
    if len(header) < 1 + dims or header[0] != 0x800 + dims:
        raise DataError(Problem(str(path), "another header", f"an idx file of bytes with {dims} dims", CHECK))
    sides = [int(side) for side in header[1:]]
    given, needed = len(content) - 4 - 4 * dims, prod(sides)
    if given != needed:
        what = "cut short" if given < needed else "with more behind its end"
        got = f"a file {what}: {given:,} bytes of values"
        raise DataError(
            Problem(str(path), got, f"{needed:,}, as its header says", "copy or download it again")
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sides)


NPZ_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
NPZ_NAMES = tuple(
    [("images", "labels"), ("x", "y"), ("X", "y")]
    + [(f"x_{name}", f"y_{name}") for names in NPZ_SPLITS.values() for name in names]
    + [(f"{name}_images", f"{name}_labels") for names in NPZ_SPLITS.values() for name in names]
)
"""Names of the arrays of pictures and of their labels."""


def _read_npz(path: Path, shape: Shape) -> Pictures:
    try:
        with zipfile.ZipFile(open(path, "rb", opener=open_regular)) as packed:
            held = {name.removesuffix(".npy"): packed.getinfo(name) for name in packed.namelist()}
            pairs = [pair for pair in NPZ_NAMES if set(pair) <= held.keys()]
            free = psutil.virtual_memory().available
            if sum(held[name].file_size for pair in pairs for name in pair) > free:
                raise DataError(Problem(str(path), "more than fits in memory", f"{free:,} bytes"))
            names = [name for pair in pairs for name in pair]
            arrays = {name: _array(packed.read(held[name]), f"{path}: {name}") for name in names}
    except FileNotFoundError as error:
        raise DataError(Problem(str(path), "no such file", "an .npz file", CHECK)) from error
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(Problem(str(path), f"a damaged file ({error})", "an .npz file", CHECK)) from error
    if not pairs:
        listed = ", ".join(short_name(name) for name in list(held)[:8])
        allowed = "images and labels, or x_train, y_train, x_test and y_test"
        raise DataError(Problem(str(path), f"arrays {listed}", allowed))
    images, labels, splits = [], [], []
    for of_images, of_labels in pairs:
        pictures = shape.array(arrays[of_images], f"{path}: {of_images}")
        numbers = arrays[of_labels].reshape(-1)
        where = f"{path}: {of_labels}"
        if len(numbers) != len(pictures) or numbers.dtype.kind not in "iu":
            got = f"{len(numbers):,} labels as {numbers.dtype}"
            raise DataError(Problem(where, got, f"{len(pictures):,} whole numbers, as there are pictures"))
        _check_labels(numbers, shape, where)
        images.append(pictures)
        labels.append(numbers.astype(np.int64))
        splits += [_split_of(of_images)] * len(numbers)
    known = np.array(splits) if all(splits) else None
    return Pictures(np.concatenate(images), np.concatenate(labels), known)


def _array(content: bytes, where: str) -> np.ndarray:
    try:
        return parse_array(content)
    except ValueError as error:
        raise DataError(Problem(where, str(error), "an array of numbers")) from error


def _split_of(name: str) -> str:
    parts = name.split("_")
    return next((split for split, names in NPZ_SPLITS.items() if set(names) & set(parts)), "")


def _check_labels(labels: np.ndarray, shape: Shape, where: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= shape.num_classes))
    if len(wrong):
        shape.label(int(labels[wrong[0]]), f"{where}, picture {wrong[0] + 1}")
