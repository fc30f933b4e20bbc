"""The checkpoint store: what is written comes back, in any cut, and damage is seen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import retention, store
from llmtrain.engine.base import Fragment
from llmtrain.errors import CheckpointError

WEIGHT = torch.arange(24.0).reshape(4, 6)


@dataclass
class Owner:
    """As much of an engine as the store asks for: one matrix, held in several cuts."""

    cuts: list[tuple[int, int]]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.holders = [torch.nn.Parameter(WEIGHT.reshape(-1)[a:b].clone()) for a, b in self.cuts]
        self.optimizer = torch.optim.AdamW(self.holders, lr=0.1, fused=True)
        for holder in self.holders:
            holder.grad = holder.detach().clone()
        self.optimizer.step()

    def fragments(self) -> list[Fragment]:
        cuts = zip(self.cuts, self.holders, strict=True)
        return [Fragment("w", (4, 6), a, b, holder, 0) for (a, b), holder in cuts]

    held_fragments = fragments

    def scaler_state(self) -> dict[str, float]:
        return {}

    def load_scaler_state(self, state: object) -> None:
        assert state == {}

    def refresh_weights(self) -> None:
        pass

    def whole(self) -> torch.Tensor:
        return torch.cat([holder.detach() for holder in self.holders])


def save(root: Path, owner: Owner, step: int = 1, **description: object) -> store.Checkpoint:
    return store.Checkpoint.open(store.save(root, step, owner, description, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [[(0, 24)], [(0, 7), (7, 24)], [(0, 1), (1, 12), (12, 24)]])
def test_any_cut_takes_up_any_other(tmp_path: Path, cuts: list[tuple[int, int]]):
    saver = Owner([(0, 5), (5, 13), (13, 24)])
    checkpoint = save(tmp_path, saver)
    assert checkpoint.weights()["w"].shape == (4, 6)
    loader = Owner(cuts)
    loader.optimizer.state.clear()
    with torch.no_grad():
        for holder in loader.holders:
            holder.zero_()
    checkpoint.restore(loader)  # type: ignore[arg-type]
    assert torch.equal(loader.whole(), saver.whole())
    for key in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (torch.cat([o.optimizer.state[h][key] for h in o.holders]) for o in (loader, saver))
        assert torch.equal(ours, theirs)
    assert all(float(loader.optimizer.state[holder]["step"]) == 1.0 for holder in loader.holders)


def test_a_gap_is_refused(tmp_path: Path):
    checkpoint = save(tmp_path, Owner([(0, 5), (9, 24)]))
    with pytest.raises(CheckpointError, match="no elements 5–24"):
        dict(checkpoint.weights())


def test_damage_is_found(tmp_path: Path):
    checkpoint = save(tmp_path, Owner([(0, 24)]))
    assert checkpoint.damage() is None
    file = checkpoint.path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "another checksum" in str(checkpoint.damage())
    file.write_bytes(content[:-1])
    assert "bytes, not" in str(checkpoint.damage())
    file.unlink()
    assert "missing" in str(checkpoint.damage())


def test_newest_good(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, Owner([(0, 24)]), step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    (tmp_path / "step-00000002" / "rank-00000.safetensors").write_bytes(b"")
    (tmp_path / ".step-00000004.partial").mkdir()
    said: list[str] = []
    found, rejected = retention.newest_good(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert [text.split(":")[0] for text in rejected] == ["step-00000003", "step-00000002"]
    assert len(said) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "x"}', '{"format": "llmtrain-checkpoint", "version": 99}']
)
def test_foreign_manifests(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        store.Checkpoint.open(tmp_path)


def test_retention(tmp_path: Path):
    losses = {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: 6.0, 60: 7.0}
    for step, loss in losses.items():
        save(tmp_path, Owner([(0, 24)]), step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000060", keep_last=2, keep_best=1, keep_every=30)
    left = [
        json.loads((path / "manifest.json").read_text())["step"] for path in retention.list_steps(tmp_path)
    ]
    assert left == [20, 30, 50, 60]


def test_an_altered_manifest_is_damage(tmp_path: Path):
    path = save(tmp_path, Owner([(0, 24)]), 6).path
    manifest = json.loads((path / "manifest.json").read_text())
    for altered in ({**manifest, "step": 5}, {k: v for k, v in manifest.items() if k != "files"}):
        (path / "manifest.json").write_text(json.dumps(altered))
        with pytest.raises(CheckpointError, match="an altered manifest"):
            store.Checkpoint.open(path)


def test_what_kills_leave_is_cleared(tmp_path: Path):
    kept = save(tmp_path, Owner([(0, 24)]), 1).path
    for name in (".step-00000002.partial", ".deleted-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"x")
    store.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_losses_that_are_not_finite_are_not_best(tmp_path: Path):
    for step, loss in {1: float("nan"), 2: 3.0, 3: None, 4: 5.0}.items():
        save(tmp_path, Owner([(0, 24)]), step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000004", keep_last=1, keep_best=1, keep_every=None)
    assert [path.name for path in retention.list_steps(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_same_step_again_replaces(tmp_path: Path):
    save(tmp_path, Owner([(0, 24)]), 5, note="old")
    checkpoint = save(tmp_path, Owner([(0, 24)]), 5, note="new")
    assert checkpoint.manifest["note"] == "new"
    assert checkpoint.damage() is None


def test_no_pickle_in_a_checkpoint(tmp_path: Path):
    checkpoint = save(tmp_path, Owner([(0, 24)]))
    assert sorted(path.suffix for path in checkpoint.path.iterdir()) == [".json", ".safetensors"]
