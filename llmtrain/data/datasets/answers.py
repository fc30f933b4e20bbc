"""The last answer of each conversation of a split, and what comes before it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from llmtrain.data.datasets.conversations import Conversations, PackedConversations
from llmtrain.tokenizers.base import Tokenizer


class LastAnswers:
    """Prompts that a model is to answer, and the answers of the table; of a conversation that is cut, the
    last answer that fits."""

    def __init__(
        self,
        conversations: Conversations | PackedConversations,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
    ) -> None:
        """end_ids: ids that end an answer, and are no part of its text."""
        self._single = conversations.single
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self.rows = np.arange(len(self._single.lengths))
        """Number of each conversation."""

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, with its end."""
        return max(len(self._single.last_answer(number)[1]) for number in self.rows.tolist())

    @property
    def longest_source(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(self._single.last_answer(number)[0]) for number in self.rows.tolist())

    def source(self, sample: int) -> np.ndarray:
        """Return the ids of all that comes before the answer."""
        return self._single.last_answer(sample)[0]

    def references(self, sample: int) -> list[str]:
        """Return the text of the answer."""
        before, answer = (ids.tolist() for ids in self._single.last_answer(sample))
        while answer and answer[-1] in self._end_ids:
            answer.pop()
        return [self._tokenizer.decode_after(before, answer).strip()]
