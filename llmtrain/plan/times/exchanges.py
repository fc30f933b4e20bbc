"""What ranks that hold the same weights, and pipeline stages, exchange for a micro-batch: gathers of weights,
sums of gradients, and hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llmtrain.nn.model_config import ModelConfig
from llmtrain.plan.times.collectives import Group, exposed, gather_seconds, reduce_seconds, send_seconds
from llmtrain.plan.times.layer import Pass, Setting

REUSED_WITHIN = 1_000_000_000
"""If fewer weights than this are used before a weight is used again, DeepSpeed's ZeRO 3 does not release it
(`stage3_max_reuse_distance`, which llmtrain leaves as it is)."""


def gather_weights(
    setting: Setting,
    forward: Pass,
    backward: Pass,
    parameters: int,
    trained: float,
    stays: bool = False,
) -> None:
    """Add what ZeRO 3 gathers before both passes of a step of the model, and what ZeRO 2 and 3 reduce, of the
    share that trains, after the backward pass; the layers before and after are computed meanwhile
    (arXiv:1910.02054, 2304.11277). ZeRO++ (arXiv:2306.10209) sends numbers of fewer bits, and gathers within
    a host before the backward pass.

    stays: whether the weights stay gathered between the passes."""
    layout, device = setting.layout, setting.device
    if layout.zero < 2 or setting.replicas.size == 1:
        return
    links, replicas = setting.links, setting.replicas
    number = setting.assume.gradient_bytes or device.number_bytes
    size = parameters * (1 if layout.quantized_weights else device.number_bytes)
    gathered = gather_seconds(links, replicas, size)
    near = Group(layout.hierarchical_partition, replicas.stride)
    again = 0.0 if stays else size
    gathered_back = gather_seconds(links, replicas if near.size == 1 else near, again)
    of_gradient = 0.5 if layout.quantized_gradients else number
    gradients = trained * parameters * of_gradient
    reduced = gather_seconds(links, replicas, gradients)
    interference = device.efficiency.interference
    there, back = forward.computing, backward.computing
    if layout.zero == 3:
        forward.add("weight gathers", gathered, exposed(gathered, there, interference))
        forward.send("weights", replicas.passed(size))
        both = max(1e-12, gathered_back + reduced)
        waited = exposed(both, back, interference)
        backward.add("weight gathers", gathered_back, waited * gathered_back / both)
        backward.send("weights", (replicas if near.size == 1 else near).passed(again))
        backward.add("gradient reduction", reduced, waited * reduced / both)
        backward.send("gradients", replicas.passed(gradients))
    else:
        whole = not setting.assume.scatter_gradients
        reduced *= 2 if whole else 1
        backward.add("gradient reduction", reduced, exposed(reduced, back, interference))
        backward.send("gradients", (2 if whole else 1) * replicas.passed(gradients))


def stays_gathered(counts: Sequence[int], setting: Setting) -> list[bool]:
    """Return of each step whether ZeRO 3 keeps its weights gathered from the forward to the backward pass, as
    DeepSpeed does where fewer weights than REUSED_WITHIN are used in between."""
    if setting.assume.regather or setting.layout.zero < 3:
        return [False] * len(counts)
    after = itertools.accumulate(reversed(counts))
    return [weights < REUSED_WITHIN for weights in after][::-1]


def hidden_bytes(model: ModelConfig, setting: Setting) -> float:
    """Return the bytes of one micro-batch's hidden states."""
    return float(setting.tokens * model.state_width * setting.device.number_bytes)


def transfer_seconds(model: ModelConfig, setting: Setting) -> float:
    """Return the time to hand one micro-batch's hidden states on to the next stage: the ranks of a tensor
    group send a part each, and gather the whole if they do not share the tokens (arXiv:2104.04473, section
    4.1); DeepSpeed gathers a stage's own output once more before its backward pass."""
    layout = setting.layout
    if layout.pipeline == 1:
        return 0.0
    size = hidden_bytes(model, setting)
    stride = layout.data * layout.sequence * layout.tensor
    seconds = send_seconds(setting.links, stride, size / layout.tensor)
    if not layout.tensor_sequence:
        seconds += 1.5 * gather_seconds(setting.links, setting.tensor_group, size)
    return seconds


def reduce_shared(step: Pass, model: ModelConfig, setting: Setting) -> None:
    """Add the sum of the gradients of a weight that the first and the last stage share."""
    layout = setting.layout
    steps = range(len(model.step_parameter_counts(layout.tensor)))
    size = 4.0 * model.repeated_count(steps, layout.tensor)  # stages add up their gradients in fp32
    group = Group(2, (layout.pipeline - 1) * setting.replicas.size * setting.replicas.stride)
    step.add("gradient reduction", reduce_seconds(setting.links, group, size))
    step.send("pipeline", 2 * group.passed(size))
