"""Damage of a checkpoint is found: in its manifest, its files and between them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.errors import CheckpointError, TrainingError
from llmtrain.tensor_boxes import Box, Shard
from tests.support.corpora import write_manifest
from tests.support.owners import MATRIX, Owner, flat, save


def test_what_is_not_there_is_told(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner({"first.w": torch.ones(4, 6), "second.w": torch.ones(2)})])
    with pytest.raises(CheckpointError, match=r"no weight frist.w; allowed: first.w"):
        checkpoint.read("weight", "frist.w", Box(0, 0, 1, 1))
    with pytest.raises(CheckpointError, match=r"no wait first.w; allowed: weight"):
        checkpoint.read("wait", "first.w", Box(0, 0, 1, 1))
    with pytest.raises(CheckpointError, match=r"first.w: got shape \(4, 6\); allowed: shape \(6, 4\)"):
        checkpoint.read_into(torch.empty(24), "weight", "first.w", Shard((6, 4)), 0)
    (checkpoint.path / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: got No such file"):
        checkpoint.read("weight", "first.w", Box(0, 0, 1, 1))


def test_a_gap_is_found_before_a_checkpoint_is_one(tmp_path: Path):
    owner = Owner(MATRIX, flat(0, 5) + flat(9, 24))
    with pytest.raises(TrainingError, match="weight w: 4 of 24 elements are in no box"):
        store.save(tmp_path, 1, owner, {}, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_manifest_with_a_gap(tmp_path: Path):
    """By hand: as none is written, but an element that no box holds must never come back as noise."""
    whole = save(tmp_path, [Owner(MATRIX, flat(0, 12, 24))])
    manifest = copy.deepcopy(whole.manifest)
    del manifest["tensors"]["weight"]["w"]["boxes"][1]
    lacking = Checkpoint(whole.path, manifest)
    assert "12 of 24 elements are in no box" in str(lacking.incompleteness())
    assert lacking.read("weight", "w", Box(0, 0, 2, 6)).shape == (2, 6)
    with pytest.raises(CheckpointError, match="lack 6 of 18 elements"):
        lacking.read("weight", "w", Box(0, 0, 3, 6))
    with pytest.raises(CheckpointError, match="lack 12 of 24 elements"):
        dict(lacking.weights())


def test_files_that_hold_other_tensors_than_the_manifest_says(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    manifest = copy.deepcopy(checkpoint.manifest)
    manifest["tensors"]["weight"]["w"]["boxes"][0][1] = "weight/v@0,0"
    assert "does not hold weight/v@0,0" in str(Checkpoint(checkpoint.path, manifest).incompleteness())
    manifest = copy.deepcopy(checkpoint.manifest)
    manifest["tensors"]["weight"]["w"] = {
        "shape": [6, 4],
        "boxes": [["rank-00000.safetensors", "weight/w@0,0", [0, 0, 6, 4]]],
    }
    assert "F32 [4, 6], not F32 [6, 4]" in str(Checkpoint(checkpoint.path, manifest).incompleteness())


def test_damage_is_found(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
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
        save(tmp_path, [Owner(MATRIX)], step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    (tmp_path / "step-00000002" / "rank-00000.safetensors").write_bytes(b"")
    (tmp_path / ".step-00000004.partial").mkdir()
    said: list[str] = []
    found, rejected = retention.newest_good(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert [text.split(":")[0] for text in rejected] == ["step-00000003", "step-00000002"]
    assert len(said) == 2


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path):
    path = save(tmp_path, [Owner(MATRIX)], 1).path
    for name in ("step-00000002\r\x1b[8mhidden", "step-2", "step-", "step-0000000a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert retention.list_steps(tmp_path) == [path]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "x"}', '{"format": "llmtrain-checkpoint", "version": 99}']
)
def test_foreign_manifests(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


def test_an_altered_manifest_is_damage(tmp_path: Path):
    path = save(tmp_path, [Owner(MATRIX)], 6).path
    manifest = json.loads((path / "manifest.json").read_text())
    for altered in ({**manifest, "step": 5}, {k: v for k, v in manifest.items() if k != "files"}):
        (path / "manifest.json").write_text(json.dumps(altered))
        with pytest.raises(CheckpointError, match="an altered manifest"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    "name",
    ["../other/rank-00000.safetensors", "/dev/zero", "", ".", "a//b", "a/../../b", "a\x1b[2J", None, 7],
)
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path: Path, name: object):
    """Whoever forges a manifest makes its checksum too."""
    path = save(tmp_path, [Owner(MATRIX)], 6).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][0]["file"] = name
    for entry in manifest["tensors"]["weight"].values():
        entry["boxes"] = [[name, *rest] for _, *rest in entry["boxes"]]
    write_manifest(path, manifest)
    allowed = "a file of the checkpoint's own folder" if isinstance(name, str) else "text"
    with pytest.raises(CheckpointError, match=rf"manifest.json: files\[0\].file: got .*; allowed: {allowed}"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": []}, "tensors.weight.w.boxes: got the file 'rank-00000.safetensors'; allowed: files that"),
        ({"files": 1}, "files: got 1; allowed: a list"),
        ({"files": [{}]}, r"files\[0\].file: got nothing; allowed: text"),
        ({"step": "6"}, "altered manifest"),
        ({"step": None}, "altered manifest"),
        ({"step": 10**30}, "altered manifest"),
        ({"saved_at": 3}, "saved_at: got 3; allowed: text"),
        ({"model": 3}, "model: got 3; allowed: a section of keys"),
        ({"model": {}}, "model.family: got nothing; allowed: text"),
        ({"config": {"optimizer": "adamw"}}, "config.optimizer: got 'adamw'; allowed: a section of keys"),
        ({"layout": []}, "layout: got "),
        ({"counters": {"optimizer.step": 3}}, "counters.optimizer.step: got 3; allowed: a section of keys"),
        (
            {"counters": {"optimizer.step": {"w": "3"}}},
            "counters.optimizer.step.w: got '3'; allowed: a finite",
        ),
        ({"scaler": {"scale": []}}, r"scaler.scale: got \[\]; allowed: a finite number"),
        ({"timeline": [{"step": 1}]}, r"timeline\[0\].sample: got nothing"),
        ({"timeline": []}, "timeline: got "),
        ({"trackers": {"wandb": {"run_id": "../x"}}}, "trackers.wandb.run_id: got '../x'; allowed: letters"),
        ({"validation_loss": "low"}, "validation_loss: got 'low'; allowed: a number, or null"),
        ({"evaluation_owed": "yes"}, "evaluation_owed: got 'yes'; allowed: true or false"),
        ({"dtype": "float8"}, "dtype: got 'float8'; allowed: float32, float64"),
        ({"origin": {"settings": 3}}, "origin.settings: got 3"),
        ({"fresh": "head"}, "fresh: got 'head'; allowed: a list"),
        ({"tensors": None}, "tensors: got nothing; allowed: a section of keys, weight among them"),
        ({"tensors": {"weight": []}}, "tensors: got "),
        ({"tensors": {"weight": {"w": {}}}}, "tensors.weight.w: got {}; allowed: a shape and boxes"),
        ({"tensors": {"weight": {"w": {"shape": [-1], "boxes": []}}}}, "tensors.weight.w: got "),
        ({"tensors": {"weight": {"w": {"shape": [True], "boxes": []}}}}, "tensors.weight.w: got "),
        ({"tensors": {"weight": {"w": {"shape": [4], "boxes": [["f", "k", [0, 0, 4]]]}}}}, "w.boxes: got "),
        ({"tensors": {"weight": {"w": {"shape": [4], "boxes": []}}}}, "got 0 elements in boxes; allowed: 4"),
    ],
)
def test_each_field_of_a_manifest_has_its_type(tmp_path: Path, change: dict, said: str):
    """Whoever forges a manifest makes its checksum too."""
    path = save(tmp_path, [Owner(MATRIX)], 6).path
    write_manifest(path, {**json.loads((path / "manifest.json").read_text()), **change})
    with pytest.raises(CheckpointError, match=said) as failure:
        Checkpoint.open(path)
    assert len(str(failure.value).splitlines()) <= 8


def test_tensors_beyond_what_the_files_hold_are_refused_before_memory_is_taken(tmp_path: Path):
    path = save(tmp_path, [Owner(MATRIX)], 6).path
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["tensors"]["weight"]["w"]
    entry |= {"shape": [10**6, 10**6], "boxes": [["rank-00000.safetensors", "k", [0, 0, 10**6, 10**6]]]}
    write_manifest(path, manifest)
    with pytest.raises(CheckpointError, match=r"tensors: got 4,000,000,000,\d+ bytes in rank-00000"):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_a_pipe_in_place_of_a_file_is_damage(tmp_path: Path, name: str):
    checkpoint = save(tmp_path, [Owner(MATRIX)], 6)
    file = checkpoint.path / name
    size = file.stat().st_size
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="a pipe, not a file"):
        Checkpoint.open(checkpoint.path).weights()["w"]
    if name != "manifest.json":
        assert f"{name} has 0 bytes, not {size:,}" in str(checkpoint.damage())


def test_frozen_names_are_of_weights(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    assert checkpoint.frozen == frozenset()
    write_manifest(checkpoint.path, {**checkpoint.manifest, "frozen": ["nothing"]})
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: frozen: got 'nothing'; allowed: names of weights"
    ):
        Checkpoint.open(checkpoint.path)
