"""DeepSpeed's CPUAdam with torch's state names, and bit-exact on resume, so that any layout can resume it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmtrain.distributed import launcher, processes, toolchain
from llmtrain.errors import Problem, TrainingError
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.groups import Group
from llmtrain.optim.optimizers import parameter_groups
from llmtrain.parallel import upstream


def build_cpu_adam(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    groups: Mapping[str, Group],
) -> torch.optim.Optimizer:
    """Return Adam or AdamW, as `config` names it, for weights in host memory. Compile it first if necessary.

    Its state is that of torch's: exp_avg, exp_avg_sq, step. Raise TrainingError if compilation fails.
    """
    upstream.import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    os.environ["PATH"] = toolchain.executables()
    upstream.free_kernels()
    folder = toolchain.build_folder("cpu_adam")
    if launcher.local_rank() == 0 and not (folder / "cpu_adam.so").exists():
        print(f"compiling DeepSpeed's CPU Adam in {folder}, some minutes, once", file=sys.stderr, flush=True)

    def build() -> torch.optim.Optimizer:
        try:
            return DeepSpeedCPUAdam(
                parameter_groups(named_parameters, config.weight_decay, groups),
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                adamw_mode=config.name == "adamw",
            )
        except RuntimeError as error:
            raise TrainingError(
                Problem(
                    "optimizer.implementation",
                    f"deepspeed, which failed to build: {error.__cause__ or error}",
                    remedy=f"delete {folder} and try again, or give optimizer.implementation=torch",
                )
            ) from error

    optimizer = processes.agree(build)
    optimizer.register_step_pre_hook(_start_from_state)
    return optimizer


def _start_from_state(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    upstream.start_cpu_adam_from_state(optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = int(state["step"])  # checkpoints give a tensor, as in torch's optimizers
