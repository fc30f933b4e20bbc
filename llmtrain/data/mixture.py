"""Assign samples to the sources of a mixture: pure functions of the global sample number and a timeline, in
constant time.

A timeline is a list of segments, within which the global batch size and the shares of the sources are
constant. A curriculum or a resumed run that changes them begins a new segment, in which every source
continues where it was. A source can thus be added or reweighted without affecting the others.

Within a segment, sample i belongs to the source in whose interval of [0, 1) the fractional part of i·φ lies
(φ the golden ratio). Over any range of samples the shares are exact up to a few samples (Kronecker sequence,
discrepancy O(log(n) / n)), and the number of the first i samples in an interval is a sum of floors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from llmtrain.config import LARGEST_INT, decode_json, require
from llmtrain.corpus.config import PRESENT_KEYS
from llmtrain.errors import Problem

_WORD = 1 << 64
_STEP = 0x9E3779B97F4A7C15
"""The fractional part of φ in units of 2^-64; odd."""


@dataclass(frozen=True)
class Segment:
    """The composition of batches from one optimizer step on."""

    step: int
    """First step of the segment."""
    sample: int
    """Global number of its first sample."""
    global_size: int
    """Number of samples in a step."""
    shares: Mapping[str, float]
    """Source → share of the samples; the sum is 1."""
    positions: Mapping[str, int]
    """Source → number of samples drawn from it before the segment."""
    settings: Mapping[str, Any]
    """Settings that determine the samples of a source and their order; only compared here."""

    def __post_init__(self) -> None:
        """Give a setting that an earlier version recorded its present name."""
        settings = {PRESENT_KEYS.get(key, key): value for key, value in self.settings.items()}
        object.__setattr__(self, "settings", settings)

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
        """Return for samples [first, last) of the run, each (last − first,) int64: the index of the source in
        `shares`, and the number of samples drawn from that source before."""
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
        """Return source → number of samples drawn from it before sample `sample` of the run, including
        sources that the segment no longer uses."""
        drawn = self._drawn(sample - self.sample)
        now = {name: self.positions.get(name, 0) + n for name, n in zip(self.shares, drawn, strict=True)}
        return {**self.positions, **now}

    def first_sample(self, step: int) -> int:
        """Return the global number of the first sample of `step`."""
        return self.sample + (step - self.step) * self.global_size

    def draws_alike(self, other: Segment) -> bool:
        """Return whether both segments draw the same samples from the same positions on."""
        mine, theirs = ((s.global_size, list(s.shares.items()), s.settings) for s in (self, other))
        return mine == theirs

    def follows(self, other: Segment) -> bool:
        """Return whether the segment begins where the segment before would go on."""
        is_next = self.sample == other.first_sample(self.step)
        return is_next and self.positions == other.positions_at(self.sample)

    def encode(self) -> dict[str, Any]:
        """Return the segment as JSON values."""
        return {
            **{name: getattr(self, name) for name in ("step", "sample", "global_size")},
            **{name: dict(getattr(self, name)) for name in ("shares", "positions", "settings")},
        }

    @cached_property
    def _bounds(self) -> list[int]:
        """The end of the interval of each source in units of 2^-64; the last is 2^64."""
        total, bounds = 0.0, []
        for share in self.shares.values():
            total += share
            bounds.append(min(_WORD, max(1, round(total * _WORD))))
        return [*bounds[:-1], _WORD]

    def _drawn(self, count: int) -> list[int]:
        """Return how many of the first `count` samples of the segment come from each source."""
        below = [0, *(_below(count, bound) for bound in self._bounds)]
        return [after - before for before, after in pairwise(below)]


class Timeline:
    """Segments in order of their steps."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        if not segments or segments[0].step != 0:
            raise ValueError("a timeline must begin with step 0")
        self.segments = tuple(segments)
        self._steps = [segment.step for segment in segments]

    def at(self, step: int) -> Segment:
        """Return the segment of `step`."""
        return self.segments[bisect_right(self._steps, step) - 1]

    def samples(self, step: int) -> range:
        """Return the global numbers of the samples of `step`, over all ranks."""
        segment = self.at(step)
        first = segment.first_sample(step)
        return range(first, first + segment.global_size)

    def changed(
        self, step: int, global_size: int, shares: Mapping[str, float], settings: Mapping[str, Any]
    ) -> Timeline:
        """Return this timeline up to `step`, followed by a segment with the given values, or without it if
        nothing changes."""
        now = self.at(step)
        first = now.first_sample(step)
        segment = Segment(step, first, global_size, shares, now.positions_at(first), settings)
        kept = [earlier for earlier in self.segments if earlier.step < step]
        if kept and segment.draws_alike(kept[-1]) and segment.follows(kept[-1]):
            return Timeline(kept)
        return Timeline([*kept, segment])

    def leaving_out(self, step: int, count: int) -> Timeline:
        """Return this timeline without the samples of `count` steps from `step` on: `step` draws those that
        come after them. Later changes stay at their steps."""
        now, after = self.at(step), self.at(step + count)
        first = after.first_sample(step + count)
        kept = [earlier for earlier in self.segments if earlier.step < step]
        jump = replace(now, step=step, sample=first, positions=after.positions_at(first))
        timeline = Timeline([*kept, jump])
        for later in self.segments:
            if later.step > step:
                timeline = timeline.changed(later.step, later.global_size, later.shares, later.settings)
        return timeline

    def left_out_before(self, step: int) -> range:
        """Return the global numbers of the samples that were left out just before `step`; mostly none."""
        segment = self.at(step)
        earlier = [before for before in self.segments if before.step < segment.step]
        if segment.step != step or not earlier:
            return range(0)
        return range(earlier[-1].first_sample(step), segment.sample)

    def rescaled(self, step: int, factors: Mapping[str, float]) -> Timeline:
        """Return this timeline up to `step`, followed by a segment in which the positions of sources are
        multiplied by `factors`, for sources whose samples have another size from there on."""
        last = self.at(step)
        first = last.first_sample(step)
        positions = {n: int(p * factors.get(n, 1.0)) for n, p in last.positions_at(first).items()}
        segment = Segment(step, first, last.global_size, last.shares, positions, last.settings)
        return Timeline([*(earlier for earlier in self.segments if earlier.step < step), segment])

    def encode(self) -> list[dict[str, Any]]:
        """Return the segments as JSON values."""
        return [segment.encode() for segment in self.segments]

    @classmethod
    def decode(cls, encoded: Sequence[Mapping[str, Any]]) -> Timeline:
        """Return the timeline of `encode`'s result. Raise ConfigError for other values."""
        return cls([decode_json(Segment, segment) for segment in encoded])


def timeline_problems(segments: Sequence[Segment]) -> Iterator[Problem]:
    """Yield the problems that prevent `segments` from forming a timeline."""
    steps = [segment.step for segment in segments]
    is_timeline = steps[:1] == [0] and all(a < b for a, b in pairwise(steps))
    yield from require(is_timeline, "timeline", steps, "segments in order of their steps, from 0 on")


def begin(global_size: int, shares: Mapping[str, float], settings: Mapping[str, Any]) -> Timeline:
    """Return the timeline of a new run."""
    return Timeline([Segment(0, 0, global_size, shares, dict.fromkeys(shares, 0), settings)])


def sample_shares(weights: Mapping[str, float], tokens_per_sample: Mapping[str, float]) -> dict[str, float]:
    """Convert weights by tokens to shares by samples, with sum 1, without sources of weight 0."""
    raw = {name: weight / tokens_per_sample[name] for name, weight in weights.items() if weight > 0}
    total = sum(raw.values())
    return {name: share / total for name, share in raw.items()}


def _below(count: int, bound: int) -> int:
    """Return how many i in [0, count) satisfy i·_STEP mod 2^64 < bound, for bound ≤ 2^64."""
    if bound == _WORD:
        return count
    whole = _floor_sum(count, _WORD, _STEP, 0)
    # x mod m < bound if and only if floor(x / m) and floor((x − bound) / m) differ, by one.
    return whole - (_floor_sum(count, _WORD, _STEP, _WORD - bound) - count)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return Σ floor((a·i + b) / m) over i in [0, n), by a Euclidean algorithm (Graham, Knuth and Patashnik,
    Concrete Mathematics, section 3.5)."""
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
