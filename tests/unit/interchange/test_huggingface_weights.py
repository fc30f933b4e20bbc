"""Weights of folders: each tensor from the file that the index names, and no claim of a header believed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.errors import CheckpointError
from llmtrain.interchange.huggingface_weights import INDEX, WEIGHTS, StoredTensors

A, B = torch.zeros(2), torch.ones(2)


def shards(folder: Path, contents: dict[str, dict[str, Any]], index: dict[str, str]) -> Path:
    for name, tensors in contents.items():
        save_file(tensors, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        StoredTensors(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_tensor_is_that_of_the_file_that_the_index_names(tmp_path: Path):
    shards(
        tmp_path,
        {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}},
        {"a": "1.safetensors", "b": "2.safetensors"},
    )
    stored = StoredTensors(tmp_path)
    assert torch.equal(stored["a"], A)
    assert torch.equal(stored["b"], B)


@pytest.mark.parametrize("second", [{"b": B, "a": A}, {"b": B, "other": A}])
def test_a_tensor_that_the_index_does_not_put_there(second: dict[str, Any], tmp_path: Path):
    index = {"a": "1.safetensors", "b": "2.safetensors"}
    shards(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": second}, index)
    name = "a" if "a" in second else "other"
    message = refusal(tmp_path)
    assert f"2.safetensors: got the tensor {name}; allowed: only what {INDEX} puts there" in message


def test_a_tensor_that_the_file_lacks(tmp_path: Path):
    shards(
        tmp_path,
        {"1.safetensors": {"a": A}},
        {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"},
    )
    assert "1.safetensors: got no tensor b and 1 more" in refusal(tmp_path)


def test_two_files_for_a_tensor(tmp_path: Path):
    shards(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"a": B}}, {})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    assert f"{INDEX}: got the key 'a' twice" in refusal(tmp_path)


def test_buffers_of_older_releases_may_be_in_either(tmp_path: Path):
    buffers = {"a": A, "embeddings.position_ids": torch.arange(2)}
    shards(tmp_path, {"1.safetensors": buffers}, {"a": "1.safetensors", "x.token_type_ids": "1.safetensors"})
    assert list(StoredTensors(tmp_path)) == ["a"]


@pytest.mark.parametrize("name", ["", ".", "..", "../1.safetensors", "/etc/passwd", "a\0b", 5, None, ["1"]])
def test_names_that_are_no_bare_names(name: Any, tmp_path: Path):
    save_file({"a": A}, tmp_path / "1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    message = refusal(tmp_path)
    assert f"{INDEX}: weight_map.a: got " in message
    assert "allowed: a bare file name" in message


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": [["a", "b"]]}]
)
def test_an_index_without_a_map(content: Any, tmp_path: Path):
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert f"{INDEX}: weight_map: got " in refusal(tmp_path)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a": X, "a": X}', bytes(4), "the key 'a' twice"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), "invalid offset"),
        ({"a": entry([1], 4, 8)}, bytes(8), "invalid offset"),
        ({"a": entry([3], 0, 4)}, bytes(4), "invalid shape"),
        ({"a": entry([-1], 0, 4)}, bytes(4), "damaged file"),
        ({"a": entry([2**62, 2**62, 0], 0, 0)}, b"", "overflow"),
        ({"a": entry([1], 0, 4)}, bytes(8), "damaged file"),
        ({"a": entry([1], 0, 2**60)}, bytes(8), "damaged file"),
        ({"a": entry([1], 0, 4, "F99")}, bytes(4), "damaged file"),
        (b'{"\\ud800": X}', bytes(4), "a lone surrogate"),
        ({}, b"", "weights without a tensor"),
        (b"[]", b"", "a list instead of an object"),
    ],
)
def test_headers_that_do_not_fit_the_file(header: Any, data: bytes, message: str, tmp_path: Path):
    if isinstance(header, bytes):
        content = header.replace(b"X", json.dumps(entry([1], 0, 4)).encode())
    else:
        content = json.dumps(header).encode()
    raw(tmp_path / WEIGHTS, content, data)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 1000])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path):
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"a damaged file (a header of {length:,} bytes, more than 2)" in refusal(tmp_path)


def test_a_tensor_of_a_thousand_dims_is_not_read(tmp_path: Path):
    raw(tmp_path / WEIGHTS, json.dumps({"a": entry([1] * 1000, 0, 4)}).encode(), bytes(4))
    with pytest.raises(CheckpointError, match="1,000 dims; allowed: at most 8"):
        StoredTensors(tmp_path)["a"]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [pipe, device, folder])
@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "1.safetensors"])
def test_what_is_no_file(kind: Callable[[Path], None], name: str, tmp_path: Path):
    if name == "1.safetensors":
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    kind(tmp_path / name)
    assert f"{name}: got a {kind.__name__}, not a file" in refusal(tmp_path)


def test_a_link_to_a_file_is_followed(tmp_path: Path):
    save_file({"a": A}, tmp_path / "blob")
    (tmp_path / WEIGHTS).symlink_to("blob")
    assert list(StoredTensors(tmp_path)) == ["a"]
