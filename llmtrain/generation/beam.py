"""Beam search with a length penalty.

It follows `generate` of transformers (version 5), so that results are comparable. Of all continuations of a
prompt's beams, the best max(2, 1 + E)·num_beams are considered, where E is the number of end tokens. Those of
the first num_beams that end become finished texts, and the best num_beams that do not end become the next
beams. The score of a text is Σ log p / length^length_penalty; the penalty of GNMT (arXiv:1609.08144, equation
14) has another form.

Dim names: B prompts, N beams, C candidates, T tokens so far, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.rows import Rows
from llmtrain.watch import phases

PADDING = -1
"""Fills finished texts after their end."""


def beam_search(rows: Rows, config: GenerateConfig, eos_ids: Collection[int]) -> list[list[int]]:
    """Return the best text of each prompt, without the end token.

    rows: one row per prompt; eos_ids: ids that end a generated text.
    """
    assert config.num_beams is not None
    B, N = rows.logits.shape[0], config.num_beams
    ends_E = torch.tensor(rows.known(eos_ids), dtype=torch.int64, device=rows.device)
    found: list[list[int]] = [[] for _ in range(B)]
    beams = _Beams(B, N, rows.device)
    prompts = list(range(B))
    rows.select(torch.arange(B, device=rows.device).repeat_interleave(N))
    for length in range(1, config.new_tokens + 1):
        phases.go_on()
        log_probs_BNV = rows.penalized(rows.logits.log_softmax(-1)).unflatten(0, (-1, N))
        if length <= (config.min_new_tokens or 0):
            log_probs_BNV[..., ends_E] = -torch.inf
        is_last = length == config.new_tokens
        parents_BN, is_open_B = beams.extend(log_probs_BNV, ends_E, config, is_last=is_last)
        open_B = is_open_B.nonzero().flatten()
        if len(open_B) < len(prompts):
            for i, text_T in enumerate(beams.finished[:, 0].tolist()):
                found[prompts[i]] = [token for token in text_T if token not in (PADDING, *eos_ids)]
            prompts = [prompts[i] for i in open_B.tolist()]
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
    """For each prompt, N open texts and the best N finished ones, with their scores; −inf if there is none
    yet."""

    def __init__(self, B: int, N: int, device: torch.device) -> None:
        self.texts = torch.zeros(B, N, 0, dtype=torch.int64, device=device)
        self._scores_BN = torch.full((B, N), -torch.inf, device=device)
        self._scores_BN[:, 0] = 0.0  # at first all beams are the same text: only one may be continued
        self.finished = self.texts
        """(B, N, T), best first, padded with PADDING."""
        self._finished_scores_BN = torch.full((B, N), -torch.inf, device=device)

    def extend(
        self, log_probs_BNV: Tensor, ends_E: Tensor, config: GenerateConfig, *, is_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Extend each open text by one token.

        Return the index (B, N) of the text that each new one continues, and whether each prompt is still open
        (B,).
        """
        N, V = log_probs_BNV.shape[1:]
        T = self.texts.shape[2] + 1
        totals_BM = (self._scores_BN[:, :, None] + log_probs_BNV).flatten(1)
        scores_BC, indices_BC = totals_BM.topk(min(max(2, 1 + len(ends_E)) * N, N * V))
        parents_BC, tokens_BC = indices_BC // V, indices_BC % V
        texts_BCT = torch.cat((_pick(self.texts, parents_BC), tokens_BC[..., None]), dim=-1)
        ends_BC = torch.full_like(tokens_BC, is_last, dtype=torch.bool)
        ends_BC |= torch.isin(tokens_BC, ends_E)

        penalty = T ** (1.0 if config.length_penalty is None else config.length_penalty)
        ended_BN = (scores_BC[:, :N] / penalty).masked_fill(~ends_BC[:, :N], -torch.inf)
        padding_BN1 = torch.full_like(tokens_BC[:, :N, None], PADDING)
        finished_BNT = torch.cat((self.finished, padding_BN1), dim=-1)
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
        """Keep only these prompts."""
        self.texts, self._scores_BN = self.texts[prompts_B], self._scores_BN[prompts_B]
        self.finished = self.finished[prompts_B]
        self._finished_scores_BN = self._finished_scores_BN[prompts_B]


def _pick(texts_BNT: Tensor, indices_BC: Tensor) -> Tensor:
    return texts_BNT.gather(1, indices_BC[..., None].expand(-1, -1, texts_BNT.shape[2]))
