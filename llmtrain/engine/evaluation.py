"""Loss and metric sums of a module over batches: during training, and of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes
from llmtrain.engine.modules import ObjectiveModule, autocast, to_device
from llmtrain.objectives.base import Batch, Objective, Terms
from llmtrain.parallel.config import Precision


@dataclass(frozen=True)
class Totals:
    """Sums over many batches and all ranks: `loss_sum` in nats over `num_targets` targets."""

    loss_sum: float
    num_targets: int
    metric_sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Each with the count that it is divided by."""

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_targets)

    @property
    def metrics(self) -> dict[str, float]:
        return {name: total / max(1.0, count) for name, (total, count) in self.metric_sums.items()}


def sum_over_batches(
    compute: Callable[[Batch], Terms], batches: Iterable[Batch], counted: bool = True
) -> Totals:
    """The terms of all batches of all ranks; each rank must bring equally many, and those not `counted`
    have the same as others that are."""
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            terms = compute(batch)
            whole = torch.stack([terms.loss_sum.double(), terms.num_targets.double()])
            for name, value in {"": whole, **terms.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * counted
    names = sorted(sums)
    if not names:  # on no rank then, since all bring equally many
        return Totals(0.0, 0)
    totals = torch.stack([sums[name] for name in names])
    reduced = {
        name: (total, count)
        for name, (total, count) in zip(names, processes.all_sum(totals).tolist(), strict=True)
    }
    loss_sum, num_targets = reduced.pop("")
    return Totals(loss_sum, int(num_targets), reduced)


def evaluate_batches(
    model: nn.Module,
    objective: Objective,
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
    precision: Precision,
    counted: bool = True,
) -> Totals:
    """The same for a bare model, in evaluation mode."""
    module = ObjectiveModule(model, objective, autocast(precision, device)).eval()
    batches = (to_device(micro.batch, device) for micro in micro_batches)
    return sum_over_batches(lambda batch: Terms(*module(batch)), batches, counted)
