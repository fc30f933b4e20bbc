"""Models whose forward is a list of steps, which pipelines divide and recomputation repeats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmtrain.nn.head import TiedHeadModel
from llmtrain.nn.transformer import Context


class Stage(NamedTuple):
    """One step of a forward, with the modules that hold its parameters."""

    modules: dict[str, nn.Module]
    """Canonical name → module."""
    run: Callable[[Tensor, Any], Any]
    """(output of the previous step, the model's context) → input of the next; the last step returns
    logits, the summed loss, or sums by name."""


class ZeroSums(dict[str, Tensor]):
    """Sums by name in a pipeline stage that has none: each is 0."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros((), device=self._device)


@runtime_checkable
class HasLevels(Protocol):
    """A model with layers that methods of fine-tuning tell apart."""

    def levels(self) -> list[list[str]]:
        """Return the names of its modules by depth: embeddings, each layer from the bottom, and what follows
        the last, the head among it. Each parameter belongs to one of them, a shared one by its first name."""


class StagedModel(TiedHeadModel):
    """A language model whose forward runs its stages one after another."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the steps of a forward in order."""

    def levels(self) -> list[list[str]]:
        """Return the names of modules by depth; see HasLevels."""
        return [list(stage.modules) for stage in self.stages()]

    @abstractmethod
    def context(self, tokens_BT: Tensor, *_: Any, **arguments: Any) -> Context:
        """Return the arguments shared by all stages; documents the arguments and the result of forward."""

    def forward(self, tokens_BT: Tensor, **arguments: Any) -> Any:
        """Run all stages and return what `context` documents for these arguments. Advance a given cache."""
        context = self.context(tokens_BT, **arguments)
        x: Any = tokens_BT
        for stage in self.stages():
            x = stage.run(x, context)
        if context.cache is not None:
            context.cache.length += context.positions.shape[1]
        return x
