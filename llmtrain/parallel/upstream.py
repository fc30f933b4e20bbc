"""Import DeepSpeed with quiet logs and without kernels that are compiled at first use."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.distributed import launcher, toolchain


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
    if dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)  # uses the existing process group
    return deepspeed


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
