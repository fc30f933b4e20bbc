"""The time of a plan's step: the inputs of the time model of `times/`, and what a run does beyond
computing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtrain.nn.memory import Numbers
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.memory import model_memory, optimizer_slots, weight_bytes
from llmtrain.plan.times.collectives import Along, links_of
from llmtrain.plan.times.device import device_of
from llmtrain.plan.times.layer import Setting
from llmtrain.plan.times.step import Host, StepTime, sent_bytes, step_time

if TYPE_CHECKING:
    from llmtrain.plan.estimate import Plan

FLASH = ("by_document", "torch")
"""Kernels of llmtrain that are flash attention."""
TOKEN_BYTES = 4
"""Bytes of a token in a corpus."""


def step_time_of(
    plan: Plan, layout: Layout, recompute: RecomputeConfig, *, is_exact: bool = True
) -> StepTime | None:
    """Return the time of a plan's step in some layout; None if the cluster lacks the figures for it.

    is_exact: simulate the pipeline's schedule rather than estimate its length.
    """
    cluster, setting = plan.cluster, _setting(plan, layout)
    if setting is None:
        return None
    per_node = cluster.devices_per_node or layout.world_size
    link = cluster.host_bandwidth or cluster.memory_bandwidth or float("inf")
    host = Host(link, (cluster.host_memory_bandwidth or link * per_node) / per_node)
    slots = optimizer_slots(plan.optimizer) + plan.weight_copies
    step = step_time(plan.model, setting, recompute, slots, host, trainable=plan.trainable, is_exact=is_exact)
    return _with_storage(plan, layout, step, slots, link)


def sent_bytes_of(plan: Plan, stage: int, micro_batches: int) -> Mapping[Along, float] | None:
    """Return what a rank of a stage sends in a step of so many micro-batches, in bytes along each axis; None
    if the cluster lacks the figures for its precision."""
    setting = _setting(plan, plan.layout)
    if setting is None:
        return None
    return sent_bytes(plan.model, setting, plan.conditions.recompute, stage, micro_batches, plan.trainable)


def _setting(plan: Plan, layout: Layout) -> Setting | None:
    """Return what the times of a plan depend on; None if the cluster lacks the figures for its precision."""
    cluster = plan.cluster
    device = device_of(cluster, plan.precision)
    if device is None:
        return None
    residual = 2 if plan.assume.fused and plan.precision != "fp32" else weight_bytes(plan.precision, layout)
    return Setting(
        device=device,
        links=links_of(cluster, layout.world_size),
        layout=layout,
        row=plan.row,
        assume=plan.assume,
        kernel=_kernel(plan, layout, residual),
        residual_bytes=residual,
        keyed_masks=plan.conditions.exact_dropout,
    )


def _kernel(plan: Plan, layout: Layout, residual: int) -> str:
    """Return attention's kernel as the time model names it."""
    if plan.assume.attention != "auto":
        return plan.assume.attention
    numbers = Numbers(4 if plan.precision == "fp32" else 2, residual)
    memory = model_memory(plan.model, plan.row, numbers, layout, plan.conditions)
    kernel = None if memory is None else memory.attention_kernel()
    if kernel is None:
        return "all_scores"
    return "flash" if kernel in FLASH else str(kernel)


def _with_storage(plan: Plan, layout: Layout, step: StepTime, slots: int, link: float) -> StepTime:
    """Return the time with the share of the input stream, which is read beside the computation, and of
    checkpoints: a copy to the host's memory, and what of the writing the steps between do not hide."""
    bandwidth = plan.cluster.storage_bandwidth
    if bandwidth is None:
        return step
    per_node = plan.cluster.devices_per_node or layout.world_size
    hosts = max(1, layout.world_size // per_node)
    busy, parts, seconds = dict(step.busy), dict(step.parts), step.seconds
    read = layout.tokens_per_step * TOKEN_BYTES / hosts / bandwidth
    busy["input"], parts["input"] = read, max(0.0, read - seconds)
    if plan.checkpoint_every is not None:
        trainable, weights = plan.trainable, plan.parameters
        trained = weights if trainable is None else trainable.parameters
        if trainable is not None and trainable.added:
            weights = trained  # the base of an adaptation has the others
        size = 4.0 * (weights + slots * trained)
        written = size / hosts / bandwidth
        every = plan.checkpoint_every
        waited = written
        if plan.asynchronous_checkpoints:
            waited = size / layout.world_size / link + max(0.0, written - every * seconds)
        busy["checkpoint"], parts["checkpoint"] = written / every, waited / every
    return StepTime(busy, parts)
