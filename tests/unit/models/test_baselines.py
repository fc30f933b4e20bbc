"""The LSTM language model and the digit classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import initialize

V = 64


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def lstm(request: pytest.FixtureRequest) -> RecurrentModel:
    model = RecurrentModel(LSTMConfig(vocab_size=V, hidden_size=32, tie_embeddings=request.param))
    initialize(model, seed=0)
    return model


def test_lstm_cached_logits_equal_full_logits(lstm: RecurrentModel) -> None:
    x = torch.randint(0, V, (2, 12))
    cache = lstm.new_cache(12)
    with torch.no_grad():
        cached = torch.cat([lstm(piece, cache=cache) for piece in (x[:, :5], x[:, 5:6], x[:, 6:])], dim=1)
        torch.testing.assert_close(cached, lstm(x), rtol=1e-5, atol=1e-6)
    assert cache.length == 12


def test_lstm_loss(lstm: RecurrentModel) -> None:
    x = torch.randint(0, V, (2, 12))
    labels = x.roll(-1, 1)
    labels[:, -1] = -100
    loss = lstm(x, labels_BT=labels, positions_BT=None, documents_BT=torch.zeros_like(x))
    expected = F.cross_entropy(lstm(x).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_lstm_learns(lstm: RecurrentModel) -> None:
    x = torch.randint(0, V, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(lstm.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = lstm(x[:, :-1], labels_BT=x[:, 1:]) / x[:, 1:].numel()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_cnn_learns_and_sums() -> None:
    model = SimpleCNN(SimpleCNNConfig())
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 1, 28, 28, generator=generator), torch.arange(16) % 10
    logits = model(images)
    assert logits.shape == (16, 10)
    torch.testing.assert_close(model(images, labels), F.cross_entropy(logits, labels, reduction="sum"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (model(images, labels) / 16).backward()
        optimizer.step()
    assert model(images).argmax(1).eq(labels).all()
