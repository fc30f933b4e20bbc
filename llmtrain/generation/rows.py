"""Texts that a model is writing, and what is kept of them between tokens.

Dim names: B prompts run together, T tokens of a prompt, S tokens of the longest source, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llmtrain.errors import CheckpointError, Problem


def has_sources(model: nn.Module) -> bool:
    """Whether a prompt is what an encoder reads, not what a decoder continues."""
    config: Any = model.config
    return config.family == "seq2seq"


class Rows:
    """One text a row, first one a prompt. `logits` are those of each row's next token, (R, V) fp32."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        repetition_penalty: float = 1.0,
    ) -> None:
        """prompts: of one length, or sources of any.
        repetition_penalty: of `penalized`.

        Raise CheckpointError for a model whose logits are not finite, as `extend` does."""
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
        scaling = getattr(config, "rope_scaling", None)
        self._context: int | None = None
        if scaling is not None and scaling.kind == "longrope":
            self._context, self._texts_RT = scaling.original_max_sequence_length, tokens_BT
        self._penalty = repetition_penalty
        self._has_RV: Tensor | None = None
        if repetition_penalty != 1:
            self._has_RV = torch.zeros_like(self.logits, dtype=torch.bool).scatter_(1, tokens_BT, True)

    def penalized(self, scores_RV: Tensor) -> Tensor:
        """The same, but for tokens that a row has already, an encoder–decoder's in its target: positive
        scores over the penalty, others times it (arXiv:1909.05858)."""
        if self._has_RV is None:
            return scores_RV
        worse_RV = torch.where(scores_RV > 0, scores_RV / self._penalty, scores_RV * self._penalty)
        return torch.where(self._has_RV, worse_RV, scores_RV)

    def known(self, ids: Collection[int]) -> list[int]:
        """Those that the model can write."""
        return [token for token in ids if 0 <= token < self.logits.shape[1]]

    def extend(self, tokens_R: Tensor) -> None:
        """Put a token behind each row."""
        if self._has_RV is not None:
            self._has_RV.scatter_(1, tokens_R[:, None], True)
        if self._context is not None:
            self._texts_RT = torch.cat((self._texts_RT, tokens_R[:, None]), dim=1)
            if self._texts_RT.shape[1] == self._context + 1:
                # From here on all keys are turned otherwise, also those held.
                self._cache = self._model.new_cache(self._longest)  # type: ignore[operator]
                self.logits = self._forward(self._texts_RT, last_only=True)
                return
        self.logits = self._forward(tokens_R[:, None])

    def select(self, rows_R: Tensor) -> None:
        """Go on with these rows alone, in this order; one may come several times."""
        self._cache.select(rows_R)
        self.logits = self.logits[rows_R]
        if self._context is not None:
            self._texts_RT = self._texts_RT[rows_R]
        if self._has_RV is not None:
            self._has_RV = self._has_RV[rows_R]

    def reorder(self, rows_R: Tensor) -> None:
        """Let row r go on from row rows_R[r] of the same prompt."""
        self._cache.reorder(rows_R)
        if self._context is not None:
            self._texts_RT = self._texts_RT[rows_R]
        if self._has_RV is not None:
            self._has_RV = self._has_RV[rows_R]

    def _forward(self, tokens_RT: Tensor, **arguments: Any) -> Tensor:
        logits_RV: Tensor = self._model(tokens_RT, cache=self._cache, **arguments)[:, -1].float()
        if not logits_RV.isfinite().all():
            remedy = "take an earlier checkpoint of the run, or another copy of the model"
            raise CheckpointError(Problem("model", "logits that are not finite", remedy=remedy))
        return logits_RV


def _padded(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, S), and 0 for tokens and −1 for padding, (B, S); None where there is no padding."""
    tensors = [torch.tensor(list(source)) for source in sources]
    sources_BS = pad_sequence(tensors, batch_first=True).to(device)
    if len({len(source) for source in sources}) == 1:
        return sources_BS, None
    marks = [torch.zeros_like(tensor, dtype=torch.int32) for tensor in tensors]
    return sources_BS, pad_sequence(marks, batch_first=True, padding_value=-1).to(device)
