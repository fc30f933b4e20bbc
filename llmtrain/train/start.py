"""The ranks of a run join, and check that their configurations and data agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from llmtrain.config import encode
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.distributed.agreement import Fact, run_facts
from llmtrain.errors import DataError
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


def _fingerprint(resolved: Resolved) -> str | None:
    """Return the fingerprint of the data that this rank sees; None for an unreadable file."""
    if resolved.corpora is not None:
        return resolved.corpora.fingerprint
    path = getattr(resolved.config.data, "path", None)
    assert path is not None, "data without corpora is one file"
    try:
        return xxhash.xxh3_128_hexdigest(resolve_package_path(path).read_bytes())
    except (OSError, DataError):
        return None
