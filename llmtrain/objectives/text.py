"""Show samples as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmtrain.tokenizers.base import Tokenizer

_CONTEXT = 8
"""Number of preceding tokens that determine how a token decodes: with a space, or as the rest of a
character."""


class Spelling:
    """Decodes tokens to text, special tokens to their names."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[int, str]) -> None:
        """names: id → name of special tokens."""
        self._tokenizer, self._names = tokenizer, names

    def spell(self, tokens: np.ndarray, marked: Mapping[int, str]) -> str:
        """Return the text of the tokens, with `marked` (position → text) in place of those at its
        positions."""
        ids = tokens.tolist()
        shown = dict(marked)
        shown |= {i: self._names[t] for i, t in enumerate(ids) if t in self._names and i not in marked}
        text, start = "", 0
        for position in [*sorted(shown), len(ids)]:
            before = [ids[i] for i in range(max(0, start - _CONTEXT), start) if i not in shown]
            text += self._tokenizer.decode_after(before, ids[start:position])
            text += shown.get(position, "")
            start = position + 1
        return text

    def name(self, token: int) -> str:
        """Return a special token's name, or the text of another."""
        return self._names.get(int(token)) or self._tokenizer.decode([int(token)])

    def with_marks(self, tokens: np.ndarray, bears_loss: np.ndarray) -> str:
        """Return the text with ⟦ ⟧ around tokens that bear no loss."""
        borders = np.flatnonzero(np.diff(bears_loss)) + 1
        text = ""
        for run in np.split(np.arange(len(tokens)), borders):
            decoded = self._tokenizer.decode(tokens[run].tolist())
            text += decoded if bears_loss[run[0]] else f"⟦{decoded}⟧"
        return text

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
