"""Which runs go on with which parameters."""

from __future__ import annotations

from pathlib import Path

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.train.resume import _other_frozen

NAMES = ("embedding.weight", "blocks.0.weight", "blocks.1.weight", "head.weight")


def checkpoint(*frozen: str) -> Checkpoint:
    weights = {name: {"shape": [2], "boxes": []} for name in NAMES}
    return Checkpoint(Path("run/step-00000003"), {"tensors": {"weight": weights}, "frozen": list(frozen)})


def test_the_same_parameters_by_other_patterns():
    assert list(_other_frozen(["blocks.?.weight"], checkpoint("blocks.0.weight", "blocks.1.weight"))) == []
    assert list(_other_frozen([], checkpoint())) == []
    old = Checkpoint(Path("old"), {"tensors": {"weight": dict.fromkeys(NAMES)}})
    assert list(_other_frozen([], old)) == []


def test_other_parameters_are_named():
    (problem,) = _other_frozen(["blocks.*"], checkpoint("blocks.0.weight", "head.weight"))
    assert str(problem) == (
        "train.freeze: got frozen that trained: blocks.1.weight; trained that were frozen: head.weight; "
        "allowed: those of run/step-00000003; leave train.freeze as it was, or start another run.dir with "
        "model=pretrained model.path=run/step-00000003"
    )
    (problem,) = _other_frozen([], checkpoint(*NAMES[:3]))
    assert "trained that were frozen: blocks.0.weight, blocks.1.weight, embedding.weight;" in str(problem)
