"""Configs of what fine-tuning adds to a model. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.sharding import Table


class Addition:
    """Base of the configs."""

    method: str
    fits_into_matrices: ClassVar = False
    """Whether what it adds can be summed into matrices of the model."""
    is_in_rows: ClassVar = False
    """Whether its virtual tokens are tokens of the rows, beside those of the text."""

    @property
    def usual(self) -> Addition:
        """Return the config with the default of each key."""
        return type(self)()

    @property
    def sharding(self) -> Table:
        """Return pattern → role of added modules that tensor parallelism divides in a way of their own; of
        others the role of the layer that they are added to says it."""
        return {}

    @property
    def virtual_tokens(self) -> int:
        """Return the tokens that it puts before those of a row."""
        return 0


@dataclass(frozen=True)
class LoraConfig(Addition):
    """LoRA (arXiv:2106.09685): W·x + scale·B·A·x, with W frozen."""

    fits_into_matrices: ClassVar = True

    method: Literal["lora"] = field(default="lora", metadata={INTERNAL: True})
    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability of what A reads."""
    targets: tuple[str, ...] = ()
    """fnmatch patterns of the matrices' names, or of their ends: `mlp.*`, `query`; none: all matrices of the
    layers. A matrix that holds several (`attention.qkv`) has its parts as targets (`qkv.query`), each with
    an A of its own; if it is named itself, it has one for all."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    start: Literal["uniform", "normal"] = "uniform"
    """Values that A starts from, B from 0. uniform: between ±1 / sqrt(columns), as in Microsoft's and in
    PEFT's; normal: of standard deviation 1 / rank."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def problems(self) -> Iterator[Problem]:
        yield from require(self.rank >= 1, "rank", self.rank, "1 or more")
        yield from require(self.alpha > 0, "alpha", self.alpha, "more than 0")
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")


@dataclass(frozen=True)
class AdapterConfig(Addition):
    """Bottleneck adapters: y + up·f(down·y) after sublayers of each layer, with the rest frozen."""

    method: Literal["adapter"] = field(default="adapter", metadata={INTERNAL: True})
    kind: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: after attention and after the MLP (arXiv:1902.00751); pfeiffer: after the MLP alone
    (arXiv:2005.00247)."""
    width: int = 64
    """Rows of down and columns of up."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "relu"
    """The function f."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.width >= 1, "width", self.width, "1 or more")


@dataclass(frozen=True)
class PrefixConfig(Addition):
    """Prefix tuning (arXiv:2101.00190): learned keys and values before those of each layer's tokens."""

    method: Literal["prefix"] = field(default="prefix", metadata={INTERNAL: True})
    length: int = 20
    """Keys of each head; positions of tokens count from here."""

    @property
    def sharding(self) -> Table:
        return {"*.prefix": "added_heads"}

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def problems(self) -> Iterator[Problem]:
        yield from require(self.length >= 1, "length", self.length, "1 or more")


@dataclass(frozen=True)
class PromptConfig(Addition):
    """Prompt tuning (arXiv:2104.08691): learned vectors before the embeddings of each row's tokens."""

    is_in_rows: ClassVar = True

    method: Literal["prompt"] = field(default="prompt", metadata={INTERNAL: True})
    length: int = 20
    """Vectors, which count as tokens of the row beyond batch.sequence_length."""

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def problems(self) -> Iterator[Problem]:
        yield from require(self.length >= 1, "length", self.length, "1 or more")


Adaptation = LoraConfig | AdapterConfig | PrefixConfig | PromptConfig
"""The `adaptation` of a model's config: it describes the parameters that were added to the model."""
