"""Rows of a table as prompts with a place for an answer.

Dim names: M samples of a micro-batch, C answers, R rows of a sample (1, or one for each answer), A tokens of
the longest answer, T sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from llmtrain.data.datasets.base import EMPTY
from llmtrain.data.datasets.examples import CutRows
from llmtrain.labels import IGNORE_INDEX
from llmtrain.tables.table import TableSplit

NO_TOKEN = -1
"""Beyond the tokens of a shorter answer."""


class Prompt(NamedTuple):
    """A template in tokens. A part is a column of the table, or tokens that stand there as they are."""

    before: Sequence[str | np.ndarray]
    after: Sequence[str | np.ndarray]
    answers: Sequence[np.ndarray]
    """Tokens of each answer."""
    mask_id: int | None
    """The token that stands for the answer; None: the prompt ends before it."""
    first: np.ndarray
    """Special tokens at the beginning, and other prompts with their answers."""
    last: np.ndarray
    """Special tokens at the end."""
    pad_id: int

    @property
    def expands(self) -> bool:
        """Return whether each answer needs a row of its own, since one has several tokens."""
        return max(map(len, self.answers)) > 1

    @property
    def parts(self) -> tuple[str | np.ndarray, ...]:
        """Return the parts that a row has."""
        return (*self.before, *(self.after if self.mask_id is not None else ()))

    @property
    def num_fixed(self) -> int:
        """Return the tokens of a row that are not of a field, those of the longest answer among them."""
        own = sum(len(part) for part in self.parts if not isinstance(part, str))
        of_answer = 1 if self.mask_id is not None else max(map(len, self.answers)) - 1
        return len(self.first) + own + of_answer + (len(self.last) if self.mask_id is not None else 0)


class Prompts(CutRows):
    """The rows of one split; fields that are too long are cut, the longest first."""

    def __init__(self, split: TableSplit, sequence_length: int, prompt: Prompt, group: int = 64) -> None:
        """group: see OrdersByLength."""
        self.split, self.sequence_length, self.prompt, self.group = split, sequence_length, prompt, group
        self._room = sequence_length - prompt.num_fixed
        names = [part for part in prompt.parts if isinstance(part, str)]
        totals = np.sum([split.ragged(name).lengths for name in names], axis=0)
        self.truncated = int((totals > self._room).sum())
        self.lengths = np.minimum(totals, self._room) + prompt.num_fixed

    @property
    def fingerprint(self) -> str:
        tokens = [part if isinstance(part, str) else part.tolist() for part in self.prompt.parts]
        answers = [answer.tolist() for answer in self.prompt.answers]
        said = f"{self.split.fingerprint}/{self.sequence_length}/{tokens}/{answers}"
        said += f"/{self.prompt.first.tolist()}/{self.prompt.last.tolist()}"
        return xxhash.xxh3_128_hexdigest(said.encode())

    def get(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return "tokens" int64 (M, R, T), padded; "lengths" int64 (M, R), 1 for EMPTY samples; "asked" int64
        (M, R, A), the positions whose logits say the tokens of an answer; "answers" int64 (M, C, A), the
        tokens, NO_TOKEN beyond them; "label" int64 (M), IGNORE_INDEX for EMPTY samples."""
        prompt = self.prompt
        M, C, A = len(indices), len(prompt.answers), max(map(len, prompt.answers))
        R = C if prompt.expands else 1
        tokens = np.full((M, R, self.sequence_length), prompt.pad_id, np.int64)
        lengths, asked = np.ones((M, R), np.int64), np.zeros((M, R, A), np.int64)
        answers = np.full((C, A), NO_TOKEN, np.int64)
        for number, answer in enumerate(prompt.answers):
            answers[number, : len(answer)] = answer
        for sample, index in enumerate(indices.tolist()):
            if index == EMPTY:
                continue
            for row, answer in enumerate(prompt.answers[:R]):
                ids, place = self.row(index, answer)
                tokens[sample, row, : len(ids)] = ids
                lengths[sample, row] = len(ids)
                asked[sample, row] = np.minimum(place + np.arange(A), len(ids) - 1)
        label = np.array(self.split.array("label")[np.maximum(indices, 0)])
        label[indices == EMPTY] = IGNORE_INDEX
        every = np.broadcast_to(answers, (M, C, A)).copy()
        return {"tokens": tokens, "lengths": lengths, "asked": asked, "answers": every, "label": label}

    def row(self, index: int, answer: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the ids of a row, and the position whose logits say the first token of the answer: that of
        the mask, or the one before the answer, whose last token the row leaves out."""
        prompt = self.prompt
        parts = self._parts(index)
        before = np.concatenate([prompt.first, *parts[: len(prompt.before)]])
        if prompt.mask_id is None:
            return np.concatenate([before, answer[:-1]]), len(before) - 1
        mask = np.array([prompt.mask_id])
        return np.concatenate([before, mask, *parts[len(prompt.before) :], prompt.last]), len(before)

    def example(self, index: int, room: int) -> np.ndarray:
        """Return the ids of a row with its own answer, for the prompts of others. room: most tokens of its
        fields."""
        prompt = self.prompt
        parts = _filled((*prompt.before, *prompt.after), self.split, index, room)
        answer = prompt.answers[int(self.split.array("label")[index])]
        count = len(prompt.before)
        return np.concatenate([*parts[:count], answer, *parts[count:]])

    def _parts(self, index: int) -> list[np.ndarray]:
        return _filled(self.prompt.parts, self.split, index, self._room)


def _filled(parts: Sequence[str | np.ndarray], split: TableSplit, index: int, room: int) -> list[np.ndarray]:
    """Return the parts with the tokens of the row's fields, cut to `room` tokens together."""
    names = [part for part in parts if isinstance(part, str)]
    kept = fit([split.ragged(name).length(index) for name in names], room)
    of_fields = iter(
        split.ragged(name)[index][:count].astype(np.int64) for name, count in zip(names, kept, strict=True)
    )
    return [next(of_fields) if isinstance(part, str) else part for part in parts]


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """Return how much is kept of each length, so that they are `room` together at most: the longest are cut
    down to the others first."""
    cap = max(lengths, default=0)
    while (over := sum(min(length, cap) for length in lengths) - room) > 0 and cap > 0:
        cap -= max(1, over // len(lengths))
    kept = [min(length, cap) for length in lengths]
    left = room - sum(kept)
    for number, length in enumerate(lengths):
        if kept[number] < length and left > 0:
            kept[number] += 1
            left -= 1
    return kept
