"""Dropout's masks: fair coins, functions of (sample, layer, place) alone.

Every mask here is fixed by its seeds, so the statistical bounds hold always or never.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn import dropout
from llmtrain.nn.dropout import (
    ATTENTION,
    HIDDEN,
    AttentionDropout,
    Dropout,
    row_keys,
    sample_keys,
    scaled_mask,
)
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.base import DROPOUT_KEYS
from llmtrain.objectives.image_classification import ImageClassification

STANDARD_ERRORS = 5.5
"""A bound that fair coins pass in all but 4 of 100 million looks."""


def drops(p: float, shape: tuple[int, int, int], layer: int = 0, kind: int = HIDDEN, seed: int = 0) -> Tensor:
    """1.0 where an element is dropped, of shape (B, T, D)."""
    kept = Dropout(p, layer, kind)(torch.ones(shape), sample_keys(seed, range(shape[0])))
    return (kept == 0).float()


def assert_uncorrelated(a: Tensor, b: Tensor, p: float) -> None:
    """No more elements are dropped in both than by chance."""
    bound = STANDARD_ERRORS * p * (1 - p) / a.numel() ** 0.5
    assert abs(((a - p) * (b - p)).mean().item()) < bound


@pytest.mark.parametrize("p", [1e-3, 0.01, 0.1, 0.5, 0.9])
def test_rate(p: float):
    dropped = drops(p, (16, 256, 512))
    for over in ((), (1, 2), (0, 2), (0, 1)):
        rates = dropped.mean(over) if over else dropped.mean()
        looks = dropped.numel() // rates.numel()
        assert (rates - p).abs().max() < STANDARD_ERRORS * (p * (1 - p) / looks) ** 0.5 + 2 / looks


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_rows_and_columns_are_independent(p: float):
    """All pairs of 256 columns, and of 256 rows, each over 65,536 places."""
    by_row = drops(p, (16, 4096, 256)).flatten(0, 1)
    by_column = drops(p, (16, 256, 4096)).transpose(0, 1).flatten(1).T
    for places in (by_row, by_column):
        N = len(places)
        centred = places - places.mean(0)
        covariance = (centred.T @ centred) / N
        covariance.fill_diagonal_(0.0)
        errors = covariance / (p * (1 - p) / N**0.5)
        assert errors.std().item() == pytest.approx(1.0, abs=0.05)
        # Rare coincidences are Poisson, with a longer tail.
        assert errors.abs().max() < (STANDARD_ERRORS if p > 0.05 else 9.0)


@pytest.mark.parametrize("distance", [1, 2, 64, 255])
def test_places_at_a_distance_are_independent(distance: int):
    p, dropped = 0.1, drops(0.1, (8, 512, 512))
    assert_uncorrelated(dropped[:, distance:], dropped[:, :-distance], p)
    assert_uncorrelated(dropped[..., distance:], dropped[..., :-distance], p)
    assert_uncorrelated(dropped[:, distance:, distance:], dropped[:, :-distance, :-distance], p)
    assert_uncorrelated(dropped[:, distance:, :-distance], dropped[:, :-distance, distance:], p)


def test_samples_seeds_layers_and_kinds_are_independent():
    p, shape = 0.1, (8, 256, 256)
    masks = [drops(p, shape, *which) for which in [(0, HIDDEN), (0, HIDDEN + 1), (1, HIDDEN), (-1, HIDDEN)]]
    masks += [drops(p, shape, seed=1), masks[0].roll(1, 0), masks[0].roll(4, 0)]
    attention = AttentionDropout(p, 0, sample_keys(0, range(8)))
    masks.append((attention.scaled_mask(1, 256, 256, torch.float32)[:, 0] == 0).float())
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert_uncorrelated(mask, other, p)


def test_heads_are_independent():
    p = 0.1
    mask = AttentionDropout(p, 3, sample_keys(0, range(4))).scaled_mask(8, 128, 128, torch.float32)
    dropped_NM = (mask == 0).float().transpose(0, 1).flatten(1)
    assert dropped_NM.mean().item() == pytest.approx(p, abs=STANDARD_ERRORS * 0.3 / dropped_NM.numel() ** 0.5)
    for head in range(1, 8):
        assert_uncorrelated(dropped_NM[0], dropped_NM[head], p)
        assert_uncorrelated(dropped_NM[head - 1], dropped_NM[head], p)


def test_no_two_layers_and_kinds_share_a_mask():
    """Of a deep model: the embedding's layer is -1, a block has an attention and two hidden masks."""
    keys = sample_keys(0, [5])
    masks = {
        Dropout(0.5, layer, kind)(torch.ones(1, 4, 32), keys).numpy().tobytes()
        for layer in range(-1, 200)
        for kind in range(ATTENTION, HIDDEN + 2)
    }
    assert len(masks) == 201 * 3


def test_keys_tell_samples_apart():
    keys = sample_keys(0, range(2000)).tolist()
    assert len({*keys, *sample_keys(1, range(2000)).tolist()}) == 4000
    assert all(0 <= key < 2**31 for key in keys)
    assert sample_keys(0, [7, 1999]).tolist() == [keys[7], keys[1999]]


def test_pinned_values():
    """A mask is part of what a seed means: runs of other versions and machines must find the same."""
    assert sample_keys(7, [0, 1, 10**12]).tolist() == [1722446644, 453708142, 679392964]
    rows = row_keys(torch.tensor([12345]), torch.tensor([3, 4]))
    kept = (scaled_mask(rows, 16, 0.5, torch.float32)[0] > 0).int()
    assert ["".join(map(str, row)) for row in kept.tolist()] == ["1001110101011110", "0110001000111011"]
    x = Dropout(0.25, 2, HIDDEN)(torch.ones(1, 2, 12), sample_keys(7, [3]))[0]
    assert ["".join(map(str, row)) for row in (x > 0).int().tolist()] == ["111110000111", "001101110011"]
    mask = AttentionDropout(0.25, 2, sample_keys(7, [3]), first_head=1).scaled_mask(1, 2, 12, torch.float32)
    assert ["".join(map(str, row)) for row in (mask[0, 0] > 0).int().tolist()] == [
        "111111110001",
        "111101111011",
    ]


def test_parts_equal_the_whole():
    """Sequences divided over 4 processes, heads over 2."""
    keys, x_BTD = sample_keys(0, range(3)), torch.randn(3, 32, 16)
    dropout = Dropout(0.3, 1, HIDDEN)
    whole = dropout(x_BTD, keys)
    parts = []
    for part, x in enumerate(x_BTD.chunk(4, dim=1)):
        dropout.sequence_part = part
        parts.append(dropout(x, keys))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    heads = AttentionDropout(0.3, 1, keys).scaled_mask(6, 8, 8, torch.float32)
    halves = [AttentionDropout(0.3, 1, keys, first).scaled_mask(3, 8, 8, torch.float32) for first in (0, 3)]
    assert torch.equal(torch.cat(halves, dim=1), heads)


@pytest.mark.parametrize("elements", [1, 64, 100, 2**20])
def test_chunks_of_a_mask_equal_the_whole(elements: int, monkeypatch: pytest.MonkeyPatch):
    keys = row_keys(sample_keys(3, range(6)).view(2, 3), torch.arange(4, 11))
    monkeypatch.setattr(dropout, "CACHED_ELEMENTS", 2**40)
    whole = scaled_mask(keys, 11, 0.3, torch.float32)
    monkeypatch.setattr(dropout, "CACHED_ELEMENTS", elements)
    assert torch.equal(scaled_mask(keys, 11, 0.3, torch.float32), whole)


def test_a_sample_keeps_its_mask_in_any_batch():
    x_BTD, dropout = torch.randn(6, 8, 16), Dropout(0.3, 1, HIDDEN)
    keys = sample_keys(0, range(6))
    whole = dropout(x_BTD, keys)
    for rows in ([0, 1], [5], [4, 2, 0]):
        assert torch.equal(dropout(x_BTD[rows], keys[rows]), whole[rows])
        masks = [AttentionDropout(0.3, 1, k).scaled_mask(2, 8, 8, torch.float32) for k in (keys, keys[rows])]
        assert torch.equal(masks[0][rows], masks[1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_what_is_kept_is_scaled(p: float):
    x_BTD = torch.randn(2, 64, 64)
    y_BTD = Dropout(p, 0, HIDDEN)(x_BTD, sample_keys(0, range(2)))
    kept = y_BTD != 0
    torch.testing.assert_close(y_BTD[kept], x_BTD[kept] / (1 - p))
    mask = AttentionDropout(p, 0, sample_keys(0, range(2))).scaled_mask(2, 8, 8, torch.float32)
    assert set(mask.unique().tolist()) == {0.0, float(np.float32(1 / (1 - p)))}


def test_low_precision_drops_the_same_elements():
    x_BTD, keys, dropout = torch.randn(2, 32, 64), sample_keys(0, range(2)), Dropout(0.1, 0, HIDDEN)
    y, low = dropout(x_BTD, keys), dropout(x_BTD.bfloat16(), keys)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low == 0, y == 0)
    torch.testing.assert_close(low.float(), y, rtol=2**-6, atol=0)


def test_gradient_passes_what_is_kept():
    x_BTD = torch.randn(2, 8, 16, requires_grad=True)
    y_BTD = Dropout(0.5, 0, HIDDEN)(x_BTD, sample_keys(0, range(2)))
    (gradient,) = torch.autograd.grad(y_BTD.sum(), x_BTD)
    assert torch.equal(gradient, 2.0 * (y_BTD != 0))


def test_nothing_is_dropped_at_zero_and_in_evaluation():
    x_BTD, keys = torch.randn(2, 8, 16), sample_keys(0, range(2))
    assert Dropout(0.0, 0, HIDDEN)(x_BTD, keys) is x_BTD
    assert Dropout(0.5, 0, HIDDEN).eval()(x_BTD, keys) is x_BTD


def test_without_keys_torch_draws():
    x_BTD = torch.randn(2, 8, 16)
    torch.manual_seed(3)
    y_BTD = Dropout(0.5, 0, HIDDEN)(x_BTD)
    torch.manual_seed(3)
    assert torch.equal(y_BTD, F.dropout(x_BTD, 0.5))


def test_keys_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    keys = sample_keys(0, range(2))
    Dropout(0.5, 0, HIDDEN)(torch.ones(2, 8, 16), keys)
    AttentionDropout(0.5, 0, keys).scaled_mask(2, 8, 8, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


GPT_CONFIG = GPTConfig(
    vocab_size=64, num_layers=2, hidden_size=32, num_heads=4, max_sequence_length=16, dropout=0.2
)
LSTM_CONFIG = LSTMConfig(vocab_size=64, hidden_size=32, num_layers=3, dropout=0.2)


@pytest.mark.parametrize("config", [GPT_CONFIG, LSTM_CONFIG], ids=lambda config: config.family)
def test_language_models_do_not_know_their_micro_batches(config: GPTConfig | LSTMConfig):
    model = GPT(config) if isinstance(config, GPTConfig) else RecurrentModel(config)
    initialize(model, seed=0)
    tokens, keys = torch.randint(0, 64, (4, 16)), sample_keys(0, range(4))
    whole = model(tokens, dropout_keys_B=keys)
    # Matrix products of other sizes may round otherwise; another mask would show in the first digits.
    for rows in ([0], [3, 1]):
        torch.testing.assert_close(
            model(tokens[rows], dropout_keys_B=keys[rows]), whole[rows], rtol=1e-4, atol=1e-6
        )
    others = sample_keys(0, range(4, 8))
    assert not torch.allclose(model(tokens, dropout_keys_B=others), whole, rtol=1e-2)
    assert not torch.allclose(model.eval()(tokens, dropout_keys_B=keys), whole, rtol=1e-2)


def test_lstm_drops_between_all_layers_and_not_between_tokens():
    """The same computed layer by layer and token by token, the state carried on whole."""
    model = RecurrentModel(LSTM_CONFIG)
    initialize(model, seed=0)
    keys = sample_keys(0, range(4))
    tokens = torch.randint(0, 64, (4, 12))
    x_BTD = Dropout(0.2, -1, HIDDEN)(model.embedding(tokens), keys)
    for number, layer in enumerate(model.layers):
        outputs, state = [], None
        for x_B1D in x_BTD.split(1, dim=1):
            y_B1D, state = layer(x_B1D, state)
            outputs.append(y_B1D)
        x_BTD = Dropout(0.2, number, HIDDEN)(torch.cat(outputs, dim=1), keys)
    torch.testing.assert_close(model(tokens, dropout_keys_B=keys), model.head(x_BTD), rtol=1e-4, atol=1e-6)


def test_classifier_takes_its_keys_from_the_batch():
    model, objective = SimpleCNN(SimpleCNNConfig(dropout=0.5)), ImageClassification()
    initialize(model, seed=0)
    images = np.random.default_rng(0).standard_normal((6, 1, 28, 28)).astype(np.float32)
    batch = objective.collate({"images": images, "labels": np.arange(6)})
    keys = sample_keys(0, range(6))
    whole = objective(model, {**batch, DROPOUT_KEYS: keys}).loss_sum
    halves = [
        {name: x[rows] for name, x in {**batch, DROPOUT_KEYS: keys}.items()}
        for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(objective(model, half).loss_sum for half in halves), whole)
    other = objective(model, {**batch, DROPOUT_KEYS: sample_keys(1, range(6))}).loss_sum
    assert not torch.allclose(other, whole, rtol=1e-3)
    first, second = (objective(model, batch).loss_sum for _ in range(2))
    assert not torch.allclose(first, second, rtol=1e-4), "without keys, torch's generator draws anew"
