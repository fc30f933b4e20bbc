"""Initialization: values by (seed, name, index) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import (
    TILE,
    Constant,
    Initializer,
    Normal,
    NormalByRow,
    Uniform,
    fill,
    fill_box,
    initialize,
    match_initializers,
)
from llmtrain.tensor_boxes import Box, Shard

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_sequence_length": 16}
GPT2 = GPTConfig(**SMALL)
LLAMA = GPTConfig(
    **SMALL,
    num_kv_heads=2,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
)


@pytest.mark.parametrize(
    "initializer", [Normal(0.5), NormalByRow((0.1, 1.0, 5.0), 7), Uniform(0.5), Constant(3.0)]
)
def test_boxes_equal_the_whole(initializer: Initializer) -> None:
    rows, columns = TILE + 40, 2 * TILE + 7
    everything = fill_box("w", initializer, 7, (rows, columns), Box(0, 0, rows, columns))
    for box in [
        Box(0, 0, 1, 1),
        Box(TILE - 3, 5, 9, 2 * TILE),
        Box(3, TILE, 2, 1),
        Box(rows - 1, columns - 1, 1, 1),
    ]:
        expected = everything[box.row : box.row + box.rows, box.column : box.column + box.columns]
        assert torch.equal(fill_box("w", initializer, 7, (rows, columns), box), expected)


@pytest.mark.parametrize(("shape", "dim"), [((9, 700), 0), ((600, 10), 1), ((7,), 0), ((5, 2, 3), 0)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_and_flat_ranges_of_them_equal_the_whole(shape: tuple[int, ...], dim: int, count: int) -> None:
    full = torch.empty(math.prod(shape))
    fill(full, "w", Normal(1.0), 3, Shard(shape))
    part = -(-shape[dim] // count)
    padding = [0, 0] * (len(shape) - 1 - dim) + [0, part * count - shape[dim]]
    padded = torch.nn.functional.pad(full.view(shape), padding)
    for index in range(count):
        shard = Shard(shape, dim, index, count)
        expected = padded.narrow(dim, index * part, part).flatten()
        for start, stop in [(0, shard.numel), (1, shard.numel - 1), (shard.numel // 2, shard.numel)]:
            out = torch.full((max(0, stop - start),), float("nan"))
            fill(out, "w", Normal(1.0), 3, shard, start)
            assert torch.equal(out, expected[start:stop])


def draw(name: str, initializer: Initializer, seed: int, count: int) -> torch.Tensor:
    return fill_box(name, initializer, seed, (count,), Box(0, 0, 1, count))[0]


def test_values_depend_on_seed_and_name() -> None:
    values = {draw(name, Normal(1.0), seed, 1)[0].item() for name in "ab" for seed in (0, 1, -1)}
    assert len(values) == 6


def test_values_are_pinned() -> None:
    """Another torch, machine or refactoring must not change what a seed means."""
    normal = fill_box("w", Normal(1.0), 0, (500, 500), Box(0, 0, 1, 3))[0]
    assert normal.tolist() == pytest.approx(PINNED_NORMAL, abs=1e-6)
    uniform = fill_box("w", Uniform(1.0), 0, (500, 500), Box(TILE, TILE, 1, 3))[0]
    assert uniform.tolist() == pytest.approx(PINNED_UNIFORM)


PINNED_NORMAL = [-0.3891880214214325, 2.127816677093506, -1.912026286125183]
PINNED_UNIFORM = [-0.671032190322876, 0.3382542133331299, -0.5577666759490967]


def test_distributions() -> None:
    normal = fill_box("w", Normal(0.02), 0, (512, 512), Box(0, 0, 512, 512))
    assert normal.std().item() == pytest.approx(0.02, rel=0.01)
    assert normal.mean().item() == pytest.approx(0.0, abs=2e-4)
    uniform = fill_box("w", Uniform(0.5), 0, (512, 512), Box(0, 0, 512, 512))
    assert uniform.abs().max().item() <= 0.5
    assert uniform.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (GPT, GPT2),
        (GPT, LLAMA),
        (RecurrentModel, LSTMConfig(vocab_size=64, hidden_size=32)),
        (RecurrentModel, LSTMConfig(vocab_size=64, hidden_size=32, tie_embeddings=False)),
        (SimpleCNN, SimpleCNNConfig()),
    ],
)
def test_every_parameter_from_meta(model: type[nn.Module], config: object) -> None:
    with torch.device("meta"):
        built = model(config)
    built.to_empty(device="cpu")
    for parameter in built.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialize(built, seed=1)
    table = match_initializers(built.initializers(), dict(built.named_parameters()))  # type: ignore[operator]
    for name, parameter in built.named_parameters():
        expected = torch.empty(parameter.numel())
        fill(expected, name, table[name], 1, Shard(tuple(parameter.shape)))
        assert torch.equal(parameter.flatten(), expected)


def test_gpt2_scales() -> None:
    model = GPT(GPTConfig(vocab_size=500, hidden_size=128, num_layers=8, num_heads=4))
    initialize(model, 0)
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert block.mlp.up.bias.abs().sum() == 0
    assert model.norm.weight.eq(1).all()


def test_tie_outlives_the_meta_device() -> None:
    with torch.device("meta"):
        model = GPT(GPT2)
    model.to_empty(device="cpu")
    assert model.head.weight is model.embedding.weight
    assert [n for n, _ in model.named_parameters()].count("head.weight") == 0


def test_unfit_tables_are_errors() -> None:
    one = Constant(1.0)
    with pytest.raises(ValueError, match=r"b\.weight matches no pattern"):
        match_initializers({"a.*": one}, ["a.weight", "b.weight"])
    with pytest.raises(ValueError, match=r"match no parameter: c\.\*"):
        match_initializers({"a.*": one, "c.*": one}, ["a.weight"])
    with pytest.raises(ValueError, match="exactly one"):
        match_initializers({"a.*": one, "*.weight": one}, ["a.weight"])
