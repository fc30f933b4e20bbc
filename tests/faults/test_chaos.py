"""A short storm over one job; tests/faults/chaos.py makes long ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import chaos
from tests.faults.test_launch_torchrun import unavailable
from tests.support.storm.faults import AgentKilled, ClockOff, RankKilled, ServerFails
from tests.support.storm.layouts import LAYOUTS
from tests.support.two_hosts import NoNamespacesError

pytestmark = pytest.mark.slow


def test_a_job_goes_on_after_each_fault_and_its_curve_is_the_undisturbed_one(tmp_path: Path):
    storm = chaos.Storm(0, tmp_path / "chaos.jsonl", tmp_path)
    faults = [
        RankKilled(gap=3, delay=0.1, target=1, seconds=0.0),
        ServerFails(gap=3, delay=0.0, target=0, seconds=1.0),
        ClockOff(gap=3, delay=0.0, target=0, seconds=0.5),
        AgentKilled(gap=3, delay=0.0, target=1, seconds=0.0),
    ]
    layout = replace(LAYOUTS[0], steps=90)
    try:
        outcomes = storm.run(0, layout, faults, is_numbered=True)
    except NoNamespacesError as error:
        unavailable(str(error))
    assert not [outcome for outcome in outcomes if outcome.problem]
    *struck, first, second, third = outcomes
    assert [outcome.fault for outcome in struck] == [fault.kind for fault in faults]
    assert struck[0].outcome == chaos.BY_ITSELF
    assert "rank 1 exited with 137 (killed by SIGKILL" in struck[0].line
    assert [outcome.outcome for outcome in struck[2:]] == [chaos.NO_RESTART, chaos.BY_SCHEDULER]
    assert [nan.line for nan in (first, second, third)] == ["gradient norm nan"] * 3
    records, jobs, ends = chaos.known(tmp_path / "chaos.jsonl", 0)
    assert jobs == {0}
    assert [end["curve"] for end in ends] == ["equal"]
    assert f"| {RankKilled.kind} | 1 |  | 1 |" in chaos.table(records, ends)
