"""The state of texts during generation: cache, next logits, and tokens for the repetition penalty.

Dim names: B prompts of a batch, T tokens of a prompt, S tokens of the longest source, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llmtrain.errors import CheckpointError, Problem
from llmtrain.models.registry import family_of


def has_sources(model: nn.Module) -> bool:
    """Return whether prompts of the model are sources for an encoder, not texts for a decoder to continue."""
    config: Any = model.config
    return family_of(config).reads_sources


class Rows:
    """One text per row, initially one row per prompt. `logits`: of the next token of each row, (R, V)
    fp32."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        repetition_penalty: float = 1.0,
    ) -> None:
        """prompts: of equal length, or sources of any length. repetition_penalty: used by `penalized`.

        Raise CheckpointError if the logits are not finite, as `extend` does.
        """
        self._model = model
        self.device = next(model.parameters()).device
        config: Any = model.config
        self._cache: Any
        if has_sources(model):
            sources_BS, documents_BS = _padded(prompts, self.device)
            self._cache = model.new_cache(  # type: ignore[operator]
                max_new_tokens, sources_BS=sources_BS, source_documents_BS=documents_BS
            )
            tokens_BT = torch.full((len(prompts), 1), config.start_id, device=self.device)
            self.logits = self._forward(tokens_BT)
        else:
            tokens_BT = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
            self._longest = tokens_BT.shape[1] + max_new_tokens
            self._cache = model.new_cache(self._longest)  # type: ignore[operator]
            self.logits = self._forward(tokens_BT, last_only=True)
        scaling = config.rotary_scaling
        self._context: int | None = None if scaling is None else scaling.changes_beyond
        if self._context is not None:
            self._texts_RT = tokens_BT
        self._penalty = repetition_penalty
        self._has_RV: Tensor | None = None
        if repetition_penalty != 1:
            self._has_RV = torch.zeros_like(self.logits, dtype=torch.bool).scatter_(1, tokens_BT, True)

    def penalized(self, scores_RV: Tensor) -> Tensor:
        """Return the scores with the repetition penalty (arXiv:1909.05858) applied to tokens that already
        occur in the row (in the target, for an encoder–decoder): positive scores are divided by it, negative
        ones multiplied."""
        if self._has_RV is None:
            return scores_RV
        worse_RV = torch.where(scores_RV > 0, scores_RV / self._penalty, scores_RV * self._penalty)
        return torch.where(self._has_RV, worse_RV, scores_RV)

    def known(self, ids: Collection[int]) -> list[int]:
        """Return the ids that are in the model's vocabulary."""
        return [token for token in ids if 0 <= token < self.logits.shape[1]]

    def extend(self, tokens_R: Tensor) -> None:
        """Append one token to each row and compute the next logits."""
        if self._has_RV is not None:
            self._has_RV.scatter_(1, tokens_R[:, None], True)
        if self._context is not None:
            self._texts_RT = torch.cat((self._texts_RT, tokens_R[:, None]), dim=1)
            if self._texts_RT.shape[1] == self._context + 1:
                # Beyond this length LongRoPE rotates all keys by other factors: recompute the cached ones.
                self._cache = self._model.new_cache(self._longest)  # type: ignore[operator]
                self.logits = self._forward(self._texts_RT, last_only=True)
                return
        self.logits = self._forward(tokens_R[:, None])

    def select(self, rows_R: Tensor) -> None:
        """Continue with these rows only, in this order; rows may be repeated."""
        self._cache.select(rows_R)
        self.logits = self.logits[rows_R]
        if self._context is not None:
            self._texts_RT = self._texts_RT[rows_R]
        if self._has_RV is not None:
            self._has_RV = self._has_RV[rows_R]

    def reorder(self, rows_R: Tensor) -> None:
        """Make row r continue row rows_R[r], which must belong to the same prompt."""
        self._cache.reorder(rows_R)
        if self._context is not None:
            self._texts_RT = self._texts_RT[rows_R]
        if self._has_RV is not None:
            self._has_RV = self._has_RV[rows_R]

    def _forward(self, tokens_RT: Tensor, **arguments: Any) -> Tensor:
        logits_RV: Tensor = self._model(tokens_RT, cache=self._cache, **arguments)[:, -1].float()
        if not logits_RV.isfinite().all():
            remedy = "use an earlier checkpoint of the run, or another copy of the model"
            raise CheckpointError(Problem("model", "logits that are not finite", remedy=remedy))
        return logits_RV


def _padded(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return padded ids (B, S) and marks (B, S): 0 for tokens, −1 for padding; None instead of marks if there
    is no padding."""
    tensors = [torch.tensor(list(source)) for source in sources]
    sources_BS = pad_sequence(tensors, batch_first=True).to(device)
    if len({len(source) for source in sources}) == 1:
        return sources_BS, None
    marks = [torch.zeros_like(tensor, dtype=torch.int32) for tensor in tensors]
    return sources_BS, pad_sequence(marks, batch_first=True, padding_value=-1).to(device)
