"""Plan a layout: check every rule, then divide the batch and the model over the processes."""

from __future__ import annotations

from llmtrain.errors import ConfigError
from llmtrain.optim.config import Implementation
from llmtrain.parallel.config import BatchConfig, EngineName, ParallelConfig, Precision
from llmtrain.parallel.layout import Layout, ModelShape
from llmtrain.parallel.nearest import processes_per_replica
from llmtrain.parallel.refusals import (
    batch_problems,
    engine_problems,
    model_problems,
    pipeline_problems,
    sequence_problems,
    statistics_problems,
    step_problems,
    world_problems,
)
from llmtrain.parallel.zero_refusals import hierarchy_problems, offload_problems, quantization_problems


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
    """Return the division of `batch` and `model` over `world_size` processes.

    device: the type of the devices, "cpu" or "cuda".
    implementation: that of the optimizer.
    on_this_machine: also refuse what needs a compiler or library that this machine lacks; False to plan for
        another machine.
    Raises ConfigError with every broken rule and, for each, the nearest values that satisfy it.
    """
    problems = [problem.within("parallel") for problem in parallel.problems()]
    problems += [problem.within("batch") for problem in batch.problems()]
    if problems:
        raise ConfigError(problems)
    problems += world_problems(parallel, world_size)
    problems += engine_problems(parallel, engine, precision, device)
    if model is None or "pipeline" in model.axes:
        problems += pipeline_problems(parallel, engine, max_grad_norm)
    problems += sequence_problems(parallel, batch)
    problems += offload_problems(parallel, implementation, on_this_machine)
    problems += quantization_problems(parallel, precision, device, on_this_machine)
    if model is not None:
        problems += model_problems(parallel, model, exact_dropout, world_size)
        problems += statistics_problems(parallel, model, engine)
        problems += step_problems(parallel, model)
    data = parallel.data or world_size // processes_per_replica(parallel)
    if data >= 1:
        problems += batch_problems(batch, data)
        problems += hierarchy_problems(parallel, data)
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
