"""Configuration of the penalties that keep a fine-tuned model near the one that it started from. Free of
torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.optim.groups import Penalty


@dataclass(frozen=True)
class TransferConfig:
    """Terms of the loss besides the task's, with a model that starts from model.path."""

    l2_sp: float = 0.0
    """Factor of the squared distance of the weights from the values that they started from (L2-SP,
    arXiv:1802.01483); its gradient is added after clipping. Parameters that model.path lacks, such as the
    head, are left out. 0: none."""
    l2_new: float = 0.0
    """Factor of the squared size of the parameters that model.path lacks, such as the head. 0: none."""

    def problems(self) -> Iterator[Problem]:
        for name in ("l2_sp", "l2_new"):
            factor = getattr(self, name)
            yield from require(0.0 <= factor < float("inf"), name, factor, "0 or more")

    @property
    def weight_copies(self) -> int:
        """Return how many fp32 copies of the trained weights are held beside the optimizer's state."""
        return int(self.l2_sp > 0)

    def penalties(self, names: Collection[str], new: Collection[str]) -> dict[str, Penalty]:
        """Return the penalty of each parameter that has one. names: of all parameters; new: those that
        model.path lacks."""
        of_new, of_old = Penalty(self.l2_new, False), Penalty(self.l2_sp, True)
        found = {name: of_new if name in new else of_old for name in names}
        return {name: penalty for name, penalty in found.items() if penalty.factor > 0}
