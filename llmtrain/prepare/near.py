"""Documents that are nearly the same as an earlier one: MinHash and locality-sensitive hashing.

Broder 1997 (On the resemblance and containment of documents); for corpora Lee et al. 2021
(arXiv:2107.06499). A document is the set of its runs of `shingle_words` words; PERMUTATIONS minima of
its hashes (by rensa) estimate how much two sets share. Bands of the minima bring candidates together:
documents with an equal band are compared by all their minima, and those that agree in `threshold` of
them are joined. Of documents joined, directly or by others, the first in source order stays.

As exact duplicates are, bands are searched one range of keys at a time, so memory does not grow with the
corpus but for the pairs found. On disk a document takes PERMUTATIONS * 4 bytes and 12 a band.
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
from llmtrain.prepare.blocks import DROPPED_DTYPE, Block, save_array, splits_of_block
from llmtrain.prepare.config import NearDuplicatesConfig, SplitConfig
from llmtrain.prepare.streams import TOKEN_DTYPE

PERMUTATIONS = 128
SEED = 0
# One range of a band's keys is sorted in memory at a time: about 100 MB at this many.
RANGE_DOCUMENTS = 2_000_000
# Pairs compared at a time: 1 KB each.
CHUNK_PAIRS = 1 << 14

KEY_DTYPE = np.dtype([("key", "<u8"), ("row", "<u4")])
PAIR_DTYPE = np.dtype([("first", "<u8"), ("second", "<u8")])
"""Two documents, the earlier first: number of the block * 2^32 + number in the block."""

# Scripts that put no space between words: each character is one (Thai to Tibetan, Myanmar, Khmer, kana,
# Han, Hangul syllables).
_WORD = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[^\\W_]+"
)
_SIGNATURES, _DOCUMENTS, _KEYS = "signatures.npy", "documents.npy", "keys.npy"


@dataclass(frozen=True)
class Signed:
    """A block's signatures, in a folder of its own: (documents, PERMUTATIONS) uint32, the documents'
    positions in the block, and for each band their keys, sorted."""

    path: Path

    def load(self, name: str) -> np.ndarray:
        return np.load(self.path / name, mmap_mode="r")

    @property
    def is_finished(self) -> bool:
        return self.path.is_dir()


def require_library() -> int:
    """The version of the library's algorithm, on which signatures depend.

    Raise ConfigError if it is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        where, got = "near_duplicates.threshold", "a search for near-duplicates without the package rensa"
        install = 'pip install "llmtrain[filters]"'
        raise ConfigError(Problem(where, got, "null, or a number once it is installed", install)) from error
    return rensa.RMinHash.ALGORITHM_VERSION


@lru_cache
def bands_of(threshold: float) -> tuple[int, int]:
    """(bands, minima in each) that miss few pairs above the threshold and bring few together below it; to
    miss one is held for nine times as bad."""
    shared = np.linspace(0.0, 1.0, 1001)
    above = shared >= threshold

    def loss(rows: int) -> float:
        found = 1.0 - (1.0 - shared**rows) ** (PERMUTATIONS // rows)
        return float(0.9 * (1.0 - found)[above].sum() + 0.1 * found[~above].sum())

    rows = min(range(1, PERMUTATIONS + 1), key=loss)
    return PERMUTATIONS // rows, rows


# --------------------------------------------------------------------------------------- signatures


def sign_block(
    block: Block,
    number: int,
    dropped_paths: Sequence[Path],
    config: NearDuplicatesConfig,
    path: Path,
) -> int:
    """Write the signatures of a block's documents that are no exact duplicates to the folder `path`.
    Returns the block's number."""
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
    """(rows, PERMUTATIONS) uint32 of the rows shingles[borders[i]:borders[i + 1]]."""
    import rensa

    # The calling process is one of as many as there are cores.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, borders.astype(np.uint64), PERMUTATIONS, SEED
    )
    return np.array(matrix.to_rows(), "<u4").reshape(-1, PERMUTATIONS)


def _band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(bands, documents) of KEY_DTYPE, each band sorted by key and then by document."""
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
    """(hashes of all documents' shingles, where each document's end). A document of fewer words than
    `length` has one shingle, of all of them; one without words has none."""
    if is_tokenized:
        ids = [np.frombuffer(document, TOKEN_DTYPE) for document in batch]
        words = mix(np.concatenate(ids).astype(np.uint64))
        counts = np.array([len(document) for document in ids])
    else:
        words, counts = _words(batch)
    hashes = np.zeros(len(words), np.uint64)
    starts = np.cumsum(counts) - counts
    for place in range(min(length, len(words))):
        hashes[: len(words) - place] = mix(hashes[: len(words) - place]) + words[place:]
    short = np.flatnonzero((counts > 0) & (counts < length))
    for document in short:
        whole = np.zeros(1, np.uint64)
        for word in words[starts[document] : starts[document] + counts[document]]:
            whole = mix(whole) + word
        hashes[starts[document]] = whole[0]
    sizes = np.where(counts == 0, 0, np.maximum(counts - length + 1, 1))
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
    return mix(hashes[places]), ends


def _words(batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the lower-case words of all documents, and how many each has."""
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
    """In how many ranges of its keys each band is searched."""
    return max(1, -(-num_documents // RANGE_DOCUMENTS))


def find_pairs(
    number: int, blocks: Sequence[Signed], ranges: int, config: NearDuplicatesConfig, path: Path
) -> int:
    """Write the near-duplicates that one range of one band's keys brings together, as PAIR_DTYPE. The
    number counts the ranges of all bands, band by band; returns it."""
    assert config.threshold is not None
    band, key_range = divmod(number, ranges)
    groups, owners, rows = _candidates(blocks, band, bands_of(config.threshold)[0], key_range, ranges)
    pairs = [np.zeros(0, PAIR_DTYPE)]
    # In each group of equal keys, documents are compared with the group's first; those that are not like
    # it form a group again.
    while len(groups):
        is_first = np.append(True, groups[1:] != groups[:-1])
        leaders = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        others = np.flatnonzero(~is_first)
        is_like = np.zeros(len(groups), bool)
        for start in range(0, len(others), CHUNK_PAIRS):
            chunk = others[start : start + CHUNK_PAIRS]
            ours = _gather(blocks, owners[chunk], rows[chunk])
            theirs = _gather(blocks, owners[leaders[chunk]], rows[leaders[chunk]])
            is_like[chunk] = (ours == theirs).mean(axis=1) >= config.threshold
        found = np.flatnonzero(is_like)
        made = np.empty(len(found), PAIR_DTYPE)
        made["first"] = _documents(blocks, owners[leaders[found]], rows[leaders[found]])
        made["second"] = _documents(blocks, owners[found], rows[found])
        pairs.append(made)
        left = ~is_first & ~is_like
        owners, rows, groups = owners[left], rows[left], groups[left]
    temporary = path.with_name(f".{path.name}.tmp")
    save_array(temporary, np.unique(np.concatenate(pairs)))
    os.replace(temporary, path)
    return number


def _candidates(
    blocks: Sequence[Signed], band: int, bands: int, key_range: int, ranges: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key, block, row) of each document whose key of this band lies in the range and is not its alone, by
    key and then in source order."""
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


def _band(block: Signed, band: int, bands: int) -> np.ndarray:
    keys = block.load(_KEYS)
    documents = len(keys) // bands
    return keys[band * documents : (band + 1) * documents]


def _gather(blocks: Sequence[Signed], owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(documents, PERMUTATIONS) minima of documents of several blocks."""
    gathered = np.empty((len(owners), PERMUTATIONS), "<u4")
    for owner in np.unique(owners):
        where = np.flatnonzero(owners == owner)
        gathered[where] = blocks[owner].load(_SIGNATURES).reshape(-1, PERMUTATIONS)[rows[where]]
    return gathered


def _documents(blocks: Sequence[Signed], owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Documents as in PAIR_DTYPE."""
    numbers = owners.astype(np.uint64) << np.uint64(32)
    for owner in np.unique(owners):
        where = np.flatnonzero(owners == owner)
        numbers[where] += blocks[owner].load(_DOCUMENTS)[rows[where]].astype(np.uint64)
    return numbers


def join_pairs(paths: Sequence[Path], path: Path) -> int:
    """Write which documents go, as DROPPED_DTYPE, ascending: all but the first of each cluster of pairs.
    Takes about 100 bytes of memory a pair. Returns 0, the number of this only piece."""
    pairs = np.unique(np.concatenate([np.zeros(0, PAIR_DTYPE), *map(np.load, paths)]))
    documents, places = np.unique(np.concatenate([pairs["first"], pairs["second"]]), return_inverse=True)
    first, second = np.split(places, 2)
    # The place of the first document known to be joined with each; documents ascend in source order.
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
    going = documents[leader != np.arange(len(documents))]
    dropped = np.empty(len(going), DROPPED_DTYPE)
    dropped["block"], dropped["document"] = going >> np.uint64(32), going & np.uint64(2**32 - 1)
    temporary = path.with_name(f".{path.name}.tmp")
    save_array(temporary, dropped)
    os.replace(temporary, path)
    return 0
