"""Two parts of a model that train against each other, alternately, within one optimizer step.

The first part takes a step on each micro-batch, then the second one on the last: with batch.global_size = 5 ·
batch.micro_size on one process the first has five turns to one of the second (arXiv:1704.00028, algorithm 1).
Both have one torch optimizer, which steps what has a gradient: each parameter has state and counter of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmtrain.data.loader import MicroBatch
from llmtrain.engine.base import Setup, StepResult
from llmtrain.engine.local import GradientAverager, LocalEngine
from llmtrain.objectives.base import Batch, Terms, ratio
from llmtrain.optim.optimizers import set_lr
from llmtrain.watch import phases


class TurnsEngine(LocalEngine):
    """The local engine for an objective that is a `TakesTurns`."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._lr = 0.0
        self._parts = self.objective.parts(self.model)  # type: ignore[attr-defined]
        self._averagers: list[GradientAverager | None] = [None, None]
        if self.mesh.replicas > 1:
            group = self.mesh.replica_group
            self._averagers = [GradientAverager([*part.parameters()], group) for part in self._parts]

    def train_step(self, micro_batches: Sequence[MicroBatch], *, lr: float, **more: Any) -> StepResult:
        self._lr = lr
        # The first turn changes weights, so that a step cannot be given up between micro-batches.
        return super().train_step(micro_batches, lr=lr, **{**more, "between": lambda: None})

    def _accumulate(self, count: int, batch: Callable[[int], Batch], scale: float) -> list[Terms]:
        objective: Any = self.objective
        first, second = self._parts
        found: list[Terms] = []
        current: Batch = {}
        for i in range(count):
            current = batch(i)
            with phases.FORWARD, self._autocast(), _frozen(second):
                terms = objective.discriminator_terms(self.model, current)
            # Each turn is a step over one micro-batch of each replica.
            self._backward(terms, 0, scale * count)
            set_lr(self._optimizer, self._lr)
            if (most := self.setup.optimizer.max_grad_norm) > 0:
                torch.nn.utils.clip_grad_norm_(first.parameters(), most)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            found.append(terms)
        with phases.FORWARD, self._autocast(), _frozen(first):
            terms = objective.generator_terms(self.model, current)
        self._backward(terms, 1, scale * count)
        last = found[-1]
        metrics = {**last.metrics, "generator_loss": ratio(terms.loss_sum.detach(), terms.num_targets)}
        return [*found[:-1], Terms(last.loss_sum, last.num_targets, metrics)]

    def _backward(self, terms: Terms, part: int, scale: float) -> None:
        averager = self._averagers[part]
        if averager is not None:
            averager.enabled = True
        with phases.BACKWARD:
            (terms.loss_sum * scale).backward()
            if averager is not None:
                averager.finish()

    def _autocast(self) -> Any:
        from llmtrain.engine.modules import autocast

        return autocast(self.setup.precision, self.device)


@contextmanager
def _frozen(part: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through a part and stay in none of its parameters."""
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
