"""The keys of `llmtrain plan` and `llmtrain plan search` besides those of a run, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.plan.config import AssumeConfig


@dataclass(frozen=True)
class BudgetConfig:
    """A budget of computation, for which the best size of a model and number of tokens are sought."""

    device_hours: float | None = None
    """Hours of one device, over all devices; null: as `days` gives."""
    days: float | None = None
    """Days on world_size devices; null: as `device_hours` gives. Both null: no budget."""
    loss_floor: float = 1.69
    """E of the law of the loss, E + A / N^alpha + B / D^beta for N parameters and D tokens (Hoffmann et al.,
    arXiv:2203.15556, equation 10): the entropy of text."""
    size_factor: float = 406.4
    """A of that law."""
    size_exponent: float = 0.34
    """alpha of that law."""
    token_factor: float = 410.7
    """B of that law."""
    token_exponent: float = 0.28
    """beta of that law."""

    def problems(self) -> Iterator[Problem]:
        for name in ("device_hours", "days"):
            value = getattr(self, name)
            yield from require(value is None or value > 0, name, value, "more than 0, or null")
        both = self.device_hours is not None and self.days is not None
        yield from require(not both, "days", self.days, "null beside budget.device_hours", "give one of them")
        for name in ("size_factor", "token_factor"):
            yield from require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("size_exponent", "token_exponent"):
            value = getattr(self, name)
            yield from require(0.05 <= value <= 1, name, value, "0.05 to 1")

    @property
    def is_given(self) -> bool:
        return self.device_hours is not None or self.days is not None


@dataclass(frozen=True)
class PlanKeys:
    """What `llmtrain plan` takes besides the keys of a run."""

    world_size: int | None = None
    """Number of processes; null: as many as the launcher started, else 1."""
    format: Literal["text", "json"] = "text"
    """A table, or one JSON object."""
    dry_run: bool = False
    """Also build the engine of one rank and run a step over tensors without values, to report its real
    process groups, collectives and bytes. Needs torch, and no GPU."""
    rank: tuple[str, ...] = ("0",)
    """The rank of the dry run, or several of them: numbers, and first, middle, last."""
    assume: AssumeConfig = field(default_factory=AssumeConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def problems(self) -> Iterator[Problem]:
        size = self.world_size
        yield from require(size is None or size >= 1, "world_size", size, "1 or more, or null")


@dataclass(frozen=True)
class SearchKeys(PlanKeys):
    """What `llmtrain plan search` takes besides the keys of a run."""

    rank_by: Literal["time", "memory", "cost"] = "time"
    """What the best layout minimizes: seconds of a step, bytes of a process, or dollars of a token, for which
    fewer processes than world_size are tried too. `objective=time` says the same."""
    top: int = 10
    """Number of layouts to print."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(1 <= self.top <= 1000, "top", self.top, "1 to 1000")
        yield from require(not self.dry_run, "dry_run", "true", "false in a search", "use llmtrain plan")
