"""Limits that nobody could keep are refused."""

from __future__ import annotations

from llmtrain.watch.config import WatchConfig


def test_limits_that_cannot_be_kept_are_refused():
    config = WatchConfig(
        hang_seconds=1, save_seconds=0, straggler_factor=1, times_every=50, straggler_steps=20
    )
    assert [str(problem) for problem in config.problems()] == [
        "hang_seconds: got 1; allowed: 2 or more, or 0 for none",
        "straggler_factor: got 1; allowed: more than 1",
        "straggler_steps: got 20; allowed: watch.times_every=50 or more",
    ]
    assert not list(WatchConfig().problems())
