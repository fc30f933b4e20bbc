"""Which keys each query sees when documents are packed into rows.

Dim names: B batch, T queries, S keys.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.nn.attention_blocks import Block, bidirectional_blocks, blocks_of_documents, hidden_keys


class Documents:
    """Documents packed into rows: a query sees the keys of its own document; if `causal`, up to itself.

    A document is a run of equal ids. Masks, borders and blocks are computed at first use and shared by all
    layers.
    """

    def __init__(self, ids_BT: Tensor, *, causal: bool = True, window: int | None = None) -> None:
        """window: maximum number of keys that a query sees, its own the last; only with `causal`."""
        self.causal = causal
        self.window = window
        self._ids_BT = ids_BT
        self._narrowed: Documents | None = None
        self._lengthened: Documents | None = None
        self._begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        self._begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]

    @cached_property
    def starts(self) -> Tensor:
        """Return the position in its row of the first key that each token sees, (B, T)."""
        positions_T = torch.arange(self._begins_BT.shape[1], device=self._begins_BT.device)
        starts_BT = (self._begins_BT * positions_T).cummax(1).values
        return starts_BT if self.window is None else starts_BT.maximum(positions_T - self.window + 1)

    def within(self, window: int) -> Documents:
        """Return the same documents seen through a window; cached."""
        if self._narrowed is None or self._narrowed.window != window:
            self._narrowed = Documents(self._ids_BT, causal=self.causal, window=window)
        return self._narrowed

    def after(self, count: int) -> Documents:
        """Return the same documents in rows with `count` more tokens of the first one before them; cached."""
        if self._lengthened is None or self._lengthened._ids_BT.shape[1] != count + self._ids_BT.shape[1]:
            first_BP = self._ids_BT[:, :1].expand(-1, count)
            ids_BT = torch.cat([first_BP, self._ids_BT], dim=1)
            self._lengthened = Documents(ids_BT, causal=self.causal, window=self.window)
        return self._lengthened

    @cached_property
    def ends(self) -> Tensor:
        """Return the position in its row after the last token of each token's document, (B, T)."""
        T = self._begins_BT.shape[1]
        is_last_BT = F.pad(self._begins_BT[:, 1:], (0, 1), value=True)
        positions_T = torch.arange(T, device=is_last_BT.device)
        return T - (is_last_BT.flip(1) * positions_T).cummax(1).values.flip(1)

    @cached_property
    def mask(self) -> Tensor:
        """Return (B, 1, T, T), True where a query sees a key."""
        T = self.starts.shape[1]
        return ~hidden_keys(self.starts, None if self.causal else self.ends, range(T), range(T))

    @cached_property
    def borders(self) -> tuple[Tensor, int]:
        """Return the start of each document among all B·T tokens, then B·T, int32 (documents + 1,); and
        the length of the longest document in tokens. On a GPU this synchronizes, once per forward pass."""
        starts = self._begins_BT.flatten().nonzero().flatten()
        borders = F.pad(starts, (0, 1), value=self._begins_BT.numel())
        return borders.to(torch.int32), int(borders.diff().max())

    @cached_property
    def blocks(self) -> list[Block]:
        """Return blocks of queries that cover all rows, each with the keys that any of its queries sees."""
        if self.causal:
            return list(blocks_of_documents(self.starts))
        B, T = self.starts.shape
        return list(bidirectional_blocks(B, T, T, self.starts, self.ends))


class CrossDocuments:
    """Documents of queries and of other keys: a query sees the keys of the document with its number.

    The keys of a document are contiguous. A query whose number no key has, or whose number is negative
    (padding), sees only the last key, so that its output is finite, but meaningless.
    """

    causal = False

    def __init__(self, ids_BT: Tensor, key_ids_BS: Tensor) -> None:
        self.num_keys = S = key_ids_BS.shape[1]
        own_BTS = (ids_BT[:, :, None] == key_ids_BS[:, None]) & (ids_BT >= 0)[:, :, None]
        own_BTS[..., -1] |= ~own_BTS.any(-1)
        own = own_BTS.to(torch.uint8)
        self.starts = own.argmax(-1)
        """Position of the first key that each query sees, (B, T)."""
        self.ends = S - own.flip(-1).argmax(-1)
        """Position after the last key that each query sees, (B, T)."""

    @cached_property
    def mask(self) -> Tensor:
        """Return (B, 1, T, S), True where a query sees a key."""
        return ~hidden_keys(self.starts, self.ends, range(self.starts.shape[1]), range(self.num_keys))

    @cached_property
    def blocks(self) -> list[Block]:
        """Return blocks of queries that cover all rows, each with the keys that any of its queries sees."""
        B, T = self.starts.shape
        return list(bidirectional_blocks(B, T, self.num_keys, self.starts, self.ends))
