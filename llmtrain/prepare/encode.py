"""Encode document blocks to token ids on disk, and pack these into samples and tar files.

The borders of samples and tar files depend on the tokens only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.corpus.tar_files import Sample, sample_bytes, token_dtype, write_tar_file
from llmtrain.prepare.clean import SEPARATOR_BYTE
from llmtrain.prepare.config import SplitConfig
from llmtrain.prepare.document_blocks import DocumentBlock, save_array, splits_of_block
from llmtrain.prepare.files import write_marker
from llmtrain.prepare.long_texts import encode_text
from llmtrain.prepare.source_file import TOKEN_DTYPE
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class EncodedBlock:
    """The token ids of one document block.

    NAME.tokens holds the documents of train, then validation, then test, each followed by eos;
    NAME.lengths.npy holds their lengths in tokens, including eos. The lists have one value per split.
    """

    path: str
    num_documents: list[int]
    num_tokens: list[int]
    num_bytes: list[int]
    num_unknown: int
    num_tokenless: int = 0
    """Documents (or pairs) dropped because they (or one of the two texts) have no token."""
    specials: dict[str, int] = field(default_factory=dict)
    """Special token → number of occurrences of its spelling in the texts."""

    @property
    def tokens_path(self) -> Path:
        return Path(self.path + ".tokens")

    @property
    def lengths_path(self) -> Path:
        return Path(self.path + ".lengths.npy")


def encode_block(
    block: DocumentBlock,
    number: int,
    dropped_paths: Sequence[Path],
    split: SplitConfig,
    tokenizer_path: Path,
    tokenizer_sha256: str,
    specials_are_text: bool,
    is_paired: bool,
    path: Path,
) -> int:
    """Encode the kept documents of a block to files with the prefix `path`; a pair becomes two documents.
    path.json, written last, marks the block as finished. Then delete the text of the block.

    number: of the block; dropped_paths: files that list the documents to drop.
    tokenizer_sha256: distinguishes tokenizers that were at `tokenizer_path` one after the other.
    Return the number of the block.
    """
    tokenizer, specials = _tokenizer(tokenizer_path, tokenizer_sha256, specials_are_text)
    dtype = token_dtype(tokenizer.vocab_size)
    documents = block.documents()
    encoded = EncodedBlock(str(path), [], [], [], 0)
    lengths: list[np.ndarray] = []
    num_unknown = num_tokenless = 0
    spelled_out: Counter[str] = Counter()
    byte_lengths = tokenizer.token_byte_lengths() if block.is_tokenized else np.zeros(0, np.int32)
    with open(encoded.tokens_path, "wb") as file:
        for chosen in splits_of_block(documents, number, dropped_paths, split):
            num_documents = num_tokens = num_bytes = 0
            for batch in block.read(documents, chosen):
                if block.is_tokenized:
                    ids = [np.frombuffer(document, TOKEN_DTYPE).astype(np.int32) for document in batch]
                    num_bytes += int(sum(byte_lengths[document].sum() for document in ids))
                else:
                    if is_paired:
                        batch = [side for pair in batch for side in pair.split(SEPARATOR_BYTE)]
                    spelled_out += count_specials(specials, batch)
                    ids = encode_documents(tokenizer, batch)
                    kept = with_tokens(ids, 2 if is_paired else 1)
                    num_tokenless += (len(ids) - len(kept)) // (2 if is_paired else 1)
                    ids = [ids[i] for i in kept]
                    num_bytes += sum(len(batch[i]) for i in kept)
                if not ids:
                    continue
                num_documents += len(ids)
                sizes = np.fromiter(map(len, ids), np.int64, len(ids)) + 1
                joined = np.concatenate(
                    [*chain.from_iterable(zip(ids, repeat(_eos(tokenizer)), strict=False))]
                )
                if tokenizer.unk_id is not None:
                    num_unknown += int(np.count_nonzero(joined == tokenizer.unk_id))
                file.write(joined.astype(dtype).data.cast("B"))
                lengths.append(sizes)
                num_tokens += len(joined)
            encoded.num_documents.append(num_documents)
            encoded.num_tokens.append(num_tokens)
            encoded.num_bytes.append(num_bytes)
    save_array(encoded.lengths_path, np.concatenate([np.zeros(0, np.int64), *lengths]).astype("<u4"))
    encoded = replace(
        encoded, num_unknown=num_unknown, num_tokenless=num_tokenless, specials=dict(spelled_out)
    )
    write_marker(Path(f"{path}.json"), asdict(encoded))
    block.text_path.unlink(missing_ok=True)
    return number


def finished_block(path: Path, dtype: np.dtype) -> EncodedBlock | None:
    """Return the encoded block at `path`, None if it is missing or incomplete."""
    try:
        encoded = EncodedBlock(**json.loads(Path(f"{path}.json").read_text()))
        whole = encoded.tokens_path.stat().st_size == sum(encoded.num_tokens) * dtype.itemsize
        return encoded if whole and encoded.lengths_path.stat().st_size else None
    except (OSError, ValueError):
        return None


def encode_documents(tokenizer: Tokenizer, documents: list[bytes]) -> list[np.ndarray]:
    """Return the ids of UTF-8 documents, int32. Long documents are encoded in parts."""
    longest = tokenizer.longest_text_bytes
    if max(map(len, documents)) <= longest:
        return tokenizer.encode_arrays(documents)
    return [encode_text(tokenizer, document, longest) for document in documents]


def with_tokens(ids: list[np.ndarray], together: int) -> list[int]:
    """Return the indices of the documents that have tokens.

    together: size of the groups of consecutive documents (2 for pairs) that are kept only if all have tokens.
    """
    groups = (range(first, first + together) for first in range(0, len(ids), together))
    return [i for group in groups if all(len(ids[i]) for i in group) for i in group]


def count_specials(specials: Mapping[bytes, list[str]], documents: list[bytes]) -> Counter[str]:
    """Count the occurrences of special tokens in the documents.

    specials: prefix → special tokens with it. Few texts contain any prefix, and searching for each of
    hundreds of tokens would be slow.
    """
    joined = b"\n".join(documents)
    found = (token for beginning, tokens in specials.items() if beginning in joined for token in tokens)
    return +Counter({token: joined.count(token.encode()) for token in found})


@lru_cache(maxsize=2)
def _tokenizer(path: Path, sha256: str, specials_are_text: bool) -> tuple[Tokenizer, dict[bytes, list[str]]]:
    """Return the tokenizer, and by their first three bytes the special tokens that it recognizes in texts.

    Cached per process; `sha256` is part of the key, because different tokenizers may use the path in turn.
    """
    tokenizer = load_tokenizer(path)
    specials: dict[bytes, list[str]] = {}
    for token in tokenizer.typed_specials():
        specials.setdefault(token.encode()[:3], []).append(token)
    if specials_are_text:
        tokenizer.encode_specials_as_text()
    return tokenizer, specials


def _eos(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([tokenizer.eos_id], np.int32)


# ----------------------------------------------------------------------------------------- tar files


@dataclass(frozen=True)
class Piece:
    """Documents [document_start, document_stop) and their tokens in the files of one encoded block."""

    block: EncodedBlock
    token_start: int
    token_stop: int
    document_start: int
    document_stop: int


SamplePieces = list[Piece]


def split_lengths(encoded: Iterable[EncodedBlock], split: int) -> Iterator[np.ndarray]:
    """Yield the lengths in tokens, including eos, of the documents of a split, block by block."""
    for block in encoded:
        first = sum(block.num_documents[:split])
        yield np.load(block.lengths_path, mmap_mode="r")[first : first + block.num_documents[split]]


def plan_samples(
    encoded: Sequence[EncodedBlock], split: int, sample_tokens: int, together: int = 1
) -> Iterator[SamplePieces]:
    """Yield samples: the fewest consecutive whole documents of a split with `sample_tokens` in total.

    together: size of the groups of consecutive documents (2 for pairs) that stay in one sample.
    """
    pieces: SamplePieces = []
    filled = 0
    for block, lengths in zip(encoded, split_lengths(encoded, split), strict=True):
        token = sum(block.num_tokens[:split])
        document = sum(block.num_documents[:split])
        ends = np.cumsum(lengths, dtype=np.int64)
        done_documents, done_tokens = 0, 0
        while done_documents < len(ends):
            last = int(np.searchsorted(ends, done_tokens + sample_tokens - filled))
            stop = min(-(-(last + 1) // together) * together, len(ends))
            tokens_stop = int(ends[stop - 1])
            pieces.append(
                Piece(
                    block,
                    token + done_tokens,
                    token + tokens_stop,
                    document + done_documents,
                    document + stop,
                )
            )
            filled += tokens_stop - done_tokens
            done_documents, done_tokens = stop, tokens_stop
            if filled >= sample_tokens:
                yield pieces
                pieces, filled = [], 0
    if pieces:
        yield pieces


def plan_tar_files(
    samples: Iterator[SamplePieces], dtype: np.dtype, tar_bytes: int
) -> Iterator[list[SamplePieces]]:
    """Yield the samples of each tar file: the fewest consecutive samples with `tar_bytes` in total."""
    tar_file: list[SamplePieces] = []
    size = 0
    for sample in samples:
        tar_file.append(sample)
        size += sample_bytes(
            sum(piece.token_stop - piece.token_start for piece in sample),
            sum(piece.document_stop - piece.document_start for piece in sample),
            dtype,
        )
        if size >= tar_bytes:
            yield tar_file
            tar_file, size = [], 0
    if tar_file:
        yield tar_file


def write_planned_tar_file(
    path: Path, index: int, first_sample: int, samples: list[SamplePieces], dtype: np.dtype, done_path: Path
) -> dict[str, Any]:
    """Write one tar file and return its result; `done_path`, written last, keeps the result for a later run.

    index: number of the tar file in the split; first_sample: number of its first sample.
    """
    split = path.parent.name
    made = (
        _read_sample(f"{split}-{number:09d}", pieces, dtype)
        for number, pieces in enumerate(samples, first_sample)
    )
    entry, rows = write_tar_file(path, made, index)
    result = {"split": split, "shard": index, "entry": entry, "rows": rows.tolist()}
    write_marker(done_path, result)
    return result


def _read_sample(key: str, pieces: SamplePieces, dtype: np.dtype) -> Sample:
    tokens = [
        np.fromfile(
            p.block.tokens_path, dtype, p.token_stop - p.token_start, offset=p.token_start * dtype.itemsize
        )
        for p in pieces
    ]
    lengths = [
        np.load(p.block.lengths_path, mmap_mode="r")[p.document_start : p.document_stop] for p in pieces
    ]
    return Sample(
        key, np.concatenate(tokens), np.cumsum(np.concatenate(lengths), dtype=np.int64).astype("<u4")
    )


def finished_tar_file(path: Path, done_path: Path) -> dict[str, Any] | None:
    """Return the recorded result of the tar file at `path`, None if it is missing or incomplete."""
    try:
        done = json.loads(done_path.read_text())
        return done if path.stat().st_size == done["entry"]["bytes"] else None
    except (OSError, ValueError):
        return None
