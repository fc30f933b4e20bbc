"""Products of low rank in our form and in that of Hugging Face's matrices, which hold the same numbers in
other rows: one of ours may be three of theirs, and the other way round.

Dim names: O outputs of a matrix, I its inputs, R rank of a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.adapt.modules import LowRank, spread
from llmtrain.models.huggingface.form import Entry


@dataclass(frozen=True)
class Product:
    """B·A, which is added to a matrix."""

    a: Tensor
    """(R, I)."""
    b: Tensor
    """(O, R), with its scale."""

    @property
    def rank(self) -> int:
        return len(self.a)


def products_in(model: nn.Module) -> dict[str, LowRank]:
    """Return matrix → the product beside it."""
    found = ((name.removesuffix(".lora"), module) for name, module in model.named_modules())
    return {name: module for name, module in found if isinstance(module, LowRank)}


def theirs_of(
    entry: Entry, products: Mapping[str, LowRank], weights: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Product]:
    """Return name of a weight of theirs → the product that is added to it, of those of an entry that have
    one.

    products: our matrices → products without values; weights: name → values of these, as `NAME.lora.a`.
    """
    ours = [name.removesuffix(".weight") for name in entry.all_ours]
    if not any(name in products for name in ours):
        return {}
    rows = [model.get_parameter(name).shape[0] for name in entry.all_ours]
    a, b, touched = [], [], []
    for name, count in zip(ours, rows, strict=True):
        product = products.get(name)
        if product is None:
            b.append(torch.zeros(count, 0))
            touched.append(torch.zeros(count, 0))
            continue
        added = filled(product, weights[f"{name}.lora.a"], weights[f"{name}.lora.b"])
        a.append(added.a)
        b.append(added.b)
        touched.append(filled(product, added.a, torch.ones_like(product.b, device="cpu")).b)
    found = {}
    parts = zip(entry.theirs, _split(entry, b), _split(entry, touched), strict=True)
    for name, own, has in parts:
        columns = has.any(dim=0)
        if columns.any():
            found[name] = Product(torch.cat(a)[columns].contiguous(), own[:, columns].contiguous())
    return found


def is_by_inputs(entry: Entry, model: nn.Module) -> bool:
    """Return whether theirs of an entry are stored as (I, O), as GPT-2's are."""
    shapes = [(model.get_parameter(name).shape[0], 0) for name in entry.all_ours]
    parts = entry.split_all([torch.empty(shape, device="meta") for shape in shapes])
    return any(part.ndim == 2 and part.shape[0] == 0 for part in parts)


def shapes_of(entry: Entry, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name of a matrix of theirs → (O, I)."""
    ours = [torch.empty(model.get_parameter(name).shape, device="meta") for name in entry.all_ours]
    shapes = zip(entry.theirs, entry.split_all(ours), strict=True)
    is_turned = len(ours[0].shape) == 2 and is_by_inputs(entry, model)
    return {name: tuple(part.shape)[:: -1 if is_turned else 1] for name, part in shapes}


def ours_of(entry: Entry, given: Mapping[str, Product], model: nn.Module) -> dict[str, Product]:
    """Return name of a matrix of ours → the product that `given`, theirs by name, adds to it.

    Of several of theirs in one of ours, each keeps its rank: rows of B belong to the A of their part."""
    present = [given[name] for name in entry.theirs if name in given]
    if not present:
        return {}
    ranks = {product.rank for product in present}
    assert len(ranks) == 1, "they were made alike"
    shapes = [(model.get_parameter(name).shape[0], 0) for name in entry.all_ours]
    sizes = [part.shape[0] for part in _split(entry, [torch.empty(shape) for shape in shapes])]
    columns = ranks.pop()
    parts = [
        given[name].b if name in given else torch.zeros(size, columns)
        for name, size in zip(entry.theirs, sizes, strict=True)
    ]
    if is_by_inputs(entry, model):
        parts = [part.T for part in parts]
    joined = entry.join(parts)
    names = [name.removesuffix(".weight") for name in entry.all_ours]
    a = torch.cat([product.a for product in present])
    return {name: Product(a, b) for name, b in zip(names, joined.chunk(len(names)), strict=True)}


def values_of(product: LowRank, held: Product) -> tuple[Tensor, Tensor]:
    """Return the values of `a` and `b` of a product of ours, whose rows `held` has as those of the layer,
    without the scale of ours."""
    b = held.b / product.config.scale
    if product.packing is not None:
        packing = product.packing
        grouped = b.view(-1, packing.units_of_group, packing.width, b.shape[1])
        places = packing.places(product.parts)
        b = torch.cat([grouped[:, place] for place in places], dim=1).flatten(0, 2)
    return held.a.contiguous(), b.contiguous()


def filled(product: LowRank, a: Tensor, b: Tensor) -> Product:
    """Return the product with these values of its parameters, over all rows of its layer."""
    whole = b if product.packing is None else spread(b, product.packing, product.parts)
    return Product(a, product.config.scale * whole)


def _split(entry: Entry, columns: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices of the rows of theirs: (O, R) for columns (O, R) of each of ours in turn, whose R are
    told apart."""
    whole = torch.block_diag(*columns) if len(columns) > 1 else columns[0]
    # Their rows, not their columns, are looked for: theirs may be stored as (I, O).
    probe = [part.shape for part in entry.split(torch.empty(len(whole), 0))]
    parts = entry.split(whole)
    return [part.T if shape[0] == 0 else part for shape, part in zip(probe, parts, strict=True)]
