"""Which checkpoints of a run are kept, and what interrupted saves leave."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.reader import Checkpoint
from tests.support.owners import MATRIX, Owner, save


def test_retention(tmp_path: Path):
    losses = {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: 6.0, 60: 7.0}
    for step, loss in losses.items():
        save(tmp_path, [Owner(MATRIX)], step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000060", retention.Rules(2, 1, 30))
    left = [
        json.loads((path / "manifest.json").read_text())["step"] for path in retention.list_steps(tmp_path)
    ]
    assert left == [20, 30, 50, 60]


def test_losses_that_are_not_finite_are_not_best(tmp_path: Path):
    for step, loss in {1: float("nan"), 2: 3.0, 3: None, 4: 5.0}.items():
        save(tmp_path, [Owner(MATRIX)], step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000004", retention.Rules(1, 1))
    assert [path.name for path in retention.list_steps(tmp_path)] == ["step-00000002", "step-00000004"]


def test_what_kills_leave_is_cleared(tmp_path: Path):
    kept = save(tmp_path, [Owner(MATRIX)], 1).path
    for name in (".step-00000002.partial", ".deleted-step-00000000", ".replaced-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"x")
    store.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_the_same_step_again_replaces(tmp_path: Path):
    save(tmp_path, [Owner(MATRIX)], 5, note="old")
    checkpoint = save(tmp_path, [Owner(MATRIX)], 5, note="new")
    assert checkpoint.manifest["note"] == "new"
    assert checkpoint.damage() is None
    assert list(tmp_path.iterdir()) == [checkpoint.path]


def test_killed_while_the_same_step_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At whichever rename: the old one or the new one is there once the next start has tidied."""
    replace = os.replace
    for dies_at in range(1, 5):
        save(tmp_path, [Owner(MATRIX)], 5, note="old")
        renames = itertools.count(1)

        def replace_or_die(*names: object, renames=renames, dies_at=dies_at) -> None:
            if next(renames) == dies_at:
                raise KeyboardInterrupt
            replace(*names)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            save(tmp_path, [Owner(MATRIX)], 5, note="new")
            ended = True
        except KeyboardInterrupt:
            ended = False
        monkeypatch.setattr(os, "replace", replace)
        store.tidy(tmp_path)
        checkpoint = Checkpoint.open(tmp_path / "step-00000005")
        assert checkpoint.damage() is None
        assert checkpoint.manifest["note"] == ("new" if ended else "old")
        assert list(tmp_path.iterdir()) == [checkpoint.path]
    assert ended
