"""Plain torch: one process, or data-parallel replicas whose gradients are averaged.

torch's DistributedDataParallel regroups its buckets after the first step of each process, which reorders
sums over three or more ranks, so that a resumed run would differ in the last bits. Here buckets depend
only on the order of parameters, and still overlap with the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmtrain.engine.base import Engine, Fragment, Setup
from llmtrain.engine.gate import Gate
from llmtrain.engine.modules import ObjectiveModule, autocast
from llmtrain.objectives.base import Batch, Terms
from llmtrain.optim.optimizers import set_lr
from llmtrain.tensor_boxes import Shard
from llmtrain.watch import phases

BUCKET_BYTES = 25 * 2**20


class GradientAverager:
    """Averages gradients over the ranks of `group` in fixed buckets, each sent as soon as it is complete."""

    def __init__(
        self, parameters: list[nn.Parameter], group: Any = None, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.enabled = False
        self._group = group
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket_bytes + 1
        for parameter in reversed(parameters):
            if size + parameter.numel() * parameter.element_size() > bucket_bytes:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._ready = [0] * len(self._buckets)
        self._next = 0
        self._sent: list[tuple[torch.Tensor, dist.Work]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self.enabled:
            return
        self._ready[self._bucket_of[parameter]] += 1
        # Send buckets in the same order on all ranks, whatever order autograd completes them in.
        while self._next < len(self._buckets) and self._ready[self._next] == len(self._buckets[self._next]):
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        # The bucket takes the gradients' place at once, so that no more than one is held twice.
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._sent.append((flat, work))
        self._next += 1

    def finish(self) -> None:
        """Wait until all buckets, of which the gradients are parts, hold the averages."""
        while self._next < len(self._buckets):  # parameters that did not take part in the loss
            self._send()
        for flat, work in self._sent:
            work.wait()
            flat.div_(dist.get_world_size(self._group))
        self._ready = [0] * len(self._buckets)
        self._next = 0
        self._sent.clear()
        self.enabled = False


class LocalEngine(Engine):
    """Whole weights and optimizer on each rank; autocast for bf16 and fp16."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        device = self.device.type
        self._wrapped = ObjectiveModule(self.model, self.objective, autocast(setup.precision, self.device))
        self._optimizer = self._make_optimizer()
        self._scaler = torch.amp.GradScaler(device) if setup.precision == "fp16" else None  # type: ignore[attr-defined]
        self._averager: GradientAverager | None = None
        if self.mesh.replicas > 1:
            self._averager = GradientAverager([p for _, p in self.trainable], self.mesh.replica_group)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def _module(self) -> nn.Module:
        return self._wrapped

    def _accumulate(self, count: int, batch: Callable[[int], Batch], scale: float) -> list[Terms]:
        all_terms = []
        for i in range(count):
            with phases.FORWARD:
                terms = Terms(*self._wrapped(batch(i)))
            loss = terms.loss_sum * scale
            if self._averager is not None:
                self._averager.enabled = i == count - 1
            with phases.BACKWARD:
                (self._scaler.scale(loss) if self._scaler is not None else loss).backward()
            all_terms.append(terms)
        if self._averager is not None:
            with phases.BACKWARD:
                self._averager.finish()
        return all_terms

    def _update(self, lr: float, gate: Gate | None) -> tuple[float, bool]:
        set_lr(self._optimizer, lr)
        scale_before = 1.0
        if self._scaler is not None:
            scale_before = self._scaler.get_scale()
            self._scaler.unscale_(self._optimizer)
        norm = self._clip(self.setup.optimizer.max_grad_norm)
        overflows = self._scaler is not None and not math.isfinite(norm)
        is_taken = gate is None or overflows or gate(norm)
        if self._scaler is not None:
            if is_taken:
                self._scaler.step(self._optimizer)
            self._scaler.update()
        elif is_taken:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        is_too_large = self._scaler is not None and self._scaler.get_scale() < scale_before
        return norm, is_too_large or not is_taken

    def held_fragments(self) -> list[Fragment]:
        return [*self._whole_fragments(self.setup.parameters.items()), *self._statistics()]

    def fragments(self) -> list[Fragment]:
        shared = self._each_replicas_share(self._whole_fragments(self.setup.parameters.items()))
        return [*shared, *self._statistics()[self.mesh.replica :: self.mesh.replicas]]

    def _statistics(self) -> list[Fragment]:
        return [
            Fragment(name, Shard(tuple(values.shape)), 0, values.numel(), values, 0, False, True)
            for name, values in self.statistics.by_name.items()
        ]

    def release(self) -> None:
        """Do nothing: the last reference holds all of it."""

    def refresh_weights(self) -> None:
        """Do nothing: the fragments are the weights."""

    def scaler_state(self) -> dict[str, float]:
        return dict(self._scaler.state_dict()) if self._scaler is not None else {}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if self._scaler is not None and state:
            own = self._scaler.state_dict()
            self._scaler.load_state_dict({name: state.get(name, value) for name, value in own.items()})
