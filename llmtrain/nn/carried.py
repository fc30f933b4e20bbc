"""States that the rows of a step hand on to the rows of the next (truncated back-propagation through time).

Dim names: B rows of a batch, G rows of a step, C numbers of a state.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_HALF = 1 << 20
"""Numbers of samples are stored in two fp32 numbers, each exact."""


class CarriedStates:
    """The state after the last token of each row of a step, and the sample that may go on from it."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows, self.width = rows, width
        self._values_GC = torch.zeros(rows, width, device=device)
        self._next_G = torch.full((rows,), -1, dtype=torch.int64, device=device)

    def before(self, lanes_B: Tensor, samples_B: Tensor) -> Tensor:
        """Return the state that each row begins from, (B, C) fp32: that of the row before it, or zeros.

        lanes_B: number of each row within its step; samples_B: number of its sample in the corpus."""
        goes_on_B1 = (self._next_G[lanes_B] == samples_B)[:, None]
        return self._values_GC[lanes_B] * goes_on_B1

    def keep(self, lanes_B: Tensor, samples_B: Tensor, states_BC: Tensor, ends_B: Tensor) -> None:
        """Keep the states after these rows. ends_B: whether the next row begins another text."""
        self._values_GC[lanes_B] = states_BC.detach().float()
        self._next_G[lanes_B] = torch.where(ends_B, -1, samples_B + 1)

    def packed(self) -> Tensor:
        """Return a copy of all of it, (G, C + 2) fp32."""
        halves = (self._next_G + 1) % _HALF, (self._next_G + 1) // _HALF
        return torch.cat((self._values_GC, *(half[:, None].float() for half in halves)), dim=1)

    def unpack(self, packed_GC: Tensor) -> None:
        """Restore the result of `packed`."""
        packed_GC = packed_GC.to(self._values_GC.device)
        self._values_GC = packed_GC[:, :-2].clone()
        low_G, high_G = packed_GC[:, -2:].long().unbind(1)
        self._next_G = low_G + high_G * _HALF - 1


@runtime_checkable
class CarriesStates(Protocol):
    """A model whose rows may begin from the states of earlier rows."""

    carried: CarriedStates | None

    def carry_states(self, rows: int, device: torch.device) -> None:
        """From now on, carry the states of so many rows from training step to training step."""
