"""Layers of recurrent cells, computed by torch's fused kernels; over packed rows, one document at a time.

Dim names: B batch, T sequence, D hidden width, P documents of like length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What a cell passes from one token to the next, (1, B, D) each: (h,); of an LSTM (h, c)."""


Layer = Callable[[Tensor, "State | None"], tuple[Tensor, State]]


class Cells(nn.Module):
    """Base of layers of one kind of cell in one direction, beside one of torch's modules."""

    def forward(
        self, x_BTD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State | None]:
        """Return the hidden states of all tokens, (B, T, D), and the state after the last.

        documents: those of packed rows; see Documents.run. They are divided in here, because ZeRO 3 gathers
        weights at each call of a module, which all ranks have to make equally often.
        """
        if documents is not None:
            return documents.run(self._read, x_BTD, state)
        return self._read(x_BTD, state)

    def _read(self, x_BTD: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Read rows of one text each.

        Computes in fp32 if autocast requests a low precision that this CPU has no kernel for, where torch
        would fail or round at each step.
        """
        run: Any = super().forward
        if x_BTD.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or self._has_low_precision():
            states_BTD, last = run(x_BTD, self._given(state))
        else:
            if state is not None:
                state = tuple(part.float() for part in state)
            with torch.autocast("cpu", enabled=False):
                states_BTD, last = run(x_BTD.float(), self._given(state))
        return states_BTD, last if isinstance(last, tuple) else (last,)

    def _given(self, state: State | None) -> Any:
        """Return a state as torch's module takes it."""
        return state if state is None or self._has_cell_state else state[0]

    _has_cell_state = False

    def _has_low_precision(self) -> bool:
        return False


class RNN(Cells, nn.RNN):  # type: ignore[misc]
    """h' = f(W x + b + U h + c), with f tanh or max(0, ·)."""

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str = "tanh") -> None:
        nn.RNN.__init__(self, input_size, hidden_size, nonlinearity=nonlinearity, batch_first=True)


class GRU(Cells, nn.GRU):  # type: ignore[misc]
    """Gated recurrent units as cuDNN has them: the reset gate acts after the product with the state."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        nn.GRU.__init__(self, input_size, hidden_size, batch_first=True)


class LSTM(Cells, nn.LSTM):  # type: ignore[misc]
    """Long short-term memory with a forget gate and without peepholes."""

    _has_cell_state = True

    def __init__(self, input_size: int, hidden_size: int) -> None:
        nn.LSTM.__init__(self, input_size, hidden_size, batch_first=True)

    def _has_low_precision(self) -> bool:
        return has_low_precision_kernel()


def has_low_precision_kernel() -> bool:
    """Return whether this CPU can run an LSTM in bf16; plan/machine.py determines it without torch."""
    name = "_is_mkldnn_bf16_supported"
    return hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()


def make_cells(kind: str, input_size: int, hidden_size: int, nonlinearity: str = "tanh") -> Cells:
    """Return one direction of a layer of cells. kind: rnn, gru or lstm; nonlinearity: of rnn."""
    if kind == "rnn":
        return RNN(input_size, hidden_size, nonlinearity)
    return {"gru": GRU, "lstm": LSTM}[kind](input_size, hidden_size)


class Documents:
    """The documents of packed rows, each of which a layer reads from a state of zeros.

    Those of like length, between two powers of two, go through a layer as the rows of one batch, so that
    padding at most doubles the work.
    """

    def __init__(self, documents_BT: Tensor, goes_on: bool = False) -> None:
        """documents_BT: the number of each token's document; one goes on as long as the number stays.
        goes_on: the first document of each row may begin from a state, and that after the last is wanted."""
        B, T = documents_BT.shape
        begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        firsts = begins_BT.flatten().nonzero().squeeze(1)
        ends = torch.cat((firsts[1:], firsts.new_tensor([B * T])))
        lengths = ends - firsts
        self._shape = (B, T)
        self._groups: list[tuple[Tensor, Tensor]] = []
        widths = [1 << (n - 1).bit_length() for n in lengths.tolist()]
        if goes_on:
            # The state after a padded row would be that after its padding.
            widths = [
                n if end % T == 0 else w
                for n, w, end in zip(lengths.tolist(), widths, ends.tolist(), strict=True)
            ]
        widths_P = torch.tensor(widths, device=firsts.device)
        self._rows, self._begins, self._ends = firsts // T, firsts % T == 0, ends % T == 0
        self._of_group: list[Tensor] = []
        for width in widths_P.unique().tolist():
            of_width = widths_P == width
            places = torch.arange(width, device=firsts.device)
            indices_PW = (firsts[of_width, None] + places).clamp(max=B * T - 1)
            self._groups.append((indices_PW, places < lengths[of_width, None]))
            self._of_group.append(of_width.nonzero().squeeze(1))
        places = torch.cat([indices[is_token] for indices, is_token in self._groups])
        self._order = torch.empty_like(places)
        self._order[places] = torch.arange(B * T, device=places.device)

    def run(self, layer: Layer, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Return the hidden states of all tokens, (B, T, D), and with a state to begin from, if documents go
        on, that after the last token of each row."""
        flat = x_BTD.flatten(0, 1)
        found, lasts, rows = [], [], []
        for (indices_PW, is_token_PW), numbers in zip(self._groups, self._of_group, strict=True):
            x_PWD = flat.index_select(0, indices_PW.flatten()).unflatten(0, indices_PW.shape)
            first = None
            if state is not None:
                begins_P1 = self._begins[numbers, None]
                first = tuple((part[:, self._rows[numbers]] * begins_P1).contiguous() for part in state)
            states_PWD, last = layer(x_PWD, first)
            found.append(states_PWD[is_token_PW])
            ends = self._ends[numbers]
            lasts.append(tuple(part[:, ends] for part in last))
            rows.append(self._rows[numbers][ends])
        states_BTD = torch.cat(found).index_select(0, self._order).unflatten(0, self._shape)
        if state is None:
            return states_BTD, None
        order_B = torch.cat(rows).argsort()
        return states_BTD, tuple(torch.cat(parts, dim=1)[:, order_B] for parts in zip(*lasts, strict=True))


class Reversal:
    """Texts from their last token to their first; the padding after them stays. Twice is the text again."""

    def __init__(self, lengths_B: Tensor, T: int) -> None:
        places_T = torch.arange(T, device=lengths_B.device)
        is_token_BT = places_T < lengths_B[:, None]
        sources_BT = torch.where(is_token_BT, lengths_B[:, None] - 1 - places_T, places_T)
        rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        self._sources = (rows_B1 * T + sources_BT).flatten()

    def __call__(self, x_BTD: Tensor) -> Tensor:
        # Unlike gather, it keeps no input for the backward pass.
        return x_BTD.flatten(0, 1).index_select(0, self._sources).view(x_BTD.shape)
