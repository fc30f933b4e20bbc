"""Which source each sample comes from, and how far that source has been read: pure functions of the sample's
global number and of a timeline, in constant time.

A timeline is a list of segments; within one, the global batch and the sources' shares stay the same. A new
segment begins where a curriculum or a resumed run changes them, with every source where it was: so a source
can be added, or weighted anew, without moving the others.

Within a segment sample i belongs to the source in whose interval of [0, 1) the fraction of i·φ falls (φ the
golden ratio): over any stretch the shares hold to a few samples (Kronecker's sequence, whose discrepancy is
of order log(n) / n), and how many of the first i samples fall into an interval is a sum of floors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from llmtrain.config import LARGEST_INT, decode_json, require
from llmtrain.errors import Problem

_WORD = 1 << 64
_STEP = 0x9E3779B97F4A7C15
"""φ's fraction, in units of 2^-64; odd."""


@dataclass(frozen=True)
class Segment:
    """How samples are drawn from one optimizer step on."""

    step: int
    """The first."""
    sample: int
    """Global number of its first sample."""
    global_size: int
    """Samples of a step."""
    shares: Mapping[str, float]
    """Source → share of the samples, together 1."""
    positions: Mapping[str, int]
    """Source → samples drawn from it before."""
    settings: Mapping[str, Any]
    """On what the samples of a source and their order depend; compared, never read here."""

    def problems(self) -> Iterator[Problem]:
        for name, least in (("step", 0), ("sample", 0), ("global_size", 1)):
            number = getattr(self, name)
            yield from require(least <= number < LARGEST_INT >> 16, name, number, f"{least} or more")
        total = sum(self.shares.values())
        are_shares = all(share > 0 for share in self.shares.values()) and abs(total - 1) < 1e-6
        yield from require(are_shares, "shares", dict(self.shares), "positive shares, 1 together")
        for name, position in self.positions.items():
            yield from require(position >= 0, f"positions.{name}", position, "0 or more")

    def draw(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [first, last) of the run → (source: its place in `shares`, int64; position within the
        source, int64), (last − first,) each."""
        names = list(self.shares)
        start = first - self.sample
        if len(names) == 1:
            position = self.positions.get(names[0], 0) + start
            return np.zeros(last - first, np.int64), np.arange(position, position + last - first)
        before = self._drawn(start)
        i = np.arange(start, last - self.sample, dtype=np.uint64)
        words = i * np.uint64(_STEP)  # modulo 2^64
        upper = np.array([bound - 1 for bound in self._bounds], dtype=np.uint64)
        sources = np.searchsorted(upper, words, side="left")
        positions = np.empty(len(i), dtype=np.int64)
        for source, name in enumerate(names):
            chosen = sources == source
            count = int(chosen.sum())
            positions[chosen] = self.positions.get(name, 0) + before[source] + np.arange(count)
        return sources.astype(np.int64), positions

    def positions_at(self, sample: int) -> dict[str, int]:
        """Source → samples drawn from it before the run's sample `sample`; sources that are drawn from no
        more keep theirs."""
        drawn = self._drawn(sample - self.sample)
        now = {name: self.positions.get(name, 0) + n for name, n in zip(self.shares, drawn, strict=True)}
        return {**self.positions, **now}

    def first_sample(self, step: int) -> int:
        return self.sample + (step - self.step) * self.global_size

    def draws_alike(self, other: Segment) -> bool:
        """Whether both, going on from one place, draw the same."""
        mine, theirs = ((s.global_size, list(s.shares.items()), s.settings) for s in (self, other))
        return mine == theirs

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: getattr(self, name) for name in ("step", "sample", "global_size")},
            **{name: dict(getattr(self, name)) for name in ("shares", "positions", "settings")},
        }

    @cached_property
    def _bounds(self) -> list[int]:
        """The end of each source's interval in units of 2^-64; the last is 2^64."""
        total, bounds = 0.0, []
        for share in self.shares.values():
            total += share
            bounds.append(min(_WORD, max(1, round(total * _WORD))))
        return [*bounds[:-1], _WORD]

    def _drawn(self, count: int) -> list[int]:
        """Of the segment's first `count` samples, how many come from each source."""
        below = [0, *(_below(count, bound) for bound in self._bounds)]
        return [after - before for before, after in pairwise(below)]


class Timeline:
    """Segments in the order of their steps."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        if not segments or segments[0].step != 0:
            raise ValueError("a timeline begins with step 0")
        self.segments = tuple(segments)
        self._steps = [segment.step for segment in segments]

    def at(self, step: int) -> Segment:
        """The segment that `step` belongs to."""
        return self.segments[bisect_right(self._steps, step) - 1]

    def samples(self, step: int) -> range:
        """Global numbers of the samples of `step`, over all ranks."""
        segment = self.at(step)
        first = segment.first_sample(step)
        return range(first, first + segment.global_size)

    def changed(
        self, step: int, global_size: int, shares: Mapping[str, float], settings: Mapping[str, Any]
    ) -> Timeline:
        """This one up to `step`, from where samples are drawn so; itself up to there where that is no
        change."""
        now = self.at(step)
        first = now.first_sample(step)
        segment = Segment(step, first, global_size, shares, now.positions_at(first), settings)
        kept = [earlier for earlier in self.segments if earlier.step < step]
        if kept and segment.draws_alike(kept[-1]) and segment.positions == kept[-1].positions_at(first):
            return Timeline(kept)
        return Timeline([*kept, segment])

    def rescaled(self, step: int, factors: Mapping[str, float]) -> Timeline:
        """This one up to `step`, where each source's position is multiplied: its samples have other sizes
        from there on."""
        last = self.at(step)
        first = last.first_sample(step)
        positions = {n: int(p * factors.get(n, 1.0)) for n, p in last.positions_at(first).items()}
        segment = Segment(step, first, last.global_size, last.shares, positions, last.settings)
        return Timeline([*(earlier for earlier in self.segments if earlier.step < step), segment])

    def encode(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [segment.encode() for segment in self.segments]

    @classmethod
    def decode(cls, encoded: Sequence[Mapping[str, Any]]) -> Timeline:
        """Raise ConfigError for what `encode` did not give."""
        return cls([decode_json(Segment, segment) for segment in encoded])


def timeline_problems(segments: Sequence[Segment]) -> Iterator[Problem]:
    """What keeps them from being a timeline."""
    steps = [segment.step for segment in segments]
    is_timeline = steps[:1] == [0] and all(a < b for a, b in pairwise(steps))
    yield from require(is_timeline, "timeline", steps, "segments in the order of their steps, from 0 on")


def begin(global_size: int, shares: Mapping[str, float], settings: Mapping[str, Any]) -> Timeline:
    """A run's timeline before anything changed."""
    return Timeline([Segment(0, 0, global_size, shares, dict.fromkeys(shares, 0), settings)])


def sample_shares(weights: Mapping[str, float], tokens_per_sample: Mapping[str, float]) -> dict[str, float]:
    """Weights by tokens → shares by samples, together 1; sources of weight 0 are left out."""
    raw = {name: weight / tokens_per_sample[name] for name, weight in weights.items() if weight > 0}
    total = sum(raw.values())
    return {name: share / total for name, share in raw.items()}


def _below(count: int, bound: int) -> int:
    """How many i in [0, count) have i·_STEP mod 2^64 < bound ≤ 2^64."""
    if bound == _WORD:
        return count
    whole = _floor_sum(count, _WORD, _STEP, 0)
    # x mod m < bound exactly where floor(x / m) and floor((x − bound) / m) differ, by one.
    return whole - (_floor_sum(count, _WORD, _STEP, _WORD - bound) - count)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ floor((a·i + b) / m) over i in [0, n), by Euclid's steps (Graham, Knuth and Patashnik, Concrete
    Mathematics, section 3.5)."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b = divmod(top, m)
        m, a = a, m
    return total
