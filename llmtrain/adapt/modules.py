"""Modules that fine-tuning adds to a linear layer: a low-rank product (LoRA) or a bottleneck adapter.

Dim names: I inputs of the layer, O its outputs, P parts of its rows that are adapted, R rank, D hidden
width, W width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.adapt.config import AdapterConfig, LoraConfig
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Constant, Initializer, Normal, Uniform
from llmtrain.nn.linear import Linear, linear
from llmtrain.nn.transformer import ACTIVATIONS

_FIRST_NUMBER = 8192
"""Beyond the numbers of layers and heads, so that the masks of LoRA's dropout are its own."""
STARTING_STD = 0.02
"""Standard deviation of the initial values of a bottleneck's down matrix."""


@dataclass(frozen=True)
class Packing:
    """Layout of a matrix that holds several parts, such as queries, keys and values.

    Its rows form groups; each group contains the units of the first part, then those of the next, and so on.
    """

    units: Mapping[str, int]
    """Name of a part → its units in a group."""
    width: int
    """Rows of a unit."""

    @property
    def units_of_group(self) -> int:
        return sum(self.units.values())

    def places(self, parts: Sequence[str]) -> list[slice]:
        """Return the units of each of `parts` within a group."""
        first, found = 0, {}
        for name, count in self.units.items():
            found[name] = slice(first, first + count)
            first += count
        return [found[part] for part in parts]


def spread(b: Tensor, packing: Packing, parts: Sequence[str]) -> Tensor:
    """Return (O, P·R) from the rows of `parts`, (…, R): rows of other parts, and columns of others, are 0."""
    held = Packing({part: packing.units[part] for part in parts}, packing.width)
    grouped, R = b.view(-1, held.units_of_group, packing.width, b.shape[1]), b.shape[1]
    whole = b.new_zeros(len(grouped), packing.units_of_group, packing.width, len(parts), R)
    places = zip(packing.places(parts), held.places(parts), strict=True)
    for number, (place, own) in enumerate(places):
        whole[:, place, :, number] = grouped[:, own]
    return whole.view(-1, len(parts) * R)


class LowRank(nn.Module):
    """scale · B·A·x, of which A and B train (arXiv:2106.09685, section 4.1).

    `a` (P·R, I) has the A of each part in turn; `b` has the rows of the adapted parts in the order of the
    layer's own, (O, R) if these are all. A slice of whole groups of its rows fits that slice of the layer.
    """

    def __init__(
        self,
        layer: nn.Linear,
        config: LoraConfig,
        number: int,
        packing: Packing | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        """number: of this product in the model, which makes its dropout masks its own.
        parts: of the packing, in its order; none: the layer is taken as one matrix."""
        super().__init__()
        self.config = config
        self.packing, self.parts = packing if parts else None, tuple(parts)
        rows = layer.out_features
        if self.packing is not None:
            held = sum(self.packing.units[part] for part in self.parts)
            rows = rows // self.packing.units_of_group * held
        self.a = nn.Parameter(torch.empty(max(1, len(self.parts)) * config.rank, layer.in_features))
        self.b = nn.Parameter(torch.empty(rows, config.rank))
        self.dropout = Dropout(config.dropout, _FIRST_NUMBER + number, HIDDEN)
        self.keys: Tensor | None = None
        """Keys of the rows of the batch, from which dropout masks are generated."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        # What has no rows of a batch, such as the distances of XLNet's positions, is not dropped.
        dropped = self.dropout(x, self.keys) if x.ndim == 3 else x
        return linear(linear(dropped, self.a) * self.config.scale, self.up())

    def up(self) -> Tensor:
        """Return B of all rows of the layer and all parts, (O, P·R), which is 0 where a row is of another
        part: up() @ a is the product."""
        return self.b if self.packing is None else spread(self.b, self.packing, self.parts)

    def initializers(self, name: str) -> dict[str, Initializer]:
        """Return those of its parameters, `name` being its own: the product starts at 0."""
        bound = self.a.shape[1] ** -0.5
        start: Initializer = Uniform(bound)
        if self.config.start == "normal":
            start = Normal(1.0 / self.config.rank)
        return {f"{name}.a": start, f"{name}.b": Constant(0.0)}


class Bottleneck(nn.Module):
    """up·f(down·y), which starts at 0."""

    def __init__(self, hidden_size: int, config: AdapterConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.down = nn.Parameter(torch.empty(config.width, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(config.width))
        self.up = nn.Parameter(torch.empty(hidden_size, config.width))
        self.up_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, y_BTD: Tensor) -> Tensor:
        h_BTW = ACTIVATIONS[self.activation](linear(y_BTD, self.down, self.down_bias))
        return linear(h_BTW, self.up, self.up_bias)

    def initializers(self, name: str) -> dict[str, Initializer]:
        """Return those of its parameters, `name` being its own."""
        zero = Constant(0.0)
        table: dict[str, Initializer] = {f"{name}.{key}": zero for key in ("down_bias", "up", "up_bias")}
        return {f"{name}.down": Normal(STARTING_STD), **table}


class AdaptedLinear(Linear):
    """A linear layer with a product beside it, or a bottleneck behind it. It holds the layer's parameters."""

    lora: LowRank | None
    adapter: Bottleneck | None

    def __init__(
        self, layer: nn.Linear, *, lora: LowRank | None = None, adapter: Bottleneck | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora, self.adapter = lora, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora is not None:
            y = y + self.lora(x)
        return y if self.adapter is None else y + self.adapter(y)
