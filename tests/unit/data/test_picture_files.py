"""Pictures from folders of classes, idx files and npz files: the same images in each form."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmtrain.data.datasets.images import Images
from llmtrain.errors import DataError

SPLITS = ("train", "validation", "test")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % 3


def write_idx(folder: Path, images: np.ndarray, numbers: np.ndarray, part: str, packed: bool = False) -> None:
    for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", numbers)):
        header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
        content = header + values.astype(np.uint8).tobytes()
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)


def held(path: Path, split: str, channels: int = 3, **more: bool) -> set[tuple[bytes, int]]:
    images = Images.open(str(path), split, 3, size=8, channels=channels, **more)
    return {(p.tobytes(), int(n)) for p, n in zip(images.pictures_NHWC, images.labels, strict=True)}


def expected(pixels: np.ndarray) -> set[tuple[bytes, int]]:
    return {(p.tobytes(), int(n)) for p, n in zip(pixels, labels(len(pixels)), strict=True)}


def test_folders_of_classes_with_and_without_splits(tmp_path: Path, pixels: np.ndarray) -> None:
    for name, part, first in (("a/train", pixels[:40], 0), ("a/test", pixels[40:], 40), ("b", pixels, 0)):
        for i, picture in enumerate(part):
            path = tmp_path / name / ["cat", "dog", "emu"][(first + i) % 3] / f"{first + i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    whole = expected(pixels)
    assert set.union(*(held(tmp_path / "b", split) for split in SPLITS)) == whole
    test = held(tmp_path / "a", "test")
    assert len(test) == 20
    # Of the training part a tenth is held out, without a row in common.
    trained, validated = held(tmp_path / "a", "train"), held(tmp_path / "a", "validation")
    assert trained | validated == whole - test
    assert not trained & validated
    assert Images.open(str(tmp_path / "a"), "test", 3, size=8, channels=3).names == ("cat", "dog", "emu")


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, pixels: np.ndarray, packed: bool) -> None:
    grey = pixels[..., 0]
    write_idx(tmp_path, grey[:40], labels(60)[:40], "train", packed)
    write_idx(tmp_path, grey[40:], labels(60)[40:], "t10k", packed)
    test = Images.open(str(tmp_path), "test", 3, size=8)
    np.testing.assert_array_equal(test.pictures_NHWC[..., 0], grey[40:])
    np.testing.assert_array_equal(test.labels, labels(60)[40:])
    assert len(held(tmp_path, "train", 1)) + len(held(tmp_path, "validation", 1)) == 40
    one = tmp_path / ("train-images-idx3-ubyte" + ".gz" * packed)
    assert sum(len(held(one, split, 1)) for split in SPLITS) == 40


def test_npz_files(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez_compressed(tmp_path / "whole.npz", images=pixels, labels=labels(60))
    found = [held(tmp_path / "whole.npz", split) for split in SPLITS]
    assert set.union(*found) == expected(pixels)
    np.savez(
        tmp_path / "parts.npz",
        x_train=pixels[:40], y_train=labels(60)[:40, None], x_test=pixels[40:], y_test=labels(60)[40:],
    )  # fmt: skip
    assert len(held(tmp_path / "parts.npz", "test")) == 20
    # Color becomes grey as Pillow makes it.
    grey = Images.open(str(tmp_path / "parts.npz"), "test", 3, size=8)
    by_pillow = [np.asarray(Image.fromarray(picture).convert("L")) for picture in pixels[40:]]
    np.testing.assert_array_equal(grey.pictures_NHWC[..., 0], by_pillow)


def test_bad_files_take_one_line(tmp_path: Path, pixels: np.ndarray) -> None:
    write_idx(tmp_path, pixels[:9, ..., 0], labels(9), "train")
    images, numbers = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole, of_labels = images.read_bytes(), numbers.read_bytes()

    def refusal(path: Path, **more: bool) -> str:
        with pytest.raises(DataError) as caught:
            held(path, "train", 1, **more)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    images.write_bytes(whole[:-10])
    assert "a file cut short: 566 bytes of values; allowed: 576, as its header says" in refusal(tmp_path)
    images.write_bytes(whole[:3])
    assert "another header" in refusal(images)
    images.write_bytes(whole)
    numbers.write_bytes(of_labels[:8] + b"\x07" * 9)
    assert "picture 1: got the label 7; allowed: 0 to 2" in refusal(tmp_path)
    numbers.write_bytes(struct.pack(">2I", 0x801, 8) + b"\0" * 8)
    assert "8 labels; allowed: 9" in refusal(tmp_path)
    numbers.unlink()
    assert "no such file" in refusal(tmp_path)

    np.savez(tmp_path / "large.npz", images=np.zeros((3, 9, 8), np.uint8), labels=np.zeros(3, int))
    assert "pictures of 9 × 8 as uint8" in refusal(tmp_path / "large.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "arrays a" in refusal(tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "large.npz").read_bytes()[:100])
    assert "a damaged file" in refusal(tmp_path / "cut.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{}, {}]), labels=np.zeros(2, int))
    assert "Python's objects" in refusal(tmp_path / "pickled.npz")

    folder = tmp_path / "classes"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(pixels[0]).resize((9, 8)).save(folder / name / "0.png")
    assert "a picture of 9×8 pixels; allowed: 8×8" in refusal(folder, resize=False)
    (folder / "a" / "0.png").write_bytes(b"\x89PNG no picture")
    assert "0.png: got no picture" in refusal(folder)
    for name in ("d", "e"):
        (folder / name).mkdir()
        Image.fromarray(pixels[0]).save(folder / name / "0.png")
    assert "5 folders of classes; allowed: model.num_classes=3" in refusal(folder)
