import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.mixture import Timeline, begin, sample_shares

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10.0), min_size=1)


def shares_of(weights: dict[str, float]) -> dict[str, float]:
    return sample_shares(weights, dict.fromkeys(weights, 1.0))


def drawn(timeline: Timeline, first: int, last: int) -> list[tuple[str, int]]:
    """(source, position) of each sample of steps [first, last)."""
    found = []
    for step in range(first, last):
        samples, segment = timeline.samples(step), timeline.at(step)
        names = list(segment.shares)
        sources, positions = segment.draw(samples.start, samples.stop)
        found += [(names[source], int(p)) for source, p in zip(sources, positions, strict=True)]
    return found


def assert_positions_go_on(found: list[tuple[str, int]]) -> None:
    """Every source is read from its beginning, without a gap or a repeat."""
    for name in {name for name, _ in found}:
        positions = [position for source, position in found if source == name]
        assert positions == list(range(len(positions)))


@settings(max_examples=80)
@given(weights=WEIGHTS, global_size=st.integers(1, 40), steps=st.integers(1, 30))
def test_sources_are_read_on_without_gaps(weights: dict[str, float], global_size: int, steps: int):
    found = drawn(begin(global_size, shares_of(weights), {}), 0, steps)
    assert len(found) == steps * global_size
    assert_positions_go_on(found)


@settings(max_examples=80)
@given(weights=WEIGHTS, first=st.integers(0, 10**12), count=st.integers(1, 50), cut=st.integers(0, 50))
def test_any_slice_is_drawn_alike(weights: dict[str, float], first: int, count: int, cut: int):
    segment = begin(8, shares_of(weights), {}).segments[0]
    middle = first + min(cut, count)
    whole = np.stack(segment.draw(first, first + count))
    parts = [np.stack(segment.draw(*part)) for part in ((first, middle), (middle, first + count))]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))
    after = segment.positions_at(first + count)
    for source, name in enumerate(segment.shares):
        last = whole[1][whole[0] == source]
        if len(last):
            assert after[name] == last[-1] + 1


@settings(max_examples=60)
@given(weights=WEIGHTS, first=st.integers(0, 10**9), global_size=st.sampled_from([1, 4, 24, 512]))
def test_weights_hold_over_any_thousand_steps(weights: dict[str, float], first: int, global_size: int):
    """Within 0.5 % of all samples, even at one sample a step."""
    shares = shares_of(weights)
    segment = begin(global_size, shares, {}).segments[0]
    before = segment.positions_at(first * global_size)
    after = segment.positions_at((first + 1000) * global_size)
    for name, share in shares.items():
        assert abs((after[name] - before[name]) / (1000 * global_size) - share) <= 0.005


def test_three_sources_hold_their_weights():
    weights = {"books": 0.2, "code": 0.1, "web": 0.7}
    segment = begin(1, shares_of(weights), {}).segments[0]
    worst = 0.0
    for first in range(0, 100_000, 617):
        before, after = segment.positions_at(first), segment.positions_at(first + 1000)
        worst = max(worst, *(abs((after[n] - before[n]) / 1000 - w) for n, w in weights.items()))
    assert worst < 0.0025


def test_weights_are_by_tokens():
    shares = sample_shares({"a": 0.5, "b": 0.5, "c": 0.0}, {"a": 100.0, "b": 50.0, "c": 1.0})
    assert shares == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}


@settings(max_examples=60)
@given(
    changes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 20), WEIGHTS, st.booleans()), min_size=1, max_size=5
    )
)
def test_no_change_repeats_or_loses_a_sample(changes: list[tuple[int, int, dict[str, float], bool]]):
    """Of weights, of sources, of the global batch; and what was drawn before stays as it was."""
    timeline = begin(4, shares_of({"a": 1.0}), {"seed": 0})
    step, before = 0, []
    for gap, global_size, weights, reload in changes:
        step += gap
        before = drawn(timeline, 0, step)
        timeline = timeline.changed(step, global_size, shares_of(weights), {"seed": 0})
        if reload:
            timeline = Timeline.decode(json.loads(json.dumps(timeline.encode())))
        assert drawn(timeline, 0, step) == before
    assert_positions_go_on(drawn(timeline, 0, step + 10))


def test_a_change_that_is_none_leaves_no_trace():
    shares, settings_ = {"a": 0.25, "b": 0.75}, {"seed": 1}
    timeline = begin(4, shares, settings_)
    assert timeline.changed(7, 4, dict(shares), dict(settings_)).encode() == timeline.encode()
    # A change that a resumed run takes back before any step was made of it.
    there_and_back = timeline.changed(7, 4, {"a": 1.0}, settings_).changed(7, 4, shares, settings_)
    assert drawn(there_and_back, 0, 20) == drawn(timeline, 0, 20)


def test_a_new_source_begins_and_the_others_go_on():
    timeline = begin(10, shares_of({"a": 3.0, "b": 1.0}), {})
    later = timeline.changed(5, 10, shares_of({"a": 3.0, "b": 1.0, "c": 4.0}), {})
    counts = {name: sum(n == name for n, _ in drawn(timeline, 0, 5)) for name in "ab"}
    first = {}
    for name, position in drawn(later, 5, 9):
        first.setdefault(name, position)
    assert first == {**counts, "c": 0}


def test_a_source_that_rests_keeps_its_place():
    timeline = begin(10, shares_of({"a": 1.0, "b": 1.0}), {})
    timeline = timeline.changed(4, 10, {"a": 1.0}, {}).changed(6, 10, shares_of({"a": 1.0, "b": 1.0}), {})
    assert_positions_go_on(drawn(timeline, 0, 12))


def test_rescaled_sources_stay_at_their_share():
    timeline = begin(10, {"a": 1.0}, {}).rescaled(8, {"a": 0.5})
    assert drawn(timeline, 8, 9)[0] == ("a", 40)
    assert drawn(timeline, 0, 8) == [("a", n) for n in range(80)]


@pytest.mark.parametrize("step", [3, 5, 9])
def test_samples_that_are_left_out(step: int):
    """Also over a change of weights; and a resumed run that plans the same again keeps the gap."""
    shares = shares_of({"a": 3.0, "b": 1.0})
    timeline = begin(4, shares, {}).changed(6, 4, {"a": 1.0}, {})
    later = timeline.leaving_out(step, 2)
    assert [later.samples(s) for s in range(step)] == [timeline.samples(s) for s in range(step)]
    assert later.samples(step) == timeline.samples(step + 2)
    assert later.left_out_before(step) == range(
        timeline.samples(step).start, timeline.samples(step + 2).start
    )
    assert not later.left_out_before(step + 1)
    before, after = later.at(step), timeline.at(step + 2)
    first = later.samples(step).start
    assert before.positions_at(first) == after.positions_at(first)
    assert later.at(6).shares == timeline.at(6).shares
    same = Timeline.decode(json.loads(json.dumps(later.encode())))
    assert same.changed(step, 4, same.at(step).shares, {}).encode() == [
        segment.encode() for segment in later.segments if segment.step <= step
    ]


def test_a_timeline_begins_with_step_0():
    with pytest.raises(ValueError, match="must begin with step 0"):
        Timeline([])
