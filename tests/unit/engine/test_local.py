"""The loss is divided once, by the targets of the whole global batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llmtrain.data.loader import MicroBatch
from llmtrain.engine.base import total_norm
from llmtrain.engine.dropout import dropout_seed
from llmtrain.engine.gate import NonFiniteError
from llmtrain.engine.local import LocalEngine
from llmtrain.objectives.causal_lm import CausalLM
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.planning import plan_layout
from tests.support.engines import whole_setup

VOCAB = 11


class Bigram(nn.Module):
    """The smallest language model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))

    def forward(self, tokens_BT, *, labels_BT=None, **_):
        logits = self.table[tokens_BT]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")


def micro_batches(rows: np.ndarray, documents: np.ndarray, size: int) -> list[MicroBatch]:
    objective = CausalLM()
    return [
        MicroBatch(
            objective.collate({"tokens": rows[i : i + size], "documents": documents[i : i + size]}),
            range(i, i + size),
            np.arange(i, i + size),
        )
        for i in range(0, len(rows), size)
    ]


def engine(model: nn.Module, micro_size: int, total: int, **settings: object) -> LocalEngine:
    layout = plan_layout(
        ParallelConfig(),
        BatchConfig(total, micro_size, 5),
        engine="local",
        precision="fp32",
        world_size=1,
        device="cpu",
    )
    optimizer = OptimizerConfig(name="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.0, **settings)  # type: ignore[arg-type]
    return LocalEngine(whole_setup(model, layout, optimizer))


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCAB, (4, 6))
    documents = np.zeros((4, 6), dtype=np.int32)
    documents[0, 2:] = 1
    documents[1, 1:] = -1  # padding: this row has no target
    return rows, documents


@pytest.mark.parametrize("micro_size", [1, 2, 4])
def test_accumulation_and_padding_leave_the_step_unchanged(batch, micro_size: int):
    rows, documents = batch
    model = Bigram()
    targets = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    log_probs = model.table.detach().log_softmax(-1)[rows[:, :-1], rows[:, 1:]].numpy()
    expected = -(log_probs * targets).sum() / targets.sum()

    result = engine(model, micro_size, 4).train_step(micro_batches(rows, documents, micro_size), lr=0.5)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.num_targets == targets.sum()

    reference = Bigram()
    step = engine(reference, 4, 4).train_step(micro_batches(rows, documents, 4), lr=0.5)
    assert result.grad_norm == pytest.approx(step.grad_norm, rel=1e-6)
    torch.testing.assert_close(model.table, reference.table, rtol=1e-6, atol=1e-7)


def test_a_loss_that_is_not_finite_names_its_samples(batch):
    rows, documents = batch
    model = Bigram()
    with torch.no_grad():
        model.table[rows[2, 0]] = float("nan")
    before = model.table.detach().clone()
    with pytest.raises(NonFiniteError) as caught:
        engine(model, 1, 4).train_step(micro_batches(rows, documents, 1), lr=0.5)
    with_nan = [i for i in range(4) if i != 1 and (rows[i, :-1] == rows[2, 0]).any()]
    assert set(caught.value.samples) <= set(with_nan)
    assert 2 in caught.value.samples
    torch.testing.assert_close(model.table, before, equal_nan=True)


def test_a_step_that_is_not_accepted_leaves_statistics_too(batch):
    class Normed(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(VOCAB)

        def forward(self, tokens_BT, *, labels_BT=None, **_):
            logits = self.norm(self.table[tokens_BT].flatten(0, 1))
            return nn.functional.cross_entropy(logits, labels_BT.flatten(), reduction="sum")

    rows, documents = batch
    model, asked = Normed(), []
    trained = engine(model, 2, 4)
    trained.train_step(micro_batches(rows, documents, 2), lr=0.5)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with torch.no_grad():
        model.table[0] = float("inf")
    result = trained.train_step(
        micro_batches(rows, documents, 2), lr=0.5, accepts=lambda *found: bool(asked.append(found))
    )
    assert result.rejected
    assert result.skipped
    assert asked == [(pytest.approx(result.loss, nan_ok=True), pytest.approx(result.grad_norm, nan_ok=True))]
    before["table"][0] = float("inf")
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_the_norm_of_large_gradients_is_exact():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((2**22,), (33, 70_001), (5,))]
    expected = torch.cat([g.flatten().double() for g in gradients]).norm().item()
    assert total_norm(gradients).item() == pytest.approx(expected, rel=2e-6)


def test_dropout_seeds_differ_and_stay():
    seeds = {
        dropout_seed(seed, sample, stage) for seed in range(8) for sample in range(64) for stage in range(3)
    }
    assert len(seeds) == 8 * 64 * 3
    assert dropout_seed(0, 0) == dropout_seed(0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_without_any_target_leaves_the_weights(batch):
    """Neither momentum nor weight decay moves them."""
    rows, documents = batch
    model = Bigram()
    optimizer = OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.5)
    layout = engine(model, 4, 4).layout
    trained = LocalEngine(whole_setup(model, layout, optimizer))
    trained.train_step(micro_batches(rows, documents, 4), lr=0.1)
    before = model.table.detach().clone()
    result = trained.train_step(
        micro_batches(rows, np.full_like(documents, -1), 4), lr=0.1, stop_requested=lambda: True
    )
    assert (result.num_targets, result.skipped, result.stop) == (0, True, True)
    assert torch.equal(model.table, before)
