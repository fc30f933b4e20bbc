"""Recurrent networks against their equations, one step at a time, and what padding and documents do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.models.recurrent.config import GRUConfig, LSTMConfig, RecurrentConfig, RNNConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import initialize
from llmtrain.nn.task_config import TaskHeadConfig

V = 40
FAMILIES: dict[str, Callable[..., RecurrentConfig]] = {
    "rnn": RNNConfig,
    "relu": lambda **keys: RNNConfig(nonlinearity="relu", **keys),
    "gru": GRUConfig,
    "lstm": LSTMConfig,
}
CLASSES = TaskHeadConfig("classes", 3, pooling="last", dropout=0.0)


def made(config: RecurrentConfig) -> RecurrentModel:
    model = RecurrentModel(config)
    initialize(model, seed=1)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    assert max(p.numel() for p in model.parameters()) == config.largest_parameter_count()
    return model.eval()


def step(kind: str, cells: Any, x_D: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One token through one cell, by the equations of the papers."""
    h, c = state
    into = cells.weight_ih_l0 @ x_D + cells.bias_ih_l0
    own = cells.weight_hh_l0 @ h + cells.bias_hh_l0
    if kind in ("rnn", "relu"):
        total = into + own
        return (torch.tanh(total) if kind == "rnn" else total.clamp(min=0)), c
    if kind == "gru":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = into.chunk(3), own.chunk(3)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        return (1 - z) * torch.tanh(n_x + r * n_h) + z * h, c
    i, f, g, o = (into + own).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def states_of(kind: str, cells: Any, x_TD: Tensor) -> Tensor:
    state = (torch.zeros(cells.hidden_size), torch.zeros(cells.hidden_size))
    found = []
    for x_D in x_TD:
        state = step(kind, cells, x_D, state)
        found.append(state[0])
    return torch.stack(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_language_model_equals_its_equations(kind: str) -> None:
    model = made(FAMILIES[kind](vocab_size=V, hidden_size=12, num_layers=2))
    tokens_T = torch.randint(V, (9,))
    x_TD: Tensor = model.embedding(tokens_T)
    for cells in model.layers:
        x_TD = states_of(kind, cells, x_TD)
    torch.testing.assert_close(model(tokens_T[None])[0], x_TD @ model.embedding.weight.T)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_reader_of_both_sides_equals_its_equations(kind: str) -> None:
    """Rows of three lengths in one batch, each as if it stood alone."""
    config = FAMILIES[kind](
        vocab_size=V, hidden_size=8, embedding_size=5, num_layers=2, bidirectional=True, task=CLASSES
    )
    model = made(config)
    tokens_BT, lengths_B = torch.randint(V, (3, 10)), torch.tensor([10, 4, 1])
    logits_BC = model(tokens_BT, lengths_B=lengths_B)
    for row, length in enumerate(lengths_B.tolist()):
        x_TW: Tensor = model.embedding(tokens_BT[row, :length])
        for cells, from_end in zip(model.layers, model.reversed_layers, strict=True):
            back_TD = states_of(kind, from_end, x_TW.flip(0)).flip(0)
            x_TW = torch.cat((states_of(kind, cells, x_TW), back_TD), dim=-1)
        final_W = torch.cat((x_TW[-1, :8], x_TW[0, 8:]))
        head: Any = model.head
        torch.testing.assert_close(logits_BC[row], head.out.weight @ final_W + head.out.bias)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_torch_itself_computes_the_same_bidirectional_network(kind: str) -> None:
    """Weights in torch's own bidirectional module over packed rows."""
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    config = FAMILIES[kind](vocab_size=V, hidden_size=8, num_layers=2, bidirectional=True, task=CLASSES)
    model = made(config)
    torchs: Any = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](
        8, 8, num_layers=2, bidirectional=True, batch_first=True
    )
    weights = {}
    for layer in range(2):
        for side, suffix in ((model.layers, ""), (model.reversed_layers, "_reverse")):
            for name, value in side[layer].state_dict().items():
                weights[name.replace("l0", f"l{layer}{suffix}")] = value
    torchs.load_state_dict(weights)
    tokens_BT, lengths_B = torch.randint(V, (3, 10)), torch.tensor([10, 4, 7])
    packed = pack_padded_sequence(model.embedding(tokens_BT), lengths_B, True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(torchs(packed)[0], batch_first=True)
    found = model._read(tokens_BT, lengths_B, None)
    is_token = torch.arange(10) < lengths_B[:, None]
    torch.testing.assert_close(found[is_token], expected[is_token])


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_document_is_read_from_a_state_of_zeros(kind: str) -> None:
    model = made(FAMILIES[kind](vocab_size=V, hidden_size=16, num_layers=2)).double()
    tokens_BT = torch.randint(V, (2, 24))
    documents_BT = torch.tensor([[0] * 5 + [1] * 16 + [2] * 3, [0] * 24])
    found = model(tokens_BT, documents_BT=documents_BT)
    for row, begin, end in ((0, 0, 5), (0, 5, 21), (0, 21, 24), (1, 0, 24)):
        alone = model(tokens_BT[row : row + 1, begin:end])
        torch.testing.assert_close(found[row, begin:end], alone[0])
    loss, whole = (model(tokens_BT, documents_BT=d, labels_BT=tokens_BT) for d in (documents_BT, None))
    assert abs(loss - whole) > 1e-3, "without documents the state flows on"
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["additive", "dot", "multi_head"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_attention_equals_its_equations(attention: Any, bidirectional: bool) -> None:
    config = LSTMConfig(
        vocab_size=V,
        hidden_size=8,
        num_layers=1,
        bidirectional=bidirectional,
        attention=attention,
        attention_heads=2,
        task=CLASSES,
    )
    model = made(config)
    tokens_BT, lengths_B = torch.randint(V, (2, 7)), torch.tensor([7, 4])
    logits_BC = model(tokens_BT, lengths_B=lengths_B)
    weights_BNT = model.attention_weights(tokens_BT, lengths_B)
    torch.testing.assert_close(weights_BNT.sum(-1), torch.ones(weights_BNT.shape[:2]))
    assert (weights_BNT[1, :, 4:] == 0).all()
    own: Any = model.attention
    for row, length in enumerate(lengths_B.tolist()):
        states_TW = model._read(tokens_BT[row : row + 1, :length], lengths_B[row : row + 1], None)[0]
        final_W = torch.cat((states_TW[-1, :8], states_TW[0, 8:]))
        if attention == "additive":
            scores_T = torch.tanh(states_TW @ own.hidden.weight.T + own.hidden.bias) @ own.query
            pooled_W = scores_T.softmax(0) @ states_TW
        elif attention == "dot":
            pooled_W = (states_TW @ final_W / states_TW.shape[1] ** 0.5).softmax(0) @ states_TW
        else:
            made_of = torch.nn.MultiheadAttention(states_TW.shape[1], 2, batch_first=True)
            with torch.no_grad():
                parts = (own.query, own.key, own.value)
                made_of.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
                made_of.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                made_of.out_proj.load_state_dict(own.output.state_dict())
            pooled_W = made_of(final_W[None, None], states_TW[None], states_TW[None])[0][0, 0]
        head: Any = model.head
        torch.testing.assert_close(logits_BC[row], head.out.weight @ pooled_W + head.out.bias)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cache_continues_the_text(kind: str) -> None:
    model = made(FAMILIES[kind](vocab_size=V, hidden_size=16, num_layers=2))
    tokens_BT = torch.randint(V, (2, 12))
    cache = model.new_cache(12)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens_BT.split((5, 1, 6), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT))


@pytest.mark.parametrize("kind", FAMILIES)
def test_autocast_runs_on_any_processor(kind: str) -> None:
    model = made(FAMILIES[kind](vocab_size=V, hidden_size=16, num_layers=1))
    tokens_BT = torch.randint(V, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens_BT, labels_BT=tokens_BT)
    torch.testing.assert_close(loss, model(tokens_BT, labels_BT=tokens_BT), rtol=0.02, atol=0.1)
    loss.backward()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_does_not_know_its_micro_batch(bidirectional: bool) -> None:
    config = GRUConfig(vocab_size=V, hidden_size=16, dropout=0.3, bidirectional=bidirectional, task=CLASSES)
    model = made(config).train()
    tokens_BT, lengths_B, keys_B = torch.randint(V, (3, 9)), torch.tensor([9, 2, 5]), torch.arange(3)
    together = model(tokens_BT, lengths_B=lengths_B, dropout_keys_B=keys_B)
    alone = [
        model(tokens_BT[r : r + 1], lengths_B=lengths_B[r : r + 1], dropout_keys_B=keys_B[r : r + 1])
        for r in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together, model.eval()(tokens_BT, lengths_B=lengths_B))
