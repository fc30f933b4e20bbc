"""The checkpoint store: what is written comes back, under any division."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint.reader import Reader
from llmtrain.engine.base import Fragment
from llmtrain.tensor_boxes import Box, Shard
from tests.support.owners import MATRIX, Cut, Owner, flat, save, take


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


def test_no_pickle_in_a_checkpoint(tmp_path: Path):
    checkpoint = save(tmp_path, [Owner(MATRIX)])
    assert sorted(path.suffix for path in checkpoint.path.iterdir()) == [".json", ".safetensors"]
