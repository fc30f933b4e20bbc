"""What a rank tells of itself and its host before any process group exists: plain values, sent as JSON."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.config import SHARED_MEMORY
from llmtrain.distributed import launcher
from llmtrain.preflight import gpus
from llmtrain.preflight.config import PreflightConfig

if TYPE_CHECKING:
    import torch

PACKAGES = ("llmtrain", "torch", "deepspeed", "numpy")
CGROUP = Path("/sys/fs/cgroup")


def take(config: PreflightConfig, device: torch.device) -> dict[str, Any]:
    """Return the inventory of this rank: bytes for memory and disks, text for versions."""
    local_rank = launcher.local_rank()
    driver = gpus.describe(local_rank) if device.type == "cuda" or launcher.has_gpu_driver() else {}
    return {
        "rank": launcher.rank(),
        "local_rank": local_rank,
        "hostname": socket.gethostname(),
        # The launcher's number of this host: two containers may share a name.
        "node": os.environ.get("GROUP_RANK", ""),
        "versions": _versions(device),
        "device": _device(device),
        "gpus": driver,
        "cores": len(os.sched_getaffinity(0)),
        "free": {
            "memory": _free_memory(),
            "run": _free_disk(config.run.dir),
            "tmp": _free_disk(Path(tempfile.gettempdir())),
            "shm": _free_disk(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None,
        },
    }


def _versions(device: torch.device) -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: metadata.version(package) for package in PACKAGES}
    found["CUDA of torch"] = torch.version.cuda
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _device(device: torch.device) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {"type": device.type, "name": _processor()}
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    parts = torch.cuda.get_device_properties(device).multi_processor_count
    return {"type": "cuda", "name": name, "memory_bytes": total, "free_bytes": free, "multiprocessors": parts}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _free_memory() -> int:
    """Return the bytes that programs of this host, or of its container, can still take."""
    import psutil

    available: int = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))  # cached files, which the kernel drops at need
    except (OSError, ValueError):  # no such limit, or "max"
        return available
    return min(available, max(0, limit - used))


def _free_disk(folder: Path) -> int | None:
    """Return the bytes that this user can still write there, or in the nearest folder above that exists."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None
