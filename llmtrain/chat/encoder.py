"""Tokens of a rendered conversation, and which of them are trained.

Dim names: N tokens of a conversation, A answers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from llmtrain.chat.error import ChatError
from llmtrain.chat.renderer import Renderer
from llmtrain.chat.source import ChatTemplate
from llmtrain.chat.spans import ASSISTANT, Marked
from llmtrain.tokenizers.base import Tokenizer


class Encoded(NamedTuple):
    """The tokens of a conversation."""

    ids: np.ndarray
    """int32 (N,)."""
    trained: np.ndarray
    """bool (N,): whether each token is trained."""
    ends: np.ndarray
    """int32 (A,): the token after the last of each answer."""


class Encoder:
    """Encodes rendered conversations as transformers does: with the special tokens that the text spells, and
    no others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces, matched = tokenizer.pieces(), {*tokenizer.added_tokens()}
        # Sentencepiece takes the spelling of its own control tokens for ordinary text.
        ids = tokenizer.special_ids.values()
        self._unmatched = {pieces[i]: i for i in ids if pieces[i] not in matched and pieces[i]}
        longest_first = sorted(map(re.escape, self._unmatched), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first)})") if longest_first else None

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, int32 (N,), and the characters [begin, end) of each, int64 (N, 2)."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in [text] if self._split is None else self._split.split(text):
            if part in self._unmatched:
                ids.append(self._unmatched[part])
                offsets.append((at, at + len(part)))
            elif part:
                found, places = self._tokenizer.encode_with_offsets(part)
                ids += found
                offsets += [(begin + at, end + at) for begin, end in places]
            at += len(part)
        return np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)

    def conversation(self, marked: Marked) -> Encoded:
        """Return the tokens of a conversation. A token that holds any character of an answer is trained.

        Raise ChatError for an answer of no tokens.
        """
        ids, offsets = self.encode(marked.text)
        begins, ends_of = offsets.T
        trained, ends = np.zeros(len(ids), bool), []
        for begin, end in marked.answers:
            # The offsets of white space may be empty, at its end.
            inside = np.flatnonzero((begins < end) & (ends_of > begin))
            if not len(inside):
                raise ChatError("an answer of no tokens", "answers with text")
            trained[inside] = True
            ends.append(int(inside[-1]) + 1)
        return Encoded(ids, trained, np.array(ends, np.int32))


def end_ids(renderer: Renderer, template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the id that ends an answer; none if answers end in ordinary text, or the template refuses a
    question and its answer."""
    sample = ({"role": "user", "content": "1"}, {"role": ASSISTANT, "content": "1"})
    try:
        encoded = Encoder(tokenizer).conversation(renderer.conversation(sample))
    except ChatError:
        return ()
    last = int(encoded.ids[encoded.ends[-1] - 1])
    return (last,) if tokenizer.pieces()[last] in template.added else ()
