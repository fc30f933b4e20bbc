"""Heads of GGUF files that claim more than is there, or other types than their keys have."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmtrain.errors import CheckpointError
from llmtrain.interchange.foreign import read_foreign
from llmtrain.interchange.gguf import GgufFile
from llmtrain.interchange.gguf_header import read_header
from tests.support.gguf_files import small_model, write_gguf

HUGE = 1 << 60
FORMATS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(keys: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, *counts) + keys + tensors


def key(kind: int, value: bytes, name: str = "k") -> bytes:
    return head(text(name) + struct.pack("<I", kind) + value, counts=(0, 1))


def tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "4 bytes at byte 0 of a head of 0"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "with the highest byte first"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
        (head(counts=(HUGE, 0)), "1,152,921,504,606,846,976 tensors, more than 65,536"),
        (head(counts=(0, HUGE)), "1,152,921,504,606,846,976 keys"),
        (head(struct.pack("<Q", HUGE), counts=(0, 1)), "1,152,921,504,606,846,976 bytes at byte 32"),
        (key(8, struct.pack("<Q", HUGE)), "1,152,921,504,606,846,976 bytes"),
        (key(9, struct.pack("<IQ", 8, HUGE)), "a list of 1,152,921,504,606,846,976 texts"),
        (key(9, struct.pack("<IQ", 0, HUGE)), "1,152,921,504,606,846,976 bytes"),
        (key(9, struct.pack("<IQ", 10, HUGE)), "9,223,372,036,854,775,808 bytes"),
        (key(9, struct.pack("<IQIQ", 9, 1, 9, 1)), "a list of lists"),
        (key(77, bytes(8)), "a value of the unknown type 77"),
        (key(8, struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (head(key(7, b"\1")[24:] * 2, counts=(0, 2)), "the key 'k' twice"),
        (head(tensors=tensor((1,) * 5), counts=(1, 0)), "'t' of 5 dims"),
        (head(tensors=tensor(()), counts=(1, 0)), "'t' of 0 dims"),
        (
            head(tensors=tensor((2**40, 2**40)), counts=(1, 0)),
            r"'t' of shape \(1099511627776, 1099511627776\)",
        ),
        (head(tensors=tensor((0, 4)), counts=(1, 0)), r"'t' of shape \(4, 0\)"),
        (head(tensors=tensor((4,), 999), counts=(1, 0)), "'t' in the unknown format 999"),
        (head(tensors=tensor((33,), 8), counts=(1, 0)), "rows of 33 numbers, no multiple of 32"),
        (head(tensors=tensor((4,), offset=HUGE), counts=(1, 0)), "tensors up to byte 1,152,921,504,606,847"),
        (head(tensors=tensor((4,)) + tensor((4,)), counts=(2, 0)), "the tensor 't' twice"),
        (
            head(tensors=tensor((4,)) + tensor((4,), name="u"), counts=(2, 0)) + bytes(64),
            "over another tensor",
        ),
        (key(4, struct.pack("<I", 0), "general.alignment"), "general.alignment 0, not a power of two"),
        (key(8, text("x"), "general.alignment"), "general.alignment 'x'"),
    ],
)
def test_no_claim_is_believed(content: bytes, reason: str):
    started = time.process_time()
    with pytest.raises(ValueError, match=reason):
        read_header(content, FORMATS)
    assert time.process_time() - started < 1


def test_what_the_package_reads(tmp_path: Path):
    """Every value, and every tensor's place."""
    path = write_gguf(tmp_path / "model.gguf", small_model("llama"), "Q8_0")
    header = read_header(path.read_bytes(), FORMATS)
    theirs = gguf.GGUFReader(path)
    own = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(header.values) == pytest.approx(own)
    places = {t.name: (tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors}
    assert {name: (p.shape, p.start, p.size) for name, p in header.tensors.items()} == places


def test_lists_of_every_type(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_array("wholes", [-1, 3])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = read_header((tmp_path / "x.gguf").read_bytes(), FORMATS).values
    assert values["texts"] == ["a", "", "ü"]
    for name, expected in (("numbers", [1.5, 2.5]), ("wholes", [-1, 3]), ("flags", [1, 0])):
        np.testing.assert_array_equal(values[name], expected)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": 5}, "general.architecture: got 5; allowed: text"),
        ({"llama.block_count": "two"}, "llama.block_count: got 'two'; allowed: a number"),
        ({"llama.block_count": 10**9}, "num_hidden_layers: got 1000000000; allowed: no more than its"),
        ({"llama.embedding_length": 2**32 - 1}, "model.gguf: got sizes of .* allowed: those of its tensors"),
        ({"llama.attention.head_count": 0}, "num_heads: got 0; allowed: 1 or more"),
        ({"llama.attention.head_count_kv": "x"}, "head_count_kv: got 'x'; allowed: a whole number"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base: got nan; allowed: a number"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base: got inf; allowed: a number"),
        ({"llama.rope.scaling.type": 3}, "rope.scaling.type: got 3; allowed: text"),
        ({"llama.attention.key_length": 2**32 - 2, "llama.rope.dimension_count": None}, "got"),
        ({"llama.expert_count": "none"}, "expert_count: got 'none'; allowed: a number"),
        ({"split.count": "two"}, "split.count: got 'two'; allowed: a whole number"),
        ({"tokenizer.ggml.tokens": 4}, "tokenizer.ggml.tokens: got 4; allowed: a list of texts"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id: got 'x'; allowed: a whole number"),
    ],
)
def test_a_key_of_another_type_is_one_line(metadata: dict[str, object], message: str, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", MODEL, metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


MODEL = small_model("llama")


def test_factors_of_a_head_of_any_width_are_not_made(tmp_path: Path):
    """They would take 8 GB."""
    metadata = {"llama.attention.key_length": 2**31, "llama.rope.dimension_count": 2**31}
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", MODEL, metadata=metadata, tensors=factors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: got stretched"):
        read_foreign(path)


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to("/dev/zero")
    for name, kind in (("pipe.gguf", "a pipe, not a file"), ("link.gguf", "a device, not a file")):
        with pytest.raises(CheckpointError, match=kind):
            read_foreign(tmp_path / name)
    with pytest.raises(CheckpointError, match="Not a directory"):
        read_foreign(Path("/dev/zero"))
    with open(tmp_path / "hole.gguf", "wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        GgufFile(tmp_path / "hole.gguf")
