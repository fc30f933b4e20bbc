"""What a run will need, without importing torch: parameters, FLOPs, memory, and whether it fits.

plan = estimate(model, layout, config)
print(report.table(plan))
fit.refuse_if_too_large(plan)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.memory import Memory, Trainable, memory_per_process, start_bytes

CLEARLY_OVER = 1.5
"""A run on this machine, whose memory is shared and can be swapped, is refused only where it needs this many
times the memory; where it needs less than that, but too much, a warning is printed."""

ASSUMED_MFU = 0.4
"""The share of the devices' peak that efficient training reaches (PaLM, arXiv:2204.02311: 0.46; Llama 3,
arXiv:2407.21783: 0.38 to 0.43)."""


class _Steps(Protocol):
    @property
    def steps(self) -> int: ...


class _Checkpoints(Protocol):
    @property
    def asynchronous(self) -> bool: ...


class _Transfer(Protocol):
    @property
    def weight_copies(self) -> int: ...


class Workload(Protocol):
    """The part of an objective's config that the estimate reads."""

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
    def data(self) -> object: ...
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

    @cached_property
    def parameters(self) -> int:
        added = 0 if self.trainable is None else sum(self.trainable.added)
        return self.model.parameter_count() + added

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward pass of one token; an image counts as one token."""
        return self.model.flops_per_token(self.row)

    @cached_property
    def memory(self) -> Memory:
        """Memory of one process."""
        return self.memory_of(self.layout, self.conditions.recompute)

    @cached_property
    def start_bytes(self) -> int:
        """Bytes that a process holds while its weights are created; never more than later."""
        return start_bytes(self.model, self.layout, self.precision, self.conditions.device)

    @property
    def bubble(self) -> float:
        """The share of a step that pipeline stages are idle under the 1F1B schedule (arXiv:2104.04473)."""
        idle = self.layout.pipeline - 1
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
        """Duration of the whole run at ASSUMED_MFU; None when the cluster's peak is unknown."""
        peak = self.cluster.peak_flops.get(self.precision)
        return self.total_flops / (ASSUMED_MFU * peak * self.layout.world_size) if peak else None

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
        """Return the memory of one process in another layout and with other recomputation."""
        return memory_per_process(
            self.model,
            self.row,
            layout,
            precision=self.precision,
            optimizer=self.optimizer,
            conditions=replace(self.conditions, recompute=recompute),
            asynchronous_checkpoints=self.asynchronous_checkpoints,
            trainable=self.trainable,
            weight_copies=self.weight_copies,
        )


def estimate(
    model: ModelConfig, layout: Layout, settings: RunSettings, trainable: Trainable | None = None
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
    document_mask = bool(getattr(settings.data, "document_mask", False))
    available = cluster.memory_bytes
    if available is None and device == "cpu":
        available = machine.memory_bytes() // machine.processes_here(layout.world_size)
    return Plan(
        model=model,
        objective=settings.objective,
        layout=layout,
        precision=settings.precision,
        optimizer=settings.optimizer,
        cluster=cluster,
        conditions=Conditions(
            device,
            document_mask,
            settings.exact_dropout,
            settings.recompute,
            has_bf16=device != "cpu" or machine.has_bf16(),
        ),
        asynchronous_checkpoints=settings.checkpoint.asynchronous,
        steps=settings.train.steps,
        available_bytes=available,
        trainable=trainable,
        weight_copies=settings.transfer.weight_copies,
    )
