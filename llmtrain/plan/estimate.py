"""What a run will need, before torch is imported: parameters, FLOPs, memory, whether it fits.

plan = estimate(model, layout, config)
print(plan.table())
plan.refuse_if_too_large()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem
from llmtrain.models.registry import family_of
from llmtrain.nn.memory import Conditions
from llmtrain.nn.model_config import ModelConfig, OfVocabulary, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout
from llmtrain.plan import machine
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.memory import GIB, Memory, Trainable, memory_per_process, start_bytes

CLEARLY_OVER = 1.5
"""On this machine, whose memory is shared and can be swapped, only what is this many times too large is
refused; less is warned of."""

ASSUMED_MFU = 0.4
"""Share of the devices' peak that well-run training reaches (PaLM, arXiv:2204.02311: 0.46; Llama 3,
arXiv:2407.21783: 0.38 to 0.43)."""


class _Steps(Protocol):
    @property
    def steps(self) -> int: ...


class _Checkpoints(Protocol):
    @property
    def asynchronous(self) -> bool: ...


class Workload(Protocol):
    """What the estimate reads of an objective's config."""

    @property
    def data(self) -> str: ...
    def row(self, sequence_length: int) -> Row: ...


class RunSettings(Protocol):
    """What the estimate reads of a run's config."""

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


@dataclass(frozen=True)
class Plan:
    """A run in figures."""

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
    """For one process; None when it is not known."""
    trainable: Trainable | None = None
    """None: all parameters train."""

    @cached_property
    def parameters(self) -> int:
        return self.model.parameter_count()

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward; an image counts as one token."""
        return self.model.flops_per_token(self.row)

    @cached_property
    def memory(self) -> Memory:
        """Of one process."""
        return self._memory(self.layout, self.conditions.recompute)

    @cached_property
    def start_bytes(self) -> int:
        """What a process holds when its weights are made; never more than later."""
        return start_bytes(self.model, self.layout, self.precision, self.conditions.device)

    @property
    def bubble(self) -> float:
        """Share of a step that a pipeline's stages idle in the 1F1B schedule (arXiv:2104.04473)."""
        idle = self.layout.pipeline - 1
        return idle / (self.layout.accumulation + idle)

    @property
    def row(self) -> Row:
        """What the model takes of one row of a batch."""
        return self.objective.row(self.layout.sequence_length)

    @property
    def unit(self) -> str:
        """What the model takes one at a time."""
        return self.objective.data.removesuffix("s")

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_size if self.unit == "image" else self.layout.tokens_per_step

    @property
    def total_tokens(self) -> int:
        """Of the whole run."""
        return self.tokens_per_step * self.steps

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.total_tokens

    @property
    def seconds(self) -> float | None:
        """The whole run at ASSUMED_MFU; None when the cluster's peak is not known."""
        peak = self.cluster.peak_flops.get(self.precision)
        return self.total_flops / (ASSUMED_MFU * peak * self.layout.world_size) if peak else None

    @property
    def is_too_large(self) -> bool:
        """Whether the run needs more than there is."""
        return self.available_bytes is not None and self.memory.total > self.available_bytes

    @property
    def is_refused(self) -> bool:
        """Whether the run cannot fit: on a cluster what is over, on this machine what is CLEARLY_OVER."""
        slack = CLEARLY_OVER if self.cluster.is_local else 1.0
        return self.available_bytes is not None and self.memory.total > slack * self.available_bytes

    def refuse_if_too_large(self) -> None:
        """Raises ConfigError when the run cannot fit; the message names settings that would fit."""
        if self.is_refused:
            raise ConfigError(self._problem())

    def warnings(self) -> list[str]:
        """What should be known before the run starts, short of a refusal; empty when all is well."""
        return [str(self._problem())] if self.is_too_large and not self.is_refused else []

    def summary(self) -> str:
        """Two lines, and one more for each warning."""
        layout = self.layout
        lines = [
            f"{self._parameters_text()}; {self.steps:,} steps of {layout.global_size:,} samples "
            f"(data {layout.data} · micro_size {layout.micro_size} · accumulation {layout.accumulation}) = "
            f"{self.total_tokens:,} {self.unit}s",
            f"memory of one process: about {gib(self.memory.total)}"
            + (f" of {gib(self.available_bytes)}" if self.available_bytes is not None else ""),
        ]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings()])

    def table(self) -> str:
        """Everything, as aligned lines."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        layout = self.layout

        def row(name: str, text: str) -> str:
            return f"{name:<17} {text}"

        yield row("model", f"{self.model.family}, {self._parameters_text()}")
        yield row(
            "compute", f"{quantity(self.flops_per_token, 'FLOP')} per {self.unit}, forward and backward"
        )
        yield row(
            "layout",
            f"world_size {layout.world_size:,} = data {layout.data} · tensor {layout.tensor} · "
            f"pipeline {layout.pipeline} · sequence {layout.sequence}; ZeRO {layout.zero}, {self.precision}"
            + ("; tokens shared in the tensor group" if layout.tensor_sequence else ""),
        )
        yield row("recompute", self._recompute_text())
        if layout.pipeline > 1:
            yield row(
                "pipeline",
                f"{layout.pipeline} stages, {layout.accumulation} micro-batches a step: "
                f"{self.bubble:.1%} of it idle (1F1B)",
            )
        yield row(
            "batch",
            f"{layout.global_size:,} samples = data {layout.data} · micro_size {layout.micro_size} · "
            f"accumulation {layout.accumulation}; {self.tokens_per_step:,} {self.unit}s per step",
        )
        yield row(
            "run",
            f"{self.steps:,} steps, {self.total_tokens:,} {self.unit}s, {quantity(self.total_flops, 'FLOP')}",
        )
        if self.seconds is not None:
            rate = self.total_tokens / self.seconds
            yield row(
                "time",
                f"{duration(self.seconds)} at {ASSUMED_MFU:.0%} of {self.cluster.name}'s peak, "
                f"{rate:,.0f} {self.unit}s per second",
            )
        yield "memory of one process" + (" of the stage that holds most" if layout.pipeline > 1 else "")
        for name, size in self.memory.terms.items():
            yield f"  {name:<15} {gib(size):>12}"
        verdict = ""
        if self.available_bytes is not None:
            verdict = f" of {gib(self.available_bytes)}, {self.cluster.name}: "
            verdict += "does not fit" if self.is_too_large else "fits"
        yield f"  {'total':<15} {gib(self.memory.total):>12}{verdict}"
        yield f"  {'at start':<15} {gib(self.start_bytes):>12}"
        for text in self.warnings():
            yield f"warning: {text}"

    def _parameters_text(self) -> str:
        trained = "" if self.trainable is None else f", of which {self.trainable.parameters:,} train"
        return f"{self.parameters:,} parameters{trained}"

    def _recompute_text(self) -> str:
        recompute = self.conditions.recompute
        if recompute.mode == "none" or recompute.every == 1:
            return recompute.mode
        return f"{recompute.mode}, one block in {recompute.every}"

    def _problem(self) -> Problem:
        assert self.available_bytes is not None
        term = self.memory.largest
        place = "this machine" if self.cluster.is_local else self.cluster.name
        return Problem(
            "memory",
            f"{gib(self.memory.total)} a process, {gib(self.memory.terms[term])} of it {term}",
            f"{gib(self.available_bytes)}, what one process has on {place}",
            self._remedy(),
        )

    def _remedy(self) -> str:
        """The least change that fits: of ZeRO and micro-batch, of recomputation, of tensor parallelism, and
        last of the number of processes."""
        for to, recompute in self._changes():
            total = self._memory(to, recompute).total
            if self.available_bytes is not None and total <= self.available_bytes:
                return f"try {' '.join(self._differences(to, recompute))}, which needs {gib(total)}"
        if self.cluster.is_local:
            return "shorten batch.sequence_length, or take a smaller model or more machines"
        return "shorten batch.sequence_length or take a smaller model"

    def _changes(self) -> Iterator[tuple[Layout, RecomputeConfig]]:
        layout, now = self.layout, self.conditions.recompute
        recomputes = [now]
        if family_of(self.model).has_stages and now.mode in ("none", "selective"):
            recomputes.append(RecomputeConfig("full"))
        changes = [
            (to, recompute)
            for tensor, recompute in itertools.product(self._tensor_sizes(), recomputes)
            for to in _with_tensor(layout, tensor)
        ]

        def cost(change: tuple[Layout, RecomputeConfig]) -> int:
            to, recompute = change
            return (
                (to.zero != layout.zero)
                + (to.micro_size != layout.micro_size)
                + 2 * (recompute != now)
                + 3 * (to.tensor != layout.tensor)
            )

        # Sorting keeps the lower stage and the larger micro-batch first.
        yield from sorted(changes, key=cost)
        if not self.cluster.is_local:
            for tensor, recompute in itertools.product(self._tensor_sizes(), recomputes):
                yield from ((to, recompute) for to in _with_more_processes(layout, tensor))

    def _tensor_sizes(self) -> list[int]:
        """Those of the tensor axis that the model and one host allow, today's first."""
        now = self.layout.tensor
        model: Any = self.model
        if not family_of(model).has_stages:
            return [now]
        host = self.cluster.devices_per_node or self.layout.world_size
        larger = [
            size
            for size in range(now + 1, host + 1)
            if host % size == 0
            and model.kv_heads % (size * self.layout.sequence) == 0
            and model.mlp_width % size == 0
            and self.layout.sequence_length % (size * self.layout.sequence) == 0
        ]
        return [now, *larger]

    def _differences(self, to: Layout, recompute: RecomputeConfig) -> Iterator[str]:
        layout = self.layout
        if to.world_size != layout.world_size:
            yield f"{to.world_size} processes"
        if to.tensor != layout.tensor:
            yield f"parallel.tensor={to.tensor}"
        if to.zero != layout.zero:
            yield f"parallel.zero={to.zero} engine=deepspeed"
        if recompute != self.conditions.recompute:
            yield f"recompute={recompute.mode}"
        if to.micro_size != layout.micro_size:
            yield f"batch.micro_size={to.micro_size}"

    def _memory(self, layout: Layout, recompute: RecomputeConfig) -> Memory:
        return memory_per_process(
            self.model,
            self.row,
            layout,
            precision=self.precision,
            optimizer=self.optimizer,
            conditions=replace(self.conditions, recompute=recompute),
            asynchronous_checkpoints=self.asynchronous_checkpoints,
            trainable=self.trainable,
        )


def _with_tensor(layout: Layout, tensor: int) -> Iterator[Layout]:
    """Layouts of as many processes with `tensor` of them to a matrix, by ZeRO stage and micro-batch."""
    data, rest = divmod(layout.world_size, tensor * layout.pipeline * layout.sequence)
    if rest or layout.global_size % data:
        return
    highest = 1 if layout.pipeline > 1 else 3
    stages = (
        range(layout.zero, max(highest, layout.zero) + 1) if data * layout.sequence > 1 else [layout.zero]
    )
    replica_size = layout.global_size // data
    micro_sizes = [size for size in range(layout.micro_size, 0, -1) if replica_size % size == 0]
    for zero, micro in itertools.product(stages, micro_sizes):
        yield replace(
            layout,
            tensor=tensor,
            data=data,
            zero=zero,
            micro_size=micro,
            accumulation=replica_size // micro,
        )


def _with_more_processes(layout: Layout, tensor: int) -> Iterator[Layout]:
    """Layouts of more replicas, by the highest ZeRO stage and single samples."""
    others = tensor * layout.pipeline * layout.sequence
    for data in range(1, layout.global_size + 1):
        if layout.global_size % data == 0 and data * others > layout.world_size:
            yield replace(
                layout,
                world_size=data * others,
                tensor=tensor,
                data=data,
                zero=1 if layout.pipeline > 1 else 3,
                micro_size=1,
                accumulation=layout.global_size // data,
            )


def estimate(
    model: ModelConfig, layout: Layout, settings: RunSettings, trainable: Trainable | None = None
) -> Plan:
    """The figures of training `model` on `layout`; needs neither torch nor a GPU.

    Raises ConfigError when the vocabulary is not known yet.
    """
    if isinstance(model, OfVocabulary) and model.vocab_size is None:
        raise ConfigError(
            Problem("model.vocab_size", "nothing", "a whole number", "give it, or a corpus by data.path=…")
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
    )


def gib(size: float) -> str:
    """1.23 GiB, or MiB below a tenth of one."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def quantity(number: float, unit: str) -> str:
    """12.3 MFLOP: a number with its unit and the letter of its size."""
    for letter, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {letter}{unit}"
    return f"{number:.4g} {unit}"


def duration(seconds: float) -> str:
    """Rounded to what is worth knowing of an estimate."""
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} seconds"
