"""Estimate the memory of one process, term by term, from what the engines hold."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from llmtrain.models.registry import family_of
from llmtrain.nn.memory import Activations, Conditions, Division, ModelMemory, Numbers
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.balance import stage_runs
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout
from llmtrain.plan.moments import Moment, Passes, Share, moments

GIB = 2**30

RUNTIME_BYTES = {"cpu": GIB // 2, "cuda": 3 * GIB // 2}
"""Memory of the libraries of one process; on a GPU, of its context and of communication buffers."""


ALLOCATOR_SHARE = {"cpu": 0.0, "cuda": 0.1}
"""Memory that torch's caching allocator holds and cannot use, as a share of what it hands out: published
peaks of
GPUs lie 4 to 40 % above the sum of the other terms (tests/bench/published.py)."""


@dataclass(frozen=True)
class Trainable:
    """The trainable parameters of a model, some of whose parameters are frozen."""

    parameters: int
    shares: tuple[float, ...]
    """The trainable parameters of each step of the forward pass, as a share of the model's own there; one
    share for a model without steps."""
    added: tuple[int, ...] = ()
    """Parameters of each step beside the model's own, which an adaptation added; empty: none."""

    @property
    def trains_last(self) -> bool:
        """Return whether the weight of the last step trains, which is most of its parameters."""
        return self.shares[-1] > 0.5

    def added_count(self, steps: range) -> int:
        """Return the parameters that were added to `steps`, as if the tensor axis did not divide them."""
        return sum(self.added[step] for step in steps) if self.added else 0

    def kept(self, steps: range) -> range:
        """Return those of `steps` that keep activations on one process: from the lowest that trains on."""
        if len(self.shares) == 1:
            return steps
        lowest = next((step for step, share in enumerate(self.shares) if share > 0), len(self.shares))
        return range(min(max(steps.start, lowest), steps.stop), steps.stop)

    def count(self, model: ModelConfig, layout: Layout, steps: range) -> int:
        """Return the trainable parameters of one process that runs `steps`, before ZeRO divides them.

        The count is off by a few percent where the tensor axis divides only some of the parameters.
        """
        held = held_parameter_count(model, layout, steps)
        if len(steps) == len(self.shares):
            # Counts by step include a shared parameter several times.
            return round(held * self.parameters / model.parameter_count())
        counts = model.step_parameter_counts(layout.tensor)
        trained = sum(counts[step] * self.shares[step] for step in steps)
        return round(held * trained / sum(counts[step] for step in steps))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: the most of each term, and `total`, the most of all at one time."""

    weights: int
    gradients: int
    optimizer: int
    """Optimizer state, and fp32 master weights if they are separate from the weights."""
    activations: int
    """Activations kept for the backward pass, and those of recomputing one layer."""
    logits: int
    """Memory of the output layer and its loss."""
    buffers: int
    """Communication buffers of gradients and weights."""
    checkpoint_copy: int
    """The copy that an asynchronous checkpoint is written from, and copies of the state in memory; 0 on a
    GPU, where the host holds them."""
    runtime: int
    allocator: int = 0
    """Fragmentation: memory that a GPU's allocator holds in pieces that are too small to use."""
    not_at_once: int = 0
    """What to subtract (a negative number), since not all terms have their most at the same time; 0 on a GPU,
    whose allocator keeps what one moment needed."""

    @property
    def terms(self) -> dict[str, int]:
        """Name → bytes, in the order of the table."""
        return {name.replace("_", " "): getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=self.terms.__getitem__)


def memory_of_stages(
    model: ModelConfig,
    row: Row,
    layout: Layout,
    *,
    precision: Precision,
    optimizer: OptimizerConfig,
    conditions: Conditions,
    asynchronous_checkpoints: bool = False,
    trainable: Trainable | None = None,
    weight_copies: int = 0,
    state_copies: int = 0,
) -> list[Memory]:
    """Return the memory of one process of each pipeline stage that trains `model`.

    Without ZeRO, weights are fp32 and autocast gives the low precision. With ZeRO, weights and activations
    are in the low precision, with sharded fp32 master weights (arXiv:1910.02054). Gradients, master weights
    and optimizer state exist for `trainable` parameters only; None: for all. weight_copies: fp32 numbers for
    each weight that are part of the optimizer's state besides those of its algorithm. state_copies: how often
    host memory holds what a process saves, between checkpoints.
    """
    slots = optimizer_slots(optimizer) + weight_copies
    state_copies += int(asynchronous_checkpoints)
    shared = (precision, slots, conditions, state_copies, trainable)
    return [
        _of_stage(model, row, layout, stage, steps, *shared)
        for stage, steps in enumerate(stage_steps(model, layout))
    ]


def memory_per_process(*arguments: Any, **settings: Any) -> Memory:
    """Return the memory of one process in the stage that holds most; arguments as of `memory_of_stages`."""
    return max(memory_of_stages(*arguments, **settings), key=lambda memory: memory.total)


def _of_stage(
    model: ModelConfig,
    row: Row,
    layout: Layout,
    stage: int,
    steps: range,
    precision: Precision,
    slots: int,
    conditions: Conditions,
    state_copies: int,
    trainable: Trainable | None,
) -> Memory:
    held, replicas = held_parameter_count(model, layout, steps), layout.data * layout.sequence
    trained = held if trainable is None else trainable.count(model, layout, steps)
    held += 0 if trainable is None else trainable.added_count(steps)
    stored, is_cast = weight_bytes(precision, layout), layout.zero == 0 and precision != "fp32"
    numbers = Numbers(compute=4 if precision == "fp32" else 2, residual=stored)
    trains_head = trainable is None or trainable.trains_last
    with_head = replace(conditions, trains_head=trains_head)
    memory = model_memory(model, row, numbers, layout, with_head)
    largest = largest_parameter_count(model, layout)
    share = Share(held, trained, _share(trained, replicas), min(trained, largest), slots)
    of_micro_batch = Activations(0, 0) if memory is None else _activations(memory, steps, layout, trainable)
    in_flight = min(layout.pipeline - stage, layout.accumulation)
    head = memory if stage == layout.pipeline - 1 else None
    handed_on = 0 if memory is None or head is not None else memory.between_layers() * stored
    tied = model.repeated_count(steps, layout.tensor) if trained == held else 0
    passes = Passes(
        activations=in_flight * (of_micro_batch.kept + handed_on),
        working=of_micro_batch.working,
        copies=2 * memory.low_precision_copies(steps) if is_cast and memory is not None else 0,
        head=0 if head is None else head.head_bytes(),
        head_backward=0 if head is None else head.head_backward_bytes(),
        waiting=stored * tied if layout.accumulation > 1 else 0,
        embedding=stored * (share.largest if layout.accumulation > 1 else tied),
    )
    found = list(moments(share, passes, layout, precision, conditions.device))
    most = {f.name: max(getattr(moment, f.name) for moment in found) for f in fields(Moment)}
    # A GPU's caching allocator keeps the blocks of one moment, which seldom fit another's.
    on_gpu = conditions.device == "cuda"
    peak = sum(most.values()) if on_gpu else max(moment.total for moment in found)
    saved = 4 * (1 + slots) * _owned(model, layout, trained)
    checkpoint_copy = state_copies * saved if conditions.device == "cpu" else 0
    lost = ALLOCATOR_SHARE[conditions.device] * (peak + checkpoint_copy)
    return Memory(
        **most,
        checkpoint_copy=checkpoint_copy,
        runtime=RUNTIME_BYTES[conditions.device],
        allocator=round(lost),
        not_at_once=peak - sum(most.values()),
    )


def _owned(model: ModelConfig, layout: Layout, trained: int) -> int:
    """Return how many of the trainable parameters that a process holds it saves; the replicas share them."""
    replicas = layout.data * layout.sequence
    owned = _share(trained, replicas)
    if layout.zero == 0 and replicas > 1:  # whole parameters are assigned to ranks
        owned = min(trained, max(owned, largest_parameter_count(model, layout)))
    return owned


def saved_bytes(model: ModelConfig, layout: Layout, slots: int, trainable: Trainable | None) -> int:
    """Return the bytes of a checkpoint that one process writes, in the stage that writes most; weights that
    are frozen are not counted. slots: fp32 numbers for each weight in the optimizer's state."""
    most = 0
    for steps in stage_steps(model, layout):
        held = held_parameter_count(model, layout, steps)
        trained = held if trainable is None else trainable.count(model, layout, steps)
        most = max(most, 4 * (1 + slots) * _owned(model, layout, trained))
    return most


def _activations(
    memory: ModelMemory, steps: range, layout: Layout, trainable: Trainable | None
) -> Activations:
    """Return what `steps` keep. Below the lowest that trains, a step holds its own only while it runs; a
    stage of a pipeline sends gradients to the one before it, and keeps all."""
    if trainable is None or layout.pipeline > 1:
        return memory.activations(steps)
    kept = trainable.kept(steps)
    found = memory.activations(kept)
    if kept.start == steps.start:
        return found
    passing = memory.activations(range(kept.start - 1, kept.start))
    return Activations(found.kept, max(found.working, passing.kept + passing.working))


def model_memory(
    model: ModelConfig, row: Row, numbers: Numbers, layout: Layout, conditions: Conditions
) -> ModelMemory | None:
    """Return the family's estimate of activations and output layer; None if the family has none."""
    memory = family_of(model).memory
    division = Division(
        layout.micro_size, layout.sequence_length, layout.tensor, layout.sequence, layout.tensor_sequence
    )
    return None if memory is None else memory(model, row, numbers, division, conditions)


def start_bytes(model: ModelConfig, layout: Layout, precision: Precision, device: str) -> int:
    """Return the bytes of one process while its weights are created, one parameter at a time.

    Gradients and optimizer state do not exist yet."""
    held = max(held_parameter_count(model, layout, steps) for steps in stage_steps(model, layout))
    if layout.zero == 3:
        held = _share(held, layout.data * layout.sequence) + largest_parameter_count(model, layout)
    return weight_bytes(precision, layout) * held + RUNTIME_BYTES[device]


def weight_bytes(precision: Precision, layout: Layout) -> int:
    """Return the bytes of one held weight: ZeRO holds low precision and fp32 masters, autocast fp32."""
    return 2 if precision != "fp32" and layout.zero > 0 else 4


def stage_steps(model: ModelConfig, layout: Layout) -> list[range]:
    """Return the steps of the forward pass (embedding, layers, output) that each pipeline stage runs."""
    by_time = layout.balance == "time"
    return _divided(model, layout.pipeline, layout.tensor, layout.sequence_length if by_time else None)


@lru_cache(maxsize=1024)
def _divided(model: ModelConfig, pipeline: int, tensor: int, sequence_length: int | None) -> list[range]:
    """Divide by parameters, or, given a sequence length, by multiplications of a token."""
    counts = model.step_parameter_counts(tensor)
    if len(counts) == 1:
        return [range(1)]
    if sequence_length is not None:
        counts = model.step_multiplications(tensor, sequence_length)
    return stage_runs([float(count) for count in counts], pipeline)


def held_parameter_count(model: ModelConfig, layout: Layout, steps: range) -> int:
    """Return the parameters of one process that runs `steps`, before ZeRO divides them among replicas."""
    counts = model.step_parameter_counts(layout.tensor)
    return sum(counts[step] for step in steps) - model.repeated_count(steps, layout.tensor)


def largest_parameter_count(model: ModelConfig, layout: Layout) -> int:
    """Return the elements of the largest parameter of one process, before ZeRO divides it."""
    return model.largest_parameter_count(layout.tensor)


def optimizer_slots(config: OptimizerConfig) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    momentum = int(config.momentum > 0)
    return {"adamw": 2, "adam": 2, "sgd": momentum, "adagrad": 1, "rmsprop": 1 + momentum}[config.name]


def _share(count: int, replicas: int) -> int:
    """Return the largest share when `count` is divided among `replicas`."""
    return -(-count // replicas)
