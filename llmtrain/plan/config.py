"""The configuration of the machines that a run is planned for, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a run is planned for; all null: this machine."""

    name: str = "local"
    """Name of the cluster in messages."""
    device: Literal["cpu", "cuda"] | None = None
    """Kind of device; null: the kind that this machine has."""
    devices_per_node: int | None = None
    """Number of devices, and so of processes, of one host."""
    memory_bytes: int | None = None
    """Memory of one device; null: this machine's."""
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    """Peak FLOP/s of dense matrix products of one device, by precision (fp32, bf16, fp16)."""

    def problems(self) -> Iterator[Problem]:
        for name in ("devices_per_node", "memory_bytes"):
            value = getattr(self, name)
            yield from require(value is None or value >= 1, name, value, "1 or more, or null")

    @property
    def is_local(self) -> bool:
        """Whether the run is planned for this machine."""
        return self.memory_bytes is None
