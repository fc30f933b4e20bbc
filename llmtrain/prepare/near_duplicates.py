"""Find documents that are nearly equal to an earlier one, by MinHash and locality-sensitive hashing.

Broder 1997 (On the resemblance and containment of documents); applied to corpora by Lee et al. 2021
(arXiv:2107.06499). A document is represented by its set of shingles, runs of `shingle_words` words. The
MinHash signature, PERMUTATIONS minima of the hashed shingles (computed by rensa), estimates the Jaccard
similarity of two sets. The signature is divided into bands: documents that are equal in a band are
candidates, whose full signatures are compared; if a share of at least `threshold` agrees, they form a pair.
Of each connected group of pairs only the first document in source order is kept.

As with exact duplicates, a band is searched one range of keys at a time, so that memory grows only with the
number of pairs. Disk space per document: 4 * PERMUTATIONS bytes, plus 12 bytes per band.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from llmtrain.errors import ConfigError, Problem
from llmtrain.hashing import mix
from llmtrain.prepare.config import NearDuplicatesConfig, SplitConfig
from llmtrain.prepare.document_blocks import DROPPED_DTYPE, DocumentBlock, save_array, splits_of_block
from llmtrain.prepare.source_file import TOKEN_DTYPE

PERMUTATIONS = 128
SEED = 0
# Documents per range of keys of a band; a range is sorted in memory, in about 100 MB.
RANGE_DOCUMENTS = 2_000_000
# Pairs compared at a time, 1 KB each.
CHUNK_PAIRS = 1 << 14

KEY_DTYPE = np.dtype([("key", "<u8"), ("row", "<u4")])
PAIR_DTYPE = np.dtype([("first", "<u8"), ("second", "<u8")])
"""Two documents, the earlier one first, each as number of the block * 2^32 + number in the block."""

# In scripts without spaces between words each character counts as a word (Thai to Tibetan, Myanmar, Khmer,
# kana, Han, Hangul syllables).
_WORD = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[^\\W_]+"
)
_SIGNATURES, _DOCUMENTS, _KEYS = "signatures.npy", "documents.npy", "keys.npy"


@dataclass(frozen=True)
class SignedBlock:
    """The signatures of a document block, in their own folder: signatures (documents, PERMUTATIONS) uint32,
    numbers of the documents in the block, and per band the sorted keys."""

    path: Path

    def load(self, name: str) -> np.ndarray:
        return np.load(self.path / name, mmap_mode="r")

    @property
    def is_finished(self) -> bool:
        return self.path.is_dir()


def require_library() -> int:
    """Return the version of rensa's algorithm, on which signatures depend.

    Raise ConfigError if rensa is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        where, got = "near_duplicates.threshold", "a number, but the package rensa is not installed"
        raise ConfigError(Problem(where, got, "null", 'or pip install "llmtrain[filters]"')) from error
    return rensa.RMinHash.ALGORITHM_VERSION


@lru_cache
def bands_of(threshold: float) -> tuple[int, int]:
    """Return (number of bands, minima per band) with the lowest loss: pairs above the threshold that are
    missed, weighted 0.9, and pairs below it that become candidates, weighted 0.1."""
    shared = np.linspace(0.0, 1.0, 1001)
    above = shared >= threshold

    def loss(rows: int) -> float:
        found = 1.0 - (1.0 - shared**rows) ** (PERMUTATIONS // rows)
        return float(0.9 * (1.0 - found)[above].sum() + 0.1 * found[~above].sum())

    rows = min(range(1, PERMUTATIONS + 1), key=loss)
    return PERMUTATIONS // rows, rows


# --------------------------------------------------------------------------------------- signatures


def sign_block(
    block: DocumentBlock,
    number: int,
    dropped_paths: Sequence[Path],
    config: NearDuplicatesConfig,
    path: Path,
) -> int:
    """Write the signatures of the documents of a block, without exact duplicates, to the folder `path`.

    number: of the block. Return it.
    """
    assert config.threshold is not None
    documents = block.documents()
    kept = np.sort(np.concatenate(splits_of_block(documents, number, dropped_paths, SplitConfig())))
    signatures, positions = [np.zeros((0, PERMUTATIONS), "<u4")], [np.zeros(0, "<u4")]
    done = 0
    for batch in block.read(documents, kept):
        shingles, ends = _shingles(batch, block.is_tokenized, config.shingle_words)
        sizes = np.diff(ends, prepend=0)
        has_words = np.flatnonzero(sizes)
        if len(has_words):
            signatures.append(minima(shingles, np.append(0, ends[has_words])))
            positions.append(kept[done + has_words].astype("<u4"))
        done += len(batch)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    signed = np.concatenate(signatures)
    save_array(temporary / _SIGNATURES, signed.reshape(-1))
    save_array(temporary / _DOCUMENTS, np.concatenate(positions))
    save_array(temporary / _KEYS, _band_keys(signed, *bands_of(config.threshold)).reshape(-1))
    os.replace(temporary, path)
    return number


def minima(shingles: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Return the signatures (documents, PERMUTATIONS) uint32; document i has the shingles
    shingles[borders[i]:borders[i + 1]]."""
    import rensa

    # There is already one worker process per core.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, borders.astype(np.uint64), PERMUTATIONS, SEED
    )
    return np.array(matrix.to_rows(), "<u4").reshape(-1, PERMUTATIONS)


def _band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Return the keys (bands, documents) of KEY_DTYPE, each band sorted by key, then by document."""
    keys = np.empty((bands, len(signatures)), KEY_DTYPE)
    for band in range(bands):
        columns = signatures[:, band * rows : (band + 1) * rows].astype(np.uint64)
        key = np.full(len(signatures), band, np.uint64)
        for column in columns.T:
            key = mix(key ^ column)
        order = np.argsort(key, kind="stable")
        keys[band]["key"], keys[band]["row"] = key[order], order
    return keys


def _shingles(batch: list[bytes], is_tokenized: bool, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes of the shingles of all documents, end of each document's shingles).

    length: words per shingle. A document of fewer words has one shingle of all its words, or none if it has
    no words.
    """
    if is_tokenized:
        ids = [np.frombuffer(document, TOKEN_DTYPE) for document in batch]
        words = mix(np.concatenate(ids).astype(np.uint64))
        counts = np.array([len(document) for document in ids])
    else:
        words, counts = _words(batch)
    hashes = np.zeros(len(words), np.uint64)
    starts = np.cumsum(counts) - counts
    for offset in range(min(length, len(words))):
        hashes[: len(words) - offset] = mix(hashes[: len(words) - offset]) + words[offset:]
    short = np.flatnonzero((counts > 0) & (counts < length))
    for document in short:
        whole = np.zeros(1, np.uint64)
        for word in words[starts[document] : starts[document] + counts[document]]:
            whole = mix(whole) + word
        hashes[starts[document]] = whole[0]
    sizes = np.where(counts == 0, 0, np.maximum(counts - length + 1, 1))
    ends = np.cumsum(sizes)
    first_words = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
    return mix(hashes[first_words]), ends


def _words(batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the lower-case words of all documents, and the number of words of each."""
    known: dict[str, int] = {}
    hashes: list[int] = []
    counts = []
    for document in batch:
        words = _WORD.findall(document.decode().lower())
        counts.append(len(words))
        for word in words:
            value = known.get(word)
            if value is None:
                value = known[word] = xxhash.xxh3_64_intdigest(word.encode())
            hashes.append(value)
    return np.array(hashes, np.uint64), np.array(counts)


# -------------------------------------------------------------------------------------------- pairs


def num_ranges(num_documents: int) -> int:
    """Return the number of ranges into which the keys of a band are divided."""
    return max(1, -(-num_documents // RANGE_DOCUMENTS))


def find_pairs(
    number: int, blocks: Sequence[SignedBlock], ranges: int, config: NearDuplicatesConfig, path: Path
) -> int:
    """Write the near-duplicate pairs among the documents with equal keys in one range of one band, as
    PAIR_DTYPE.

    number: band * ranges + range. Return it.
    """
    assert config.threshold is not None
    band, key_range = divmod(number, ranges)
    groups, owners, rows = _candidates(blocks, band, bands_of(config.threshold)[0], key_range, ranges)
    pairs = [np.zeros(0, PAIR_DTYPE)]
    # Compare the documents of each group of equal keys with the first of the group; those that are not
    # similar to it form a new group.
    while len(groups):
        is_first = np.append(True, groups[1:] != groups[:-1])
        leaders = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        others = np.flatnonzero(~is_first)
        is_similar = np.zeros(len(groups), bool)
        for start in range(0, len(others), CHUNK_PAIRS):
            chunk = others[start : start + CHUNK_PAIRS]
            ours = _gather(blocks, owners[chunk], rows[chunk])
            theirs = _gather(blocks, owners[leaders[chunk]], rows[leaders[chunk]])
            is_similar[chunk] = (ours == theirs).mean(axis=1) >= config.threshold
        found = np.flatnonzero(is_similar)
        made = np.empty(len(found), PAIR_DTYPE)
        made["first"] = _documents(blocks, owners[leaders[found]], rows[leaders[found]])
        made["second"] = _documents(blocks, owners[found], rows[found])
        pairs.append(made)
        left = ~is_first & ~is_similar
        owners, rows, groups = owners[left], rows[left], groups[left]
    temporary = path.with_name(f".{path.name}.tmp")
    save_array(temporary, np.unique(np.concatenate(pairs)))
    os.replace(temporary, path)
    return number


def _candidates(
    blocks: Sequence[SignedBlock], band: int, bands: int, key_range: int, ranges: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (key, block, row) of the documents whose key of this band lies in the range and occurs more than
    once, sorted by key, then in source order."""
    first, behind = key_range * 2**64 // ranges, (key_range + 1) * 2**64 // ranges
    found, owners = [np.zeros(0, KEY_DTYPE)], [np.zeros(0, np.uint32)]
    for number, block in enumerate(blocks):
        keys = _band(block, band, bands)
        start = np.searchsorted(keys["key"], np.uint64(first))
        stop = len(keys) if behind == 2**64 else np.searchsorted(keys["key"], np.uint64(behind))
        found.append(np.array(keys[start:stop]))
        owners.append(np.full(stop - start, number, np.uint32))
    merged, owner = np.concatenate(found), np.concatenate(owners)
    order = np.argsort(merged["key"], kind="stable")
    key = merged["key"][order]
    repeats = np.append(False, key[1:] == key[:-1])
    order = order[repeats | np.append(repeats[1:], False)]
    return merged["key"][order], owner[order], merged["row"][order]


def _band(block: SignedBlock, band: int, bands: int) -> np.ndarray:
    keys = block.load(_KEYS)
    documents = len(keys) // bands
    return keys[band * documents : (band + 1) * documents]


def _gather(blocks: Sequence[SignedBlock], owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the signatures (documents, PERMUTATIONS) of documents of several blocks."""
    gathered = np.empty((len(owners), PERMUTATIONS), "<u4")
    for owner in np.unique(owners):
        where = np.flatnonzero(owners == owner)
        gathered[where] = blocks[owner].load(_SIGNATURES).reshape(-1, PERMUTATIONS)[rows[where]]
    return gathered


def _documents(blocks: Sequence[SignedBlock], owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the documents as numbers of PAIR_DTYPE."""
    numbers = owners.astype(np.uint64) << np.uint64(32)
    for owner in np.unique(owners):
        where = np.flatnonzero(owners == owner)
        numbers[where] += blocks[owner].load(_DOCUMENTS)[rows[where]].astype(np.uint64)
    return numbers


def join_pairs(paths: Sequence[Path], path: Path) -> int:
    """Write the documents to drop, as DROPPED_DTYPE, ascending: all but the first of each connected group of
    pairs.

    Takes about 100 bytes of memory per pair. Return 0, the number of this only piece of work.
    """
    pairs = np.unique(np.concatenate([np.zeros(0, PAIR_DTYPE), *map(np.load, paths)]))
    documents, indices = np.unique(np.concatenate([pairs["first"], pairs["second"]]), return_inverse=True)
    first, second = np.split(indices, 2)
    # For each document the index of the first document known to be in its group; documents are in source
    # order.
    leader = np.arange(len(documents))
    while True:
        lower = np.minimum(leader[first], leader[second])
        joined = leader.copy()
        for ends in (first, second, leader[first], leader[second]):
            np.minimum.at(joined, ends, lower)
        joined = joined[joined]
        if (joined == leader).all():
            break
        leader = joined
    later = documents[leader != np.arange(len(documents))]
    dropped = np.empty(len(later), DROPPED_DTYPE)
    dropped["block"], dropped["document"] = later >> np.uint64(32), later & np.uint64(2**32 - 1)
    temporary = path.with_name(f".{path.name}.tmp")
    save_array(temporary, dropped)
    os.replace(temporary, path)
    return 0
