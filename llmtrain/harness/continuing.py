"""Continue texts of different lengths in one batch, until each has produced one of its ends.

All rows begin with as many tokens as the shortest text has; the further tokens of longer texts are given to
the model one by one, while it continues the others. So no row is padded, and no cache needs a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import for_writing, generate, sample, uniform
from llmtrain.generation.rows import Rows
from llmtrain.harness.codec import Codec

EXTRA_TOKENS = 8
"""Tokens beyond the bytes of the longest end that are decoded to look for ends."""


@dataclass(frozen=True)
class Ends:
    """What ends a text that a model writes."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, texts: Sequence[str], ids: Collection[int], codec: Codec) -> Ends:
        """Return the ends of a task's `until`. ids: those that end a text anyway. The spelling of a special
        token, which no decoded text has, ends a text by its id."""
        by_text = {text: codec.special_id(text) for text in texts if text}
        special = {found for found in by_text.values() if found is not None}
        return cls(frozenset({*ids, *special}), tuple(by_text))

    def cut(self, text: str) -> str:
        """Return the text up to the first end in it."""
        for end in self.texts:
            text = text.split(end)[0]
        return text

    def are_in(self, ids: Sequence[int], codec: Codec) -> bool:
        """Return whether an end is among the last tokens."""
        if not self.texts:
            return False
        # A token is a byte or more.
        window = max(len(end.encode()) for end in self.texts) + EXTRA_TOKENS
        tail = codec.decode(ids[-window:])
        return any(end in tail for end in self.texts)


def batches_of(lengths: Sequence[int], new_tokens: int, batch_size: int) -> list[list[int]]:
    """Return the numbers of texts in batches, the longest first. In a batch no text is longer than another by
    more than half of what is written, since those tokens are read one by one."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        spread = lengths[batches[-1][0]] - lengths[number] if batches else 0
        if not batches or len(batches[-1]) == batch_size or spread > new_tokens // 2:
            batches.append([])
        batches[-1].append(number)
    return batches


@torch.inference_mode()
def continue_texts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    settings: GenerateConfig,
    ends: Ends,
    codec: Codec,
) -> list[str]:
    """Return what the model writes after each prompt, up to its end.

    numbers: of the prompts among all, from which random draws follow.
    settings: resolved. Beams need prompts of one length, so they are searched one prompt after another.
    Raise CheckpointError if logits are not finite.
    """
    if (settings.num_beams or 1) > 1:
        texts = [generate(model, [prompt], settings, eos_ids=ends.ids)[0] for prompt in prompts]
    else:
        texts = [[] for _ in prompts]
        with for_writing(model, settings):
            for row, token in _one_by_one(model, prompts, numbers, settings, ends, codec):
                texts[row].append(token)
    return [ends.cut(codec.decode(text)) for text in texts]


def _one_by_one(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    settings: GenerateConfig,
    ends: Ends,
    codec: Codec,
) -> Iterator[tuple[int, int]]:
    """Yield (place of a prompt, token) as tokens are written."""
    lengths = [len(prompt) for prompt in prompts]
    length = min(lengths)
    room = max(lengths) - length + settings.new_tokens
    rows = Rows(model, [prompt[:length] for prompt in prompts], room, settings.repetition_penalty or 1.0)
    written: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    while True:
        logits_RV = rows.penalized(rows.logits)
        _forbid_early_ends(logits_RV, [written[i] for i in running], settings, rows.known(ends.ids))
        draws = []
        if settings.temperature != 0:
            draws = [uniform(settings.seed, numbers[i], length) for i in running]
        drawn = sample(logits_RV, settings, draws).tolist()
        kept, tokens = [], []
        for row, i in enumerate(running):
            token = drawn[row]
            if length < lengths[i]:
                token = prompts[i][length]
            elif token in ends.ids:
                continue
            else:
                written[i].append(token)
                yield i, token
                if len(written[i]) == settings.new_tokens or ends.are_in(written[i], codec):
                    continue
            kept.append(row)
            tokens.append(token)
        if not kept:
            return
        if len(kept) < len(running):
            rows.select(torch.tensor(kept, device=rows.device))
            running = [running[row] for row in kept]
        rows.extend(torch.tensor(tokens, device=rows.device))
        length += 1


def _forbid_early_ends(
    logits_RV: torch.Tensor, written: Sequence[Sequence[int]], settings: GenerateConfig, ends: Sequence[int]
) -> None:
    """Make the ends impossible in rows that are not long enough yet."""
    least = settings.min_new_tokens or 0
    early = [row for row, text in enumerate(written) if len(text) < least]
    if early and ends:
        logits_RV[torch.tensor(early)[:, None], torch.tensor(list(ends))[None]] = -torch.inf
