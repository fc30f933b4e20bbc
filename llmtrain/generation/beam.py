"""Beam search with a length penalty.

Its rules are those of transformers' `generate` (beam search as of its version 5), so that results compare:
of all continuations of a prompt's beams the best 2·num_beams are looked at, or with E tokens that end a text
(1 + E)·num_beams; those among the first num_beams
that end are candidates, and the best num_beams that don't go on. A text's score is
Σ log p / length^length_penalty, where GNMT's penalty (arXiv:1609.08144, equation 14) is another.

Dim names: B prompts, N beams, C candidates, T tokens so far, V vocabulary, E tokens that end a text.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.rows import Rows

NOTHING = -1
"""Stands behind the end of a text."""


def beam_search(rows: Rows, config: GenerateConfig, eos_ids: Collection[int]) -> list[list[int]]:
    """The text found for each row, without that of eos_ids which ended it."""
    assert config.num_beams is not None
    B, N = rows.logits.shape[0], config.num_beams
    ends_E = torch.tensor(rows.known(eos_ids), dtype=torch.int64, device=rows.device)
    found: list[list[int]] = [[] for _ in range(B)]
    beams = _Beams(B, N, rows.device)
    prompts = list(range(B))
    rows.select(torch.arange(B, device=rows.device).repeat_interleave(N))
    for length in range(1, config.new_tokens + 1):
        log_probs_BNV = rows.penalized(rows.logits.log_softmax(-1)).unflatten(0, (-1, N))
        if length <= (config.min_new_tokens or 0):
            log_probs_BNV[..., ends_E] = -torch.inf
        is_last = length == config.new_tokens
        parents_BN, is_open_B = beams.extend(log_probs_BNV, ends_E, config, is_last=is_last)
        open_B = is_open_B.nonzero().flatten()
        if len(open_B) < len(prompts):
            for place, text_T in enumerate(beams.finished[:, 0].tolist()):
                found[prompts[place]] = [token for token in text_T if token not in (NOTHING, *eos_ids)]
            prompts = [prompts[place] for place in open_B.tolist()]
            beams.select(open_B)
            parents_BN = parents_BN[open_B]
            kept_BN = open_B[:, None] * N + torch.arange(N, device=rows.device)
            if prompts:
                rows.select(kept_BN.flatten())
        if not prompts:
            break
        first_B1 = torch.arange(len(prompts), device=rows.device)[:, None] * N
        rows.reorder((first_B1 + parents_BN).flatten())
        rows.extend(beams.texts[..., -1].flatten())
    return found


class _Beams:
    """Of each prompt: N open texts and the best N that have ended, either with their scores; −inf where there
    is none yet."""

    def __init__(self, B: int, N: int, device: torch.device) -> None:
        self.texts = torch.zeros(B, N, 0, dtype=torch.int64, device=device)
        self._scores_BN = torch.full((B, N), -torch.inf, device=device)
        self._scores_BN[:, 0] = 0.0  # all open texts are one at first
        self.finished = self.texts
        """(B, N, T), the best first."""
        self._finished_scores_BN = torch.full((B, N), -torch.inf, device=device)

    def extend(
        self, log_probs_BNV: Tensor, ends_E: Tensor, config: GenerateConfig, *, is_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Let each open text go on by one token.

        → the place (B, N) of the text that each now continues, and which prompts are still open, (B,).
        """
        N, V = log_probs_BNV.shape[1:]
        T = self.texts.shape[2] + 1
        totals_BM = (self._scores_BN[:, :, None] + log_probs_BNV).flatten(1)
        scores_BC, places_BC = totals_BM.topk(min(max(2, 1 + len(ends_E)) * N, N * V))
        parents_BC, tokens_BC = places_BC // V, places_BC % V
        texts_BCT = torch.cat((_pick(self.texts, parents_BC), tokens_BC[..., None]), dim=-1)
        ends_BC = torch.full_like(tokens_BC, is_last, dtype=torch.bool)
        ends_BC |= torch.isin(tokens_BC, ends_E)

        penalty = T ** (1.0 if config.length_penalty is None else config.length_penalty)
        ended_BN = (scores_BC[:, :N] / penalty).masked_fill(~ends_BC[:, :N], -torch.inf)
        nothing_BN1 = torch.full_like(tokens_BC[:, :N, None], NOTHING)
        finished_BNT = torch.cat((self.finished, nothing_BN1), dim=-1)
        scores_BM = torch.cat((self._finished_scores_BN, ended_BN), dim=1)
        self._finished_scores_BN, best_BN = scores_BM.topk(N)
        self.finished = _pick(torch.cat((finished_BNT, texts_BCT[:, :N]), dim=1), best_BN)

        self._scores_BN, chosen_BN = scores_BC.masked_fill(ends_BC, -torch.inf).topk(N)
        self.texts = _pick(texts_BCT, chosen_BN)
        worst_B = self._finished_scores_BN[:, -1]
        is_open_B = self._scores_BN[:, 0] / penalty > worst_B
        if config.early_stopping:
            is_open_B &= worst_B.isneginf()
        return parents_BC.gather(1, chosen_BN), is_open_B & (not is_last)

    def select(self, prompts_B: Tensor) -> None:
        """Keep these alone."""
        self.texts, self._scores_BN = self.texts[prompts_B], self._scores_BN[prompts_B]
        self.finished = self.finished[prompts_B]
        self._finished_scores_BN = self._finished_scores_BN[prompts_B]


def _pick(texts_BNT: Tensor, places_BC: Tensor) -> Tensor:
    return texts_BNT.gather(1, places_BC[..., None].expand(-1, -1, texts_BNT.shape[2]))
