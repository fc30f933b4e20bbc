"""As much of an engine as the checkpoint store asks for: fragments of given tensors under any division, with
a real optimizer over them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmtrain.checkpoint import store
from llmtrain.checkpoint.manifest import step_folder
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.engine.base import Fragment
from llmtrain.parallel.layout import Layout
from llmtrain.tensor_boxes import Shard


class Cut(NamedTuple):
    """Elements [start, stop) of the flattened shard of a parameter."""

    name: str
    shard: Shard
    start: int
    stop: int


def whole_cuts(tensors: Mapping[str, torch.Tensor]) -> list[Cut]:
    return [Cut(name, Shard(tuple(t.shape)), 0, t.numel()) for name, t in tensors.items()]


def take(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The cut's elements, 1-D, padding 0: indexing alone, a second opinion on boxes."""
    whole = tensor.reshape(tensor.shape or (1,))
    dim, index, count = cut.shard.dim, cut.shard.index, cut.shard.count
    part = -(-whole.shape[dim] // count)
    lengths = [0] * (2 * (whole.ndim - 1 - dim)) + [0, part * count - whole.shape[dim]]
    padded = torch.nn.functional.pad(whole, lengths)
    return padded.narrow(dim, index * part, part).reshape(-1)[cut.start : cut.stop].clone()


class Owner:
    """One rank. Each cut lies at an offset of a holder of its own, after one step of AdamW."""

    device = torch.device("cpu")
    model = torch.nn.Module()
    layout = Layout(1, 1, 1, 1, 1, 0, 2, 4, 8, 32)

    def __init__(self, tensors: Mapping[str, torch.Tensor], cuts: Sequence[Cut] | None = None) -> None:
        self.cuts = whole_cuts(tensors) if cuts is None else list(cuts)
        self.holders = [
            torch.nn.Parameter(torch.cat([torch.full((3,), 7.0), take(tensors[cut.name], cut)]))
            for cut in self.cuts
        ]
        # torch.optim refuses an empty list, which a rank without a share has.
        spare = [torch.nn.Parameter(torch.zeros(1))]
        self.optimizer = torch.optim.AdamW(self.holders or spare, lr=0.1)
        self.refreshed = 0
        self.step()

    def step(self) -> None:
        """Change all of the state, in place."""
        for holder in self.holders:
            holder.grad = holder.detach().clone()
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.state.clear()
        with torch.no_grad():
            for holder in self.holders:
                holder.fill_(-1.0)

    def fragments(self) -> list[Fragment]:
        pairs = zip(self.cuts, self.holders, strict=True)
        return [Fragment(*cut, holder, 3) for cut, holder in pairs]

    held_fragments = fragments

    def scaler_state(self) -> dict[str, float]:
        return {"scale": 4.0}

    def load_scaler_state(self, state: object) -> None:
        assert state == {"scale": 4.0}

    def refresh_weights(self) -> None:
        self.refreshed += 1

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Of each cut: weight, moments and step counter."""
        found = []
        for fragment in self.fragments():
            kept = {"weight": fragment.view_of(fragment.holder).clone()}
            for key, value in self.optimizer.state[fragment.holder].items():
                kept[key] = (fragment.view_of(value) if value.ndim else value).clone()
            found.append(kept)
        return found


def save(root: Path, owners: Sequence[Owner], step: int = 1, **description: Any) -> Checkpoint:
    """A checkpoint of several ranks, written by one process."""
    partial = store.begin(root, step)
    shares = [store.write_share(partial, rank, store.collect(owner)) for rank, owner in enumerate(owners)]  # type: ignore[arg-type]
    facts = store.describe(owners[0], step, description)  # type: ignore[arg-type]
    store.assemble(partial, step, shares, facts, None)
    return Checkpoint.open(root / step_folder(step))


MATRIX = {"w": torch.arange(24.0).reshape(4, 6)}
"""A parameter to cut."""


def flat(*ends: int) -> list[Cut]:
    """MATRIX cut at `ends`."""
    return [Cut("w", Shard((4, 6)), start, stop) for start, stop in itertools.pairwise(ends)]
