"""Show samples as text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmtrain.tokenizers.base import Tokenizer

_CONTEXT = 8
"""Number of preceding tokens that determine how a token decodes: with a space, or as the rest of a
character."""


class Spelling:
    """Decodes tokens to text, special tokens to their names."""

    def __init__(
        self, tokenizer: Tokenizer, names: Mapping[int, str], marks: tuple[str, str] = ("⟦", "⟧")
    ) -> None:
        """names: id → name of special tokens; marks: what stands around tokens that bear no loss."""
        self._tokenizer, self._names, self._marks = tokenizer, names, marks

    def spell(self, tokens: np.ndarray, marked: Mapping[int, str]) -> str:
        """Return the text of the tokens, with `marked` (position → text) in place of those at its
        positions."""
        ids = tokens.tolist()
        shown = dict(marked)
        shown |= {i: self._names[t] for i, t in enumerate(ids) if t in self._names and i not in marked}
        return self._part(ids, shown, 0, len(ids))

    def _part(self, ids: list[int], shown: Mapping[int, str], start: int, stop: int) -> str:
        """Return the text of the tokens [start, stop). shown: position → text in its place."""
        text = ""
        for position in [*(i for i in sorted(shown) if start <= i < stop), stop]:
            before = [ids[i] for i in range(max(0, start - _CONTEXT), start) if i not in shown]
            text += self._tokenizer.decode_after(before, ids[start:position])
            text += shown.get(position, "") if position < stop else ""
            start = position + 1
        return text

    def name(self, token: int) -> str:
        """Return a special token's name, or the text of another."""
        return self._names.get(int(token)) or self._tokenizer.decode([int(token)])

    def with_marks(self, tokens: np.ndarray, bears_loss: np.ndarray) -> str:
        """Return the text with marks around tokens that bear no loss."""
        before, after = self._marks
        borders = np.flatnonzero(np.diff(bears_loss)) + 1
        text = ""
        for run in np.split(np.arange(len(tokens)), borders):
            decoded = self._tokenizer.decode(tokens[run].tolist())
            text += decoded if bears_loss[run[0]] else f"{before}{decoded}{after}"
        return text

    def apart(self, tokens: np.ndarray, bears_loss: np.ndarray) -> list[str]:
        """Return the lines of the text, with special tokens, and with marks around tokens that bear no
        loss."""
        ids, (before, after) = tokens.tolist(), self._marks
        shown = {i: self._names[t] for i, t in enumerate(ids) if t in self._names}
        borders = [0, *(np.flatnonzero(np.diff(bears_loss)) + 1).tolist(), len(ids)]
        text = ""
        for start, stop in pairwise(borders):
            part = self._part(ids, shown, start, stop)
            text += part if bears_loss[start] else f"{before}{part}{after}"
        return indented(text)

    def documents(self, tokens: np.ndarray, documents: np.ndarray, marked: Mapping[int, str]) -> list[str]:
        """Return the lines of each document of a row separately, without padding, whose document is
        negative. marked: position in the row → text to show there."""
        lines = []
        for number in range(int(documents.max(initial=-1)) + 1):
            positions = np.flatnonzero(documents == number)
            within = {i: marked[p] for i, p in enumerate(positions.tolist()) if p in marked}
            lines += indented(self.spell(tokens[positions], within))
        return lines


def indented(text: str, head: str = "") -> list[str]:
    """Return the text's lines, indented, the first after `head`."""
    first, *others = text.split("\n")
    return [f"    {head}{first}", *(f"    {' ' * len(head)}{line}" for line in others)]
