"""Time of one optimizer step, part by part: how long each part takes, and how much of it the step waits for.

Layers, head and collectives of a micro-batch (`layer.py`) pass through the pipeline's schedule
(`pipeline.py`); once a step come the reduction of gradients, the optimizer, and what ZeRO gathers
(arXiv:1910.02054) and offloads (arXiv:2101.06840).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.memory import Trainable, held_parameter_count, stage_steps
from llmtrain.plan.times.collectives import Along, exposed, gather_seconds, reduce_seconds
from llmtrain.plan.times.exchanges import (
    gather_weights,
    hidden_bytes,
    reduce_shared,
    stays_gathered,
    transfer_seconds,
)
from llmtrain.plan.times.layer import (
    Pass,
    Setting,
    embedding_passes,
    head_passes,
    layer_passes,
    mean_keys,
    single_passes,
)
from llmtrain.plan.times.pipeline import estimated_seconds, simulated_seconds

OPTIMIZER_BYTES = 12
"""Bytes of each weight's gradient that clipping and the optimizer read, and of zeroing it."""
SLOT_BYTES = 8
"""Bytes read and written of each fp32 number of the optimizer's state, and of the fp32 weight."""
SIMULATED_WORK = 400_000
"""Passes of a schedule that are simulated; longer ones are estimated."""

Schedule = Callable[[Sequence[float], Sequence[float], int, float, int], float]


@dataclass(frozen=True)
class Host:
    """What a step needs of the host's links, in bytes per second."""

    link: float
    """Between a device and its host's memory."""
    memory: float
    """Of the host's memory, for each of its devices."""


@dataclass(frozen=True)
class Stage:
    """One micro-batch's passes in one stage."""

    forward: Pass
    backward: Pass


@dataclass(frozen=True)
class StepTime:
    """The time of one optimizer step."""

    busy: dict[str, float]
    """Part → seconds that it takes on the slowest stage, whatever runs beside it."""
    parts: dict[str, float]
    """Part → seconds that the step is longer for it; they sum up to the step."""

    @cached_property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(
    model: ModelConfig,
    setting: Setting,
    recompute: RecomputeConfig,
    slots: int,
    host: Host,
    *,
    trainable: Trainable | None = None,
    is_exact: bool = True,
) -> StepTime:
    """Return the time of one step.

    slots: numbers of the optimizer's state for each weight that trains.
    trainable: what trains; None: all.
    is_exact: simulate the pipeline's schedule rather than estimate its length.
    """
    layout, assume = setting.layout, setting.assume
    runs = _runs(model, setting)
    stages = stage_passes(model, setting, recompute, runs, trainable)
    transfer = transfer_seconds(model, setting)
    chunks = assume.virtual_stages if layout.pipeline > 1 else 1
    forward = [stage.forward.seconds for stage in stages]
    backward = [stage.backward.seconds for stage in stages]
    slowest = max(range(len(stages)), key=lambda stage: forward[stage] + backward[stage])
    step = Pass()
    for of_pass in (stages[slowest].forward, stages[slowest].backward):
        step.include(of_pass, layout.accumulation)
    if layout.pipeline > 1:
        waits = 0.0 if assume.overlap_transfers else transfer * chunks
        step.add(
            "pipeline transfers", 2 * transfer * chunks * layout.accumulation, 2 * waits * layout.accumulation
        )
        work = 2 * layout.pipeline * layout.accumulation * chunks
        run: Schedule = simulated_seconds if is_exact and work <= SIMULATED_WORK else estimated_seconds
        total = run(
            [seconds + waits for seconds in forward],
            [seconds + waits for seconds in backward],
            layout.accumulation,
            transfer,
            chunks,
        )
        step.add("pipeline bubble", max(0.0, total - step.seconds))
    parameters = max(held_parameter_count(model, layout, run_of_steps) for run_of_steps in runs)
    trained = max(_trained(model, layout, run_of_steps, trainable) for run_of_steps in runs)
    if layout.pipeline > 1:
        reduce_shared(step, model, setting)
    _once_a_step(step, setting, stages[slowest], parameters, trained, slots, host)
    step.add("other", setting.device.efficiency.step_seconds)
    return StepTime(step.busy, step.waited)


def sent_bytes(
    model: ModelConfig,
    setting: Setting,
    recompute: RecomputeConfig,
    stage: int,
    micro_batches: int,
    trainable: Trainable | None = None,
) -> Mapping[Along, float]:
    """Return what a rank of a pipeline stage sends in a step of so many micro-batches, in bytes along each
    axis: what the times of collectives are of."""
    layout = setting.layout
    runs = _runs(model, setting)
    passes = stage_passes(model, setting, recompute, runs, trainable)[stage]
    step = Pass()
    for of_pass in (passes.forward, passes.backward):
        step.include(of_pass, micro_batches)
    if layout.pipeline > 1:
        neighbours = (stage > 0) + (stage < layout.pipeline - 1)
        if setting.assume.virtual_stages > 1:
            neighbours = 2
        handed_on = neighbours * micro_batches * setting.assume.virtual_stages * hidden_bytes(model, setting)
        step.send("pipeline", handed_on / layout.tensor)
        if not layout.tensor_sequence:
            handed_on *= 1 + (stage < layout.pipeline - 1) / neighbours  # its own output a second time
            step.send("tensor", setting.tensor_group.passed(handed_on))
        if stage in (0, layout.pipeline - 1):
            reduce_shared(step, model, setting)
    parameters = held_parameter_count(model, layout, runs[stage])
    trained = _trained(model, layout, runs[stage], trainable)
    _once_a_step(step, setting, passes, parameters, trained, 0, Host(math.inf, math.inf))
    return step.sent


def _runs(model: ModelConfig, setting: Setting) -> list[range]:
    """Return the steps of the forward pass that each stage runs."""
    layout = setting.layout
    return even_runs(model, layout) if setting.assume.even_layers else stage_steps(model, layout)


def _trained(model: ModelConfig, layout: Layout, steps: range, trainable: Trainable | None) -> int:
    """Return the parameters that train of those that a process holds which runs `steps`."""
    if trainable is None:
        return held_parameter_count(model, layout, steps)
    return trainable.count(model, layout, steps)


def even_runs(model: ModelConfig, layout: Layout) -> list[range]:
    """Return the steps of each stage where all have as many layers, but for the first ones, which have the
    remainder."""
    steps = len(model.step_parameter_counts(layout.tensor))
    each, more = divmod(steps - 2, layout.pipeline)
    bounds = [1 + stage * each + min(stage, more) for stage in range(layout.pipeline + 1)]
    bounds[0], bounds[-1] = 0, steps
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def stage_passes(
    model: ModelConfig,
    setting: Setting,
    recompute: RecomputeConfig,
    runs: Sequence[range],
    trainable: Trainable | None = None,
) -> list[Stage]:
    """Return the passes of each stage of the pipeline, with what ZeRO gathers around them.

    Without a pipeline the backward pass ends at the lowest step that trains; a stage of a pipeline sends
    gradients to the one before it. Weights that do not train have no gradients.
    """
    layout, blocks = setting.layout, model.blocks
    if blocks is None:
        parameters, share = model.parameter_count(), 1.0
        if trainable is not None:
            share = min(1.0, trainable.parameters / parameters)
        forward, backward = single_passes(model, setting, share)
        gather_weights(
            setting, forward, backward, parameters, share, stays_gathered([parameters], setting)[0]
        )
        part, part_back = Pass(), Pass()
        part.include(forward, 1 / (len(runs) * layout.tensor))
        part_back.include(backward, 1 / (len(runs) * layout.tensor))
        return [Stage(part, part_back)] * len(runs)
    counts = model.step_parameter_counts(layout.tensor)
    steps = len(counts)
    shares = (1.0,) * steps if trainable is None else trainable.shares
    kept = range(steps)
    if trainable is not None and layout.pipeline == 1:
        kept = trainable.kept(kept)
    weight = _correction(model, setting, steps - 2)
    kinds: dict[tuple[bool, float, bool], tuple[Pass, Pass]] = {}
    first, last = (min(1.0, shares[step]) for step in (0, -1))
    ends = {
        0: embedding_passes(model, setting),
        steps - 1: head_passes(model, setting, last, passes_on=kept.start < steps - 1),
    }
    stays = stays_gathered(counts, setting)
    gather_weights(setting, *ends[0], counts[0], first, stays[0])
    # A weight that the head shares with the embedding is reduced once, and gathered for both if too much lies
    # between.
    shared = model.repeated_count(range(steps), layout.tensor)
    head = counts[-1] - (shared if stays[0] else 0)
    gather_weights(setting, *ends[steps - 1], head, last * (counts[-1] - shared) / max(1, head), stays[-1])
    stages = []
    for run in runs:
        forward, backward = Pass(), Pass()
        layers = [step for step in run if 0 < step < steps - 1]
        found = [
            ((recompute.covers(step - 1), min(1.0, shares[step]), stays[step]), step in kept)
            for step in layers
        ]
        for (kind, runs_back), number in Counter(found).items():
            if kind not in kinds:
                kinds[kind] = _kind(model, setting, recompute, *kind)
            layer, layer_back = kinds[kind]
            forward.include(layer, weight * number)
            if runs_back:
                backward.include(layer_back, weight * number)
        for step in {run.start, run.stop - 1} & ends.keys():
            there, back = ends[step]
            forward.include(there)
            if step > 0 or shares[0] > 0:
                backward.include(back)
        stages.append(Stage(forward, backward))
    return stages


def _kind(
    model: ModelConfig,
    setting: Setting,
    recompute: RecomputeConfig,
    is_recomputed: bool,
    share: float,
    stays: bool,
) -> tuple[Pass, Pass]:
    """Return both passes of a layer of whose weights a share trains. stays: whether its weights stay gathered
    between them."""
    forward, backward, again = layer_passes(model, setting, recompute, share)
    if is_recomputed:
        backward.include(again, under="recomputation")
    assert model.blocks is not None
    parameters = model.blocks.layer_parameter_count(setting.layout.tensor)
    gather_weights(setting, forward, backward, parameters, share, stays)
    return forward, backward


def _correction(model: ModelConfig, setting: Setting, layers: int) -> float:
    """Return the work of the model's layers as a multiple of that of plain ones: 1 for a decoder; layers with
    attention
    to a source, or of two streams, do more."""
    config: Any = model
    row, blocks = setting.row, model.blocks
    assert blocks is not None
    plain = 6.0 * blocks.layer_matrix_count()
    plain += 12.0 * blocks.num_heads * blocks.head_width * mean_keys(model, blocks, row.tokens)
    share = min(1.0, row.predicted / row.tokens) if row.predicted else 1.0
    head = 6.0 * share * config.head_matrix_count()
    return max(0.1, (model.flops_per_token(row) - head) / (plain * layers))


def _once_a_step(
    step: Pass, setting: Setting, stage: Stage, parameters: int, trained: int, slots: int, host: Host
) -> None:
    """Add the reduction of gradients, the optimizer and the gathers after it, of the fullest stage, which
    holds so many parameters, and trains so many."""
    layout, device, replicas = setting.layout, setting.device, setting.replicas
    overlaps = setting.assume.overlap_gradients
    if overlaps is None:
        overlaps = layout.pipeline == 1
    number = device.number_bytes
    if replicas.size > 1 and layout.zero < 2:
        size = trained * (setting.assume.gradient_bytes or (4 if layout.zero == 0 else number))
        # DeepSpeed reduces whole gradients on all ranks, which then take their shares.
        is_whole = layout.zero == 0 or not setting.assume.scatter_gradients
        reduce = reduce_seconds if is_whole else gather_seconds
        seconds = reduce(setting.links, replicas, size)
        step.send("gradients", (2 if is_whole else 1) * replicas.passed(size))
        beside = stage.backward.seconds if overlaps else 0.0
        step.add("gradient reduction", seconds, exposed(seconds, beside, device.efficiency.interference))
    owners = replicas.size if layout.zero > 0 else 1
    owned = trained / owners
    if layout.offload_optimizer != "none":
        moved = owned * (4 + number) / host.link
        computed = owned * (OPTIMIZER_BYTES + SLOT_BYTES * (1 + slots)) / host.memory
        step.add("offload", moved)
        step.add("optimizer", computed)
    else:
        touched = owned * (OPTIMIZER_BYTES + SLOT_BYTES * (1 + slots))
        step.add("optimizer", device.traffic_seconds(touched))
    if layout.offload_parameters != "none":
        passes = 2 * layout.accumulation
        moved = parameters / owners * number / host.link * passes
        step.add("offload", moved, exposed(moved, step.computing, device.efficiency.interference))
    if layout.zero in (1, 2) and replicas.size > 1:
        seconds = gather_seconds(setting.links, replicas, trained * number)
        step.send("weights", replicas.passed(trained * number))
        beside = stage.forward.seconds if setting.assume.overlap_gradients else 0.0
        step.add("weight gathers", seconds, exposed(seconds, beside, device.efficiency.interference))
