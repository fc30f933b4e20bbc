from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmtrain.config import decode
from llmtrain.corpus.config import Mixture, TokenDataConfig
from llmtrain.data.mixture import Timeline
from llmtrain.data.streaming import open_stream, plan_timeline
from llmtrain.train.config import TrainConfig
from llmtrain.train.resolve import VARIANTS
from tests.support.training import compose


class Rows:
    """A dataset of numbers."""

    def __init__(self, length: int, fingerprint: str = "") -> None:
        self.length = length
        self.fingerprint = fingerprint or f"{length}"
        self.tar_sizes = np.array([length])

    def __len__(self) -> int:
        return self.length

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"numbers": indices}

    def describe(self) -> str:
        return f"{self.length} rows"


def config(global_size: int = 8, seed: int = 0, **data: Any) -> TrainConfig:
    mapping = compose(["data.path=corpora", "run.dir=none"])
    decoded = decode(TrainConfig, mapping, VARIANTS)
    assert isinstance(decoded.data, TokenDataConfig)
    changed = replace(decoded, data=replace(decoded.data, **data), seed=seed)
    return replace(changed, batch=replace(changed.batch, global_size=global_size))


A, B, C = (Rows(length) for length in (100, 60, 40))


def plan(config: TrainConfig, before: Timeline | None, step: int, **sources: Rows) -> tuple[Timeline, str]:
    """The timeline, and what was said."""
    said: list[str] = []
    encoded = None if before is None else before.encode()
    return plan_timeline(config, sources or {"": A}, encoded, step, said.append), "\n".join(said)


def positions(timeline: Timeline, step: int) -> dict[str, int]:
    segment = timeline.at(step)
    return segment.positions_at(segment.first_sample(step))


def test_resuming_unchanged_changes_nothing():
    timeline, said = plan(config(), None, 0)
    again, said_again = plan(config(), timeline, 7)
    assert again.encode() == timeline.encode()
    assert said == said_again == ""
    assert timeline.samples(3) == range(24, 32)


def test_a_curriculum_is_laid_out_ahead():
    stages = (Mixture(10, {"a": 1.0, "b": 1.0}), Mixture(20, {"b": 1.0}))
    timeline, _ = plan(config(mixture={"a": 1.0}, curriculum=stages), None, 0, a=A, b=B)
    assert [(s.step, dict(s.shares)) for s in timeline.segments] == [
        (0, {"a": 1.0}),
        (10, {"a": 0.5, "b": 0.5}),
        (20, {"b": 1.0}),
    ]
    assert positions(timeline, 10) == {"a": 80, "b": 0}
    assert positions(timeline, 25) == {"a": 120, "b": 80}
    # Resumed in any stage, or with its later stages changed, what is over stays.
    for step in (5, 10, 15, 30):
        again, said = plan(config(mixture={"a": 1.0}, curriculum=stages), timeline, step, a=A, b=B)
        assert said == ""
        assert [(s.step, s.shares) for s in again.segments] == [(s.step, s.shares) for s in timeline.segments]
        assert positions(again, 33) == positions(timeline, 33)
    cut, _ = plan(config(mixture={"a": 1.0}, curriculum=stages[:1]), timeline, 15, a=A, b=B)
    assert [s.step for s in cut.segments] == [0, 10]


def test_a_source_joins_and_leaves():
    timeline, _ = plan(config(mixture={"a": 3.0, "b": 1.0}), None, 0, a=A, b=B)
    joined, said = plan(config(mixture={"a": 3.0, "b": 1.0, "c": 4.0}), timeline, 10, a=A, b=B, c=C)
    assert said == "note: c joins the mixture at its beginning; the others continue"
    assert positions(joined, 10) == {"a": 60, "b": 20, "c": 0}
    left, said = plan(config(mixture={"b": 1.0, "c": 1.0}), joined, 20, b=B, c=C)
    assert said == "note: a leaves the mixture"
    assert positions(left, 20)["a"] == positions(joined, 20)["a"]
    reweighted, said = plan(config(mixture={"b": 1.0, "c": 3.0}), left, 20, b=B, c=C)
    assert said == "note: the mixture's weights have changed; each corpus continues where it was"
    assert positions(reweighted, 20) == positions(left, 20)
    back, said = plan(config(mixture={"a": 1.0, "b": 1.0, "c": 1.0}), left, 30, a=A, b=B, c=C)
    assert said == "note: a joins the mixture again, from where it was; the others continue"
    assert positions(back, 30) == positions(left, 30)


def test_another_global_batch_goes_on_with_the_next_sample():
    timeline, _ = plan(config(), None, 0)
    changed, said = plan(config(global_size=6), timeline, 10)
    assert said == "note: batch.global_size was 8, is 6; no sample is lost by that"
    assert changed.samples(9) == range(72, 80)
    assert changed.samples(10) == range(80, 86)


def test_other_rows_go_on_at_the_same_share_of_the_epoch():
    timeline, _ = plan(config(), None, 0)
    changed, said = plan(config(), timeline, 10, **{"": Rows(200)})
    assert "the corpus has changed; its samples come in a new order" in said
    assert positions(changed, 10) == {"": 160}
    _, said = plan(config(seed=4), timeline, 10)
    assert "note: seed (was 0, is 4); samples come in a new order" in said


def test_the_stream_follows_the_data_s_settings():
    settings = config(drop_last=True, global_size=7)
    timeline, _ = plan(settings, None, 0)
    stream = open_stream(settings.data, {"": A}, timeline, seed=0)
    assert stream.progress(14)["epoch"] == pytest.approx(1.0)


def test_another_global_batch_with_dropped_ends_stays_at_its_share():
    """Epochs of 100 samples hold 96 in steps of 8 and 98 in steps of 7."""
    timeline, _ = plan(config(drop_last=True), None, 0)
    changed, said = plan(config(drop_last=True, global_size=7), timeline, 12)
    assert "epochs end elsewhere, with data.drop_last" in said
    assert positions(changed, 12) == {"": 98}
