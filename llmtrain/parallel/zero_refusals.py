"""Rules of ZeRO's optional features: offloading, and quantized and hierarchical communication (ZeRO++)."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config import require
from llmtrain.distributed import toolchain
from llmtrain.errors import Problem
from llmtrain.optim.config import Implementation
from llmtrain.parallel.config import ParallelConfig, Precision
from llmtrain.parallel.nearest import around, listed


def offload_problems(
    parallel: ParallelConfig, implementation: Implementation, on_this_machine: bool
) -> Iterator[Problem]:
    """Require what ZeRO-Offload and DeepSpeed's CPU optimizer support."""
    optimizer, parameters = parallel.offload_optimizer, parallel.offload_parameters
    for key, target in (("offload_optimizer", optimizer), ("offload_parameters", parameters)):
        yield from require(
            target != "nvme",
            f"parallel.{key}",
            target,
            "none, cpu: checkpoints cannot read the files that DeepSpeed writes there",
            f"give parallel.{key}=cpu",
        )
    yield from require(
        optimizer == "none" or parallel.zero >= 1,
        "parallel.offload_optimizer",
        f"{optimizer} with parallel.zero=0",
        "none: without ZeRO the optimizer state is not separate from the weights",
        "give parallel.zero=1 or more",
    )
    yield from require(
        optimizer == "none" or parallel.pipeline == 1,
        "parallel.offload_optimizer",
        f"{optimizer} with pipeline {parallel.pipeline}",
        "none with pipeline parallelism: DeepSpeed accumulates gradients wrongly there in bf16",
        "give parallel.pipeline=1, or parallel.offload_optimizer=none",
    )
    yield from require(
        parameters == "none" or parallel.zero == 3,
        "parallel.offload_parameters",
        f"{parameters} with parallel.zero={parallel.zero}",
        "none: below ZeRO 3 every process keeps all weights on its device",
        "give parallel.zero=3",
    )
    if implementation == "deepspeed":
        yield from require(
            optimizer != "none",
            "optimizer.implementation",
            "deepspeed with parallel.offload_optimizer=none",
            "torch: DeepSpeed's kernel updates weights in host memory only",
            "give parallel.offload_optimizer=cpu, or optimizer.implementation=torch",
        )
        if on_this_machine and (flaw := toolchain.compiler_flaw()) is not None:
            yield Problem(
                "optimizer.implementation",
                f"deepspeed, compiled at first use, and {flaw.what}",
                "torch",
                f"{flaw.remedy}, or give optimizer.implementation=torch",
            )


def quantization_problems(
    parallel: ParallelConfig, precision: Precision, device: str, on_this_machine: bool
) -> Iterator[Problem]:
    """Require what the quantized communication of ZeRO++ supports."""
    given = [name for name in ("quantized_weights", "quantized_gradients") if getattr(parallel, name)]
    for name in given:
        key = f"parallel.{name}"
        yield from require(
            parallel.zero == 3,
            key,
            f"true with parallel.zero={parallel.zero}",
            "false: only ZeRO 3 gathers sharded weights and scatters reduced gradients",
            "give parallel.zero=3",
        )
        yield from require(
            device == "cuda",
            key,
            f"true on a {device}",
            "false: its kernels run on CUDA devices only",
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
            "false: DeepSpeed's kernel reads the gradients as fp16, whatever their type",
            "give precision=fp16, or parallel.quantized_gradients=false",
        )
        yield from require(
            parallel.tensor * parallel.pipeline == 1,
            "parallel.quantized_gradients",
            f"true with tensor {parallel.tensor} · pipeline {parallel.pipeline}",
            "false: DeepSpeed reduces them over all processes, as if each were a data-parallel replica",
            "give parallel.tensor=1 parallel.pipeline=1, or parallel.quantized_gradients=false",
        )


def hierarchy_problems(parallel: ParallelConfig, data: int) -> Iterator[Problem]:
    """Require what the hierarchical partition of ZeRO++ (hpZ) supports."""
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
        "1: DeepSpeed assumes that neighbouring processes are data-parallel replicas",
        f"give parallel.tensor=1 parallel.pipeline=1, or {key}=1",
    )
    yield from require(
        replicas % size == 0,
        key,
        size,
        f"a divisor of the {replicas} replicas",
        f"nearest: {listed(around([d for d in range(1, replicas + 1) if replicas % d == 0], size))}",
    )
