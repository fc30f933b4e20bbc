"""A model with what LoRA added to its matrices summed into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from llmtrain.adapt.modules import LowRank
from llmtrain.errors import ConfigError, Problem
from llmtrain.interchange.products import filled, products_in
from llmtrain.interchange.trained import TrainedModel
from llmtrain.models.skeleton import skeleton_of


def merged(trained: TrainedModel) -> TrainedModel:
    """Return an ordinary model that computes the same, which needs no base.

    Raise ConfigError for bottlenecks, which no matrix can hold.
    """
    adaptation = trained.config.adaptation
    if adaptation is None:
        return replace(trained, base=None, left_out=frozenset())
    if not adaptation.fits_into_matrices:
        got = f"{trained.source}, trained with method={adaptation.method}"
        allowed = "a model trained with lora, bitfit, or without such a method"
        remedy = "use it here: evaluate, predict and generate take it as it is"
        raise ConfigError(Problem("checkpoint", got, allowed, remedy))
    config = replace(trained.config, adaptation=None)  # type: ignore[type-var]
    weights = _Sums(trained.weights, products_in(skeleton_of(trained.config)))
    return replace(trained, config=config, weights=weights, base=None, left_out=frozenset())


class _Sums(Mapping[str, torch.Tensor]):
    """Name → weight, with the product beside it added on access, in fp32."""

    def __init__(self, weights: Mapping[str, torch.Tensor], products: Mapping[str, LowRank]) -> None:
        self._weights, self._products = weights, products
        self._names = [name for name in weights if ".lora." not in name]

    def __getitem__(self, name: str) -> torch.Tensor:
        matrix = name.removesuffix(".weight")
        product = self._products.get(matrix) if name.endswith(".weight") else None
        if product is None:
            return self._weights[name]
        added = filled(product, self._weights[f"{matrix}.lora.a"], self._weights[f"{matrix}.lora.b"])
        return self._weights[name].float() + added.b @ added.a

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
