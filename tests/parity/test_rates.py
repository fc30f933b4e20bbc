"""Learning rates by layer: those of a loop written by hand, and the same in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.matrix import TOLERANCES, Cell, deviation
from tests.support.training import Trace, compose, open_loader, train

pytestmark = pytest.mark.slow

STEPS, SAVED = 4, 2
RATES = ("optimizer.layer_decay=0.5", "optimizer.head_lr=3e-3", "optimizer.lr=1e-2", "schedule=linear")
UNTIED = "model.tie_embeddings=false"
CELLS = {
    "zero 1": Cell(2, zero=1),
    "zero 3": Cell(2, zero=3),
    "tensor 2": Cell(2, tensor=2),
    "pipeline 2": Cell(2, pipeline=2, zero=1),
}
ONE = Cell(1)


def run(corpus: Path, cell: Cell, *more: str, save_to: Path | None = None) -> Trace:
    overrides = (*cell.overrides(corpus), UNTIED, *RATES, *more)
    return train(cell.ranks, overrides, STEPS, save_to, None, SAVED if save_to else None)[0]


@pytest.fixture(scope="module")
def one_process(corpus: Path) -> Trace:
    return run(corpus, ONE)


def rate(name: str) -> float:
    """What two layers have: the head 0.3 of the rate, the norm before it 1, and so on downwards."""
    if name.startswith("head."):
        return 0.3
    if name.startswith("norm."):
        return 1.0
    return {"blocks.1": 0.5, "blocks.0": 0.25}.get(name[:8], 0.125)


def test_equals_a_loop_by_hand(corpus: Path, one_process: Trace) -> None:
    from llmtrain.distributed import processes
    from llmtrain.interchange.trained import build_module
    from llmtrain.nn.dropout import sample_keys
    from llmtrain.objectives.base import DROPOUT_KEYS
    from llmtrain.optim.schedules import multiplier
    from llmtrain.train.resolve import resolve

    resolved = resolve(compose([*ONE.overrides(corpus), UNTIED, *RATES]), world_size=1)
    config, optimizer = resolved.config, resolved.config.optimizer
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    model = build_module(config.model, processes.pick_device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(one_process.initial_weights[name]))
    named = list(model.named_parameters())
    groups = [
        {"params": [p], "weight_decay": optimizer.weight_decay if p.ndim >= 2 else 0.0} for _, p in named
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=optimizer.betas, eps=optimizer.eps)
    losses = []
    for step, batch in zip(range(STEPS), open_loader(resolved).steps(0), strict=False):
        adam.zero_grad()
        count = sum(objective.target_count(micro.batch) for micro in batch.micro_batches)
        total = 0.0
        for micro in batch.micro_batches:
            keys = sample_keys(config.seed, list(micro.samples))
            loss = objective(model, {**micro.batch, DROPOUT_KEYS: keys}).loss_sum / count
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        lr = 1e-2 * multiplier(config.schedule, step, config.train.steps)
        for (name, _), group in zip(named, adam.param_groups, strict=True):
            group["lr"] = lr * rate(name)
        adam.step()
    np.testing.assert_allclose(one_process.losses, losses, rtol=1e-5)
    for name, parameter in named:
        np.testing.assert_allclose(
            one_process.weights[name], parameter.detach().numpy(), rtol=1e-3, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("name", CELLS)
def test_layouts(corpus: Path, one_process: Trace, name: str) -> None:
    found = deviation(run(corpus, CELLS[name]), one_process)
    assert found.within(TOLERANCES["fp32"]), found


def test_another_layout_takes_it_up(corpus: Path, one_process: Trace, tmp_path: Path) -> None:
    run(corpus, CELLS["zero 1"], save_to=tmp_path)
    overrides = (*ONE.overrides(corpus), UNTIED, *RATES)
    [resumed] = train(1, overrides, STEPS, None, tmp_path / f"step-{SAVED:08d}")
    np.testing.assert_allclose(resumed.losses, one_process.losses[SAVED:], rtol=1e-5)
