"""What describes the machines that a run is for, free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class ClusterConfig:
    """The machines a run is meant for; all null: this machine."""

    name: str = "local"
    """Name that messages use."""
    device: Literal["cpu", "cuda"] | None = None
    """Kind of device; null: what this machine has."""
    devices_per_node: int | None = None
    """Processes that share one host."""
    memory_bytes: int | None = None
    """Memory of one device; null: this machine's."""
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    """Dense matrix FLOPs per second of one device by precision (fp32, bf16, fp16), as its vendor says."""

    def problems(self) -> Iterator[Problem]:
        for name in ("devices_per_node", "memory_bytes"):
            value = getattr(self, name)
            yield from require(value is None or value >= 1, name, value, "1 or more, or null")

    @property
    def is_local(self) -> bool:
        """Whether it is this machine that is planned for."""
        return self.memory_bytes is None
