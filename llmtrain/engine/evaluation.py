"""Loss and metric sums of a module over batches, during training and for trained models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes
from llmtrain.engine.modules import ObjectiveModule, autocast, to_device
from llmtrain.objectives.base import Batch, Objective, Terms, WeighsTerms
from llmtrain.parallel.config import Precision
from llmtrain.scoring.direction import LOSS_OF
from llmtrain.watch import phases


@dataclass(frozen=True)
class Totals:
    """Sums over many batches and all ranks: `loss_sum` in nats over `num_targets` targets."""

    loss_sum: float
    num_targets: int
    metric_sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name → (sum, count that the sum is divided by)."""
    sources: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of a mixture: name of a corpus → its part of loss_sum and of num_targets."""
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    """Number of a sample → what the model predicts of it, in ascending order; empty unless the objective
    gives it."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures that take the predictions of all rows together, the most telling first."""

    @property
    def measured(self) -> dict[str, float]:
        """Everything by name, the loss first; empty without targets."""
        if not self.num_targets:
            return {}
        return {"loss": self.loss, **self.source_losses, **self.metrics, **self.figures}

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_targets)

    @property
    def source_losses(self) -> dict[str, float]:
        """Mean loss of each corpus of a mixture, as `loss/NAME`."""
        return {f"{LOSS_OF}{name}": total / count for name, (total, count) in self.sources.items() if count}

    @property
    def metrics(self) -> dict[str, float]:
        return {name: total / max(1.0, count) for name, (total, count) in self.metric_sums.items()}


LOSS = "/loss"
"""Name of the loss among the sums; names of metrics have no slash. `/loss/NAME` is that of a corpus."""


class NamedSums:
    """Sums pairs of numbers over ranks by name. A rank without a name adds nothing to its sum."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        """Names that all ranks agreed on, in the order of transmission."""

    def over_ranks(self, pairs: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        """Return the sum over all ranks of each pair that any rank has. A collective.

        pairs: name → tensor (2,), at least one, all on one device.
        """
        device = next(iter(pairs.values())).device
        summed, unknown = self._sum(pairs, device)
        if unknown:  # on any rank: all agree on names again
            self._names = tuple(sorted({name for names in processes.gather(list(pairs)) for name in names}))
            summed, _ = self._sum(pairs, device)
        return summed

    def _sum(
        self, pairs: Mapping[str, torch.Tensor], device: torch.device
    ) -> tuple[dict[str, tuple[float, float]], bool]:
        """Return the sums of the agreed names that any rank has, and whether any rank has another name."""
        absent = torch.zeros(3, dtype=torch.float64, device=device)
        present = torch.ones(1, dtype=torch.float64, device=device)
        rows = [
            torch.cat([pairs[name].detach().double(), present]) if name in pairs else absent
            for name in self._names
        ]
        unknown = torch.full_like(absent, float(not pairs.keys() <= set(self._names)))
        first, *others = processes.all_sum(torch.stack([unknown, *rows])).tolist()
        found = zip(self._names, others, strict=True)
        return {name: (a, b) for name, (a, b, holders) in found if holders > 0}, first[0] > 0


def sum_over_batches(
    compute: Callable[[Batch], Terms], batches: Iterable[tuple[Batch, MicroBatch]], counted: bool = True
) -> Totals:
    """Return the sums over all batches of all ranks. All ranks must pass equally many; those that are not
    `counted` repeat the batches of ranks that are.

    batches: each with the micro-batch that it was made of.
    """
    sums: dict[str, torch.Tensor] = {}
    rows: dict[int, np.ndarray] | None = None
    with torch.no_grad():
        for number, (batch, micro) in enumerate(batches):
            phases.begin_micro_batch(number)
            terms = compute(batch)
            if terms.rows is not None:
                rows = {} if rows is None else rows
                given = zip(micro.indices.tolist(), terms.rows, strict=True)
                rows |= {index: row for index, row in given if counted and index != EMPTY}
            whole = torch.stack([terms.loss_sum.double(), terms.num_targets.double()])
            of_source = {f"{LOSS}/{micro.source}": whole} if micro.source else {}
            for name, value in {LOSS: whole, **of_source, **terms.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * counted
    if not sums:  # then on no rank, since all have equally many
        return Totals(0.0, 0)
    reduced = NamedSums().over_ranks(sums)
    loss_sum, num_targets = reduced.pop(LOSS)
    of_sources = {name: reduced.pop(name) for name in [*reduced] if name.startswith(f"{LOSS}/")}
    sources = {name.removeprefix(f"{LOSS}/"): (a, int(b)) for name, (a, b) in of_sources.items()}
    found: dict[int, np.ndarray] = {}
    if rows is not None:
        for part in processes.gather(rows):
            found |= part
    return Totals(loss_sum, int(num_targets), reduced, sources, dict(sorted(found.items())))


def with_terms(totals: Totals, objective: Objective) -> Totals:
    """Return the sums with the loss of an objective of several terms, whose targets are counted apart."""
    if not isinstance(objective, WeighsTerms):
        return totals
    # The metrics have the losses of the terms by name.
    return replace(totals, loss_sum=objective.loss_of(totals.metrics) * totals.num_targets, sources={})


def evaluate_batches(
    model: nn.Module,
    objective: Objective,
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
    precision: Precision,
    counted: bool = True,
) -> Totals:
    """Return the same sums for a model that is not wrapped; sets it to evaluation mode."""
    module = ObjectiveModule(model, objective, autocast(precision, device)).eval()
    batches = ((to_device(micro.batch, device), micro) for micro in micro_batches)
    totals = sum_over_batches(lambda batch: Terms(*module(batch)), batches, counted)
    return with_terms(totals, objective)
