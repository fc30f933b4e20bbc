"""The ranks of a run join, and check that their configurations and data agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from llmtrain.config import encode
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.distributed.agreement import Fact, run_facts
from llmtrain.errors import DataError
from llmtrain.parallel.layout import Layout
from llmtrain.train.resolve import Resolved

if TYPE_CHECKING:
    import torch


def start_ranks(resolved: Resolved, device: torch.device) -> None:
    """Join the process group, if there is one.

    Raise LaunchError when ranks are missing, or were started with different settings or data.
    """
    from llmtrain.distributed import processes

    facts = run_facts(encode(resolved.config), device.type, _fingerprint(resolved))
    if resolved.pretrained is not None:
        facts["model.path"] = Fact(resolved.pretrained.path.name, "start all ranks with the same command")
    processes.start(device, single_process_group=resolved.config.engine == "deepspeed", facts=facts)


def same_work(layout: Layout) -> list[list[int]]:
    """Return the groups of ranks that do the same work: those of one pipeline stage."""
    stages: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        stages.setdefault(layout.coordinates(rank).pipeline, []).append(rank)
    return list(stages.values())


def _fingerprint(resolved: Resolved) -> str | None:
    """Return the fingerprint of the data that this rank sees; None for an unreadable file."""
    if resolved.corpora is not None:
        return resolved.corpora.fingerprint
    data: Any = resolved.config.data
    files: Mapping[str, str] = data.files
    digest = xxhash.xxh3_128()
    try:
        for path in files.values():
            digest.update(resolve_package_path(path).read_bytes())
        return digest.hexdigest()
    except (OSError, DataError):
        return None
