"""How a user asks for a job to be divided, and what may be recomputed: frozen dataclasses, free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

Precision = Literal["fp32", "bf16", "fp16"]
EngineName = Literal["local", "deepspeed"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ParallelConfig:
    """The number of processes on each axis, and what each process keeps of the model's states."""

    auto: bool = False
    """Let the planner choose the other keys, the micro-batch and recomputation: the fastest layout that
    fits."""
    data: int | None = None
    """Data-parallel replicas, each with its own samples; null: as many as the processes allow."""
    tensor: int = 1
    """Processes that divide each weight matrix."""
    pipeline: int = 1
    """Pipeline stages, which divide the layers."""
    sequence: int = 1
    """Processes that divide each sequence."""
    elastic: tuple[Literal["data", "tensor", "pipeline"], ...] = ("data",)
    """Axes that may be smaller where a launcher with NNODES=MIN:MAX starts fewer processes than are asked
    for: replicas are given up first, then stages, then parts of matrices. The global batch stays."""
    zero: Literal[0, 1, 2, 3] = 0
    """What the replicas shard (arXiv:1910.02054): 1 optimizer state, 2 also gradients, 3 also weights."""
    tensor_sequence: bool = False
    """Also divide the tokens over the tensor group between its matrices, in norms and dropout
    (Megatron's sequence parallelism, arXiv:2205.05198)."""
    balance: Literal["parameters", "time"] = "parameters"
    """What to divide evenly over the pipeline stages; `time` goes by the FLOPs of each layer."""
    offload_optimizer: Offload = "none"
    """Where fp32 weights, their gradients and the optimizer state are kept: on the device (none) or in host
    memory, where the CPU runs the optimizer step (arXiv:2101.06840). nvme is refused, with the reason."""
    offload_parameters: Offload = "none"
    """Where each process keeps its shard of the weights until they are gathered (ZeRO 3)."""
    quantized_weights: bool = False
    """Gather weights in 8 bits (ZeRO++ qwZ, arXiv:2306.10209)."""
    quantized_gradients: bool = False
    """Reduce gradients in 4 bits between hosts (ZeRO++ qgZ)."""
    hierarchical_partition: int = 1
    """Size of the group of neighbouring processes, those of one host, that keeps a copy of the weights from
    the forward to the backward pass, which then gathers within the host (ZeRO++ hpZ); 1: no such copy."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.data is None or self.data >= 1, "data", self.data, "1 or more, or null")
        for axis in ("tensor", "pipeline", "sequence"):
            yield from require(getattr(self, axis) >= 1, axis, getattr(self, axis), "1 or more")
        size = self.hierarchical_partition
        yield from require(size >= 1, "hierarchical_partition", size, "1 or more", "1 turns it off")


@dataclass(frozen=True)
class BatchConfig:
    """The batch of one optimizer step."""

    global_size: int
    """Sequences of one optimizer step, over all replicas."""
    micro_size: int
    """Sequences of one forward pass on each replica; activation memory grows with it."""
    sequence_length: int
    """Tokens of one sequence."""

    def problems(self) -> Iterator[Problem]:
        for name in ("global_size", "micro_size", "sequence_length"):
            yield from require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
