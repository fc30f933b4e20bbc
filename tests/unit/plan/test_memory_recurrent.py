"""The memory of recurrent networks is what torch keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.models.recurrent import cells as recurrent_cells
from llmtrain.models.recurrent import model as recurrent
from llmtrain.models.recurrent.config import GRUConfig, LSTMConfig, RNNConfig
from llmtrain.models.recurrent_seq2seq.config import RecurrentSeq2SeqConfig
from llmtrain.models.recurrent_seq2seq.model import RecurrentSeq2Seq
from llmtrain.nn.memory import Conditions
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.paired_text import PairedTextConfig
from llmtrain.plan import machine
from tests.support.planned_memory import NUMBERS, B, T, V, autocast, built, kept_by, kept_bytes, memory_of


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(96, 1), (96, 3), (256, 2)])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_lstm_activations(
    has_bf16: bool, hidden_size: int, num_layers: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors with and without bf16; what has it can do without."""
    assert machine.has_bf16() == recurrent_cells.has_low_precision_kernel()
    if has_bf16 and not machine.has_bf16():
        pytest.skip("this processor has no LSTM in bf16")
    monkeypatch.setattr(recurrent_cells, "has_low_precision_kernel", lambda: has_bf16)
    config = LSTMConfig(vocab_size=V, hidden_size=hidden_size, num_layers=num_layers)
    model = built(recurrent.RecurrentModel(config), precision)
    tokens_BT = torch.randint(V, (B, T))

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=tokens_BT)

    numbers, conditions = NUMBERS[precision], Conditions("cpu", has_bf16=has_bf16)
    planned = memory_of(config, numbers, B, T, conditions)
    expected = planned.activations(range(1)).kept
    expected += B * T * hidden_size * numbers.compute + 4 * V * hidden_size
    if precision == "autocast":
        expected += 2 * planned.low_precision_copies(range(1))
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.1)


@pytest.mark.in_turns(4)
@pytest.mark.parametrize("cells", [RNNConfig, GRUConfig, LSTMConfig])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("attention", [None, "additive", "dot", "multi_head"])
def test_activations_of_readers(cells: Any, num_layers: int, bidirectional: bool, attention: Any) -> None:
    config = cells(
        vocab_size=V,
        hidden_size=64,
        embedding_size=48,
        num_layers=num_layers,
        dropout=0.1,
        bidirectional=bidirectional,
        attention=attention,
        task=TaskHeadConfig("classes", 2, pooling="last", dropout=0.0),
    )
    model = built(recurrent.RecurrentModel(config), "fp32")
    tokens_BT, lengths_B = torch.randint(V, (B, T)), torch.full((B,), T)
    expected = memory_of(config, NUMBERS["fp32"], B, T, Conditions("cpu")).activations(range(1)).kept

    def loss() -> torch.Tensor:
        labels_B, keys_B = torch.zeros(B, dtype=torch.int64), torch.arange(B)
        return model(tokens_BT, lengths_B=lengths_B, labels_BT=labels_B, dropout_keys_B=keys_B)

    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.12)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(("num_layers", "decoder_layers"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("S", "targets"), [(80, 40), (30, 60)])
def test_activations_of_an_encoder_decoder(
    cell: Any, num_layers: int, decoder_layers: int, S: int, targets: int
) -> None:
    config = RecurrentSeq2SeqConfig(
        cell=cell,
        vocab_size=V,
        hidden_size=64,
        embedding_size=48,
        num_layers=num_layers,
        num_decoder_layers=decoder_layers,
        start_id=1,
    )
    model = built(RecurrentSeq2Seq(config), "fp32")
    sources_BS, tokens_BT = torch.randint(V, (B, S)), torch.randint(V, (B, targets))
    row = PairedTextConfig(target_length=targets).row(S)
    expected = kept_by(config, NUMBERS["fp32"], B, S, row)
    expected += B * targets * 48 * 4 + 4 * V * 48

    def loss() -> torch.Tensor:
        keys_B = torch.arange(B)
        return model(tokens_BT, sources_BS=sources_BS, labels_BT=tokens_BT, dropout_keys_B=keys_B)

    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.1)
