"""Memory of one process by term: arithmetic over what the engines hold."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.layout import Layout, Precision
from llmtrain.plan.activations import (
    ModelConfig,
    Numbers,
    activation_bytes,
    head_bytes,
    matrix_parameter_count,
)

GIB = 2**30

DEEPSPEED_BUCKET_ELEMENTS = 200_000_000
DEEPSPEED_LIVE_ELEMENTS = 1_000_000_000
"""Largest gradient bucket, and weights that ZeRO 3 keeps gathered; as in engine/deepspeed.py, a test
compares."""

RUNTIME_BYTES = {"cpu": GIB // 2, "cuda": 3 * GIB // 2}
"""The libraries of one process; on a GPU its context and the communication library's buffers."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by term. The terms' peaks need not fall together: `total` is an upper estimate."""

    weights: int
    gradients: int
    optimizer: int
    """Optimizer state, and the fp32 master weights where they stand apart from the weights."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    logits: int
    """The head with its loss."""
    buffers: int
    """Gradients and weights on their way between processes."""
    runtime: int

    @property
    def terms(self) -> dict[str, int]:
        """In the order of a table, the largest nowhere in particular."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=self.terms.__getitem__)


def memory_per_process(
    model: ModelConfig,
    layout: Layout,
    *,
    precision: Precision,
    optimizer: OptimizerConfig,
    device: str,
    document_mask: bool = True,
) -> Memory:
    """What one process of `layout` holds in training `model`.

    Below ZeRO 1 weights are fp32 and low precision is autocast's; from ZeRO 1 on weights and activations
    are in the low precision over sharded fp32 masters (arXiv:1910.02054).
    """
    P, replicas = model.parameter_count(), layout.data
    is_low = precision != "fp32"
    stored = 2 if is_low and layout.zero else 4
    numbers = Numbers(compute=2 if is_low else 4, residual=stored)
    state = optimizer_slots(optimizer) * 4 * P
    # bf16 gradients are added up in fp32; ZeRO 1 keeps both.
    gradient = {"fp32": 4, "bf16": 6 if layout.zero == 1 else 4, "fp16": 2}[precision]

    if layout.zero == 0:
        weights = 4 * P + (2 * matrix_parameter_count(model) if is_low else 0)
        gradients, masters, buffers = 4 * P, 0, (4 * P if replicas > 1 else 0)
    else:
        weights = stored * (_share(P, replicas) if layout.zero == 3 else P)
        gradients = gradient * (P if layout.zero == 1 else _share(P, replicas))
        masters, state = 4 * _share(P, replicas), _share(state, replicas)
        buffers = stored * min(P, DEEPSPEED_BUCKET_ELEMENTS) * (2 if device == "cuda" else 1)
        if layout.zero == 3:
            buffers += stored * min(P, DEEPSPEED_LIVE_ELEMENTS)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=masters + state,
        activations=activation_bytes(
            model,
            numbers,
            micro_size=layout.micro_size,
            sequence_length=layout.sequence_length,
            device=device,
            document_mask=document_mask,
        ),
        logits=head_bytes(model, numbers, tokens=layout.micro_size * layout.sequence_length, device=device),
        buffers=buffers,
        runtime=RUNTIME_BYTES[device],
    )


def start_bytes(model: ModelConfig, layout: Layout, device: str) -> int:
    """What one process holds while it starts: the whole model in fp32, and its share of the masters that
    ZeRO then cuts from it."""
    P = model.parameter_count()
    masters = 4 * _share(P, layout.data) if layout.zero else 0
    return 4 * P + masters + RUNTIME_BYTES[device]


def optimizer_slots(config: OptimizerConfig) -> int:
    """Numbers that the optimizer keeps for each weight."""
    momentum = int(config.momentum > 0)
    return {"adamw": 2, "adam": 2, "sgd": momentum, "adagrad": 1, "rmsprop": 1 + momentum}[config.name]


def _share(count: int, replicas: int) -> int:
    """The largest share when `replicas` divide `count`."""
    return -(-count // replicas)
