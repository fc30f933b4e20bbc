"""What made a step: the stream's arithmetic read back, and one hash over what many steps consumed.

Steps here are counted as metrics are: step N is the N-th optimizer step, the stream's step N − 1.
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
"""Samples read at once."""


@dataclass(frozen=True)
class Sample:
    """Where one sample of a step comes from."""

    step: int
    sample: int
    """Its number over the whole run."""
    corpus: str
    """"" of a single one."""
    epoch: int
    position: int
    """Samples drawn from its corpus before, over all epochs."""
    row: int
    """Its number within the corpus; EMPTY where its shard was skipped."""


@dataclass(frozen=True)
class Part:
    """What a sample holds of one document."""

    shard: str
    document: int
    """Its number within the shard."""
    tokens: int


def until(timeline: Timeline, step: int) -> Timeline:
    """The timeline up to and with the segment that `step` belongs to: what was known when it was made."""
    last = timeline.at(step - 1)
    return Timeline([segment for segment in timeline.segments if segment.step <= last.step])


def samples_of(stream: Stream, step: int, skipped: Skipped = frozenset()) -> Iterator[Sample]:
    """The samples of `step` in their order. skipped: as Stream.enter gives it for the stream's step."""
    segment = stream.timeline.at(step - 1)
    numbers = stream.samples(step - 1)
    places = stream.places(numbers, step - 1, skipped)
    _, positions = segment.draw(numbers.start, numbers.stop)
    for i, number in enumerate(numbers):
        yield Sample(
            step,
            number,
            stream.names[int(places.sources[i])],
            int(places.epochs[i]),
            int(positions[i]),
            int(places.indices[i]),
        )


def parts_of(sources: Mapping[str, Dataset], sample: Sample) -> list[Part]:
    """The documents of a sample in their order; none of one that was left empty or that has no documents."""
    dataset = sources[sample.corpus]
    if sample.row == EMPTY or not isinstance(dataset, NamesDocuments):
        return []
    return [Part(*found) for found in dataset.where(sample.row)]


def digest_of(stream: Stream, step: int, skipped: Skipped = frozenset()) -> int:
    """The data_digest of `step`, from the data as they are now. skipped: as with `samples_of`."""
    numbers = stream.samples(step - 1)
    total = 0
    for first in range(numbers.start, numbers.stop, _ROWS):
        rows = range(first, min(first + _ROWS, numbers.stop))
        total += digest(stream.get(stream.places(rows, step - 1, skipped)), rows)
    return combine_digests(total)


def hash_digests(digests: Iterable[tuple[int, int]]) -> str:
    """(step, data_digest) of each step in turn → one xxh3-128, hex."""
    together = xxhash.xxh3_128()
    for pair in digests:
        together.update(np.array(pair, dtype="<i8").tobytes())
    return together.hexdigest()
