"""DeepSpeed as llmtrain needs it: quiet, with nothing compiled at first use, and all that is read or changed
here of what it does not document.

Nothing else in llmtrain names an attribute of DeepSpeed's that is not in its manual. Written from the source
of the release VERSION; UNDOCUMENTED says what of it must be there.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from llmtrain.distributed import launcher, toolchain
from llmtrain.errors import Problem, TrainingError
from llmtrain.parallel.undocumented import UNDOCUMENTED, VERSION


def missing() -> list[str]:
    """Return what of UNDOCUMENTED the installed DeepSpeed does not have, each as module.class.name. After
    `import_deepspeed`."""
    return [f"{where}.{name}" for where, names in UNDOCUMENTED.items() for name in _missing(where, names)]


def _missing(where: str, names: Iterable[str]) -> Iterator[str]:
    try:
        owner: Any = importlib.import_module(where)
    except ImportError:
        module, _, kind = where.rpartition(".")
        try:
            owner = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError):
            yield from names
            return
    # What an object gets when it is made stands in the source alone.
    sources = owner.__mro__[:-1] if inspect.isclass(owner) else [owner]
    text = "\n".join(inspect.getsource(source) for source in sources if _has_source(source))
    for name in names:
        if not hasattr(owner, name) and not re.search(rf"\b{name}\b", text):
            yield name


def _has_source(owner: Any) -> bool:
    return getattr(owner, "__module__", owner.__name__).startswith("deepspeed")


def import_deepspeed() -> Any:
    """Import DeepSpeed, with its banner and per-rank logs suppressed, and attach it to the initialized
    process group. Takes seconds the first time."""
    os.environ.setdefault("LOCAL_RANK", str(launcher.local_rank()))  # required by DeepSpeed
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed uses names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Disable the shared-memory all-reduce for CPU ranks, which is compiled at first use for up to a minute.
    # gloo suffices, and its sums do not depend on the distribution of ranks over hosts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _leave_muon_uncompiled()
    _refuse_unknown(deepspeed.__version__)
    if dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)  # uses the existing process group
    return deepspeed


def _leave_muon_uncompiled() -> None:
    """Import the functions of DeepSpeed's Muon, which every ZeRO engine imports, without compiling them.

    Decorated by torch.compile they would load Inductor: two seconds of each start, for an optimizer that
    llmtrain does not offer.
    """
    from deepspeed.runtime import compiler

    decorate = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorate


@cache
def _refuse_unknown(version: str) -> None:
    """Raise TrainingError for another release than VERSION that lacks anything of UNDOCUMENTED."""
    if version != VERSION and (gone := missing()):
        raise TrainingError(
            Problem(
                "deepspeed",
                f"release {version}, which has no {', '.join(gone)}",
                f"a release that has what {VERSION} has",
                f"pip install deepspeed=={VERSION}",
            )
        )


def free_kernels() -> None:
    """Remove stale locks of killed compilations. All ranks call it together, before a kernel is compiled or
    loaded."""
    if launcher.local_rank() == 0:
        toolchain.drop_stale_locks(toolchain.build_folder("cpu_adam").parent)
    if dist.is_initialized():
        dist.barrier()


def accelerator() -> str:
    """Return the DeepSpeed accelerator of this run. A run on the CPU of a host with GPUs must not use
    these."""
    if dist.is_initialized():
        return "cuda" if "nccl" in dist.get_backend() else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


class Held(NamedTuple):
    """Elements [start, stop) of a flattened parameter, as a rank holds them: in the flattened `holder` from
    `offset` on."""

    start: int
    stop: int
    holder: torch.Tensor
    offset: int


def torch_optimizer(zero: Any) -> torch.optim.Optimizer:
    """Return the optimizer that ZeRO's wraps."""
    found: torch.optim.Optimizer = zero.optimizer
    return found


def partitioner(init: Any) -> Callable[[nn.Parameter], None]:
    """Return what leaves this rank its share of a whole parameter, whose values are made later: the way of
    `zero.Init` itself broadcasts the whole parameter first."""

    def partition(parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    return partition


def forget_hierarchical_groups() -> None:
    """Forget the groups of hpZ of an engine that this process had before."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def master_below_zero_3(zero: Any, parameter: nn.Parameter) -> Held | None:
    """Return what this rank's optimizer updates of a trainable parameter under ZeRO 1 or 2; None: nothing."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    # ZeRO 1 in bf16 runs under another class than the rest, with other names inside.
    flats = getattr(zero, "fp32_groups_flat_partition", None) or zero.single_partition_of_fp32_groups
    start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    return Held(start, start + length, flats[mapping.param_group_index], mapping.hp_fragment_address.start)


def master_of_zero_3(zero: Any, parameter: nn.Parameter, replica: int) -> Held | None:
    """Return what the optimizer of the rank `replica` updates of a trainable parameter under ZeRO 3."""
    start, stop = _share_of_zero_3(parameter, replica)
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    return Held(start, stop, zero.fp32_partitioned_groups_flat[group], offset) if start < stop else None


def frozen_of_zero_3(parameter: nn.Parameter, replica: int) -> Held | None:
    """Return the share of the rank `replica` in a frozen parameter under ZeRO 3, in the type of weights."""
    start, stop = _share_of_zero_3(parameter, replica)
    return Held(start, stop, parameter.ds_tensor, 0) if start < stop else None  # type: ignore[attr-defined]


def _share_of_zero_3(parameter: Any, replica: int) -> tuple[int, int]:
    start = replica * parameter.ds_tensor.ds_numel
    return start, min(parameter.ds_numel, start + parameter.ds_tensor.ds_numel)


def refresh_zero_3(zero: Any, frozen: Iterable[nn.Parameter]) -> None:
    """Make weights agree with their masters, and drop the copies that hpZ has of earlier values."""
    for group in range(len(zero.fp16_groups)):
        zero.fp16_partitioned_groups_flat[group].data.copy_(zero.fp32_partitioned_groups_flat[group].data)
        zero._unflatten_partitioned_parameters(group)
    zero.invalidate_secondary_tensor()
    for parameter in frozen:
        parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


@contextlib.contextmanager
def asking_before_step(zero: Any, ask: Callable[[float], bool] | None) -> Iterator[None]:
    """Inside, `zero.step` asks with the gradient's norm before it changes anything, unless the gradient is
    not finite.

    Where the answer is no, or the gradient is not finite, the step ends as after an overflow of fp16: it
    drops the gradients and changes nothing else but the loss scale. All ranks step together. ask: None
    changes nothing.
    """
    if ask is None:
        yield
        return
    from deepspeed.runtime import utils

    def refuses(norm: torch.Tensor) -> bool:
        return not utils.is_invalid_grad_norm(norm) and not ask(float(norm) / float(_loss_scale(zero)))

    # An attribute of the object hides the method of the class until it is deleted.
    if hasattr(zero, "_get_norm_groups"):  # ZeRO 3
        name, groups_of = "_get_norm_groups", zero._get_norm_groups

        def norm_groups() -> Any:
            groups = groups_of()
            return [torch.tensor(-1.0)] if refuses(utils.combine_grad_norm_groups(groups)) else groups

        zero._get_norm_groups = norm_groups
    elif hasattr(zero, "get_grads_for_norm"):  # ZeRO 1 in bf16
        name, gradients_of = "get_grads_for_norm", zero.get_grads_for_norm

        def gradients(for_clipping: bool = False) -> Any:
            found = gradients_of(for_clipping)
            if for_clipping:
                return found
            norm = utils.get_global_norm_of_tensors(found[0], mpu=zero.mpu, norm_type=zero.norm_type)
            return ([torch.full_like(norm, torch.inf)], {}) if refuses(norm) else found

        zero.get_grads_for_norm = gradients
    else:  # ZeRO 1 and 2
        name, norm_of = "scaled_global_norm", zero.scaled_global_norm

        def norm(*arguments: Any) -> Any:
            found = norm_of(*arguments)
            return torch.full_like(found, -1.0) if refuses(found) else found

        zero.scaled_global_norm = norm
    try:
        yield
    finally:
        delattr(zero, name)


def _loss_scale(zero: Any) -> float:
    return getattr(zero, "loss_scale", 1.0)


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaler_state(zero: Any) -> dict[str, float]:
    """Return the state of fp16's loss scaler; empty without one."""
    scaler = getattr(zero, "loss_scaler", None)
    if scaler is None or not hasattr(scaler, "cur_iter"):
        return {}
    return {name: float(getattr(scaler, name)) for name in _SCALER_STATE}


def load_scaler_state(zero: Any, state: Mapping[str, float]) -> None:
    """Take back what `scaler_state` gave."""
    scaler = getattr(zero, "loss_scaler", None)
    for name, value in ((name, state[name]) for name in _SCALER_STATE if name in state):
        setattr(scaler, name, value if name == "cur_scale" else int(value))


def tie_over_stages(
    pipeline: Any, key: str, holder: nn.Module, ranks: Sequence[int], group: Any, *, counted: bool
) -> None:
    """Have a PipelineModule sum the gradients of `holder.weight` over the stages that hold it.

    ranks: theirs, of `group`. counted: whether this stage counts it in the gradient's norm.
    """
    pipeline.tied_modules[key] = holder
    pipeline.tied_comms[key] = {
        "ranks": list(ranks),
        "group": group,
        "weight_attr": ["weight"],
        "module": holder,
    }
    holder.weight.ds_pipe_replicated = not counted  # type: ignore[union-attr]


@contextlib.contextmanager
def imagined_peers() -> Iterator[None]:
    """Leave out ZeRO 3's question whether rank 0 has the same order of modules: there is no rank 0."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    compare = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = lambda ours: None
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = compare


@contextlib.contextmanager
def quick_grid() -> Iterator[None]:
    """Let a pipeline's grid find who follows each rank in one pass: its own way compares all ranks with all
    pipelines, which takes five seconds at 16,384 ranks."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    def pairs(grid: Any) -> list[list[int]]:
        pipelines = grid._topo.get_axis_comm_lists("pipe")
        following = {rank: ranks[(i + 1) % len(ranks)] for ranks in pipelines for i, rank in enumerate(ranks)}
        return [[rank, following[rank]] for rank in range(grid.world_size)]

    own = PipelineParallelGrid._build_p2p_groups
    PipelineParallelGrid._build_p2p_groups = pairs
    try:
        yield
    finally:
        PipelineParallelGrid._build_p2p_groups = own


def expect_from_neighbours(engine: Any, hidden: torch.Tensor) -> None:
    """Have a PipelineEngine take `hidden` for what the stages beside it send, in place of asking them for the
    shape."""
    from deepspeed.runtime.utils import PartitionedTensor

    sent: tuple[torch.Tensor, ...] = (hidden,)
    if engine.is_pipe_partitioned:
        part = PartitionedTensor(hidden, engine.grid.get_slice_parallel_group())
        sent = (part.to_meta(), part.data())
        engine.pipe_partition_input_meta_cache = engine.grad_partition_grad_layer_meta_cache = sent[0]
    buffers = tuple(
        engine._allocate_or_extend_buffers(i, list(tensor.size()), tensor.dtype)
        for i, tensor in enumerate(sent)
    )
    engine.pipe_recv_buf = buffers if engine.is_pipe_partitioned else buffers[0]


def step_apart(engine: Any) -> Callable[[], None]:
    """Have a PipelineEngine's `train_batch` end with the reduced gradients, since the loss is looked at
    before weights change; → what makes the step."""
    from deepspeed.runtime.pipe import schedule

    class UpToGradients(schedule.TrainSchedule):
        def steps(self) -> Any:
            for commands in super().steps():
                yield [c for c in commands if not isinstance(c, schedule.OptimizerStep)]

    engine._train_schedule = lambda: UpToGradients(
        micro_batches=engine.micro_batches, stages=engine.num_stages, stage_id=engine.stage_id
    )
    engine.steps_per_print = lambda: None  # or it prints before its first step is counted
    step: Callable[[], None] = engine._exec_optimizer_step
    return step


def start_cpu_adam_from_state(optimizer: Any) -> None:
    """Make the next step of a DeepSpeedCPUAdam a function of its state alone.

    The kernel keeps a step counter and running powers of the betas, product by product, which a resumed
    process would not have; after a step number 0, of nothing, it takes the powers of the number it gets.
    """
    nothing = torch.empty(0)
    group = optimizer.param_groups[0]
    optimizer.ds_opt_adam.adam_update(
        optimizer.opt_id, 0, group["lr"], *group["betas"], group["eps"], 0.0, True, *[nothing] * 4
    )
