"""A run's ranks come together, each with a configuration and data of its own finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from llmtrain.commands.resolve import Resolved
from llmtrain.config import encode
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.distributed.agreement import Fact, run_facts
from llmtrain.errors import DataError

if TYPE_CHECKING:
    import torch


def start_ranks(resolved: Resolved, device: torch.device) -> None:
    """Join the process group, where there is one, with ranks that were all started alike.

    Raises LaunchError when ranks are missing or differ.
    """
    from llmtrain.distributed import processes

    facts = run_facts(encode(resolved.config), device.type, _fingerprint(resolved))
    if resolved.pretrained is not None:
        facts["model.path"] = Fact(resolved.pretrained.path.name, "start all ranks with the same command")
    processes.start(device, single_process_group=resolved.config.engine == "deepspeed", facts=facts)


def _fingerprint(resolved: Resolved) -> str | None:
    """Of the data as this rank sees it; None for a file that can't be read, which its dataset explains."""
    if resolved.corpora is not None:
        return resolved.corpora.fingerprint
    path = resolved.config.data.path
    assert path is not None, "data without corpora is one file"
    try:
        return xxhash.xxh3_128_hexdigest(resolve_package_path(path).read_bytes())
    except (OSError, DataError):
        return None
