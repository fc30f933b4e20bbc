"""Which ranks are slow, from the times of their phases."""

from __future__ import annotations

import pytest

from llmtrain.watch import clock as clocks
from llmtrain.watch import layout
from llmtrain.watch.clock import WallClock
from llmtrain.watch.config import WatchConfig
from llmtrain.watch.recorder import COMMUNICATION
from llmtrain.watch.stragglers import CATEGORIES, Comparison

CONFIG = WatchConfig(times_every=10, straggler_steps=20, straggler_factor=1.5)


def times(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(CATEGORIES, 0.0), **given}


def test_a_rank_is_named_once_and_once_more_when_it_keeps_up():
    comparison = Comparison(CONFIG, [[0, 1, 2]])
    usual, slow = times(forward=0.1, backward=0.2), times(forward=0.1, backward=0.5)
    named = [comparison.add([usual, slow, usual], 10) for _ in range(4)]
    assert [len(found) for found in named] == [0, 1, 0, 0]
    [found] = named[1]
    assert (found.rank, found.is_slow, found.phase, found.seconds, found.median) == (
        1,
        True,
        "backward",
        0.5,
        0.2,
    )
    [found] = comparison.add([usual] * 3, 10)
    assert (found.rank, found.is_slow) == (1, False)


def test_waiting_for_others_is_no_work_of_ones_own():
    comparison = Comparison(CONFIG, [[0, 1, 2]])
    waiting = times(forward=0.1, communication=0.9)
    assert not [comparison.add([waiting, waiting, times(forward=0.1)], 10) for _ in range(3)][-1]


def test_stages_are_not_compared_with_each_other():
    comparison = Comparison(CONFIG, [[0, 1], [2, 3]])
    first, last = times(forward=0.1), times(forward=0.3)
    assert not [comparison.add([first, first, last, last], 10) for _ in range(3)][-1]


def test_the_clock_counts_each_phase_apart(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    clock = WallClock()
    clock.take()
    clock.mark(layout.PHASES.index("forward"))
    now[0] += 0.25
    clock.mark(COMMUNICATION)
    now[0] += 0.5
    clock.mark(layout.PHASES.index("step"))
    taken = dict(zip(CATEGORIES, clock.take(), strict=True))
    assert (taken["forward"], taken["communication"]) == (0.25, 0.5)
    assert sum(clock.take()) == 0
