"""Small corpora in the prepared format, written plainly with tarfile and numpy: a second opinion on
the format, free of the code under test."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tests.support.warm import llmtrain

INDEX_DTYPE = [
    ("shard", "<u4"),
    ("tokens_offset", "<u8"),
    ("ends_offset", "<u8"),
    ("num_tokens", "<u8"),
    ("num_documents", "<u4"),
]
Documents = Sequence[Sequence[int]]
EOS = 1


def random_documents(
    num_documents: int, seed: int = 0, vocab_size: int = 100, longest: int = 40
) -> Documents:
    """Token ids without the end-of-document id, 1 to `longest` of them each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(num_documents)]


def stream_of(documents: Documents) -> np.ndarray:
    """The token stream that these documents make."""
    return np.array([token for document in documents for token in [*document, EOS]], dtype=np.int64)


def write_corpus(
    path: Path,
    splits: Mapping[str, Documents],
    *,
    documents_per_sample: int = 5,
    samples_per_tar: int = 3,
    vocab_size: int = 100,
    dtype: str = "uint16",
    tokenizer: bytes = b"not a real model",
) -> Path:
    """Write a corpus and return its folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(tokenizer)
    entries = {
        name: _write_split(path, name, documents, documents_per_sample, samples_per_tar, dtype)
        for name, documents in splits.items()
    }
    checksums = [shard["xxh3_128"] for entry in entries.values() for shard in entry["shards"]]
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    manifest = {
        "format": "llmtrain-corpus",
        "version": 3,
        "vocab_size": vocab_size,
        "eos_id": EOS,
        "dtype": dtype,
        "tokenizer": {"file": "tokenizer.model", "sha256": sha256},
        "fingerprint": hashlib.sha256("\n".join([*checksums, sha256]).encode()).hexdigest(),
        "splits": entries,
        "report": {},
        "config": {},
    }
    write_manifest(path, manifest)
    return path


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with the checksum of what it says, into a corpus' or a checkpoint's folder."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({**body, "checksum": checksum}))


def _write_split(
    path: Path, name: str, documents: Documents, documents_per_sample: int, samples_per_tar: int, dtype: str
) -> dict[str, Any]:
    (path / name).mkdir(exist_ok=True)
    samples = [
        documents[i : i + documents_per_sample] for i in range(0, len(documents), documents_per_sample)
    ]
    rows: list[tuple[int, int, int, int, int]] = []
    shards = []
    for number, first in enumerate(range(0, len(samples), samples_per_tar)):
        group = samples[first : first + samples_per_tar]
        file = path / name / f"{name}-{number:06d}.tar"
        num_tokens = 0
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, sample in enumerate(group, start=first):
                tokens = stream_of(sample).astype(dtype)
                ends = np.cumsum([len(document) + 1 for document in sample]).astype("uint32")
                num_tokens += len(tokens)
                tokens_offset = _add_array(tar, f"{i:08d}.tokens.npy", tokens)
                ends_offset = _add_array(tar, f"{i:08d}.ends.npy", ends)
                rows.append((number, tokens_offset, ends_offset, len(tokens), len(ends)))
        shards.append(
            {
                "file": f"{name}/{file.name}",
                "bytes": file.stat().st_size,
                "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes()),
                "num_samples": len(group),
                "num_tokens": num_tokens,
                "num_documents": sum(map(len, group)),
            }
        )
    index_path, lengths_path = path / name / "index.npy", path / name / "lengths.npy"
    np.save(index_path, np.array(rows, dtype=INDEX_DTYPE))
    np.save(lengths_path, np.array([len(document) + 1 for document in documents], dtype="<u4"))
    return {
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "num_documents": len(documents),
        "num_bytes": 4 * sum(map(len, documents)),
        "num_samples": len(samples),
        "index": f"{name}/index.npy",
        "index_xxh3_128": xxhash.xxh3_128_hexdigest(index_path.read_bytes()),
        "lengths": f"{name}/lengths.npy",
        "lengths_xxh3_128": xxhash.xxh3_128_hexdigest(lengths_path.read_bytes()),
        "shards": shards,
    }


def _add_array(tar: tarfile.TarFile, name: str, array: np.ndarray) -> int:
    """Append one member; → the byte offset of the array's data in the tar file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    member = tarfile.TarInfo(name)
    member.size = buffer.tell()
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return start + member.size - array.nbytes


TEXT = """the film was a quiet story about people who never say what they mean and the actors made every
scene feel honest while music kept slow time with rain on a window somewhere near the sea"""
WORDS = TEXT.split()


def write_text(path: Path, num_documents: int = 400) -> Path:
    """A .jsonl file of small documents with some structure to learn; the same at every call."""
    source = random.Random(0)
    with path.open("w") as file:
        for number in range(num_documents):
            words = source.choices(WORDS, k=source.randint(20, 60))
            file.write(json.dumps({"text": f"{number}: " + " ".join(words) + "."}) + "\n")
    return path


def prepare_small_corpus(folder: Path) -> Path:
    """What `llmtrain prepare` makes of `write_text`, in `folder`."""
    source = write_text(folder / "text.jsonl")
    output = folder / "prepared"
    done = llmtrain(
        "prepare",
        f"source={source}",
        f"output={output}",
        "tokenizer.vocab_size=320",
        "split.validation=0.1",
        "split.test=0.05",
        "workers=1",
    )
    assert done.returncode == 0, done.stderr
    return output


def write_pairs(path: Path, num_pairs: int = 400) -> Path:
    """A .tsv file of pairs, the target being the source's words backwards; the same at every call."""
    source = random.Random(1)
    lines = ["en\tes"]
    for number in range(num_pairs):
        words = [str(number), *source.choices(WORDS, k=source.randint(2, 9))]
        lines.append(" ".join(words) + "\t" + " ".join(reversed(words)))
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare_small_pairs(folder: Path) -> Path:
    """What `llmtrain prepare` makes of `write_pairs`, in `folder`."""
    source = write_pairs(folder / "pairs.tsv")
    output = folder / "paired"
    done = llmtrain(
        "prepare",
        f"source={source}",
        f"output={output}",
        "text_field=en",
        "target_field=es",
        "tokenizer.vocab_size=320",
        "split.validation=0.1",
        "split.test=0.05",
        "sample_tokens=2000",
        "tar_bytes=8000",
        "workers=1",
    )
    assert done.returncode == 0, done.stderr
    return output
