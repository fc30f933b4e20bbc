"""Rules that a layout must satisfy: processes, batch, engine, pipeline, sequence and model.

Each function yields a Problem for each broken rule, with the reason and the nearest values that satisfy it.
The rules of ZeRO's optional features stand in zero_refusals.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.parallel.config import BatchConfig, EngineName, ParallelConfig, Precision
from llmtrain.parallel.layout import ModelShape
from llmtrain.parallel.nearest import (
    around,
    listed,
    most_stages,
    nearest_global_sizes,
    nearest_micro_sizes,
    nearest_multiples,
    processes_per_replica,
)


def world_problems(parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    """Require that the product of the axes is `world_size`."""
    others = processes_per_replica(parallel)
    if parallel.data is None:
        yield from require(
            world_size % others == 0,
            "parallel",
            f"tensor {parallel.tensor} · pipeline {parallel.pipeline} · sequence {parallel.sequence} "
            f"= {others}",
            f"a divisor of the {world_size} processes started",
            f"start {listed(nearest_multiples(world_size, others))} processes",
        )
        return
    needed = parallel.data * others
    remedy = f"start {needed} processes"
    if world_size % others == 0:
        remedy += f" or give parallel.data={world_size // others} (null finds it)"
    yield from require(
        needed == world_size,
        "parallel",
        f"data {parallel.data} · tensor {parallel.tensor} · pipeline {parallel.pipeline} · "
        f"sequence {parallel.sequence} = {needed}",
        f"a product of {world_size}, the processes started",
        remedy,
    )


def engine_problems(
    parallel: ParallelConfig, engine: EngineName, precision: Precision, device: str
) -> Iterator[Problem]:
    """Require an engine that supports `zero`, and one that supports the precision on this type of device."""
    yield from require(
        parallel.zero == 0 or engine == "deepspeed",
        "parallel.zero",
        parallel.zero,
        f"0 with engine={engine}, which keeps whole copies of all states",
        "give engine=deepspeed, which shards them",
    )
    yield from require(
        not (precision == "fp16" and engine == "local" and parallel.tensor > 1),
        "precision",
        "fp16 with tensor parallelism in engine=local",
        "bf16, fp32: its loss scaler looks for overflow only in each process' own gradients",
        "give precision=bf16, or engine=deepspeed with parallel.zero=1",
    )
    yield from require(
        not (precision == "fp16" and engine == "deepspeed" and parallel.zero == 0),
        "precision",
        "fp16 with parallel.zero=0 in engine=deepspeed",
        "bf16, fp32: DeepSpeed has the loss scaler that fp16 needs only with ZeRO",
        "give parallel.zero=1, or precision=bf16",
    )
    yield from require(
        not (precision == "fp16" and device == "cpu"),
        "precision",
        precision,
        "fp32, bf16 on a cpu",
        "a cpu has no fast fp16 arithmetic and fp16 gradients underflow; give precision=bf16",
    )


def pipeline_problems(
    parallel: ParallelConfig, engine: EngineName, max_grad_norm: float
) -> Iterator[Problem]:
    """Require what DeepSpeed's pipeline schedule supports."""
    if parallel.pipeline == 1:
        return
    yield from require(
        engine == "deepspeed",
        "parallel.pipeline",
        parallel.pipeline,
        f"1 with engine={engine}",
        "give engine=deepspeed, whose schedule runs pipelines",
    )
    yield from require(
        parallel.zero < 2,
        "parallel.zero",
        parallel.zero,
        f"1 with pipeline {parallel.pipeline}: a stage accumulates the gradients of all its micro-batches "
        "before they are reduced, which sharded gradients (ZeRO 2 and 3) do not allow",
        f"give parallel.zero=1, or parallel.pipeline=1 with parallel.zero={parallel.zero}",
    )
    yield from require(
        parallel.zero != 0 or max_grad_norm == 0,
        "parallel.zero",
        f"0 with pipeline {parallel.pipeline} and optimizer.max_grad_norm {max_grad_norm:g}",
        "1: without ZeRO the gradient norm to clip counts only each stage's own gradients",
        "give parallel.zero=1, or optimizer.max_grad_norm=0",
    )
    yield from require(
        parallel.sequence == 1,
        "parallel.sequence",
        f"{parallel.sequence} with pipeline {parallel.pipeline}",
        "1 with pipeline parallelism, whose schedule supports only data and tensor parallelism",
        f"give parallel.sequence=1 parallel.tensor={parallel.sequence * parallel.tensor} "
        "parallel.tensor_sequence=true, or parallel.pipeline=1",
    )


def sequence_problems(parallel: ParallelConfig, batch: BatchConfig) -> Iterator[Problem]:
    """Require that the processes that divide each sequence get equally many tokens."""
    yield from require(
        not parallel.tensor_sequence or parallel.tensor > 1,
        "parallel.tensor_sequence",
        "true with tensor 1",
        "false: it divides tokens within the tensor group",
        "give parallel.tensor=2 or more, or parallel.tensor_sequence=false",
    )
    parts = parallel.sequence * (parallel.tensor if parallel.tensor_sequence else 1)
    what = f"sequence {parallel.sequence}" + (
        f" · tensor {parallel.tensor}" if parallel.tensor_sequence else ""
    )
    yield from require(
        batch.sequence_length % parts == 0,
        "batch.sequence_length",
        batch.sequence_length,
        f"a multiple of {what} = {parts}, so that all processes have equally many tokens",
        f"nearest: {listed(nearest_multiples(batch.sequence_length, parts))}",
    )


def step_problems(parallel: ParallelConfig, model: ModelShape) -> Iterator[Problem]:
    """Refuse ZeRO 3, which gathers weights at each call of a module, for a model whose ranks call one as
    often as their rows have tokens."""
    yield from require(
        not model.steps_by_token or parallel.zero < 3,
        "parallel.zero",
        f"{parallel.zero} with model.family={model.family}, which goes from token to token",
        "0, 1, 2",
    )


def statistics_problems(parallel: ParallelConfig, model: ModelShape, engine: EngineName) -> Iterator[Problem]:
    """Refuse DeepSpeed, which knows no numbers besides parameters, for a model whose forward passes change
    some."""
    yield from require(
        not model.has_statistics or engine == "local" or parallel.pipeline > 1,
        "parallel.zero" if parallel.zero else "engine",
        f"{parallel.zero or engine} with model.family={model.family}, whose batch norms keep averages",
        "0" if parallel.zero else "local",
        "give engine=local parallel.zero=0: such models are small",
    )


def model_problems(
    parallel: ParallelConfig, model: ModelShape, exact_dropout: bool, world_size: int
) -> Iterator[Problem]:
    """Require that the model can be divided over these axes, by these numbers."""

    def fitting(size: int, axis: str) -> str:
        """Return the divisors of `size` nearest to the given one that `world_size` allows."""
        others = processes_per_replica(parallel) // getattr(parallel, axis)
        legal = [d for d in range(1, size + 1) if size % d == 0 and world_size % (d * others) == 0]
        return listed(around(legal or [1], getattr(parallel, axis)))

    for axis in ("tensor", "pipeline", "sequence"):
        size = getattr(parallel, axis)
        if size == 1:
            continue
        if axis not in model.axes:
            yield Problem(
                f"parallel.{axis}",
                f"{size} with model.family={model.family}",
                f"1: {model.family} {_axes_text(model)}",
                f"give parallel.{axis}=1 and the processes to parallel.data",
            )
        elif axis == "pipeline":
            yield from require(
                size <= model.num_layers,
                "parallel.pipeline",
                size,
                f"1 to model.num_layers={model.num_layers}: each stage needs one layer at least",
                f"give parallel.pipeline={most_stages(parallel, model.num_layers, world_size)}",
            )
    yield from require(
        parallel.sequence == 1 or not model.reads_lengths,
        "parallel.sequence",
        f"{parallel.sequence} with a model.rope_scaling that depends on the length of the sequence",
        "1: each process sees only a part of each sequence",
        "give parallel.sequence=1",
    )
    yield from require(
        model.shares_tokens or not parallel.tensor_sequence,
        "parallel.tensor_sequence",
        f"true with model.family={model.family}",
        "false: it needs all tokens of a sequence on one process",
        "give parallel.tensor_sequence=false",
    )
    if "tensor" in model.axes and parallel.tensor > 1:
        for name, size in (("key-value heads", model.kv_heads), ("model.mlp_hidden_size", model.mlp_width)):
            yield from require(
                size % parallel.tensor == 0,
                "parallel.tensor",
                parallel.tensor,
                f"a divisor of the {size} {name}",
                f"nearest: {fitting(size, 'tensor')}",
            )
    if "sequence" in model.axes and parallel.sequence > 1 and model.kv_heads % parallel.tensor == 0:
        heads = model.kv_heads // parallel.tensor
        yield from require(
            heads % parallel.sequence == 0,
            "parallel.sequence",
            parallel.sequence,
            f"a divisor of the {heads} key-value heads"
            + (f" that tensor {parallel.tensor} leaves each process" if parallel.tensor > 1 else "")
            + ", which the exchange around attention divides",
            f"nearest: {fitting(heads, 'sequence')}",
        )
    yield from require(
        exact_dropout or model.dropout == 0 or parallel.tensor * parallel.sequence == 1,
        "exact_dropout",
        f"false with tensor {parallel.tensor}, sequence {parallel.sequence} and dropout {model.dropout}",
        "true: processes that divide a sequence or its heads must agree on the elements to drop",
        "give exact_dropout=true or model.dropout=0",
    )


def _axes_text(model: ModelShape) -> str:
    """Return what a family supports, as the end of a sentence about it."""
    if not model.axes:
        zero = "0" if model.has_statistics else "0 to 2" if model.steps_by_token else "0 to 3"
        return f"runs data-parallel, with ZeRO {zero}"
    return f"can be divided over {', '.join(sorted(model.axes))} and replicas"


def batch_problems(batch: BatchConfig, data: int) -> Iterator[Problem]:
    """Require that global_size is a multiple of micro_size · `data`."""
    if batch.global_size % (data * batch.micro_size) == 0:
        return
    micro_sizes = nearest_micro_sizes(batch, data)
    remedies = [f"batch.micro_size {listed(micro_sizes)}"] if micro_sizes else []
    remedies.append(f"batch.global_size {listed(nearest_global_sizes(batch, data))}")
    yield Problem(
        "batch.global_size",
        f"{batch.global_size} with micro_size {batch.micro_size} on {data} data-parallel {_plural(data)}",
        f"a multiple of micro_size · data = {batch.micro_size * data}, so that every replica gets whole "
        "micro-batches",
        "nearest: " + " or ".join(remedies),
    )


def _plural(count: int) -> str:
    return "process" if count == 1 else "processes"
