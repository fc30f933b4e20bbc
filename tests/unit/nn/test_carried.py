"""States that rows hand on from step to step equal one long row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.data.order import LaneOrder
from llmtrain.models.recurrent.config import GRUConfig, LSTMConfig, RNNConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.carried import CarriedStates
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.causal_lm import CausalLM

V, T = 30, 6


@pytest.mark.parametrize("config_type", [RNNConfig, GRUConfig, LSTMConfig])
def test_rows_go_on_where_those_before_ended(config_type: Any) -> None:
    """Two texts a lane: the second begins amid a row, or with one."""
    model = RecurrentModel(config_type(vocab_size=V, hidden_size=8, num_layers=2))
    initialize(model, seed=0)
    model.carry_states(2, torch.device("cpu"))
    stream_BW = torch.randint(V, (2, 4 * T + 1)).numpy()
    # Lane 0: documents of 9 and 16 tokens; lane 1: of 12, which end with a row, and 13.
    documents_BW = np.array([[0] * 9 + [1] * 16, [0] * 12 + [1] * 13])
    objective = CausalLM(continued=True)
    found = []
    for step in range(4):
        here = slice(step * T, step * T + T + 1)
        numbers = documents_BW[:, here]
        batch = objective.collate({"tokens": stream_BW[:, here], "documents": numbers - numbers[:, :1]})
        batch |= {"lanes": torch.arange(2), "places": torch.tensor([step, 10 + step])}
        arguments = objective.arguments(batch)
        found.append(model(**{**arguments, "labels_BT": None}).detach())
    whole = torch.tensor(stream_BW[:, : 4 * T])
    expected = model(whole, documents_BT=torch.tensor(documents_BW[:, : 4 * T]))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_a_state_goes_to_the_sample_that_follows_alone() -> None:
    states = CarriedStates(3, 2, torch.device("cpu"))
    lanes, samples = torch.tensor([0, 2]), torch.tensor([5, 3 << 30])
    states.keep(lanes, samples, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([False, False]))
    again = CarriedStates(3, 2, torch.device("cpu"))
    again.unpack(states.packed())
    for held in (states, again):
        assert held.before(lanes, samples + 1).tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert held.before(lanes, samples).tolist() == [[0.0, 0.0], [0.0, 0.0]], "another sample"
        assert held.before(torch.tensor([1]), torch.tensor([6])).tolist() == [[0.0, 0.0]], "another lane"
    states.keep(lanes, samples, torch.ones(2, 2), torch.tensor([True, False]))
    assert states.before(lanes, samples + 1).tolist() == [[0.0, 0.0], [1.0, 1.0]], "the text ended"


def test_lanes_follow_the_corpus() -> None:
    order = LaneOrder(np.array([5, 6]), lanes=3)
    assert order.epoch_length == 9
    epochs, indices = order(np.arange(12))
    assert epochs.tolist() == [0] * 9 + [1] * 3
    assert indices.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8, 0, 3, 6]
