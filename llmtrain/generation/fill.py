"""Predict masked tokens with a masked or permuted language model.

Dim names: B rows, T tokens of a prompt, M masked positions, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmtrain.errors import CheckpointError, Problem

Candidates = list[tuple[int, float]]
"""(token, probability), most likely first."""

BLANK = -1
"""mask_id for models that predict positions with a query stream: these positions hold no token."""


@torch.inference_mode()
def fill_masks(
    model: nn.Module, tokens: Sequence[int], mask_id: int, top_k: int, num_text_ids: int
) -> list[Candidates]:
    """Return the `top_k` most likely tokens at each position with mask_id, predicted independently of each
    other.

    model: forward(tokens_BT) → logits (B, T, V); if mask_id is BLANK, forward(tokens_BT, targets_BM=…) → (B,
    M, V).
    num_text_ids: only ids below this are candidates.
    Raise CheckpointError if the logits are not finite.
    """
    device = next(model.parameters()).device
    tokens_1T = torch.tensor([list(tokens)], device=device)
    positions_M = (tokens_1T[0] == mask_id).nonzero().flatten()
    if mask_id == BLANK:
        logits_MV = model(tokens_1T.clamp(min=0), targets_BM=positions_M[None])[0].float()
    else:
        logits_MV = model(tokens_1T)[0][positions_M].float()
    if not logits_MV.isfinite().all():
        remedy = "use an earlier checkpoint of the run, or another copy of the model"
        raise CheckpointError(Problem("model", "logits that are not finite", remedy=remedy))
    probs_MK, ids_MK = logits_MV.softmax(-1)[:, :num_text_ids].topk(min(top_k, num_text_ids))
    return [
        list(zip(ids_K, probs_K, strict=True))
        for ids_K, probs_K in zip(ids_MK.tolist(), probs_MK.tolist(), strict=True)
    ]
