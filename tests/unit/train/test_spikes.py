"""Which steps are bad."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llmtrain.errors import UserError
from llmtrain.track.events import Event, skipped_steps
from llmtrain.train.config import StepsConfig
from llmtrain.train.resolve import resolve
from llmtrain.train.spikes import BadSteps
from llmtrain.train.spikes_config import SpikesConfig
from tests.support.training import TINY_GPT, compose

CONFIG = StepsConfig(on_spike="skip", spikes=SpikesConfig(deviations=6.0, window=20, in_a_row=3))


def after(steps: int, seed: int = 0) -> BadSteps:
    """After so many steps of losses around 3 and norms around 1."""
    noise = np.random.default_rng(seed)
    found = BadSteps(CONFIG, None)
    for _ in range(steps):
        assert found.accepts(3 + 0.1 * noise.normal(), 1 + 0.2 * noise.normal())
    return found


def test_a_value_far_above_the_mean_is_bad():
    found = after(40)
    assert not found.accepts(9.0, 1.0)
    assert found.why.startswith("loss 9, ")
    assert not found.accepts(3.0, 50.0)
    assert found.why.startswith("gradient norm 50, ")
    assert not found.is_too_many
    assert not found.accepts(math.nan, 1.0)
    assert found.why == "loss nan"
    assert found.is_too_many
    assert found.accepts(0.1, 0.01)  # what falls is not bad
    assert found.in_a_row == 0


def test_only_what_is_not_finite_is_bad_before_the_window_is_full():
    found = after(19)
    assert found.accepts(1e9, 1.0)
    assert not after(19).accepts(3.0, math.inf)


def test_noise_is_not_bad_where_values_hardly_differ():
    found = BadSteps(CONFIG, None)
    for _ in range(20):
        assert found.accepts(2.0, 1.0)
    assert found.accepts(2.1, 1.0)
    assert not found.accepts(2.2, 1.0)


def test_a_resumed_run_decides_as_one_that_went_on():
    whole = after(40)
    whole.accepts(9.0, 1.0)
    resumed = BadSteps(CONFIG, json.loads(json.dumps(whole.recorded()))["spikes"])
    noise = np.random.default_rng(1)
    for _ in range(50):
        loss, norm = 3 + 0.3 * noise.normal(), 1 + 0.6 * noise.normal()
        assert whole.accepts(loss, norm) == resumed.accepts(loss, norm)
        assert (whole.why, whole.recorded()) == (resumed.why or whole.why, resumed.recorded())


def test_a_start_undoes_what_was_skipped_after_its_step():
    skips = [Event("skip", 0.0, step, {"why": f"loss {step}"}) for step in (3, 7)]
    events = [*skips, Event("start", 0.0, 5), Event("skip", 0.0, 8, {"why": "loss 8"})]
    assert skipped_steps(events) == {3: "loss 3", 8: "loss 8"}
    assert skipped_steps([*events, Event("rollback", 0.0, 2)]) == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.on_spike=skip", "train.spikes.window=1"), "train.spikes.window: got 1"),
        (("train.on_spike=rollback", "checkpoint.every=null"), "give checkpoint.every=…, or on_spike=skip"),
        (("train.on_spike=ignore",), "train.on_spike"),
    ],
)
def test_refusals(corpus, overrides: tuple[str, ...], words: str):
    with pytest.raises(UserError) as caught:
        resolve(compose([*TINY_GPT, f"data.path={corpus}", *overrides]))
    assert words in str(caught.value)


def test_going_back_is_bounded():
    config = replace(CONFIG, on_spike="rollback", spikes=replace(CONFIG.spikes, rollbacks=2))
    assert BadSteps(config, {"rollbacks": 1}).may_go_back
    assert not BadSteps(config, {"rollbacks": 2}).may_go_back
