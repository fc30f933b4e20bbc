"""L2-SP (arXiv:1802.01483): the same as a loop written by hand, in every layout, and bit-exact on resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.matrix import TOLERANCES, deviation
from tests.parity.test_finetune import SIZE, rows, settings
from tests.support.training import Trace, compose, open_loader, train

pytestmark = pytest.mark.slow

__all__ = ["rows"]
STEPS, SAVED = 4, 2
L2_SP, L2_NEW = 0.5, 0.25
TRANSFER = (f"transfer.l2_sp={L2_SP}", f"transfer.l2_new={L2_NEW}", "optimizer.weight_decay=0")
EPS = "optimizer.eps=1e-5"
"""Biases of keys have a gradient of 0 but for rounding. With a smaller eps Adam would make steps of it, and
the penalty would go on with them, in each layout differently."""
LAYOUTS = {
    "DDP": (2, ()),
    "ZeRO 1": (2, ("parallel.zero=1",)),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.zero=1")),
    "ZeRO 1, bf16": (2, ("parallel.zero=1", "precision=bf16")),
    "ZeRO 3, bf16": (2, ("parallel.zero=3", "precision=bf16")),
}


@pytest.fixture(scope="module")
def pretrained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a BERT that has learned masked words for two steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = ["model=bert_tiny", *SIZE, "objective=mlm", f"data.path={corpus}", "batch.global_size=8"]
    words += ["batch.micro_size=8", "batch.sequence_length=48", "train.steps=20", "optimizer.lr=3e-3"]
    train(1, tuple(words), 2, save_to=folder)
    return folder / "step-00000002"


@pytest.fixture(scope="module")
def plain(
    rows: Path, corpus: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    words = settings("BERT", "classification", rows, corpus, tmp_path_factory.mktemp("tables"))
    given = [word for word in words if not word.startswith("model")]
    return ("model=pretrained", f"model.path={pretrained}", "model.dropout=0.1", *given, *TRANSFER, EPS)


@pytest.fixture(scope="module")
def one_process(plain: tuple[str, ...]) -> Trace:
    return train(1, plain, STEPS)[0]


def test_equals_a_loop_by_hand(plain: tuple[str, ...], one_process: Trace) -> None:
    from llmtrain.distributed import processes
    from llmtrain.interchange.trained import build_module
    from llmtrain.nn.dropout import sample_keys
    from llmtrain.objectives.base import DROPOUT_KEYS
    from llmtrain.optim.schedules import multiplier
    from llmtrain.train.pretrained import open_weights
    from llmtrain.train.resolve import resolve

    resolved = resolve(compose(plain), world_size=1)
    config, optimizer = resolved.config, resolved.config.optimizer
    assert resolved.pretrained is not None
    new = open_weights(resolved.pretrained, config.model).new
    assert set(new) == {"head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias"}
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    model = build_module(config.model, processes.pick_device("cpu"))
    start = {name: torch.from_numpy(values) for name, values in one_process.initial_weights.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    named = list(model.named_parameters())
    adam = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0
    )
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
        for name, parameter in named:
            assert parameter.grad is not None
            origin = torch.zeros_like(parameter) if name in new else start[name]
            factor = L2_NEW if name in new else L2_SP
            parameter.grad += 2 * factor * (parameter.detach() - origin)
        for group in adam.param_groups:
            group["lr"] = optimizer.lr * multiplier(config.schedule, step, config.train.steps)
        adam.step()
    np.testing.assert_allclose(one_process.losses, losses, rtol=1e-6)
    for name, parameter in named:
        np.testing.assert_allclose(
            one_process.weights[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=name
        )


def test_it_holds_weights_near_their_start(plain: tuple[str, ...], one_process: Trace) -> None:
    def distance(trace: Trace) -> float:
        names = [name for name in trace.weights if name.startswith("blocks.")]
        squares = [np.square(trace.weights[name] - trace.initial_weights[name]).sum() for name in names]
        return float(np.sqrt(sum(squares)))

    without = tuple(word for word in plain if not word.startswith("transfer."))
    assert distance(one_process) < 0.9 * distance(train(1, without, STEPS)[0])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout: str, plain: tuple[str, ...], one_process: Trace) -> None:
    size, more = LAYOUTS[layout]
    found = deviation(train(size, (*plain, *more), STEPS)[0], one_process)
    assert found.within(TOLERANCES["bf16" if "precision=bf16" in more else "fp32"]), found


@pytest.mark.parametrize("layout", ["one process", "ZeRO 3", "ZeRO 1, bf16"])
def test_a_resume_is_bit_exact(layout: str, plain: tuple[str, ...], tmp_path: Path) -> None:
    size, more = LAYOUTS.get(layout, (1, ()))
    whole = train(size, (*plain, *more), STEPS, save_to=tmp_path, save_at=SAVED)[0]
    rest = train(size, (*plain, *more), STEPS, resume_from=tmp_path / f"step-{SAVED:08d}")[0]
    assert rest.losses == whole.losses[SAVED:]
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)


def test_another_layout_takes_it_up(plain: tuple[str, ...], one_process: Trace, tmp_path: Path) -> None:
    train(2, (*plain, "parallel.zero=3"), STEPS, save_to=tmp_path, save_at=SAVED)
    for size, more in ((1, ()), (2, ("parallel.tensor=2",))):
        rest = train(size, (*plain, *more), STEPS, resume_from=tmp_path / f"step-{SAVED:08d}")[0]
        np.testing.assert_allclose(rest.losses, one_process.losses[SAVED:], rtol=1e-5)
