"""How a batch and the processes are divided: pure arithmetic, and every refusal with its reason.

Ranks are ordered (pipeline, data, sequence, tensor), tensor innermost: tensor parallelism talks most
often and so gets neighbouring ranks, pipeline least often and so gets the most distant ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmtrain.config import require
from llmtrain.distributed import toolchain
from llmtrain.errors import ConfigError, Problem
from llmtrain.optim.config import Implementation

Precision = Literal["fp32", "bf16", "fp16"]
EngineName = Literal["local", "deepspeed"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many processes each axis is divided."""

    data: int | None = None
    """Replicas that each see their own samples; null: every process that the other axes leave."""
    tensor: int = 1
    """Processes that share each matrix."""
    pipeline: int = 1
    """Stages that share the layers."""
    sequence: int = 1
    """Processes that share each sequence."""
    zero: Literal[0, 1, 2, 3] = 0
    """What replicas shard (arXiv:1910.02054): 1 optimizer state, 2 also gradients, 3 also weights."""
    tensor_sequence: bool = False
    """The tensor group's processes also share the tokens between their matrices, in norms and dropout
    (arXiv:2205.05198)."""
    balance: Literal["parameters", "time"] = "parameters"
    """What pipeline stages get equal shares of; `time` goes by the FLOPs of each layer."""
    offload_optimizer: Offload = "none"
    """Where fp32 weights, their gradients and the optimizer's state lie instead of on the device: in host
    memory, whose processor then does the step (arXiv:2101.06840). nvme is refused, with the reason."""
    offload_parameters: Offload = "none"
    """Where a process' share of the weights lies until it is gathered (ZeRO 3)."""
    quantized_weights: bool = False
    """Weights are gathered in 8 bits (ZeRO++ qwZ, arXiv:2306.10209)."""
    quantized_gradients: bool = False
    """Gradients are reduced in 4 bits where they go from node to node (ZeRO++ qgZ)."""
    hierarchical_partition: int = 1
    """So many neighbours, one node's processes, hold a copy of the weights between them from the forward
    pass to the backward pass, which then gathers within the node (ZeRO++ hpZ); 1: none do."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.data is None or self.data >= 1, "data", self.data, "1 or more, or null")
        for axis in ("tensor", "pipeline", "sequence"):
            yield from require(getattr(self, axis) >= 1, axis, getattr(self, axis), "1 or more")
        size = self.hierarchical_partition
        yield from require(size >= 1, "hierarchical_partition", size, "1 or more", "1 turns it off")


@dataclass(frozen=True)
class BatchConfig:
    """What one optimizer step sees."""

    global_size: int
    """Sequences of one optimizer step over all replicas."""
    micro_size: int
    """Sequences that one replica takes through the model at once; memory grows with it."""
    sequence_length: int
    """Tokens of one sequence."""

    def problems(self) -> Iterator[Problem]:
        for name in ("global_size", "micro_size", "sequence_length"):
            yield from require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True)
class ModelShape:
    """What of a model's config decides over which axes it can be divided, and by what."""

    family: str
    axes: frozenset[str]
    """Of tensor, pipeline and sequence, those that the family can be divided over."""
    num_layers: int = 1
    kv_heads: int = 1
    """Key-value heads: each stays whole, with the query heads that share it."""
    mlp_width: int = 1
    dropout: float = 0.0
    shares_tokens: bool = True
    """Whether the tensor group's processes can share the tokens between its matrices."""
    reads_lengths: bool = False
    """Whether a token's position means something else in a longer text."""


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """A division that adds up: data · tensor · pipeline · sequence == world_size and
    accumulation · micro_size · data == global_size. Made by `plan_layout`."""

    world_size: int
    data: int
    tensor: int
    pipeline: int
    sequence: int
    zero: int
    micro_size: int
    accumulation: int
    """Micro-batches of one optimizer step on each replica."""
    global_size: int
    sequence_length: int
    tensor_sequence: bool = False
    balance: Literal["parameters", "time"] = "parameters"
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    quantized_weights: bool = False
    quantized_gradients: bool = False
    hierarchical_partition: int = 1

    @property
    def model(self) -> int:
        """Processes that hold one copy of the model between them."""
        return self.tensor * self.pipeline

    @property
    def replica_size(self) -> int:
        """Sequences of one optimizer step on each replica."""
        return self.accumulation * self.micro_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all replicas."""
        return self.global_size * self.sequence_length

    def coordinates(self, rank: int) -> Coordinates:
        """The place of `rank`, 0 ≤ rank < world_size."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside world_size {self.world_size}")
        rank, tensor = divmod(rank, self.tensor)
        rank, sequence = divmod(rank, self.sequence)
        pipeline, data = divmod(rank, self.data)
        return Coordinates(pipeline, data, sequence, tensor)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at `coordinates`; the inverse of `coordinates()`."""
        pipeline, data, sequence, tensor = coordinates
        return ((pipeline * self.data + data) * self.sequence + sequence) * self.tensor + tensor


def plan_layout(
    parallel: ParallelConfig,
    batch: BatchConfig,
    *,
    engine: EngineName,
    precision: Precision,
    world_size: int,
    device: str,
    model: ModelShape | None = None,
    max_grad_norm: float = 0.0,
    exact_dropout: bool = True,
    implementation: Implementation = "torch",
    on_this_machine: bool = True,
) -> Layout:
    """Divide `batch`, and `model`, over `world_size` processes on devices of type `device` ("cpu", "cuda").

    implementation: of the optimizer. on_this_machine: whether what it lacks, a compiler or a library, keeps
    the run from starting.
    Raises ConfigError with every rule that is broken and, for each, the nearest values that keep it.
    """
    problems = [problem.within("parallel") for problem in parallel.problems()]
    problems += [problem.within("batch") for problem in batch.problems()]
    if problems:
        raise ConfigError(problems)
    problems += _world_problems(parallel, world_size)
    problems += _engine_problems(parallel, engine, precision, device)
    problems += _pipeline_problems(parallel, engine, max_grad_norm)
    problems += _sequence_problems(parallel, batch)
    problems += _offload_problems(parallel, implementation, on_this_machine)
    problems += _quantization_problems(parallel, precision, device, on_this_machine)
    if model is not None:
        problems += _model_problems(parallel, model, exact_dropout, world_size)
    data = parallel.data or world_size // _others(parallel)
    if data >= 1:
        problems += _batch_problems(batch, data)
        problems += _hierarchy_problems(parallel, data)
    if problems:
        raise ConfigError(problems)
    return Layout(
        world_size=world_size,
        data=data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        zero=parallel.zero,
        micro_size=batch.micro_size,
        accumulation=batch.global_size // (data * batch.micro_size),
        global_size=batch.global_size,
        sequence_length=batch.sequence_length,
        tensor_sequence=parallel.tensor_sequence,
        balance=parallel.balance,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        quantized_weights=parallel.quantized_weights,
        quantized_gradients=parallel.quantized_gradients,
        hierarchical_partition=parallel.hierarchical_partition,
    )


def _others(parallel: ParallelConfig) -> int:
    """Processes of one replica."""
    return parallel.tensor * parallel.pipeline * parallel.sequence


def _pipeline_problems(
    parallel: ParallelConfig, engine: EngineName, max_grad_norm: float
) -> Iterator[Problem]:
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
        f"1 with pipeline {parallel.pipeline}: a stage adds up the gradients of all its micro-batches before "
        "they are reduced, which sharded gradients (ZeRO 2 and 3) do not survive",
        f"give parallel.zero=1, or parallel.pipeline=1 with parallel.zero={parallel.zero}",
    )
    yield from require(
        parallel.zero != 0 or max_grad_norm == 0,
        "parallel.zero",
        f"0 with pipeline {parallel.pipeline} and optimizer.max_grad_norm {max_grad_norm:g}",
        "1: without ZeRO the norm to clip by counts each stage's own gradients alone",
        "give parallel.zero=1, or optimizer.max_grad_norm=0",
    )
    yield from require(
        parallel.sequence == 1,
        "parallel.sequence",
        f"{parallel.sequence} with pipeline {parallel.pipeline}",
        "1 in a pipeline, whose schedule knows data and tensor alone",
        f"give parallel.sequence=1 parallel.tensor={parallel.sequence * parallel.tensor} "
        "parallel.tensor_sequence=true, or parallel.pipeline=1",
    )


def _sequence_problems(parallel: ParallelConfig, batch: BatchConfig) -> Iterator[Problem]:
    yield from require(
        not parallel.tensor_sequence or parallel.tensor > 1,
        "parallel.tensor_sequence",
        "true with tensor 1",
        "false: it shares tokens within the tensor group",
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
        f"a multiple of {what} = {parts}, so that each process has as many tokens",
        f"nearest: {_text(_nearest_multiples(batch.sequence_length, parts))}",
    )


def _offload_problems(
    parallel: ParallelConfig, implementation: Implementation, on_this_machine: bool
) -> Iterator[Problem]:
    optimizer, parameters = parallel.offload_optimizer, parallel.offload_parameters
    for key, place in (("offload_optimizer", optimizer), ("offload_parameters", parameters)):
        yield from require(
            place != "nvme",
            f"parallel.{key}",
            place,
            "none, cpu: checkpoints cannot read what DeepSpeed has put into files of its own",
            f"give parallel.{key}=cpu",
        )
    yield from require(
        optimizer == "none" or parallel.zero >= 1,
        "parallel.offload_optimizer",
        f"{optimizer} with parallel.zero=0",
        "none: without ZeRO there is no optimizer state apart from the weights",
        "give parallel.zero=1 or more",
    )
    yield from require(
        optimizer == "none" or parallel.pipeline == 1,
        "parallel.offload_optimizer",
        f"{optimizer} with pipeline {parallel.pipeline}",
        "none in a pipeline, where DeepSpeed adds micro-batches' gradients up wrongly in bf16",
        "give parallel.pipeline=1, or parallel.offload_optimizer=none",
    )
    yield from require(
        parameters == "none" or parallel.zero == 3,
        "parallel.offload_parameters",
        f"{parameters} with parallel.zero={parallel.zero}",
        "none: below ZeRO 3 every process keeps whole weights at hand",
        "give parallel.zero=3",
    )
    if implementation == "deepspeed":
        yield from require(
            optimizer != "none",
            "optimizer.implementation",
            "deepspeed with parallel.offload_optimizer=none",
            "torch: DeepSpeed's kernel steps weights in host memory",
            "give parallel.offload_optimizer=cpu, or optimizer.implementation=torch",
        )
        if on_this_machine and (flaw := toolchain.compiler_flaw()) is not None:
            yield Problem(
                "optimizer.implementation",
                f"deepspeed, compiled at first use, and {flaw.what}",
                "torch",
                f"{flaw.remedy}, or give optimizer.implementation=torch",
            )


def _quantization_problems(
    parallel: ParallelConfig, precision: Precision, device: str, on_this_machine: bool
) -> Iterator[Problem]:
    """Of ZeRO++."""
    given = [name for name in ("quantized_weights", "quantized_gradients") if getattr(parallel, name)]
    for name in given:
        key = f"parallel.{name}"
        yield from require(
            parallel.zero == 3,
            key,
            f"true with parallel.zero={parallel.zero}",
            "false: ZeRO 3 alone gathers weights and reduces gradients by shares",
            "give parallel.zero=3",
        )
        yield from require(
            device == "cuda",
            key,
            f"true on a {device}",
            f"false: its kernels are CUDA's, and a {device} has none",
            f"give {key}=false",
        )
        if device == "cuda" and on_this_machine and (flaw := toolchain.cuda_compiler_flaw()) is not None:
            yield Problem(
                key,
                f"true, whose kernels are compiled at first use, and {flaw.what}",
                "false",
                f"{flaw.remedy}, or give {key}=false",
            )
    if parallel.quantized_gradients:
        yield from require(
            precision == "fp16",
            "parallel.quantized_gradients",
            f"true with precision={precision}",
            "false: DeepSpeed's kernel reads gradients as fp16, whatever they are",
            "give precision=fp16, or parallel.quantized_gradients=false",
        )
        yield from require(
            parallel.tensor * parallel.pipeline == 1,
            "parallel.quantized_gradients",
            f"true with tensor {parallel.tensor} · pipeline {parallel.pipeline}",
            "false: DeepSpeed reduces them over all processes, as if each were a replica",
            "give parallel.tensor=1 parallel.pipeline=1, or parallel.quantized_gradients=false",
        )


def _hierarchy_problems(parallel: ParallelConfig, data: int) -> Iterator[Problem]:
    size, replicas = parallel.hierarchical_partition, data * parallel.sequence
    if size == 1:
        return
    key = "parallel.hierarchical_partition"
    yield from require(
        parallel.zero == 3,
        key,
        f"{size} with parallel.zero={parallel.zero}",
        "1: below ZeRO 3 no weights are gathered",
        "give parallel.zero=3",
    )
    yield from require(
        parallel.tensor * parallel.pipeline == 1,
        key,
        f"{size} with tensor {parallel.tensor} · pipeline {parallel.pipeline}",
        "1: DeepSpeed takes neighbours for replicas of each other",
        f"give parallel.tensor=1 parallel.pipeline=1, or {key}=1",
    )
    yield from require(
        replicas % size == 0,
        key,
        size,
        f"a divisor of the {replicas} replicas",
        f"nearest: {_text(_around([d for d in range(1, replicas + 1) if replicas % d == 0], size))}",
    )


def _axes_text(model: ModelShape) -> str:
    if not model.axes:
        return "runs data-parallel, with ZeRO 0 to 3"
    return f"can be divided over {', '.join(sorted(model.axes))} and replicas"


def _model_problems(
    parallel: ParallelConfig, model: ModelShape, exact_dropout: bool, world_size: int
) -> Iterator[Problem]:
    def fitting(size: int, axis: str) -> str:
        """Divisors of `size` next to what was given that the processes started allow for."""
        others = _others(parallel) // getattr(parallel, axis)
        legal = [d for d in range(1, size + 1) if size % d == 0 and world_size % (d * others) == 0]
        return _text(_around(legal or [1], getattr(parallel, axis)))

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
                f"1 to model.num_layers={model.num_layers}: each stage runs one layer at least",
                f"give parallel.pipeline={_most_stages(parallel, model.num_layers, world_size)}",
            )
    yield from require(
        parallel.sequence == 1 or not model.reads_lengths,
        "parallel.sequence",
        f"{parallel.sequence} with a model.rope_scaling that depends on the length of texts",
        "1: a process sees a part of each text",
        "give parallel.sequence=1",
    )
    yield from require(
        model.shares_tokens or not parallel.tensor_sequence,
        "parallel.tensor_sequence",
        f"true with model.family={model.family}",
        "false: it needs all tokens of a row in one place",
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
        "true: processes that share a sequence must drop the same elements of it",
        "give exact_dropout=true or model.dropout=0",
    )


def _engine_problems(
    parallel: ParallelConfig, engine: EngineName, precision: Precision, device: str
) -> Iterator[Problem]:
    yield from require(
        parallel.zero == 0 or engine == "deepspeed",
        "parallel.zero",
        parallel.zero,
        f"0 with engine={engine}, which keeps whole copies",
        "give engine=deepspeed, which shards",
    )
    yield from require(
        not (precision == "fp16" and engine == "local" and parallel.tensor > 1),
        "precision",
        "fp16 with tensor parallelism in engine=local",
        "bf16, fp32: its loss scaler looks for overflow in each process' own gradients alone",
        "give precision=bf16, or engine=deepspeed with parallel.zero=1",
    )
    yield from require(
        not (precision == "fp16" and engine == "deepspeed" and parallel.zero == 0),
        "precision",
        "fp16 with parallel.zero=0 in engine=deepspeed",
        "bf16, fp32: the loss scaler that fp16 needs comes with ZeRO there",
        "give parallel.zero=1, or precision=bf16",
    )
    yield from require(
        not (precision == "fp16" and device == "cpu"),
        "precision",
        precision,
        "fp32, bf16 on a cpu",
        "a cpu has no fast fp16 arithmetic and fp16 gradients underflow; give precision=bf16",
    )


def _world_problems(parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    others = _others(parallel)
    if parallel.data is None:
        yield from require(
            world_size % others == 0,
            "parallel",
            f"tensor {parallel.tensor} · pipeline {parallel.pipeline} · sequence {parallel.sequence} "
            f"= {others}",
            f"a divisor of the {world_size} processes started",
            f"start {_text(_nearest_multiples(world_size, others))} processes",
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


def _batch_problems(batch: BatchConfig, data: int) -> Iterator[Problem]:
    if batch.global_size % (data * batch.micro_size) == 0:
        return
    micro_sizes = nearest_micro_sizes(batch, data)
    remedies = [f"batch.micro_size {_text(micro_sizes)}"] if micro_sizes else []
    remedies.append(f"batch.global_size {_text(nearest_global_sizes(batch, data))}")
    yield Problem(
        "batch.global_size",
        f"{batch.global_size} with micro_size {batch.micro_size} on {data} data-parallel {_plural(data)}",
        f"a multiple of micro_size · data = {batch.micro_size * data}, so that every replica takes whole "
        "micro-batches",
        "nearest: " + " or ".join(remedies),
    )


def nearest_micro_sizes(batch: BatchConfig, data: int, limit: int = 3) -> list[int]:
    """Micro sizes nearest to the given one that divide global_size on `data` replicas; maybe none."""
    if batch.global_size % data:
        return []
    per_replica = batch.global_size // data
    divisors = {
        d for i in range(1, int(per_replica**0.5) + 1) if per_replica % i == 0 for d in (i, per_replica // i)
    }
    return sorted(sorted(divisors, key=lambda d: (abs(d - batch.micro_size), d))[:limit])


def nearest_global_sizes(batch: BatchConfig, data: int) -> list[int]:
    """Global sizes next below and above the given one that keep micro_size on `data` replicas."""
    return _nearest_multiples(batch.global_size, data * batch.micro_size)


def _nearest_multiples(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple >= 1]


def _most_stages(parallel: ParallelConfig, num_layers: int, world_size: int) -> int:
    """The longest pipeline that has a layer for each stage and divides the processes started."""
    others = parallel.tensor * parallel.sequence
    legal = (p for p in range(num_layers, 0, -1) if world_size % (p * others) == 0)
    return next(legal, 1)


def _around(values: list[int], wanted: int) -> list[int]:
    """Of ascending `values` those next below and above `wanted`."""
    below = [value for value in values if value <= wanted][-1:]
    return below + [value for value in values if value > wanted][:1]


def _text(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _plural(count: int) -> str:
    return "process" if count == 1 else "processes"
