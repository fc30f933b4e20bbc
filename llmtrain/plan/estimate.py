"""What a run will need, without importing torch: parameters, FLOPs, memory, and whether it fits.

plan = estimate(model, layout, config)
print(report.table(plan))
fit.refuse_if_too_large(plan)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem
from llmtrain.nn.memory import Conditions
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout
from llmtrain.plan import machine
from llmtrain.plan.config import AssumeConfig, ClusterConfig
from llmtrain.plan.flops import training_flops
from llmtrain.plan.memory import (
    Memory,
    Trainable,
    memory_of_stages,
    optimizer_slots,
    saved_bytes,
    start_bytes,
)
from llmtrain.plan.times.step import StepTime
from llmtrain.plan.timing import step_time_of

CLEARLY_OVER = 1.5
"""A run on this machine, whose memory is shared and can be swapped, is refused only where it needs this many
times the memory; where it needs less than that, but too much, a warning is printed."""


class _Steps(Protocol):
    @property
    def steps(self) -> int: ...


class _Copies(Protocol):
    @property
    def copies(self) -> int: ...


class _Checkpoints(Protocol):
    @property
    def asynchronous(self) -> bool: ...
    @property
    def every(self) -> int | None: ...
    @property
    def memory(self) -> _Copies: ...


class _Transfer(Protocol):
    @property
    def weight_copies(self) -> int: ...


class _Documents(Protocol):
    @property
    def document_mask(self) -> bool: ...


class Workload(Protocol):
    """The part of an objective's config that the estimate reads."""

    @property
    def kind(self) -> str: ...
    @property
    def data(self) -> str: ...
    def row(self, sequence_length: int) -> Row: ...


class RunSettings(Protocol):
    """The part of a run's config that the estimate reads."""

    @property
    def objective(self) -> Workload: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...
    @property
    def device(self) -> str: ...
    @property
    def train(self) -> _Steps: ...
    @property
    def data(self) -> _Documents: ...
    @property
    def recompute(self) -> RecomputeConfig: ...
    @property
    def exact_dropout(self) -> bool: ...
    @property
    def checkpoint(self) -> _Checkpoints: ...
    @property
    def transfer(self) -> _Transfer: ...


@dataclass(frozen=True)
class Plan:
    """The figures of a run."""

    model: ModelConfig
    objective: Workload
    layout: Layout
    precision: Precision
    optimizer: OptimizerConfig
    cluster: ClusterConfig
    conditions: Conditions
    asynchronous_checkpoints: bool
    steps: int
    available_bytes: int | None
    """Memory of one process; None when it is unknown."""
    trainable: Trainable | None = None
    """None: all parameters train."""
    weight_copies: int = 0
    """Numbers for each weight in the optimizer's state besides those of its algorithm."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: only after the last step."""
    state_copies: int = 0
    """How often host memory holds what a process saves, between checkpoints."""
    assume: AssumeConfig = field(default_factory=AssumeConfig)

    @cached_property
    def parameters(self) -> int:
        added = 0 if self.trainable is None else sum(self.trainable.added)
        return self.model.parameter_count() + added

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward pass of one token, without those that frozen weights save; an
        image counts as one token."""
        return training_flops(self.model, self.row, self.trainable)

    @cached_property
    def memory(self) -> Memory:
        """Memory of one process, in the pipeline stage that holds most."""
        return max(self.stage_memory, key=lambda memory: memory.total)

    @cached_property
    def stage_memory(self) -> list[Memory]:
        """Memory of one process of each pipeline stage."""
        return self.stage_memory_of(self.layout, self.conditions.recompute)

    @cached_property
    def time(self) -> StepTime | None:
        """Time of one step; None where the cluster's figures are not known."""
        return step_time_of(self, self.layout, self.conditions.recompute)

    @cached_property
    def start_bytes(self) -> int:
        """Bytes that a process holds while its weights are created; never more than later."""
        return start_bytes(self.model, self.layout, self.precision, self.conditions.device)

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes of a checkpoint that one process writes, in the pipeline stage that writes most."""
        slots = optimizer_slots(self.optimizer) + self.weight_copies
        return saved_bytes(self.model, self.layout, slots, self.trainable)

    @property
    def bubble(self) -> float:
        """The share of a step that pipeline stages are idle: as the step's time has it, or, where that is not
        known, of equal stages under the 1F1B schedule, or the interleaved one (arXiv:2104.04473)."""
        if self.time is not None:
            return self.time.parts.get("pipeline bubble", 0.0) / self.time.seconds
        idle = (self.layout.pipeline - 1) / self.assume.virtual_stages
        return idle / (self.layout.accumulation + idle)

    @property
    def row(self) -> Row:
        """The sizes of one row of a batch, as the model receives it."""
        return self.objective.row(self.layout.sequence_length)

    @property
    def unit(self) -> str:
        """What FLOPs and rates are counted in: "token", "image" or "row"."""
        return {"images": "image", "columns": "row"}.get(self.objective.data, "token")

    @property
    def tokens_per_step(self) -> int:
        return self.layout.tokens_per_step if self.unit == "token" else self.layout.global_size

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.steps

    @property
    def total_flops(self) -> float:
        """FLOPs of the whole run."""
        return self.flops_per_token * self.total_tokens

    @property
    def seconds(self) -> float | None:
        """Duration of the whole run; None when the cluster's figures are unknown."""
        return None if self.time is None else self.time.seconds * self.steps

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """Tokens that one device trains on in a second, images or rows for models of those."""
        if self.time is None:
            return None
        return self.tokens_per_step / self.time.seconds / self.layout.world_size

    @property
    def utilization(self) -> float | None:
        """The model's FLOPs as a share of the devices' peak (MFU)."""
        rate = self.tokens_per_second_per_device
        return None if rate is None else rate * self.flops_per_token / self.cluster.peak_flops[self.precision]

    @property
    def is_too_large(self) -> bool:
        """Whether the run needs more memory than is available."""
        return self.available_bytes is not None and self.memory.total > self.available_bytes

    @property
    def is_refused(self) -> bool:
        """Whether the run cannot fit: it needs more memory than a device of the cluster has, or more than
        CLEARLY_OVER times the memory of this machine."""
        slack = CLEARLY_OVER if self.cluster.is_local else 1.0
        return self.available_bytes is not None and self.memory.total > slack * self.available_bytes

    def memory_of(self, layout: Layout, recompute: RecomputeConfig) -> Memory:
        """Return the memory of one process in another layout and with other recomputation, in the stage that
        holds most."""
        return max(self.stage_memory_of(layout, recompute), key=lambda memory: memory.total)

    def stage_memory_of(self, layout: Layout, recompute: RecomputeConfig) -> list[Memory]:
        """Return the memory of one process of each stage in another layout and with other recomputation."""
        return memory_of_stages(
            self.model,
            self.row,
            layout,
            precision=self.precision,
            optimizer=self.optimizer,
            conditions=replace(self.conditions, recompute=recompute),
            asynchronous_checkpoints=self.asynchronous_checkpoints,
            trainable=self.trainable,
            weight_copies=self.weight_copies,
            state_copies=self.state_copies,
        )


def available_bytes(cluster: ClusterConfig, device: str, world_size: int) -> int | None:
    """Return the memory of one process; None for a GPU of unknown kind."""
    if cluster.memory_bytes is None and device == "cpu":
        return machine.memory_bytes() // machine.processes_here(world_size)
    return cluster.memory_bytes


def estimate(
    model: ModelConfig,
    layout: Layout,
    settings: RunSettings,
    trainable: Trainable | None = None,
    assume: AssumeConfig | None = None,
) -> Plan:
    """Return the figures of training `model` on `layout`; this needs neither torch nor a GPU.

    Raise ConfigError when the vocabulary is not known yet.
    """
    if model.lacks_vocab_size:
        raise ConfigError(
            Problem("model.vocab_size", "nothing", "a whole number", "give it, or name a corpus: data.path=…")
        )
    cluster = settings.cluster
    device = cluster.device or launcher.likely_device(settings.device)
    return Plan(
        model=model,
        objective=settings.objective,
        layout=layout,
        precision=settings.precision,
        optimizer=settings.optimizer,
        cluster=cluster,
        conditions=Conditions(
            device,
            settings.data.document_mask,
            settings.exact_dropout,
            settings.recompute,
            has_bf16=device != "cpu" or machine.has_bf16(),
        ),
        asynchronous_checkpoints=settings.checkpoint.asynchronous,
        steps=settings.train.steps,
        available_bytes=available_bytes(cluster, device, layout.world_size),
        trainable=trainable,
        weight_copies=settings.transfer.weight_copies,
        checkpoint_every=settings.checkpoint.every,
        state_copies=settings.checkpoint.memory.copies,
        assume=assume or AssumeConfig(),
    )
