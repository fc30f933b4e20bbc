"""The multilayer perceptron, and exclusive or from every seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmtrain.cli import main as cli
from llmtrain.models.feedforward.config import MLPConfig
from llmtrain.models.feedforward.model import MLP
from llmtrain.nn.initialize import initialize
from llmtrain.train.resolve import resolve
from tests.support.training import compose

TORCH = {"relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "gelu": nn.GELU()}


@pytest.mark.parametrize("activation", [*TORCH])
def test_equal_to_layers_of_torch(activation: str) -> None:
    config = MLPConfig(hidden=(12, 7), activation=activation, inputs=5, num_classes=3)  # type: ignore[arg-type]
    model = MLP(config)
    initialize(model, seed=3)
    first, second, last = model.layers
    reference = nn.Sequential(first, TORCH[activation], second, TORCH[activation], last)
    rows = torch.randn(6, 5)
    torch.testing.assert_close(model(rows), reference(rows))
    labels = torch.tensor([0, 2, 1, -100, 0, 1])
    expected = nn.functional.cross_entropy(reference(rows), labels, reduction="sum")
    torch.testing.assert_close(model(rows, labels_B=labels), expected)


def test_a_single_output_is_the_probability_of_the_second_class() -> None:
    model = MLP(MLPConfig(hidden=(4,), inputs=3, num_classes=2, single_output=True))
    initialize(model, seed=0)
    rows, labels = torch.randn(8, 3), torch.arange(8) % 2
    assert model.layers[-1].weight.shape == (1, 4)
    logits = model.layers[-1](torch.relu(model.layers[0](rows)))[:, 0]
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
    torch.testing.assert_close(model(rows, labels_B=labels), expected)


def test_exclusive_or_is_learned_from_twenty_of_twenty_seeds() -> None:
    """By the network, the optimizer and the steps of the experiment."""
    config = resolve(compose(["experiment=xor"])).config
    assert isinstance(config.model, MLPConfig)
    assert config.model.sizes == (2, 3, 1)
    opened = config.objective.open(config.model, config.data, None, "train", 1)[""]
    raw = opened.get(torch.arange(4).numpy())
    rows, labels = torch.from_numpy(raw["inputs"]), torch.from_numpy(raw["labels"])
    assert len(rows) == 4
    right = []
    for seed in range(20):
        model = MLP(config.model)
        initialize(model, seed)
        optimizer = torch.optim.SGD(model.parameters(), config.optimizer.lr, config.optimizer.momentum)
        for _ in range(config.train.steps):
            (model(rows, labels_B=labels) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        right.append(int((model(rows).argmax(1) == labels).sum()))
    assert right == [4] * 20


@pytest.mark.slow
def test_the_command_learns_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run_verb("train", ["experiment=xor", f"run.dir={tmp_path}", "evaluation.every=800", "seed=7"])
        == 0
    )
    assert "step 800: validation loss 0.0" in capsys.readouterr().err
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path}", "split=test"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " accuracy 1.0000 [1.0000, 1.0000] " in said
