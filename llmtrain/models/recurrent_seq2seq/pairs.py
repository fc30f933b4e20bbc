"""Pairs of packed rows, each as a row of its own.

Dim names: B rows, T tokens of a row, P pairs, U tokens of the longest pair on this side.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 0x9E3779B1


class Pairs:
    """The pairs of a batch whose rows hold several, in the order of rows and numbers."""

    def __init__(self, documents_BT: Tensor, per_row: int) -> None:
        """documents_BT: number within its row of the pair of each target token, −1 at padding; per_row:
        numbers that a row may have."""
        self.per_row = per_row
        rows_B1 = torch.arange(len(documents_BT), device=documents_BT.device)[:, None]
        self.numbers_P = (rows_B1 * per_row + documents_BT)[documents_BT >= 0].unique()

    def keys(self, keys_B: Tensor) -> Tensor:
        """Return the dropout key of each pair, from that of its row."""
        rows_P, numbers_P = self.numbers_P // self.per_row, self.numbers_P % self.per_row
        return (keys_B[rows_P] + numbers_P * _STEP) & 0x7FFFFFFF

    def side(self, documents_BT: Tensor) -> Side:
        """Return one side of the pairs; documents_BT as above, of its tokens."""
        rows_B1 = torch.arange(len(documents_BT), device=documents_BT.device)[:, None]
        numbers_BT = rows_B1 * self.per_row + documents_BT
        index_BT = torch.searchsorted(self.numbers_P, numbers_BT).clamp(max=len(self.numbers_P) - 1)
        is_token_BT = (documents_BT >= 0) & (self.numbers_P[index_BT] == numbers_BT)
        return Side(
            is_token_BT, index_BT[is_token_BT], places_in(documents_BT)[is_token_BT], len(self.numbers_P)
        )


class Side:
    """Where the tokens of packed rows stand when each pair is a row."""

    def __init__(self, is_token_BT: Tensor, pairs_M: Tensor, places_M: Tensor, count: int) -> None:
        """pairs_M, places_M: pair of each token that is none of padding, and its place in it."""
        self._is_token, self._pairs, self._places = is_token_BT, pairs_M, places_M
        self.lengths_P = torch.bincount(pairs_M, minlength=count)
        self._shape = (count, int(self.lengths_P.max()))

    def apart(self, tokens_BT: Tensor) -> Tensor:
        """Return the tokens of each pair, (P, U), 0 after them."""
        tokens_PU = tokens_BT.new_zeros(self._shape)
        tokens_PU[self._pairs, self._places] = tokens_BT[self._is_token]
        return tokens_PU

    def together(self, x_PUD: Tensor) -> Tensor:
        """Return what belongs to the tokens of the packed rows, (B, T, D), 0 at padding."""
        x_BTD = x_PUD.new_zeros(*self._is_token.shape, x_PUD.shape[-1])
        x_BTD[self._is_token] = x_PUD[self._pairs, self._places]
        return x_BTD


def places_in(documents_BT: Tensor) -> Tensor:
    """Return each token's place in its document, which goes on as long as the number stays."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT = torch.where(begins_BT, places_T, 0).cummax(dim=1).values
    return places_T - starts_BT
