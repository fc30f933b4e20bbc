"""Configuration of the optimizer and the learning-rate schedule. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

OptimizerName = Literal["adamw", "adam", "sgd", "adagrad", "rmsprop"]
Implementation = Literal["torch", "deepspeed"]
ScheduleName = Literal["constant", "cosine", "linear", "wsd", "noam"]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of torch.optim. Keys that do not apply to the chosen optimizer are ignored."""

    name: OptimizerName = "adamw"
    """Optimization algorithm."""
    lr: float = 3e-4
    """Peak learning rate, which the schedule multiplies."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it: a layer at a distance of d layers from
    the head has lr · layer_decay^d, and the embeddings, below the lowest, the least."""
    head_lr: float | None = None
    """Peak learning rate of the head's own parameters; null: lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running averages of gradient and squared gradient (adamw, adam)."""
    eps: float = 1e-8
    """Term added to the denominator for numerical stability (all but sgd)."""
    weight_decay: float = 0.1
    """Weight decay of parameters with two or more dimensions: decoupled for adamw (arXiv:1711.05101), added
    to the gradient for the others."""
    momentum: float = 0.0
    """Momentum factor (sgd, rmsprop)."""
    alpha: float = 0.99
    """Decay rate of the running average of the squared gradient (rmsprop)."""
    fused: bool | None = None
    """Use torch's fused kernel, one for the whole step; null: if torch has one for the device."""
    implementation: Implementation = "torch"
    """Kernel of adamw and adam. torch: torch.optim. deepspeed: DeepSpeed's CPUAdam, for optimizer state in
    host memory (parallel.offload_optimizer), compiled at first use."""
    max_grad_norm: float = 1.0
    """Maximum Euclidean norm of the gradient over all parameters; larger gradients are scaled down to it. 0:
    no clipping."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0.0 < self.lr < float("inf"), "lr", self.lr, "a positive number")
        decay, head_lr = self.layer_decay, self.head_lr
        yield from require(0.0 < decay <= 1.0, "layer_decay", decay, "more than 0, up to 1")
        yield from require(
            head_lr is None or 0.0 < head_lr < float("inf"), "head_lr", head_lr, "a positive number, or null"
        )
        for i, beta in enumerate(self.betas):
            yield from require(0.0 <= beta < 1.0, f"betas[{i}]", beta, "0 up to, not including, 1")
        yield from require(self.eps > 0.0, "eps", self.eps, "a positive number")
        yield from require(self.weight_decay >= 0.0, "weight_decay", self.weight_decay, "0 or more")
        yield from require(0.0 <= self.momentum < 1.0, "momentum", self.momentum, "0 up to, not including, 1")
        yield from require(0.0 <= self.alpha < 1.0, "alpha", self.alpha, "0 up to, not including, 1")
        yield from require(
            self.max_grad_norm >= 0.0,
            "max_grad_norm",
            self.max_grad_norm,
            "0 or more",
            "0 turns clipping off",
        )
        yield from require(
            not (self.fused and self.name == "rmsprop"),
            "fused",
            True,
            "null or false",
            "torch has no fused rmsprop",
        )
        if self.implementation == "deepspeed":
            yield from require(
                self.name in ("adamw", "adam"),
                "implementation",
                f"deepspeed with name={self.name}",
                "torch: DeepSpeed's kernel implements Adam only",
                "give optimizer=adamw or optimizer=adam",
            )
            yield from require(
                self.fused is None,
                "fused",
                f"{str(self.fused).lower()} with implementation=deepspeed",
                "null: fused selects a kernel of torch",
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run as a multiple of optimizer.lr: linear warm-up, then the named shape."""

    name: ScheduleName = "cosine"
    """Shape after the warm-up: constant, cosine or linear decay, wsd (constant, then decay), or noam (inverse
    square root of the step)."""
    warmup_steps: int | None = None
    """Number of linear warm-up steps; null: 5% of the run, at most 2,000."""
    min_ratio: float = 0.1
    """Multiple of optimizer.lr at the end of the decay (cosine, linear, wsd)."""
    decay_steps: int | None = None
    """Number of decay steps at the end of the run (wsd); null: 20% of the run."""

    def problems(self) -> Iterator[Problem]:
        yield from require(
            (self.warmup_steps or 0) >= 0, "warmup_steps", self.warmup_steps, "0 or more, or null"
        )
        yield from require(0.0 <= self.min_ratio <= 1.0, "min_ratio", self.min_ratio, "0 to 1")
        yield from require(
            (self.decay_steps or 0) >= 0, "decay_steps", self.decay_steps, "0 or more, or null"
        )

    def warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps of a run of `total_steps`."""
        return min(2000, total_steps // 20) if self.warmup_steps is None else self.warmup_steps

    def decay(self, total_steps: int) -> int:
        """Return the number of decay steps of a run of `total_steps` with wsd."""
        if self.decay_steps is None:
            return min(total_steps // 5, total_steps - self.warmup(total_steps))
        return self.decay_steps


def schedule_problems(schedule: ScheduleConfig, total_steps: int) -> Iterator[Problem]:
    """Yield the problems of the schedule in a run of `total_steps`; keys are relative to the schedule."""
    warmup = schedule.warmup(total_steps)
    yield from require(
        warmup <= total_steps,
        "warmup_steps",
        warmup,
        f"0 to {total_steps}, the steps of the run",
        "null selects 5% of the run",
    )
    if schedule.name == "wsd" and warmup <= total_steps:
        yield from require(
            schedule.decay(total_steps) <= total_steps - warmup,
            "decay_steps",
            schedule.decay(total_steps),
            f"0 to {total_steps - warmup}, the steps of the run after warm-up",
            "null selects 20% of the run",
        )
