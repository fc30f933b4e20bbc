"""The tasks of a worker in each phase, and the tests that tell whether a task is finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.files import write_atomically
from llmtrain.hashing import mix
from llmtrain.prepare import document_blocks
from llmtrain.prepare.clean import SEPARATOR, CleanCounts, clean, clean_pairs, take_tokenized
from llmtrain.prepare.config import FiltersConfig, SplitConfig
from llmtrain.prepare.decompress import out_of_memory
from llmtrain.prepare.document_blocks import DocumentBlock, DocumentBlockWriter
from llmtrain.prepare.files import write_marker
from llmtrain.prepare.filters import keep
from llmtrain.prepare.read import read_part, undecodable
from llmtrain.prepare.remote import local_copy
from llmtrain.prepare.source_file import Pairs, Tokens, Unit
from llmtrain.prepare.tars import Vocabulary
from llmtrain.prepare.workers import count
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.sentencepiece import train
from llmtrain.tokenizers.words import train_words


def read_unit(
    number: int,
    unit: Unit,
    folder: Path,
    fields: Sequence[str],
    txt_document: str,
    quoting: str,
    normalization: str,
    vocabulary: Vocabulary | None,
    filters: FiltersConfig,
) -> int:
    """Read and clean a unit of source parts into document blocks in `folder`/`number`, which appears
    complete.

    Return the number of the unit.
    """
    temporary = folder / f".{number:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    writer = DocumentBlockWriter(temporary)
    counts = CleanCounts()
    for wanted in unit:
        with local_copy(wanted, temporary) as part:
            try:
                for batch in read_part(part, fields, txt_document, temporary, vocabulary, counts, quoting):
                    if isinstance(batch, Tokens):
                        writer.add(take_tokenized(batch, counts), is_tokenized=True)
                    else:
                        cleaned = (
                            clean_pairs(batch, normalization, counts)
                            if isinstance(batch, Pairs)
                            else clean(batch, normalization, counts)
                        )
                        writer.add(keep(cleaned, filters, counts.filtered))
                    count(len(batch.sources if isinstance(batch, Pairs) else batch))
            except UnicodeDecodeError as error:
                raise undecodable(part) from error
            except MemoryError as error:
                raise out_of_memory(part.file) from error
    blocks = [
        [block.path.name, block.num_documents, block.num_bytes, block.is_tokenized]
        for block in writer.close()
    ]
    write_marker(temporary / "unit.json", {"blocks": blocks, "counts": asdict(counts)})
    final = folder / f"{number:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return number


def finished_unit(folder: Path) -> tuple[list[DocumentBlock], CleanCounts] | None:
    """Return the blocks and counts of a finished unit, None if it is missing or incomplete."""
    try:
        unit = json.loads((folder / "unit.json").read_text())
        blocks = [DocumentBlock(folder / name, *numbers) for name, *numbers in unit["blocks"]]
        for block in blocks:
            # The text is deleted after encoding. A power failure may leave files empty.
            if block.text_path.exists() and block.text_path.stat().st_size != block.num_bytes:
                return None
            if not block.documents_path.stat().st_size or not block.hashes_path.stat().st_size:
                return None
        return blocks, CleanCounts(**unit["counts"])
    except (OSError, ValueError):
        return None


def find_duplicates(blocks: list[DocumentBlock], number: int, ranges: int, path: Path) -> int:
    """Write the exact duplicates of one range of hashes to `path`; return the number of the range."""
    temporary = path.with_suffix(".tmp")
    document_blocks.save_array(temporary, document_blocks.duplicates(blocks, number, ranges))
    os.replace(temporary, path)
    return number


def train_tokenizer(
    blocks: list[DocumentBlock],
    dropped_paths: list[Path],
    split: SplitConfig,
    config: TokenizerConfig,
    seed: int,
    path: Path,
) -> int:
    """Train a tokenizer on a sample of the training documents; write it to `path`. Return 0.

    Raise DataError if there is no training document.
    """
    documents = list(_training_documents(blocks, dropped_paths, split, config.train_bytes, seed))
    if not documents:
        raise DataError(
            Problem(
                "source",
                "no training document to train a tokenizer on",
                "",
                "add text or lower split.validation and split.test",
            )
        )
    make = train_words if config.kind == "words" else train
    write_atomically(path, make(documents, config))
    return 0


def _training_documents(
    blocks: list[DocumentBlock], dropped_paths: list[Path], split: SplitConfig, train_bytes: int, seed: int
) -> Iterator[str]:
    """Yield training documents of about `train_bytes` in total; the choice depends only on document and
    seed."""
    total = 0
    for number, block in enumerate(blocks):
        documents = block.documents()
        sizes = np.diff(documents["end"], prepend=np.uint64(0))
        total += int(sizes[document_blocks.splits_of_block(documents, number, dropped_paths, split)[0]].sum())
    share = min(1.0, train_bytes / max(total, 1))
    left = train_bytes
    for number, block in enumerate(blocks):
        documents = block.documents()
        chosen = document_blocks.splits_of_block(documents, number, dropped_paths, split)[0]
        if share < 1.0:
            chosen = chosen[_mixed(documents["key"][chosen], seed) < share * 2.0**64]
        for batch in block.read(documents, chosen):
            for document in batch:
                if len(document) <= left:
                    left -= len(document)
                    yield from document.decode().split(SEPARATOR)


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Map uniform 64-bit keys to other uniform 64-bit numbers that depend on `seed`."""
    return mix(keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64))
