"""Initialization: values by (seed, name, index) alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmtrain.models.config import GPTConfig, LSTMConfig, SimpleCNNConfig
from llmtrain.models.convolutional import SimpleCNN
from llmtrain.models.gpt import GPT
from llmtrain.models.initialize import (
    CHUNK,
    Constant,
    Initializer,
    Normal,
    Uniform,
    fill_slice,
    initialize,
    match_initializers,
)
from llmtrain.models.recurrent import LSTMLanguageModel

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


@pytest.mark.parametrize("initializer", [Normal(0.5), Uniform(0.5), Constant(3.0)])
def test_slices_equal_the_whole(initializer: Initializer) -> None:
    size = 2 * CHUNK + 1000
    whole = fill_slice("w", initializer, 7, 0, size)
    assert whole.shape == (size,)
    for start, stop in [(0, 10), (CHUNK - 3, CHUNK + 5), (5, 2 * CHUNK + 1), (size - 1, size), (9, 9)]:
        assert torch.equal(fill_slice("w", initializer, 7, start, stop), whole[start:stop])


def test_values_depend_on_seed_and_name() -> None:
    values = {fill_slice(name, Normal(1.0), seed, 0, 1)[0].item() for name in "ab" for seed in (0, 1, -1)}
    assert len(values) == 6


def test_values_are_pinned() -> None:
    """Another torch, machine or refactoring must not change what a seed means."""
    assert fill_slice("w", Normal(1.0), 0, 0, 3).tolist() == pytest.approx(PINNED_NORMAL, abs=1e-6)
    assert fill_slice("w", Uniform(1.0), 0, CHUNK, CHUNK + 3).tolist() == pytest.approx(PINNED_UNIFORM)


PINNED_NORMAL = [-1.339020, 2.189647, 0.181930]
PINNED_UNIFORM = [0.03323996067047119, -0.16192710399627686, -0.9409395456314087]


def test_distributions() -> None:
    normal = fill_slice("w", Normal(0.02), 0, 0, 4 * CHUNK)
    assert normal.std().item() == pytest.approx(0.02, rel=0.01)
    assert normal.mean().item() == pytest.approx(0.0, abs=2e-4)
    uniform = fill_slice("w", Uniform(0.5), 0, 0, 4 * CHUNK)
    assert uniform.abs().max().item() <= 0.5
    assert uniform.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (GPT, GPT2),
        (GPT, LLAMA),
        (LSTMLanguageModel, LSTMConfig(vocab_size=64, hidden_size=32)),
        (LSTMLanguageModel, LSTMConfig(vocab_size=64, hidden_size=32, tie_embeddings=False)),
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
        assert torch.equal(parameter.flatten(), fill_slice(name, table[name], 1, 0, parameter.numel()))


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
