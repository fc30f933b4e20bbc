"""The safetensors writer: the format's own library reads what it wrote, bit by bit."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmtrain import files
from llmtrain.checkpoint import writer
from llmtrain.checkpoint.writer import DTYPES, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        for shape in ((), (1,), (3,), (0, 4), (5, 7), (2, 3, 4)):
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            tensors[f"{dtype}/{shape}@0,0"] = values
    tensors["special"] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
    tensors["strided ü"] = torch.randn(4, 6, generator=generator).t()
    return tensors


@pytest.mark.parametrize("chunk_bytes", [writer.CHUNK_BYTES, 10])
def test_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int):
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk_bytes)
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    written = write_safetensors(path, list(tensors.items()))
    with safe_open(path, framework="pt") as handle:
        assert set(handle.keys()) == set(tensors)
        for key, tensor in tensors.items():
            found = handle.get_tensor(key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, found))
            assert torch.equal(ours, theirs), key
    assert written == (path.stat().st_size, files.checksum(path))


def test_data_are_aligned_and_nothing_lies_between(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    tensors = [(f"{'k' * n}", torch.ones(n)) for n in range(1, 9)]
    write_safetensors(path, tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    spans = [entry["data_offsets"] for entry in json.loads(content[8 : 8 + length]).values()]
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert 8 + length + spans[-1][1] == len(content)


def test_no_tensors_at_all(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    written = write_safetensors(path, [])
    with safe_open(path, framework="pt") as handle:
        assert not list(handle.keys())
    assert written == (path.stat().st_size, files.checksum(path))


def test_a_key_twice_and_an_unknown_dtype_are_defects(tmp_path: Path):
    with pytest.raises(ValueError, match="two tensors with the key a"):
        write_safetensors(tmp_path / "a", [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(KeyError):
        write_safetensors(tmp_path / "b", [("a", torch.ones(1, dtype=torch.int64))])
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_written_over(tmp_path: Path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "a", [])


@pytest.mark.parametrize("reserves", [True, False])
def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool):
    if not reserves:
        monkeypatch.setattr(writer, "_LIBC", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write_safetensors(tmp_path / "a", [("a", torch.ones(10_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files.is_disk_full(caught.value)
    size = (tmp_path / "a").stat().st_size
    assert size == 0 if reserves else 0 < size <= 10_000


def test_it_can_be_called_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 100)
    answers = iter([True, True, True, False])
    with pytest.raises(InterruptedError):
        write_safetensors(tmp_path / "a", [("a", torch.ones(1000))], lambda: next(answers))
