"""Pipeline parallelism: DeepSpeed's 1F1B schedule (arXiv:2104.04473) over data- and tensor-parallel
stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.engine.base import Setup
from llmtrain.engine.deepspeed import DeepSpeedEngine
from llmtrain.engine.modules import ObjectiveModule, autocast
from llmtrain.objectives.base import Batch, NamesArguments, PadsRows, Terms
from llmtrain.optim.groups import Group
from llmtrain.parallel import upstream
from llmtrain.parallel.pipeline import PipelineStage, SharedWeight
from llmtrain.watch import phases


class PipelineEngine(DeepSpeedEngine):
    """One pipeline stage, with ZeRO 0 or 1 over its replicas.

    DeepSpeed sends hidden states and gradients between stages by its schedule, sums the gradients of
    weights that several stages hold, and steps the optimizer. Micro-batches are not sent (see
    parallel/pipeline.py).
    """

    def __init__(self, setup: Setup, stage: PipelineStage, shared: Mapping[str, SharedWeight]) -> None:
        """shared: by canonical name, in the same order on all stages."""
        assert isinstance(setup.objective, NamesArguments)
        if isinstance(setup.objective, PadsRows):
            setup.objective.pad_fully()
        self._stage = stage
        self._shared = shared
        self._imagines = False
        self._replay = _Replay(stage, setup)
        super().__init__(setup)
        precision = setup.precision if self.layout.zero == 0 else "fp32"
        self._whole = ObjectiveModule(stage, setup.objective, autocast(precision, setup.device))

    def _initialize(self, module: nn.Module, mpu: Any) -> Any:
        deepspeed = upstream.import_deepspeed()
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        layout, mesh = self.layout, self.mesh
        with contextlib.redirect_stdout(io.StringIO()), upstream.quick_grid():
            pipeline = deepspeed.PipelineModule(
                layers=[self._replay] * layout.pipeline,  # each rank builds only its own
                topology=PipeModelDataParallelTopology(
                    num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
                ),
                partition_method="uniform",
            )
        for name, (stages, path) in self._shared.items():
            group = mesh.group_of_stages(*stages)
            if path is None or not self.setup.parameters[name].requires_grad:
                continue
            upstream.tie_over_stages(
                pipeline,
                name.replace(".", "_"),
                self.model.get_submodule(path),
                [mesh.stage_rank(stage) for stage in stages],
                group,
                counted=self._answers_for(name),
            )
        engine = super()._initialize(pipeline, None)
        self._make_step = upstream.step_apart(engine)
        return engine

    def imagine_neighbours(self) -> None:
        """Take hidden states of neighbouring stages to have the shape that this stage's batch gives them, in
        place of asking these stages: in a rehearsal there are none."""
        self._imagines = True

    def _optimized(self) -> tuple[list[tuple[str, nn.Parameter]], dict[str, Group]]:
        named, groups = super()._optimized()
        anchors = {f"anchor.{i}": anchor for i, anchor in enumerate(self._replay.anchors)}
        of_anchors = dict(zip(anchors, self._replay.anchored, strict=True))
        return [*named, *anchors.items()], {**groups, **of_anchors}

    def _module(self) -> nn.Module:
        return self._whole

    def _accumulate(self, count: int, batch: Callable[[int], Batch], scale: float) -> list[Terms]:
        # DeepSpeed divides by the number of micro-batches.
        self._replay.begin(batch, scale * count)
        if self._imagines:
            upstream.expect_from_neighbours(self._engine, self._replay.hidden_state(batch(0)))
        dummy = torch.zeros(1, device=self.device)
        # The forward passes within say so themselves.
        with phases.BACKWARD:
            self._engine.train_batch(repeat((dummy, dummy)))
        return self._replay.terms(count)

    def _step(self) -> None:
        self._make_step()

    def _drop(self) -> None:
        self._engine.zero_grad()

    def _answers_for(self, name: str) -> bool:
        is_first = name not in self._shared or self._stage.number == self._shared[name].stages[0]
        return super()._answers_for(name) and is_first


class _Replay(nn.Module):
    """A stage as DeepSpeed calls it: one forward per micro-batch, with only a hidden state as input."""

    def __init__(self, stage: PipelineStage, setup: Setup) -> None:
        super().__init__()
        self.stage = stage
        self._objective: Any = setup.objective
        self._mesh = setup.mesh
        self._autocast = autocast(setup.precision if setup.layout.zero == 0 else "fp32", setup.device)
        self.anchored = _untrained_groups(setup)
        """The optimizer group of each anchor."""
        self.anchors = nn.ParameterList(_anchor(group, setup) for group in self.anchored)
        self._losses: list[Tensor] = []
        self._targets: list[Tensor] = []

    def begin(self, batch: Callable[[int], Batch], scale: float) -> None:
        """Start a step: the next forwards are those of micro-batches 0, 1, …, and return the loss times
        `scale`."""
        self._batch, self._scale = batch, scale
        self._losses, self._targets = [], []

    def forward(self, x: Tensor) -> Tensor:
        with phases.FORWARD:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        batch = self._batch(len(self._targets))
        self._targets.append(torch.tensor(self._objective.target_count(batch), device=x.device))
        with self._autocast:
            y = self.stage.run(None if self._mesh.is_first_stage else x, **self._objective.arguments(batch))
        if self.anchors:
            y = _Anchored.apply(y, *self.anchors)
        if not self._mesh.is_last_stage:
            return y
        self._losses.append(y.detach())
        return y * self._scale

    def hidden_state(self, batch: Batch) -> Tensor:
        """Return a tensor of the shape and type of the hidden states that stages pass on."""
        shape = self.stage.hidden_shape(**self._objective.arguments(batch))
        return next(self.stage.parameters()).new_empty(shape)

    def terms(self, count: int) -> list[Terms]:
        """Return the terms of each micro-batch since `begin`; losses are 0 before the last stage."""
        zero = torch.zeros((), device=self._targets[0].device)
        losses = self._losses or [zero] * count
        return [Terms(loss, targets) for loss, targets in zip(losses, self._targets, strict=True)]


def _untrained_groups(setup: Setup) -> list[Group]:
    """Return the optimizer groups of which this stage trains nothing.

    DeepSpeed runs a backward pass through each stage and sums gradient norms over stages group by group:
    if one stage had fewer groups, the others would wait forever. So each stage has a parameter that stays 0,
    an anchor, in each of these groups.
    """
    groups = setup.groups_of
    trained = {groups[name] for name, p in setup.parameters.items() if p.requires_grad}
    return sorted({*groups.values()} - trained, key=lambda group: group.place)


def _anchor(group: Group, setup: Setup) -> nn.Parameter:
    dtype = next(iter(setup.parameters.values())).dtype
    shape = (1, 1) if group.decays else (1,)
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=setup.device))


class _Anchored(torch.autograd.Function):
    """Return x unchanged, with the anchors in its graph; their gradients are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *anchors: Tensor) -> Tensor:
        ctx.save_for_backward(*anchors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(anchor) for anchor in ctx.saved_tensors)
