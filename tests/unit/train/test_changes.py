"""Settings that changed since the checkpoint, in words."""

from __future__ import annotations

from typing import Any

from llmtrain.train.changes import changed_settings

BEFORE: dict[str, Any] = {
    "run": {"name": "a"},
    "optimizer": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.95], "clip_norm": 1.0},
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "train": {"steps": 20},
    "data": {"path": "here", "overlap": 0},
    "precision": "fp32",
    "seed": 0,
}


def test_nothing_changed():
    moved = {**BEFORE, "run": {"name": "b"}, "data": {"path": "there", "overlap": 0}, "come_since": 1}
    assert (
        changed_settings(BEFORE, {**moved, "optimizer": {**BEFORE["optimizer"], "betas": (0.9, 0.95)}}) == []
    )


def test_each_setting_that_changed_is_told():
    now = {
        **BEFORE,
        "optimizer": {**BEFORE["optimizer"], "lr": 0.01, "betas": (0.9, 0.99), "clip_norm": None},
        "schedule": {"name": "wsd", "decay_steps": 3},
        "train": {"steps": 30},
        "precision": "bf16",
        "seed": 1,
    }
    assert changed_settings(BEFORE, now) == [
        "optimizer.lr was 0.001 and is 0.01",
        "optimizer.betas was [0.9, 0.95] and is [0.9, 0.99]",
        "optimizer.clip_norm was 1.0 and is null",
        "schedule.name was cosine and is wsd",
        "train.steps was 20 and is 30",
        "precision was fp32 and is bf16",
        "seed was 0 and is 1",
    ]


def test_corpora_that_join_or_leave_a_mixture_are_told():
    before = {"data": {"mixture": {"a": 1.0, "b": 2.0}}}
    assert changed_settings(before, {"data": {"mixture": {"a": 1.0, "b": 3.0}}}) == [
        "data.mixture.b was 2.0 and is 3.0"
    ]
    for now in ({"a": 1.0}, {"a": 1.0, "c": 2.0}):
        (told,) = changed_settings(before, {"data": {"mixture": now}})
        assert told.startswith('data.mixture was {"a": 1.0, "b": 2.0} and is {"a": 1.0')
