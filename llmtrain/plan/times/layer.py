"""Time of one layer of a transformer, and of the steps before and after the layers, over one micro-batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmtrain.models.registry import family_of
from llmtrain.nn.layer_config import LayerConfig
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.config import AssumeConfig
from llmtrain.plan.times.attention import MASK_BYTES, Call, attention_seconds
from llmtrain.plan.times.collectives import (
    Along,
    Group,
    Links,
    exchange_seconds,
    exposed,
    gather_seconds,
    reduce_seconds,
)
from llmtrain.plan.times.device import Device
from llmtrain.plan.times.products import layer_product_seconds

LOSS_BYTES = 20
"""Bytes that the loss reads and writes for each logit, both ways: the logits in two precisions, their softmax
and their gradient."""
SOFTMAX_SUMS = 3
"""fp32 numbers of each token that ranks which divide the vocabulary add up: the largest logit, the label's,
and the sum of exponentials."""
KERNELS = {True: 14, False: 28}
"""Operations of a layer's forward pass that the host starts, fused or not; the backward pass has twice as
many."""


@dataclass
class Pass:
    """Seconds of one pass, by part: how long each part takes, and how much of that the device waits for."""

    busy: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    sent: dict[Along, float] = field(default_factory=dict)
    """Axis → bytes that a rank sends along it."""

    def add(self, part: str, seconds: float, waited: float | None = None) -> None:
        """Add a part's time. waited: the share of it that adds to the step; None: all."""
        self.busy[part] = self.busy.get(part, 0.0) + seconds
        self.waited[part] = self.waited.get(part, 0.0) + (seconds if waited is None else waited)

    def send(self, along: Along, size: float) -> None:
        """Add bytes that a rank sends."""
        self.sent[along] = self.sent.get(along, 0.0) + size

    def include(self, other: Pass, factor: float = 1.0, under: str | None = None) -> None:
        """Add another pass `factor` times, under one name if that is given."""
        for part, seconds in other.busy.items():
            self.add(under or part, factor * seconds, factor * other.waited[part])
        for along, size in other.sent.items():
            self.send(along, factor * size)

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
    """What determines the time of a layer in addition to the model."""

    device: Device
    links: Links
    layout: Layout
    row: Row
    assume: AssumeConfig
    kernel: str
    """Attention's kernel: flash, flash1, blockwise or all_scores."""
    residual_bytes: int
    """Bytes of a number between layers."""
    keyed_masks: bool = False
    """Whether dropout's masks are made of keys."""

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
    computes again: all (arXiv:1604.06174), or with `selective` all but the matrix products and the
    collectives of tensor parallelism (arXiv:2205.05198).

    trained: share of the layer's weights that trains.
    """
    blocks = model.blocks
    assert blocks is not None
    forward, backward, again = Pass(), Pass(), Pass()
    last_product = _products(blocks, setting, forward, backward, trained)
    _attention(model, blocks, setting, forward, backward, again)
    _elements(blocks, setting, forward, backward, again)
    _collectives(blocks, setting, forward, backward)
    if setting.layout.tensor > 1 and setting.layout.tensor_sequence:
        _sum_shared(blocks, setting, backward)
    if recompute.mode != "selective":
        again = Pass()
        again.include(forward)
        if not setting.assume.whole_recompute:
            # torch stops once it has what the backward pass reads: the last product's output is not.
            again.add("matrix products", -last_product)
            _enter_and_leave(blocks, setting, again, leaves=-1, enters=0)
    else:
        _exchange(blocks, setting, again)
    efficiency = setting.device.efficiency
    kernels = KERNELS[setting.assume.fused]
    for of_pass, count in ((forward, kernels), (backward, 2 * kernels)):
        started = count * efficiency.kernel_seconds
        # A GPU computes while the host starts the next operations; a processor does one after the other.
        hidden = of_pass.computing if setting.device.multiprocessors is not None else 0.0
        of_pass.add("starting operations", started, max(0.0, started - hidden))
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
        fused=setting.assume.fused,
        keyed_masks=setting.keyed_masks,
    )
    there, back = attention_seconds(setting.device, call)
    forward.add("attention", there)
    backward.add("attention", back)
    again.add("attention", there)


def is_causal(model: ModelConfig) -> bool:
    """Return whether a token sees only those before it."""
    memory = family_of(model).memory
    return memory is not None and memory.causal


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
    size += F * (2 * setting.device.function_bytes + (compute if blocks.gated_mlp else 0))
    size += heads * compute * (4 if blocks.positions == "rope" else 2)
    seconds = setting.device.traffic_seconds(size * setting.tokens)
    seconds *= 1.0 if setting.assume.fused else setting.device.efficiency.unfused
    if residual > compute and not setting.assume.fused:
        # Autocast: weights and what norms give are converted for products, and gradients back.
        cast = blocks.layer_matrix_count(layout.tensor) + setting.tokens * between * blocks.norms_per_block
        seconds += setting.device.traffic_seconds(cast * (residual + compute))
    forward.add("element operations", seconds)
    backward.add("element operations", 2 * seconds)
    if blocks.dropout > 0 and setting.keyed_masks:
        masks = setting.device.traffic_seconds(2 * between * setting.tokens * MASK_BYTES)
        forward.add("element operations", masks)
        seconds += masks
    again.add("element operations", seconds)


def _sum_shared(blocks: LayerConfig, setting: Setting, backward: Pass) -> None:
    """Add the sums, over the tensor group, of the gradients of norms and biases that each rank has for its
    tokens alone."""
    group = setting.tensor_group
    held = blocks.layer_parameter_count(group.size)
    whole = (group.size * held - blocks.layer_parameter_count()) / (group.size - 1)
    size = whole * setting.device.number_bytes
    backward.add("tensor parallelism", reduce_seconds(setting.links, group, size))
    backward.send("tensor", 2 * group.passed(size))


def _collectives(blocks: LayerConfig, setting: Setting, forward: Pass, backward: Pass) -> None:
    """Time the collectives of tensor parallelism, and the exchanges of sequence parallelism
    (arXiv:2309.14509).

    The former are an all-reduce of each output, and backward of the gradient of each input
    (arXiv:1909.08053); or gathers of inputs and reduce-scatters of outputs, and the reverse backward
    (arXiv:2205.05198).
    """
    _enter_and_leave(blocks, setting, forward, leaves=2, enters=2)
    _enter_and_leave(blocks, setting, backward, leaves=2, enters=2, is_backward=True)
    _exchange(blocks, setting, forward)
    _exchange(blocks, setting, backward)


def _exchange(blocks: LayerConfig, setting: Setting, of_pass: Pass) -> None:
    """Add the all-to-alls of sequence parallelism before and after attention."""
    if setting.layout.sequence == 1:
        return
    width = (blocks.qkv_width + blocks.num_heads * blocks.head_width) // setting.layout.tensor
    size = setting.tokens * width * setting.device.number_bytes
    seconds = exchange_seconds(setting.links, setting.sequence_group, size)
    of_pass.add("sequence parallelism", seconds, _waited(setting, of_pass, seconds))
    of_pass.send("sequence", setting.sequence_group.passed(size))


def _enter_and_leave(
    blocks: LayerConfig,
    setting: Setting,
    of_pass: Pass,
    *,
    leaves: int,
    enters: int,
    is_backward: bool = False,
) -> None:
    """Add the collectives of so many inputs and outputs of divided matrices. An all-reduce counts as a
    reduce-scatter and a gather: without shared tokens outputs have one, and backward the gradients of
    inputs."""
    if setting.layout.tensor == 1:
        return
    of_one_way = enters if is_backward else leaves
    halves = leaves + enters if setting.layout.tensor_sequence else 2 * of_one_way
    size = setting.tokens * blocks.hidden_size * setting.device.number_bytes
    seconds = halves * gather_seconds(setting.links, setting.tensor_group, size)
    of_pass.add("tensor parallelism", seconds, _waited(setting, of_pass, seconds))
    of_pass.send("tensor", halves * setting.tensor_group.passed(size))


def _waited(setting: Setting, of_pass: Pass, seconds: float) -> float:
    """Return how much longer a pass is for collectives that stand between its products, or run beside."""
    if not setting.assume.overlap_tensor:
        return seconds
    return exposed(seconds, of_pass.computing, setting.device.efficiency.interference)


def embedding_passes(model: ModelConfig, setting: Setting) -> tuple[Pass, Pass]:
    """Return the passes of the embedding, which moves a row of its table for each token."""
    width = model.state_width
    forward, backward = Pass(), Pass()
    seconds = setting.device.traffic_seconds(
        setting.tokens * width * (setting.device.number_bytes + setting.residual_bytes)
    )
    if setting.layout.tensor > 1:
        size, group = setting.tokens * width * setting.device.number_bytes, setting.tensor_group
        forward.add("tensor parallelism", reduce_seconds(setting.links, group, size))
        forward.send("tensor", 2 * group.passed(size))
        if setting.layout.tensor_sequence:  # the gradients of all tokens are gathered
            backward.add("tensor parallelism", gather_seconds(setting.links, group, size))
            backward.send("tensor", group.passed(size))
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
    forward, backward = Pass(), Pass()
    matrices = model.head_matrix_count(setting.layout.tensor)
    if not matrices:
        return forward, backward
    width, device = model.output_width, setting.device
    columns = max(1, matrices // width)
    predicts_all = model.task is None and not setting.row.predicted
    share = 1.0 if predicts_all else min(1.0, setting.row.predicted / setting.row.tokens)
    tokens = max(1, round(setting.tokens * share))
    there, back = layer_product_seconds(device, tokens, columns, width, trained, passes_on=passes_on)
    loss = device.traffic_seconds(tokens * columns * LOSS_BYTES / 2)
    forward.add("embedding and head", there + loss)
    backward.add("embedding and head", back + loss)
    if setting.layout.tensor > 1:
        size, group = tokens * width * device.number_bytes, setting.tensor_group
        of_softmax = SOFTMAX_SUMS * 4 * tokens
        forward.add("tensor parallelism", reduce_seconds(setting.links, group, of_softmax))
        forward.send("tensor", 2 * group.passed(of_softmax))
        backward.add("tensor parallelism", reduce_seconds(setting.links, group, size))
        backward.send("tensor", 2 * group.passed(size))
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
