"""What a run will need, before torch is imported: parameters, FLOPs, memory, whether it fits.

plan = estimate(model, layout, config)
print(plan.table())
plan.refuse_if_too_large()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.config import SimpleCNNConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel import launcher
from llmtrain.parallel.layout import Layout, Precision
from llmtrain.plan import machine
from llmtrain.plan.activations import ModelConfig
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.memory import GIB, Memory, memory_per_process, start_bytes

CLEARLY_OVER = 1.5
"""On this machine, whose memory is shared and can be swapped, only what is this many times too large is
refused; less is warned of."""

ASSUMED_MFU = 0.4
"""Share of the devices' peak that well-run training reaches (PaLM, arXiv:2204.02311: 0.46; Llama 3,
arXiv:2407.21783: 0.38 to 0.43)."""


class _Steps(Protocol):
    @property
    def steps(self) -> int: ...


class RunSettings(Protocol):
    """What the estimate reads of a run's config."""

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


@dataclass(frozen=True)
class Plan:
    """A run in figures."""

    model: ModelConfig
    layout: Layout
    precision: Precision
    optimizer: OptimizerConfig
    cluster: ClusterConfig
    device: str
    steps: int
    document_mask: bool
    available_bytes: int | None
    """For one process; None when it is not known."""

    @cached_property
    def parameters(self) -> int:
        return self.model.parameter_count()

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward; an image counts as one token."""
        return self.model.flops_per_token(self.layout.sequence_length)

    @cached_property
    def memory(self) -> Memory:
        """Of one process."""
        return self._memory(self.layout)

    @cached_property
    def start_bytes(self) -> int:
        """Most that a process holds while it starts: each builds the whole model before ZeRO shards it."""
        return start_bytes(self.model, self.layout, self.device)

    @property
    def unit(self) -> str:
        """What the model takes one at a time."""
        return "image" if isinstance(self.model, SimpleCNNConfig) else "token"

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
    def needed_bytes(self) -> int:
        """Most that one process holds at any time."""
        return max(self.memory.total, self.start_bytes)

    @property
    def is_too_large(self) -> bool:
        """Whether the run needs more than there is."""
        return self.available_bytes is not None and self.needed_bytes > self.available_bytes

    @property
    def is_refused(self) -> bool:
        """Whether the run cannot fit: on a cluster what is over, on this machine what is CLEARLY_OVER."""
        slack = CLEARLY_OVER if self.cluster.is_local else 1.0
        return self.available_bytes is not None and self.needed_bytes > slack * self.available_bytes

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
            f"{self.parameters:,} parameters; {self.steps:,} steps of {layout.global_size:,} samples "
            f"(data {layout.data} · micro_size {layout.micro_size} · accumulation {layout.accumulation}) = "
            f"{self.total_tokens:,} {self.unit}s",
            f"memory of one process: about {gib(self.needed_bytes)}"
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

        yield row("model", f"{self.model.family}, {self.parameters:,} parameters")
        yield row(
            "compute", f"{quantity(self.flops_per_token, 'FLOP')} per {self.unit}, forward and backward"
        )
        yield row(
            "layout",
            f"world_size {layout.world_size:,} = data {layout.data} · tensor {layout.tensor} · "
            f"pipeline {layout.pipeline} · sequence {layout.sequence}; ZeRO {layout.zero}, {self.precision}",
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
        yield "memory of one process"
        for name, size in self.memory.terms.items():
            yield f"  {name:<15} {gib(size):>12}"
        verdict = ""
        if self.available_bytes is not None:
            verdict = f" of {gib(self.available_bytes)}, {self.cluster.name}: "
            verdict += "does not fit" if self.is_too_large else "fits"
        if self.start_bytes > self.memory.total:
            yield f"  {'total':<15} {gib(self.memory.total):>12}"
            yield f"  {'at start':<15} {gib(self.start_bytes):>12}{verdict}"
        else:
            yield f"  {'total':<15} {gib(self.memory.total):>12}{verdict}"
        for text in self.warnings():
            yield f"warning: {text}"

    def _problem(self) -> Problem:
        assert self.available_bytes is not None
        term = self.memory.largest
        place = "this machine" if self.cluster.is_local else self.cluster.name
        if self.memory.total <= self.available_bytes:
            return Problem(
                "memory",
                f"{gib(self.start_bytes)} a process at start, where each builds the whole model in fp32",
                f"{gib(self.available_bytes)}, what one process has on {place}",
                "take a smaller model: this version shards it only once it is built",
            )
        return Problem(
            "memory",
            f"{gib(self.memory.total)} a process, {gib(self.memory.terms[term])} of it {term}",
            f"{gib(self.available_bytes)}, what one process has on {place}",
            self._remedy(),
        )

    def _remedy(self) -> str:
        """The least change of ZeRO and micro-batch that fits; else of the number of processes too."""
        layout = self.layout
        micro_sizes = [m for m in range(layout.micro_size, 0, -1) if layout.replica_size % m == 0]
        stages = range(layout.zero, 4) if layout.data > 1 else [layout.zero]
        changes = [
            replace(layout, zero=zero, micro_size=micro, accumulation=layout.replica_size // micro)
            for zero in stages
            for micro in micro_sizes
        ]
        # One changed key before two; sorting keeps the lower stage and the larger micro-batch first.
        changes.sort(key=lambda to: (to.zero != layout.zero) + (to.micro_size != layout.micro_size))
        if not self.cluster.is_local:
            changes += [
                replace(
                    layout, world_size=n, data=n, zero=3, micro_size=1, accumulation=layout.global_size // n
                )
                for n in range(layout.data + 1, layout.global_size + 1)
                if layout.global_size % n == 0
            ]
        for to in changes:
            total = self._memory(to).total
            if self.available_bytes is not None and total <= self.available_bytes:
                parts = [f"{to.world_size} processes"] if to.world_size != layout.world_size else []
                parts += [f"parallel.zero={to.zero} engine=deepspeed"] if to.zero != layout.zero else []
                parts += [f"batch.micro_size={to.micro_size}"] if to.micro_size != layout.micro_size else []
                return f"try {' '.join(parts)}, which needs {gib(total)}"
        if self.cluster.is_local:
            return "shorten batch.sequence_length, or take a smaller model or more machines"
        return "shorten batch.sequence_length or take a smaller model"

    def _memory(self, layout: Layout) -> Memory:
        return memory_per_process(
            self.model,
            layout,
            precision=self.precision,
            optimizer=self.optimizer,
            device=self.device,
            document_mask=self.document_mask,
        )


def estimate(model: ModelConfig, layout: Layout, settings: RunSettings) -> Plan:
    """The figures of training `model` on `layout`; needs neither torch nor a GPU.

    Raises ConfigError when the vocabulary is not known yet.
    """
    if not isinstance(model, SimpleCNNConfig) and model.vocab_size is None:
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
        layout=layout,
        precision=settings.precision,
        optimizer=settings.optimizer,
        cluster=cluster,
        device=device,
        steps=settings.train.steps,
        document_mask=document_mask,
        available_bytes=available,
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
