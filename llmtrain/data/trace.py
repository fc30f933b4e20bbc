"""Trace which samples and documents made a training step, and hash the data of many steps.

Steps are counted as in the metrics: step N is the N-th optimizer step, which is step N − 1 of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY, Dataset, NamesDocuments
from llmtrain.data.mixture import Timeline
from llmtrain.data.stream import Skipped, Stream, combine_digests, digest

_ROWS = 64
"""Number of samples that are read at a time."""


@dataclass(frozen=True)
class Sample:
    """The origin of one sample of a step."""

    step: int
    sample: int
    """Number of the sample in the whole run."""
    corpus: str
    """Name of its corpus, empty if there is only one."""
    epoch: int
    position: int
    """Number of samples drawn from its corpus before, over all epochs."""
    row: int
    """Number of the sample in the corpus; EMPTY if its tar file was skipped."""


@dataclass(frozen=True)
class Part:
    """The part of a sample that comes from one document."""

    tar: str
    """Name of the tar file."""
    document: int
    """Number of the document in the tar file."""
    tokens: int


def until(timeline: Timeline, step: int) -> Timeline:
    """Return the timeline up to and including the segment of `step`, as it was known at that step."""
    last = timeline.at(step - 1)
    return Timeline([segment for segment in timeline.segments if segment.step <= last.step])


def samples_of(stream: Stream, step: int, skipped: Skipped = frozenset()) -> Iterator[Sample]:
    """Yield the samples of `step` in order. skipped: the result of Stream.enter for the step of the
    stream."""
    segment = stream.timeline.at(step - 1)
    numbers = stream.samples(step - 1)
    origins = stream.origins(numbers, step - 1, skipped)
    _, positions = segment.draw(numbers.start, numbers.stop)
    for i, number in enumerate(numbers):
        yield Sample(
            step,
            number,
            stream.names[int(origins.sources[i])],
            int(origins.epochs[i]),
            int(positions[i]),
            int(origins.indices[i]),
        )


def parts_of(sources: Mapping[str, Dataset], sample: Sample) -> list[Part]:
    """Return the documents of a sample in order; none if it is empty or its dataset has no documents."""
    dataset = sources[sample.corpus]
    if sample.row == EMPTY or not isinstance(dataset, NamesDocuments):
        return []
    return [Part(*found) for found in dataset.where(sample.row)]


def digest_of(stream: Stream, step: int, skipped: Skipped = frozenset()) -> int:
    """Compute the data_digest of `step` from the current data. skipped: as in `samples_of`."""
    numbers = stream.samples(step - 1)
    total = 0
    for first in range(numbers.start, numbers.stop, _ROWS):
        rows = range(first, min(first + _ROWS, numbers.stop))
        total += digest(stream.get(stream.origins(rows, step - 1, skipped)), rows)
    return combine_digests(total)


def hash_digests(digests: Iterable[tuple[int, int]]) -> str:
    """Return one xxh3-128, in hex, of the (step, data_digest) of all steps in order."""
    together = xxhash.xxh3_128()
    for pair in digests:
        together.update(np.array(pair, dtype="<i8").tobytes())
    return together.hexdigest()
