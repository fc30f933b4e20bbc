"""`parallel=auto`: the layout that the planner finds fastest, before a run starts. Free of torch."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem
from llmtrain.nn.model_config import ModelConfig
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan import machine
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.estimate import Plan, available_bytes, estimate
from llmtrain.plan.search import search
from llmtrain.plan.space import Choice, Space
from llmtrain.train.config import TrainConfig

ORDINARY_PEAKS = {"fp32": 1e11, "bf16": 2e11, "fp16": 1e11}
"""Peaks of a processor that was not measured: like the other figures of `_ordinary`, they rank layouts, and
say no times."""


def space_of(plan: Plan, config: TrainConfig) -> Space:
    """Return the legal layouts of a run."""
    optimizer = config.optimizer
    return Space(plan, config.batch, optimizer.max_grad_norm, config.exact_dropout, optimizer.implementation)


def with_auto_layout(config: TrainConfig, world_size: int, assumed_vocabulary: int) -> TrainConfig:
    """Return the configuration with the fastest layout if it asks for `parallel=auto`: with its axes, ZeRO
    stage, micro-batch and recomputation.

    assumed_vocabulary: size of a vocabulary that only the data tell.
    Raise ConfigError when no layout fits, and for a GPU of unknown kind.
    """
    if not config.parallel.auto:
        return config
    model: ModelConfig = config.model
    if model.lacks_vocab_size:
        model = replace(model, vocab_size=assumed_vocabulary)  # type: ignore[type-var]
    cluster, device = config.cluster, config.cluster.device or launcher.likely_device(config.device)
    if cluster.memory_bandwidth is None or config.precision not in cluster.peak_flops:
        cluster = _ordinary(cluster, device, world_size)
    config = replace(config, parallel=ParallelConfig(auto=True))
    plan = estimate(model, single_layout(config), replace(config, cluster=cluster))
    plan = replace(plan, available_bytes=available_bytes(config.cluster, device, world_size))
    found = search(space_of(plan, config), world_size, "time", 1)
    return with_choice(config, found.best[0].choice)


def with_choice(config: TrainConfig, choice: Choice) -> TrainConfig:
    """Return the configuration with a choice of a search."""
    parallel = replace(choice.parallel, auto=config.parallel.auto)
    return replace(config, parallel=parallel, batch=choice.batch, recompute=choice.recompute)


def single_layout(config: TrainConfig) -> Layout:
    """Return the layout of the run on one process, from which a search departs."""
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
