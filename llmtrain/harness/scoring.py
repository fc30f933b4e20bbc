"""Log-probabilities of continuations under a decoder, many in one forward.

Dim names: B rows of a batch, T tokens of its longest row, M predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.errors import CheckpointError, Problem

CACHED = 4
"""Times the tokens of a batch that a cache of a shared context holds, for which nothing else is kept."""
SAVES = 1.5
"""Contexts are shared where that saves so many times the tokens."""
LOGITS_AT_ONCE = 2**24
"""Number of logits whose softmax is computed at once."""


class Row(NamedTuple):
    """Tokens that the model reads once, and the continuations that are scored after them."""

    inputs: list[int]
    """All tokens but the last of a continuation, which all share."""
    answers: list[list[int]]
    """Each a continuation, predicted by the last of the inputs."""
    context: int = 0
    """How many of the first inputs are read before any answer; rows may begin with the same."""

    @property
    def predicted(self) -> int:
        """Number of the last inputs whose predictions are needed."""
        return max(map(len, self.answers))


class Score(NamedTuple):
    """Of one continuation."""

    log_prob: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


class RowBatch(NamedTuple):
    """Rows that are scored together."""

    numbers: list[int]
    shared: int
    """How many of the first inputs are the same in all, and are read only once."""


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[RowBatch]:
    """Return the numbers of all rows in batches, those with the most tokens first.

    Rows with the same long context are a batch, of so many that their cache holds `CACHED · batch_tokens`.
    The others are batches of at most `batch_tokens` with padding, but at least one row.
    """
    batches: list[RowBatch] = []
    single: list[int] = []
    for (_, shared), numbers in _by_context(rows).items():
        longest = max(len(rows[number].inputs) for number in numbers)
        whole = sum(len(rows[number].inputs) for number in numbers)
        most = CACHED * batch_tokens // max(1, longest)
        tokens = shared + len(numbers) * (longest - shared)
        if len(numbers) == 1 or most < 2 or SAVES * tokens > whole:
            single += numbers
            continue
        batches += [RowBatch(numbers[i : i + most], shared) for i in range(0, len(numbers), most)]
    lengths = [len(row.inputs) for row in rows]
    single.sort(key=lambda number: (-lengths[number], number))
    packed: list[list[int]] = []
    for number in single:
        if not packed or lengths[packed[-1][0]] * (len(packed[-1]) + 1) > batch_tokens:
            packed.append([])
        packed[-1].append(number)
    batches += [RowBatch(numbers, 0) for numbers in packed]
    return sorted(batches, key=lambda batch: -sum(lengths[number] for number in batch.numbers))


def _by_context(rows: Sequence[Row]) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """Return (context, its length) → numbers of the rows that begin with it."""
    found: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault((tuple(row.inputs[: row.context]), row.context), []).append(number)
    return found


@torch.inference_mode()
def score_rows(model: nn.Module, rows: Sequence[Row], shared: int = 0) -> list[list[Score]]:
    """Return the score of each answer of each row.

    model: a decoder, tokens (B, T) → logits (B, T, V), with its last layer as `head`.
    shared: how many of the first inputs all rows share; they are read once, into a cache.
    Raise CheckpointError if logits are not finite.
    """
    device = next(model.parameters()).device
    cache: Any = None
    if shared > 0:
        context = torch.tensor([rows[0].inputs[:shared]], device=device)
        cache = model.new_cache(max(len(row.inputs) for row in rows))  # type: ignore[operator]
        model(context, cache=cache, last_only=True)
        cache.select(torch.zeros(len(rows), dtype=torch.int64, device=device))
        rows = [Row(row.inputs[shared:], row.answers) for row in rows]
    T = max(len(row.inputs) for row in rows)
    tokens_BT = torch.zeros(len(rows), T, dtype=torch.int64)
    predicted_BT = torch.zeros(len(rows), T, dtype=torch.bool)
    for number, row in enumerate(rows):
        # Padding at the end needs no mask: attention is causal.
        length = len(row.inputs)
        tokens_BT[number, :length] = torch.tensor(row.inputs)
        predicted_BT[number, length - row.predicted : length] = True
    with _logits_of(model, predicted_BT.to(device)):
        of_cache = {} if cache is None else {"cache": cache}
        logits_MV: Tensor = model(tokens_BT.to(device), **of_cache)
    return _scores(logits_MV, rows)


@contextmanager
def _logits_of(model: nn.Module, predicted_BT: Tensor) -> Iterator[None]:
    """Inside, let the head of the model compute the logits of these positions alone, (M, V).

    For a context of hundreds of tokens and an answer of a few this saves the head's share of the time, and
    the memory of all other logits.
    """
    head = getattr(model, "head", None)  # stages of a pipeline before the last have none
    if head is None:
        yield
        return

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTD, *others = arguments
        # Virtual tokens stand before those of a row.
        return (hidden_BTD[:, -predicted_BT.shape[1] :][predicted_BT], *others)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _scores(logits_MV: Tensor, rows: Sequence[Row]) -> list[list[Score]]:
    """Return the scores, given the logits of the predicted positions of all rows, row after row."""
    device = logits_MV.device
    # Position among the logits, and token, of each token of each answer.
    positions: list[int] = []
    tokens: list[int] = []
    lengths: list[int] = []
    end = 0
    for row in rows:
        end += row.predicted
        for answer in row.answers:
            positions += range(end - len(answer), end)
            tokens += answer
            lengths.append(len(answer))
    log_probs_M, right_M = _of_tokens(
        logits_MV, torch.tensor(positions, device=device), torch.tensor(tokens, device=device)
    )
    sums = torch.stack([part.sum() for part in log_probs_M.split(lengths)]).tolist()
    greedy = torch.stack([part.all() for part in right_M.split(lengths)]).tolist()
    found = iter(map(Score, sums, greedy))
    return [[next(found) for _ in row.answers] for row in rows]


def _of_tokens(logits_MV: Tensor, places_N: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token, fp32 (N,), and whether it is the most likely one."""
    step = max(1, LOGITS_AT_ONCE // logits_MV.shape[1])
    log_probs = torch.empty(len(places_N), device=logits_MV.device)
    right = torch.empty(len(places_N), dtype=torch.bool, device=logits_MV.device)
    for start in range(0, logits_MV.shape[0], step):
        logits = logits_MV[start : start + step].float()
        if not logits.isfinite().all():
            remedy = "use an earlier checkpoint of the run, or another copy of the model"
            raise CheckpointError(Problem("model", "logits that are not finite", remedy=remedy))
        here = (places_N >= start) & (places_N < start + step)
        at, token = places_N[here] - start, tokens_N[here]
        log_probs[here] = torch.log_softmax(logits, dim=-1)[at, token]
        right[here] = logits.argmax(dim=-1)[at] == token
    return log_probs, right
