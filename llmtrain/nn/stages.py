"""A forward in steps, which pipelines divide and recomputation repeats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmtrain.nn.head import TiedHeadModel
from llmtrain.nn.transformer import Context


class Stage(NamedTuple):
    """One step of a forward, with the modules that hold its parameters."""

    modules: dict[str, nn.Module]
    """Canonical name → module."""
    run: Callable[[Tensor, Any], Tensor]
    """(what the step before gave, the model's context) → what the next takes."""


class StagedModel(TiedHeadModel):
    """A language model whose forward is its stages, one behind the other."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The steps that forward runs, in order."""

    @abstractmethod
    def context(self, tokens_BT: Tensor, *_: Any, **arguments: Any) -> Context:
        """What all stages of one forward share; tells of the arguments, and of what forward then gives."""

    def forward(self, tokens_BT: Tensor, **arguments: Any) -> Tensor:
        """Token ids → what `context` says of these arguments. A cache among them takes these tokens."""
        context = self.context(tokens_BT, **arguments)
        x = tokens_BT
        for stage in self.stages():
            x = stage.run(x, context)
        if context.cache is not None:
            context.cache.length += tokens_BT.shape[1]
        return x
