"""What one process holds at the moments of a step, by engine. Free of torch.

A step's memory rises through the forward pass of its last micro-batch, and again as gradients take the place
of activations; then gradients are reduced and the optimizer works. The plan's total is of the moment that
holds most. Buffers are those that torch and DeepSpeed 0.19 really make; `python -m tests.bench.plan_memory`
compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout

LOCAL_BUCKET_BYTES = 25 * 2**20
DEEPSPEED_BUCKET_ELEMENTS = 200_000_000
DEEPSPEED_LIVE_ELEMENTS = 1_000_000_000
DEEPSPEED_PREFETCH_ELEMENTS = 50_000_000
"""Largest buckets of gradients of the local engine and of DeepSpeed, weights that ZeRO 3 keeps gathered, and
those that it gathers ahead; a test compares them with engine/."""
DEEPSPEED_MESSAGE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed sums at once where it has no buckets (`allreduce_bucket_size` of its engine)."""


@dataclass(frozen=True)
class Moment:
    """Bytes of one process at one time, by term of `plan.memory.Memory`."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    def __add__(self, other: Moment) -> Moment:
        return Moment(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Passes:
    """Bytes that the passes of a micro-batch need, whatever the engine."""

    activations: int
    """Kept for the backward pass by all micro-batches in flight."""
    working: int
    """Of the layer that the backward pass is at: what it computes again, and gradients of activations."""
    copies: int
    """Low-precision copies of weights that autocast makes."""
    head: int
    """Of the output layer and its loss, while it works."""
    head_backward: int
    """Of its gradients, when the backward pass begins."""
    waiting: int
    """Of a tied head's gradient, which waits for the embedding's, beside those of all weights."""
    embedding: int
    """Of the embedding's gradient before it is added, when the backward pass ends."""


@dataclass(frozen=True)
class Share:
    """Numbers of weights of one process."""

    held: int
    """Before ZeRO divides them, frozen ones included."""
    trained: int
    owned: int
    """Those that its optimizer updates."""
    largest: int
    """Elements of the largest parameter."""
    slots: int
    """Numbers of optimizer state for each."""

    @property
    def bucket(self) -> int:
        return min(self.trained, DEEPSPEED_BUCKET_ELEMENTS)


def moments(
    share: Share, passes: Passes, layout: Layout, precision: Precision, device: str
) -> Iterator[Moment]:
    """Yield what one process holds at each moment that may be the fullest."""
    if layout.zero == 0:
        yield from _without_zero(share, passes, layout)
    elif layout.zero == 3:
        yield from _zero_3(share, passes, layout, precision, device)
    elif layout.zero == 1 and precision == "bf16":
        yield from _zero_1_in_bf16(share, passes, layout)
    else:
        yield from _zero_1_and_2(share, passes, layout, precision, device)


def _passes(passes: Passes, before: Moment, after: Moment) -> Iterator[Moment]:
    """Yield the ends of both passes. before: held when the last micro-batch begins; after: when its backward
    pass ends."""
    forward = replace(before, weights=before.weights + passes.copies)
    yield forward + Moment(activations=passes.activations, logits=passes.head)
    yield forward + Moment(activations=passes.activations + passes.working, logits=passes.head_backward)
    yield after + Moment(activations=passes.working, buffers=passes.waiting)
    yield after + Moment(buffers=passes.waiting + passes.embedding)


def _without_zero(share: Share, passes: Passes, layout: Layout) -> Iterator[Moment]:
    held = Moment(weights=4 * share.held, optimizer=4 * share.slots * share.trained)
    whole = held + Moment(gradients=4 * share.trained)
    yield from _passes(passes, whole if layout.accumulation > 1 else held, whole)
    if layout.data * layout.sequence > 1:
        bucket = max(LOCAL_BUCKET_BYTES, 4 * share.largest)
        yield whole + Moment(buffers=min(4 * share.trained, bucket))


def _zero_1_in_bf16(share: Share, passes: Passes, layout: Layout) -> Iterator[Moment]:
    """DeepSpeed's BF16_Optimizer: fp32 gradients of all weights for good, bf16 ones beside them."""
    optimizer = 4 * (1 + share.slots) * share.owned
    held = Moment(weights=2 * share.held, gradients=4 * share.trained, optimizer=optimizer)
    both = held + Moment(gradients=2 * share.trained)
    yield from _passes(passes, both if layout.accumulation > 1 else held, both)
    # A rank without others sums its gradients too.
    yield both + Moment(buffers=6 * min(share.trained, DEEPSPEED_MESSAGE_ELEMENTS))


def _zero_1_and_2(
    share: Share, passes: Passes, layout: Layout, precision: Precision, device: str
) -> Iterator[Moment]:
    """DeepSpeed's ZeRO 1 and 2: gradients go to a bucket, and from there to the partition."""
    stored = 4 if precision == "fp32" else 2
    masters, state = 4 * share.owned, 4 * share.slots * share.owned
    accumulated = stored if precision == "fp16" else 4
    partition = accumulated * share.owned
    held = Moment(weights=stored * share.held, optimizer=masters + state)
    if is_away(layout.offload_optimizer, device):
        held = replace(held, optimizer=0)
        partition = stored * share.trained if layout.zero == 1 else 0
    elif layout.offload_optimizer != "none":
        # The host's side of offload: a copy of the weights, gradients for good, and two of the largest.
        copies = stored * share.owned + 2 * stored * share.largest
        held += Moment(gradients=4 * share.owned, buffers=copies)
    bucket = Moment(buffers=stored * share.bucket * (2 if device == "cuda" else 1))
    before, after = held, held + bucket
    if layout.accumulation > 1:
        before += Moment(gradients=stored * share.trained if layout.zero == 1 else partition)
    yield from _passes(passes, before, after)
    reducing = after + Moment(buffers=stored * share.bucket)
    if layout.zero == 2 and (layout.accumulation > 1 or precision == "bf16"):
        reducing += Moment(gradients=partition)
    if precision == "bf16":
        reducing += Moment(buffers=4 * min(share.largest, share.owned))
    yield reducing
    if layout.offload_optimizer == "none":
        yield held + Moment(gradients=partition, buffers=4 * share.owned)


def _zero_3(
    share: Share, passes: Passes, layout: Layout, precision: Precision, device: str
) -> Iterator[Moment]:
    """DeepSpeed's ZeRO 3: a bucket and a partition of gradients for good; weights are gathered ahead."""
    stored = 4 if precision == "fp32" else 2
    replicas = layout.data * layout.sequence
    accumulated = stored if precision == "fp16" else 4
    held = Moment(
        weights=stored * -(-share.held // replicas),
        gradients=accumulated * share.owned,
        optimizer=4 * (1 + share.slots) * share.owned,
        buffers=stored * share.bucket * (2 if device == "cuda" else 1),
    )
    if layout.hierarchical_partition > 1:
        held += Moment(weights=stored * -(-share.held // layout.hierarchical_partition))
    if is_away(layout.offload_optimizer, device):
        held = replace(held, optimizer=0, gradients=0)
    elif layout.offload_optimizer == "cpu":
        held += Moment(gradients=4 * share.owned)
    if is_away(layout.offload_parameters, device):
        held = replace(held, weights=held.weights - stored * -(-share.held // replicas))
    live = min(share.held, max(DEEPSPEED_LIVE_ELEMENTS, share.largest))
    gathered = held + Moment(buffers=stored * live)
    ahead = stored * min(share.held, max(DEEPSPEED_PREFETCH_ELEMENTS, share.largest))
    yield gathered + Moment(activations=passes.activations, buffers=ahead)
    yield from _passes(passes, gathered, held)
    yield held + Moment(buffers=stored * share.bucket)
    if layout.offload_optimizer == "none":
        yield held + Moment(buffers=4 * share.owned)


def is_away(offload: str, device: str) -> bool:
    """Return whether offloading frees memory of the device; offloading a CPU's data to the CPU does not."""
    return offload == "nvme" or (offload == "cpu" and device != "cpu")
