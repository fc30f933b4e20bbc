"""Time of one layer of a transformer, and of the steps before and after the layers, over one micro-batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmtrain.models.registry import family_of
from llmtrain.nn.layer_config import LayerConfig
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.config import AssumeConfig
from llmtrain.plan.times.attention import Call, attention_seconds
from llmtrain.plan.times.collectives import Group, Links, exchange_seconds, exposed, reduce_seconds
from llmtrain.plan.times.device import Device
from llmtrain.plan.times.products import layer_product_seconds

LOSS_BYTES = 20
"""Bytes that the loss reads and writes for each logit, both ways: the logits in two precisions, their softmax
and their gradient."""
KERNELS = {True: 14, False: 28}
"""Operations of a layer's forward pass that the host starts, fused or not; the backward pass has twice as
many."""


@dataclass
class Pass:
    """Seconds of one pass, by part: what it takes, and how much of that the device waits for."""

    busy: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, seconds: float, waited: float | None = None) -> None:
        """Add a part's time. waited: the share of it that adds to the step; None: all."""
        self.busy[part] = self.busy.get(part, 0.0) + seconds
        self.waited[part] = self.waited.get(part, 0.0) + (seconds if waited is None else waited)

    def include(self, other: Pass, factor: float = 1.0, under: str | None = None) -> None:
        """Add another pass `factor` times, under one name if that is given."""
        for part, seconds in other.busy.items():
            self.add(under or part, factor * seconds, factor * other.waited[part])

    def scale(self, part: str, factor: float) -> None:
        """Multiply the time of a part."""
        self.busy[part] *= factor
        self.waited[part] *= factor

    @property
    def seconds(self) -> float:
        return sum(self.waited.values())

    @property
    def computing(self) -> float:
        """Seconds in which the device computes: collectives may run beside it."""
        names = ("matrix products", "attention", "element operations", "recomputation", "embedding and head")
        return sum(self.waited.get(name, 0.0) for name in names)


@dataclass(frozen=True)
class Setting:
    """What determines the time of a layer besides the model."""

    device: Device
    links: Links
    layout: Layout
    row: Row
    assume: AssumeConfig
    kernel: str
    """Attention's kernel: flash, flash1, blockwise or all_scores."""
    residual_bytes: int
    """Bytes of a number between layers."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank of a sequence group."""
        return max(1, self.layout.micro_size * self.row.tokens // self.layout.sequence)

    @property
    def tensor_group(self) -> Group:
        return Group(self.layout.tensor, 1)

    @property
    def sequence_group(self) -> Group:
        return Group(self.layout.sequence, self.layout.tensor)

    @property
    def replicas(self) -> Group:
        """The ranks that hold the same weights, and share them under ZeRO."""
        return Group(self.layout.data * self.layout.sequence, self.layout.tensor)


def layer_passes(
    model: ModelConfig, setting: Setting, recompute: RecomputeConfig, trained: float = 1.0
) -> tuple[Pass, Pass, Pass]:
    """Return the forward pass of a layer, its backward pass without recomputation, and what recomputation
    computes again: all (arXiv:1604.06174), or with `selective` all but the matrix products
    (arXiv:2205.05198).

    trained: share of the layer's weights that trains.
    """
    config: Any = model
    blocks: LayerConfig = config.blocks
    forward, backward, again = Pass(), Pass(), Pass()
    last_product = _products(blocks, setting, forward, backward, trained)
    _attention(model, blocks, setting, forward, backward, again)
    _elements(blocks, setting, forward, backward, again)
    _collectives(blocks, setting, forward, backward)
    if recompute.mode != "selective":
        again = Pass()
        again.include(forward)
        is_whole = setting.assume.whole_recompute
        if not (setting.layout.pipeline > 1 if is_whole is None else is_whole):
            # torch stops once it has what the backward pass reads: the last product's output is not.
            again.add("matrix products", -last_product)
            if setting.layout.tensor > 1:
                again.scale("tensor parallelism", 0.5)
    efficiency = setting.device.efficiency
    kernels = KERNELS[setting.assume.fused]
    for of_pass, count in ((forward, kernels), (backward, 2 * kernels)):
        started = count * efficiency.kernel_seconds
        of_pass.add("starting operations", started, max(0.0, started - of_pass.computing))
        of_pass.add("other", efficiency.layer_seconds)
    return forward, backward, again


def _products(blocks: LayerConfig, setting: Setting, forward: Pass, backward: Pass, trained: float) -> float:
    """Time the layer's matrices, of which each rank of the tensor group holds a part. Return the forward time
    of the last."""
    D, tensor = blocks.hidden_size, setting.layout.tensor
    queries, F = blocks.num_heads * blocks.head_width, blocks.mlp_width
    shapes = [(blocks.qkv_width // tensor, D), (D, queries // tensor), (D, F // tensor)]
    shapes += [(F // tensor, D)] * (2 if blocks.gated_mlp else 1)
    shapes.append(shapes.pop(2))
    there = 0.0
    for columns, depth in shapes:
        there, back = layer_product_seconds(
            setting.device, setting.tokens, max(1, columns), max(1, depth), trained
        )
        forward.add("matrix products", there)
        backward.add("matrix products", back)
    return there


def _attention(
    model: ModelConfig, blocks: LayerConfig, setting: Setting, forward: Pass, backward: Pass, again: Pass
) -> None:
    """Time attention, with the mean of the keys that the layers see."""
    T, layout = setting.row.tokens, setting.layout
    call = Call(
        rows=layout.micro_size,
        queries=T,
        keys=mean_keys(model, blocks, T),
        heads=max(1, blocks.num_heads // (layout.tensor * layout.sequence)),
        head_width=blocks.head_width,
        dropout=blocks.dropout > 0,
        kernel=setting.kernel,
        causal=is_causal(model),
    )
    there, back = attention_seconds(setting.device, call)
    forward.add("attention", there)
    backward.add("attention", back)
    again.add("attention", there)


def is_causal(model: ModelConfig) -> bool:
    """Return whether a token sees only those before it."""
    return bool(getattr(family_of(model).memory, "causal", False))


def mean_keys(model: ModelConfig, blocks: LayerConfig, tokens: int) -> float:
    """Return the keys that a token of a row of `tokens` sees, on average over tokens and layers."""
    keys = 0.0
    windows = [blocks.sliding_window and blocks.window_of(layer) for layer in range(blocks.num_layers)]
    for window, layers in Counter(windows).items():
        seen = min(window or tokens, tokens)
        keys += layers * (seen - seen**2 / (2 * tokens) if is_causal(model) else seen)
    return keys / blocks.num_layers


def _elements(blocks: LayerConfig, setting: Setting, forward: Pass, backward: Pass, again: Pass) -> None:
    """Time what works on each element: norms, residuals, dropout, the activation, rotary positions; by the
    memory that they read and write (arXiv:2205.05198, section 4; Ivanov et al., arXiv:2007.00072)."""
    layout, residual, compute = setting.layout, setting.residual_bytes, setting.device.number_bytes
    D, F = blocks.hidden_size, blocks.mlp_width // layout.tensor
    between = D / (layout.tensor if layout.tensor_sequence else 1)
    heads = (blocks.num_heads + blocks.kv_heads) * blocks.head_width // layout.tensor
    size = between * blocks.norms_per_block * (residual + compute)
    size += between * 2 * (2 * residual + compute)  # two residual additions
    if blocks.dropout > 0:
        size += between * 2 * (2 * compute + 1)
    size += F * compute * (3 if blocks.gated_mlp else 2)
    size += heads * compute * (4 if blocks.positions == "rope" else 2)
    seconds = setting.device.traffic_seconds(size * setting.tokens)
    seconds *= 1.0 if setting.assume.fused else setting.device.efficiency.unfused
    forward.add("element operations", seconds)
    backward.add("element operations", 2 * seconds)
    again.add("element operations", seconds)


def _collectives(blocks: LayerConfig, setting: Setting, forward: Pass, backward: Pass) -> None:
    """Time the collectives of tensor parallelism (two all-reduces each way, or as many bytes of gathers and
    reduce-scatters: arXiv:1909.08053, 2205.05198) and the exchanges of sequence parallelism
    (arXiv:2309.14509)."""
    layout, compute = setting.layout, setting.device.number_bytes
    interference = setting.device.efficiency.interference
    for of_pass in (forward, backward):
        computing = of_pass.computing
        if layout.tensor > 1:
            size = setting.tokens * blocks.hidden_size * compute
            seconds = 2 * reduce_seconds(setting.links, setting.tensor_group, size)
            overlapped = setting.assume.overlap_tensor
            of_pass.add(
                "tensor parallelism",
                seconds,
                exposed(seconds, computing, interference) if overlapped else seconds,
            )
        if layout.sequence > 1:
            width = (blocks.qkv_width + blocks.num_heads * blocks.head_width) // layout.tensor
            size = setting.tokens * width * compute
            seconds = exchange_seconds(setting.links, setting.sequence_group, size)
            overlapped = setting.assume.overlap_tensor
            of_pass.add(
                "sequence parallelism",
                seconds,
                exposed(seconds, computing, interference) if overlapped else seconds,
            )


def embedding_passes(model: ModelConfig, setting: Setting) -> tuple[Pass, Pass]:
    """Return the passes of the embedding, which moves a row of its table for each token."""
    width = int(getattr(model, "hidden_size", 1))
    forward, backward = Pass(), Pass()
    seconds = setting.device.traffic_seconds(
        setting.tokens * width * (setting.device.number_bytes + setting.residual_bytes)
    )
    if setting.layout.tensor > 1:
        size = setting.tokens * width * setting.device.number_bytes
        forward.add("tensor parallelism", reduce_seconds(setting.links, setting.tensor_group, size))
    forward.add("embedding and head", seconds)
    backward.add("embedding and head", 2 * seconds)
    return forward, backward


def head_passes(
    model: ModelConfig, setting: Setting, trained: float = 1.0, *, passes_on: bool = True
) -> tuple[Pass, Pass]:
    """Return the passes of the output layer and its loss.

    trained: share of its weights that trains.
    passes_on: whether something before it trains.
    """
    matrices = getattr(model, "head_matrix_count", None)
    forward, backward = Pass(), Pass()
    if matrices is None:
        return forward, backward
    width, device = int(getattr(model, "output_width", 1)), setting.device
    columns = max(1, matrices(setting.layout.tensor) // width)
    predicts_all = getattr(model, "task", None) is None and not setting.row.predicted
    share = 1.0 if predicts_all else min(1.0, setting.row.predicted / setting.row.tokens)
    tokens = max(1, round(setting.tokens * share))
    there, back = layer_product_seconds(device, tokens, columns, width, trained, passes_on=passes_on)
    loss = device.traffic_seconds(tokens * columns * LOSS_BYTES / 2)
    forward.add("embedding and head", there + loss)
    backward.add("embedding and head", back + loss)
    if setting.layout.tensor > 1:
        size = tokens * width * device.number_bytes
        backward.add("tensor parallelism", reduce_seconds(setting.links, setting.tensor_group, size))
    return forward, backward


def single_passes(model: ModelConfig, setting: Setting, trained: float = 1.0) -> tuple[Pass, Pass]:
    """Return the passes of a model that is not a stack of layers: its FLOPs, at half the rate of large
    matrix products, and its weights' traffic. trained: share of its weights that trains."""
    device, rows = setting.device, setting.layout.micro_size
    units = rows * setting.row.tokens
    flops = model.flops_per_token(setting.row) * units / 3
    rate = device.peak * device.efficiency.matrix / 2
    moved = device.traffic_seconds(model.parameter_count() * device.number_bytes)
    forward, backward = Pass(), Pass()
    forward.add("matrix products", max(flops / rate, moved))
    backward.add("matrix products", (1 + trained) * max(flops / rate, moved))
    return forward, backward
