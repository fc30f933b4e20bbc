"""Datasets: numbered samples, read one micro-batch at a time. A dataset's tar files are those of its
corpus.

Dim names: M samples of a micro-batch, W tokens of a row (sequence length + 1), P pieces, S tar files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import xxhash

from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.rows import BestFit, Packing, Pieces, Windows
from llmtrain.data.datasets.samples import SamplesOfSplit
from llmtrain.errors import DataError, Problem

EMPTY = -1
"""Index of a sample without targets; fills up micro-batches so that all ranks have equally many."""

PADDING_DOCUMENT = -1
"""Document number of padding."""


class Dataset(Protocol):
    """Numbered samples; those of a tar file are consecutive."""

    @property
    def fingerprint(self) -> str:
        """A hex hash of the content and the number of samples."""

    @property
    def tar_sizes(self) -> np.ndarray:
        """Number of samples of each tar file, int64 (S,)."""

    def __len__(self) -> int: ...

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples with these indices (each in [0, len) or EMPTY), stacked along the first axis.
        Callable from any thread."""

    def describe(self) -> str:
        """Return a one-line description."""


@runtime_checkable
class ReadsTars(Protocol):
    """A dataset that reads its tar files on demand."""

    @property
    def tar_names(self) -> list[str]:
        """Names of the tar files, for messages."""

    def want(self, tars: Sequence[int]) -> None:
        """Prefetch these tar files, which will be read soon in this order."""

    def find_bad(self, tars: Sequence[int]) -> list[int]:
        """Return those of these tar files that cannot be read."""


@runtime_checkable
class OrdersByLength(Protocol):
    """A dataset of rows of different lengths, of which those of like length are trained on together."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (N,)."""

    @property
    def group(self) -> int:
        """Rows of like length that follow each other."""

    def batch_tokens(self, rows: np.ndarray) -> int:
        """Return the tokens of a batch of these rows, padding included."""


def mean_length(datasets: Iterable[Dataset]) -> float | None:
    """Return the mean tokens of a sample, None if all samples have the same length."""
    lengths = [dataset.lengths for dataset in datasets if isinstance(dataset, OrdersByLength)]
    return float(np.concatenate(lengths).mean()) if lengths else None


@runtime_checkable
class NamesDocuments(Protocol):
    """A dataset that knows which documents a sample holds."""

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (tar file, document, tokens) for each document of a sample."""


class TokenSequences(SamplesOfSplit):
    """A token stream cut into rows of W = T + 1 tokens: T inputs and, shifted by one, their T targets.

    The tokens of a row are from one tar file. With `concat`, row i of a tar file holds its tokens [i·T,
    i·T + T + 1), so that consecutive rows share one token; the last row is padded. With `best_fit`, rows
    hold whole documents. In both cases every token but the first of its document is a target in exactly
    one row. An objective skips targets whose predecessor belongs to another document.
    """

    def __init__(
        self,
        split: TokenSplit,
        sequence_length: int,
        *,
        packing: Literal["concat", "best_fit"] = "concat",
        overlap: int = 0,
        cache: Path | None = None,
    ) -> None:
        """overlap: tokens that each part of a document longer than a row repeats from the previous part, as
        context; best_fit only. cache: a folder that caches the number of rows that best_fit makes.

        Raise DataError if the split holds no target, or if the overlap is a whole row.
        """
        if overlap >= sequence_length:
            got = f"{overlap} with sequences of {sequence_length}"
            raise DataError(Problem("data.overlap", got, f"0 to {sequence_length - 1}, which leave a target"))
        key = f"{sequence_length}" if packing == "concat" else f"{sequence_length}/best_fit/{overlap}"
        super().__init__(split, key)
        self.sequence_length = sequence_length
        self._packing: Packing
        if packing == "concat":
            self._packing = Windows(split, sequence_length)
        else:
            self._packing = BestFit(split, sequence_length, overlap, cache)
        self._set_sizes(self._packing.tar_sizes)
        if len(self) == 0:
            remedy = "prepare more text, or a larger share for this split"
            raise DataError(Problem(f"split {split.name}", f"{split.num_tokens} tokens", "2 or more", remedy))
        self._has_contexts = packing == "best_fit" and overlap > 0

    @property
    def tokens_per_sample(self) -> float:
        """Mean tokens per row, without padding."""
        return self._split.num_tokens / len(self)

    @property
    def padding(self) -> float:
        """Share of target positions that are padding."""
        return max(0.0, 1.0 - self._packing.num_positions / (len(self) * self.sequence_length))

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens" int64 (M, W); "documents" int32 (M, W), the document's number within the row,
        from 0, PADDING_DOCUMENT at padding; and, if parts of documents overlap, "contexts" bool (M, W),
        True at tokens that are context only, not targets."""
        M, W = len(indices), self.sequence_length + 1
        pieces = self.pieces(indices)
        offsets_in_batch = pieces.rows * W + pieces.columns
        ids_MW = self._read(pieces, M)
        begins = self._packing.document_begins(pieces)
        documents_MW = np.zeros((M, W), dtype=np.int32)
        documents_MW.reshape(-1)[offsets_in_batch[begins[0]] + begins[1]] = 1
        np.cumsum(documents_MW, axis=1, out=documents_MW)
        filled_M = np.bincount(pieces.rows, weights=pieces.lengths, minlength=M)
        for row in np.flatnonzero(filled_M < W).tolist():
            documents_MW[row, int(filled_M[row]) :] = PADDING_DOCUMENT
        raw: dict[str, np.ndarray] = {"tokens": ids_MW.astype(np.int64), "documents": documents_MW}
        if self._has_contexts:
            assert pieces.contexts is not None
            offsets = np.arange(int(pieces.contexts.sum()))
            offsets -= np.repeat(np.cumsum(pieces.contexts) - pieces.contexts, pieces.contexts)
            contexts = np.zeros(M * W, dtype=bool)
            contexts[np.repeat(offsets_in_batch, pieces.contexts) + offsets] = True
            raw["contexts"] = contexts.reshape(M, W)
        return raw

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return the samples' token ids, (M, W) of the corpus' dtype, 0 at padding."""
        return self._read(self.pieces(indices), len(indices))

    def pieces(self, indices: np.ndarray) -> Pieces:
        """Return the spans of the token stream that these samples hold; EMPTY samples hold none."""
        rows = np.flatnonzero(indices != EMPTY)
        tars = self._tars_of(indices[rows])
        return self._packing.pieces(rows, tars, indices[rows] - self._firsts[tars])

    def _read(self, pieces: Pieces, num_rows: int) -> np.ndarray:
        W = self.sequence_length + 1
        ids_MW = np.zeros((num_rows, W), dtype=self._split.dtype)
        offsets_in_batch = pieces.rows * W + pieces.columns
        self._split.read_spans(pieces.starts, pieces.lengths, ids_MW.reshape(-1), offsets_in_batch)
        return ids_MW

    def where(self, index: int) -> list[tuple[str, int, int]]:
        """Return (tar file, document, tokens) for each document of a sample: the tar file's name, the
        document's number within it, and the number of the sample's tokens that belong to it."""
        pieces = self.pieces(np.array([index]))
        tar = int(np.searchsorted(self._firsts, index, side="right")) - 1
        ends = self._split.tar_starts[tar] + np.cumsum(self._split.lengths_of(tar))
        found = []
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
            first = int(np.searchsorted(ends, start, side="right"))
            while length > 0:
                taken = min(length, int(ends[first]) - start)
                found.append((self._split.tar_names[tar], first, taken))
                first, start, length = first + 1, start + taken, length - taken
        return found

    def describe(self) -> str:
        split = self._split
        padding = f", {100 * self.padding:.2f} % padding" if isinstance(self._packing, BestFit) else ""
        return (
            f"{split.name}: {split.num_tokens:,} tokens of {split.num_documents:,} documents "
            f"in {len(self):,} sequences of {self.sequence_length}{padding}"
        )


class WithoutBadTars:
    """A dataset in which samples of unreadable tar files are EMPTY, for evaluation."""

    def __init__(self, dataset: Dataset, on_skip: Callable[[str, int], None]) -> None:
        """on_skip: called with (tar file, samples) for each tar file that is left out."""
        self._dataset = dataset
        self._on_skip = on_skip
        self.tar_sizes = dataset.tar_sizes
        self._ends = np.cumsum(self.tar_sizes)
        self._is_bad: dict[int, bool] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples. Raise DataError if no tar file is readable."""
        tars = np.searchsorted(self._ends, indices, side="right")
        bad = [tar for tar in np.unique(tars[indices != EMPTY]).tolist() if self._find_bad(tar)]
        return self._dataset.get(np.where(np.isin(tars, bad), EMPTY, indices))

    def describe(self) -> str:
        return self._dataset.describe()

    def _find_bad(self, tar: int) -> bool:
        dataset = self._dataset
        if not isinstance(dataset, ReadsTars):
            return False
        with self._lock:
            if tar not in self._is_bad:
                self._is_bad[tar] = bool(dataset.find_bad([tar]))
                if self._is_bad[tar]:
                    self._on_skip(dataset.tar_names[tar], int(self.tar_sizes[tar]))
            num_bad = sum(self._is_bad.values())
        if num_bad == np.count_nonzero(self.tar_sizes):
            got = f"no readable one of {num_bad} tar files"
            raise DataError(Problem(f"data.path ({dataset.tar_names[tar]})", got, "one or more"))
        return self._is_bad[tar]


class Concatenation:
    """Several datasets in a row as one, for evaluation."""

    def __init__(self, by_name: Mapping[str, Dataset]) -> None:
        self.names = tuple(by_name)
        self._datasets = datasets = list(by_name.values())
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(d) for d in datasets])])
        self.tar_sizes = np.concatenate([dataset.tar_sizes for dataset in datasets])

    def parts(self) -> list[tuple[int, Dataset]]:
        """Return the number of the first sample of each dataset, and the dataset."""
        return list(zip(self._firsts.tolist(), self._datasets, strict=False))

    @property
    def fingerprint(self) -> str:
        together = "/".join(dataset.fingerprint for dataset in self._datasets)
        return xxhash.xxh3_128_hexdigest(together.encode())

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def sources(self, indices: np.ndarray) -> np.ndarray:
        """Return the place in `names` of the dataset of each sample; 0 for EMPTY."""
        return np.clip(np.searchsorted(self._firsts, indices, side="right") - 1, 0, None)

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        sources = self.sources(indices)
        inner = np.where(indices == EMPTY, EMPTY, indices - self._firsts[sources])
        return gather(self._datasets, sources, inner)

    def describe(self) -> str:
        return "; ".join(dataset.describe() for dataset in self._datasets)


def gather(datasets: Sequence[Dataset], sources: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the samples `indices` (M,) of the datasets `sources` (M,), stacked in that order."""
    used = np.unique(sources).tolist()
    if len(used) == 1:
        return datasets[used[0]].get(indices)
    raw: dict[str, np.ndarray] = {}
    for source in used:
        chosen = np.flatnonzero(sources == source)
        for key, values in datasets[source].get(indices[chosen]).items():
            if key not in raw:
                raw[key] = np.empty((len(indices), *values.shape[1:]), dtype=values.dtype)
            raw[key][chosen] = values
    return raw
