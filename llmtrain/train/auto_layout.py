"""`parallel=auto`: the layout that the planner finds fastest, before a run starts. Free of torch."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan import machine
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.estimate import Plan, available_bytes, estimate
from llmtrain.plan.memory import Trainable
from llmtrain.plan.search import search
from llmtrain.plan.space import Choice, Space
from llmtrain.train.config import TrainConfig

ORDINARY_PEAKS = {"fp32": 1e11, "bf16": 2e11, "fp16": 1e11}
"""Peaks assumed for a processor that was not measured: like the other figures of `_ordinary`, they serve to
rank layouts, not to predict times."""


def space_of(
    plan: Plan, config: TrainConfig, engine: str = "auto", *, on_this_machine: bool = False
) -> Space:
    """Return the legal layouts of a run. engine: the one that the user named."""
    optimizer = config.optimizer
    return Space(
        plan,
        config.batch,
        optimizer.max_grad_norm,
        config.exact_dropout,
        optimizer.implementation,
        engine,
        on_this_machine,
    )


def fastest_choice(
    config: TrainConfig, trainable: Trainable | None, world_size: int, *, on_this_machine: bool
) -> Choice:
    """Return the fastest layout of a run, with its micro-batch and recomputation. The model's sizes must be
    known.

    Raise ConfigError when no layout fits, for a GPU of unknown kind, and for keys that contradict the
    choice.
    """
    _refuse_axes(config.parallel)
    cluster, device = config.cluster, config.cluster.device or launcher.likely_device(config.device)
    if cluster.memory_bandwidth is None or config.precision not in cluster.peak_flops:
        cluster = _ordinary(cluster, device, world_size)
    plan = estimate(config.model, single_layout(config), replace(config, cluster=cluster), trainable)
    plan = replace(plan, available_bytes=available_bytes(config.cluster, device, world_size))
    space = space_of(plan, config, config.engine, on_this_machine=on_this_machine)
    return search(space, world_size, "time", 1).best[0].choice


def _refuse_axes(parallel: ParallelConfig) -> None:
    """Raise ConfigError for layout settings that a user gives beside `parallel=auto`."""
    usual = ParallelConfig()
    names = [name for name in usual.__dataclass_fields__ if name not in ("auto", "elastic")]
    given = [name for name in names if getattr(parallel, name) != getattr(usual, name)]
    if given:
        name = given[0]
        got = f"{getattr(parallel, name)} with parallel=auto"
        allowed = f"{getattr(usual, name)}: the planner chooses it".replace("None", "null")
        remedy = f"leave {', '.join(f'parallel.{each}' for each in given)} out, or parallel=auto"
        raise ConfigError(Problem(f"parallel.{name}", got, allowed, remedy))


def choice_of(config: TrainConfig, layout: Layout) -> Choice:
    """Return the run's value of each setting that a search chooses."""
    return Choice(config.parallel, config.batch, config.recompute, layout)


def with_choice(config: TrainConfig, choice: Choice) -> TrainConfig:
    """Return the configuration with the layout that a search chose."""
    parallel = replace(choice.parallel, auto=config.parallel.auto, elastic=config.parallel.elastic)
    return replace(config, parallel=parallel, batch=choice.batch, recompute=choice.recompute)


def single_layout(config: TrainConfig) -> Layout:
    """Return the layout of the run on one process, where a search begins."""
    batch = config.batch
    return Layout(
        world_size=1,
        data=1,
        tensor=1,
        pipeline=1,
        sequence=1,
        zero=0,
        micro_size=1,
        accumulation=batch.global_size,
        global_size=batch.global_size,
        sequence_length=batch.sequence_length,
    )


def _ordinary(cluster: ClusterConfig, device: str, world_size: int) -> ClusterConfig:
    if device != "cpu":
        got = f"auto with cluster={cluster.name}, whose figures are not known"
        remedy = "name the cluster, such as cluster=h100_80g, or measure it: llmtrain plan calibrate"
        raise ConfigError(Problem("parallel", got, "a cluster with figures, on GPUs", remedy))
    per_node = cluster.devices_per_node or machine.processes_here(world_size)
    return replace(
        cluster,
        devices_per_node=per_node,
        peak_flops=ORDINARY_PEAKS,
        memory_bandwidth=2e10,
        node_bandwidth=2e9,
        network_bandwidth=1e8,
    )
