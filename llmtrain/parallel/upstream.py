"""DeepSpeed as llmtrain needs it: quiet, and with nothing compiled at first use."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.parallel import launcher, toolchain


def import_deepspeed() -> Any:
    """DeepSpeed over the process group that is up, its banner and per-rank logs turned down; takes seconds
    the first time."""
    os.environ.setdefault("LOCAL_RANK", str(launcher.local_rank()))  # DeepSpeed insists on it
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch deprecates names that DeepSpeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # An all-reduce over shared memory for CPU ranks, compiled at first use for up to a minute; gloo serves,
    # and its sums do not depend on which hosts the ranks are on.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _leave_muon_uncompiled()
    if dist.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)  # its own handle of the group that is up
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


def free_kernels() -> None:
    """Remove what killed processes left of kernels that they compiled.

    All ranks call it together, before one is compiled or loaded.
    """
    if launcher.local_rank() == 0:
        toolchain.drop_stale_locks(toolchain.build_folder("cpu_adam").parent)
    if dist.is_initialized():
        dist.barrier()


def accelerator() -> str:
    """Where this run's tensors are: a run on the CPU of a host with GPUs must not take these."""
    if dist.is_initialized():
        return "cuda" if "nccl" in dist.get_backend() else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"
