"""Rows of a table of sources and targets as an encoder-decoder reads them, one pair a sample.

Dim names: M samples of a micro-batch, S tokens of the longest source, T tokens of the longest target.
"""

from __future__ import annotations

import json

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY, PADDING_DOCUMENT
from llmtrain.data.datasets.examples import padded_width
from llmtrain.tables.table import TableSplit


class TextPairs:
    """The pairs of one split: each source with one of its targets, both with an end token; what is too long
    is cut before it."""

    def __init__(
        self,
        split: TableSplit,
        source_length: int,
        target_length: int,
        first_ids: tuple[int, ...],
        eos_id: int,
        *,
        group: int = 64,
        each_target: bool = False,
    ) -> None:
        """first_ids: ids before each source; group: see OrdersByLength; each_target: a sample for each target
        of a row, else one for its first."""
        self.split, self.group = split, group
        self._widths, self._first_ids, self._eos_id = (source_length, target_length), first_ids, eos_id
        self._sources, self._targets = self.split.ragged("first"), self.split.ragged("target")
        of_all, counts = self.split.ragged("target_ends"), self.split.ragged("target_ends").lengths
        # Rows to predict may have no targets.
        samples = counts if each_target else np.ones(len(split), np.int64)
        self.rows = np.repeat(np.arange(len(split)), samples)
        """Row of each sample."""
        which = np.arange(len(self.rows)) - np.repeat(np.cumsum(samples) - samples, samples)
        # One more number, which rows without targets read.
        ends = np.append(of_all.values, 0).astype(np.int64)
        place = np.where(counts[self.rows] > 0, of_all.starts[self.rows] + which, len(ends) - 1)
        self._ends = ends[place]
        self._begins = np.where(which > 0, ends[place - 1], 0)
        room = max(0, source_length - len(first_ids) - 1), max(0, target_length - 1)
        sources, targets = self._sources.lengths[self.rows], self._ends - self._begins
        self._kept = np.minimum(sources, room[0]), np.minimum(targets, room[1])
        self.truncated = int((sources > room[0]).sum()), int((targets > room[1]).sum())
        """Samples whose source is cut, and those whose target is."""
        self.lengths = self._kept[0] + self._kept[1] + len(first_ids) + 2

    @property
    def fingerprint(self) -> str:
        said = f"{self.split.fingerprint}/{self._widths}/{self._first_ids}/{len(self)}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    @property
    def tar_sizes(self) -> np.ndarray:
        return np.array([len(self)])

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self) -> str:
        pairs = f", {len(self):,} pairs" if len(self) != len(self.split) else ""
        means = [kept.mean() + 1 for kept in self._kept]
        cut = "".join(
            f", {count:,} {side} cut to {width} tokens"
            for side, count, width in zip(("sources", "targets"), self.truncated, self._widths, strict=True)
            if count
        )
        tokens = f"{means[0] + len(self._first_ids):.1f} tokens a source and {means[1]:.1f} a target"
        return f"{self.split.describe()}{pairs}, {tokens}{cut}"

    def batch_tokens(self, rows: np.ndarray) -> int:
        source = int(self._kept[0][rows].max()) + len(self._first_ids) + 1
        target = int(self._kept[1][rows].max()) + 1
        return len(rows) * (padded_width(source) + padded_width(target))

    def source(self, sample: int) -> np.ndarray:
        """Return the ids of a sample's source, with its end."""
        kept = self._sources[int(self.rows[sample])][: int(self._kept[0][sample])]
        return np.concatenate([np.array(self._first_ids, np.int64), kept, [self._eos_id]]).astype(np.int64)

    def target(self, sample: int) -> np.ndarray:
        """Return the ids of a sample's target, with its end."""
        begin = int(self._begins[sample])
        kept = self._targets[int(self.rows[sample])][begin : begin + int(self._kept[1][sample])]
        return np.append(kept.astype(np.int64), self._eos_id)

    def references(self, sample: int) -> list[str]:
        """Return all targets of a sample's row as text."""
        found: list[str] = json.loads(self.split.ragged("references").text(int(self.rows[sample])))
        return found

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "sources" int64 (M, S) and "targets" int64 (M, T), padded with 0; "source_documents" int32
        (M, S) and "documents" int32 (M, T), 0 at tokens, PADDING_DOCUMENT at padding."""
        M, (S, T) = len(indices), self._widths
        sources, targets = np.zeros((M, S), np.int64), np.zeros((M, T), np.int64)
        source_documents = np.full((M, S), PADDING_DOCUMENT, np.int32)
        documents = np.full((M, T), PADDING_DOCUMENT, np.int32)
        for row, sample in enumerate(indices.tolist()):
            if sample == EMPTY:
                continue
            source, target = self.source(sample)[:S], self.target(sample)
            sources[row, : len(source)], source_documents[row, : len(source)] = source, 0
            targets[row, : len(target)], documents[row, : len(target)] = target, 0
        return {
            "sources": sources,
            "targets": targets,
            "source_documents": source_documents,
            "documents": documents,
        }
