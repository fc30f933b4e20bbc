"""Sums over ranks go by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtrain.data.loader import MicroBatch
from llmtrain.engine.evaluation import NamedSums, Totals, sum_over_batches
from llmtrain.objectives.base import Terms
from tests.support import ranks


def sums_of_a_rank() -> list[dict[str, tuple[float, float]]]:
    from llmtrain.distributed import processes

    rank, sums = processes.rank(), NamedSums()
    calls = [
        {"a": 1.0} if rank == 0 else {"b": 2.0},
        {"b": 5.0, "a": 3.0} if rank == 0 else {"a": 7.0},
        {"new": 1.0} if rank == 1 else {"a": 1.0},
    ]
    return [
        sums.over_ranks({name: torch.tensor([value, 1.0]) for name, value in call.items()}) for call in calls
    ]


@pytest.mark.slow
def test_ranks_may_have_different_names():
    first, second = ranks.run(2, sums_of_a_rank)
    assert first == second
    assert first[0] == {"a": (1.0, 1.0), "b": (2.0, 1.0)}
    assert first[1] == {"a": (10.0, 2.0), "b": (5.0, 1.0)}
    assert first[2] == {"a": (1.0, 1.0), "new": (1.0, 1.0)}


def test_batches_without_a_metric():
    """Some batches have a metric that others lack."""
    one = torch.ones(())
    metrics = [{"accuracy": torch.tensor([1.0, 4.0])}, {}, {"accuracy": torch.tensor([2.0, 4.0])}]
    totals = sum_over_batches(
        lambda batch: Terms(3.0 * one, one, metrics[int(batch["i"])]), batches("", "", "")
    )
    assert totals == Totals(9.0, 3, {"accuracy": (3.0, 8.0)})
    assert totals.metrics == {"accuracy": 0.375}
    assert sum_over_batches(lambda batch: Terms(one, one), []) == Totals(0.0, 0)


def batches(*sources: str):
    return [
        ({"i": torch.tensor(i)}, MicroBatch({}, range(i, i + 1), np.array([i]), source=source))
        for i, source in enumerate(sources)
    ]


def test_losses_of_corpora_are_parts_of_the_whole():
    totals = sum_over_batches(lambda batch: Terms(1.0 * batch["i"], torch.tensor(2)), batches("a", "b", "a"))
    assert totals.sources == {"a": (2.0, 4), "b": (1.0, 2)}
    assert totals.source_losses == {"loss/a": 0.5, "loss/b": 0.5}
    assert totals.measured == {"loss": 0.5, "loss/a": 0.5, "loss/b": 0.5}
    assert (totals.loss_sum, totals.num_targets) == (3.0, 6)
