"""The checkpoint store: what is written comes back, under any division, and damage is seen."""

from __future__ import annotations

import copy
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint import retention, store
from llmtrain.checkpoint.reader import Checkpoint, Reader
from llmtrain.engine.base import Fragment
from llmtrain.errors import CheckpointError, TrainingError
from llmtrain.tensor_boxes import Box, Shard
from tests.support.corpora import write_manifest
from tests.support.owners import Cut, Owner, save, take

MATRIX = {"w": torch.arange(24.0).reshape(4, 6)}


def flat(*ends: int) -> list[Cut]:
    """MATRIX cut at `ends`."""
    return [Cut("w", Shard((4, 6)), start, stop) for start, stop in itertools.pairwise(ends)]


@st.composite
def divisions(draw: st.DrawFn, shapes: dict[str, tuple[int, ...]]) -> list[list[Cut]]:
    """Each parameter under a tensor division of its own, each shard cut at random, dealt to some ranks."""
    ranks: list[list[Cut]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for name, shape in shapes.items():
        count = draw(st.integers(1, 4)) if shape else 1
        dim = draw(st.integers(0, 1)) if len(shape) == 2 else 0
        for index in range(count):
            shard = Shard(shape, dim, index, count)
            ends = draw(st.lists(st.integers(0, shard.numel), max_size=3))
            for start, stop in itertools.pairwise(sorted({0, shard.numel, *ends})):
                draw(st.sampled_from(ranks)).append(Cut(name, shard, start, stop))
    return ranks


SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
    ),
    min_size=1,
    max_size=3,
).map(lambda shapes: {f"p.{i}": shape for i, shape in enumerate(shapes)})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=SHAPES)
def test_any_division_takes_up_any_other(
    data: st.DataObject, shapes: dict[str, tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
):
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    checkpoint = save(
        tmp_path_factory.mktemp("any"), [Owner(tensors, cuts) for cuts in data.draw(divisions(shapes))]
    )
    assert checkpoint.damage() is None
    assert checkpoint.incompleteness() is None

    # Adam's arithmetic goes element by element, so any division of these tensors gets the same values.
    whole = Owner(tensors)
    expected = {cut.name: values for cut, values in zip(whole.cuts, whole.state(), strict=True)}
    weights = checkpoint.weights()
    assert set(weights) == set(tensors)
    for name, values in expected.items():
        assert weights[name].shape == tensors[name].shape
        assert torch.equal(weights[name].reshape(-1), values["weight"])
    for cuts in data.draw(divisions(shapes)):
        loader = Owner(tensors, cuts)
        loader.clear()
        checkpoint.restore(loader)  # type: ignore[arg-type]
        for cut, found in zip(cuts, loader.state(), strict=True):
            for key, values in found.items():
                of_whole = expected[cut.name][key]
                wanted = take(of_whole.view(cut.shard.shape), cut) if key != "step" else of_whole
                assert torch.equal(values, wanted), (cut, key)
        # What lies before a fragment in its holder is not its own.
        assert all((holder[:3] == -1).all() for holder in loader.holders)
        assert loader.refreshed == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_any_box_can_be_read(
    data: st.DataObject, rows: int, columns: int, tmp_path_factory: pytest.TempPathFactory
):
    tensor = torch.arange(float(rows * columns)).reshape(rows, columns)
    division = data.draw(divisions({"w": (rows, columns)}))
    owners = [Owner({"w": tensor}, cuts) for cuts in division]
    checkpoint = save(tmp_path_factory.mktemp("box"), owners)
    weight = Owner({"w": tensor}).state()[0]["weight"].view(rows, columns)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, columns - column))
    found = checkpoint.read("weight", "w", Box(row, column, height, width))
    assert torch.equal(found, weight[row : row + height, column : column + width])


def test_padding_is_read_as_zero(tmp_path: Path):
    """Four rows in three parts of two: the last part is padding."""
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    weight = checkpoint.weights()["w"]
    for dim, count, index in ((0, 3, 1), (0, 3, 2), (1, 4, 2), (1, 4, 3)):
        shard = Shard((4, 6), dim, index, count)
        out = torch.full((shard.numel,), 9.0)
        checkpoint.read_into(out, "weight", "w", shard, 0)
        padded = torch.zeros(8, 8)
        padded[:4, :6] = weight
        part = padded[: 4 if dim else 6, : 8 if dim else 6].narrow(dim, 2 * index, 2)
        assert torch.equal(out.view(shard.local_shape), part)


class KeepsW(Owner):
    """`w` does not train, and is held in bf16."""

    def fragments(self) -> list[Fragment]:
        found = []
        for fragment in super().fragments():
            if fragment.name == "w":
                fragment = replace(fragment, holder=fragment.holder.detach().bfloat16(), trains=False)
            found.append(fragment)
        return found


def test_what_does_not_train_has_weights_alone(tmp_path: Path):
    tensors = {**MATRIX, "v": torch.ones(3)}
    checkpoint = save(tmp_path, [KeepsW(tensors, [*flat(0, 24), Cut("v", Shard((3,)), 0, 3)])])
    assert checkpoint.frozen == {"w"}
    entries = checkpoint.manifest["tensors"]
    assert {kind: set(found) for kind, found in entries.items() if kind != "weight"} == {
        "optimizer.exp_avg": {"v"},
        "optimizer.exp_avg_sq": {"v"},
    }
    assert set(entries["weight"]) == {"v", "w"}
    assert checkpoint.manifest["counters"] == {"optimizer.step": {"v": 1.0}}
    trained = Owner(MATRIX).state()[0]["weight"].view(4, 6)
    assert torch.equal(checkpoint.weights()["w"], trained.bfloat16().float())


def test_frozen_names_are_of_weights(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    assert checkpoint.frozen == frozenset()
    write_manifest(checkpoint.path, {**checkpoint.manifest, "frozen": ["nothing"]})
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: frozen: got 'nothing'; allowed: names of weights"
    ):
        Checkpoint.open(checkpoint.path)


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


def test_readers_close_their_files(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])

    def is_mapped() -> bool:
        return str(checkpoint.path) in Path("/proc/self/maps").read_text()

    reader = Reader(checkpoint)
    reader.read("weight", "w", Box(0, 0, 4, 6))
    assert is_mapped()
    del reader
    checkpoint.restore(Owner(MATRIX))  # type: ignore[arg-type]
    assert not is_mapped()


def test_what_the_manifest_says_of_the_run(tmp_path: Path):
    manifest = save(tmp_path, [Owner(MATRIX)], 7, note="kept").manifest
    assert manifest["position"] == {"step": 7}
    assert manifest["layout"]["global_size"] == Owner.layout.global_size
    assert manifest["note"] == "kept"
    assert manifest["counters"] == {"optimizer.step": {"w": 1.0}}


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


def test_retention(tmp_path: Path):
    losses = {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: 6.0, 60: 7.0}
    for step, loss in losses.items():
        save(tmp_path, [Owner(MATRIX)], step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000060", keep_last=2, keep_best=1, keep_every=30)
    left = [
        json.loads((path / "manifest.json").read_text())["step"] for path in retention.list_steps(tmp_path)
    ]
    assert left == [20, 30, 50, 60]


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


def test_what_kills_leave_is_cleared(tmp_path: Path):
    kept = save(tmp_path, [Owner(MATRIX)], 1).path
    for name in (".step-00000002.partial", ".deleted-step-00000000", ".replaced-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"x")
    store.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_losses_that_are_not_finite_are_not_best(tmp_path: Path):
    for step, loss in {1: float("nan"), 2: 3.0, 3: None, 4: 5.0}.items():
        save(tmp_path, [Owner(MATRIX)], step, validation_loss=loss)
    retention.prune(tmp_path, tmp_path / "step-00000004", keep_last=1, keep_best=1, keep_every=None)
    assert [path.name for path in retention.list_steps(tmp_path)] == ["step-00000002", "step-00000004"]


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


def test_no_pickle_in_a_checkpoint(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    assert sorted(path.suffix for path in checkpoint.path.iterdir()) == [".json", ".safetensors"]
