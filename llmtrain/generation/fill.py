"""What a masked or permuted language model puts for [MASK].

Dim names: B rows, T tokens of a prompt, M places of them with [MASK], K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmtrain.errors import CheckpointError, Problem

Candidates = list[tuple[int, float]]
"""(token, probability), the likeliest first."""

BLANK = -1
"""mask_id of a model whose query stream predicts places: no token stands there, and none is seen."""


@torch.inference_mode()
def fill_masks(
    model: nn.Module, tokens: Sequence[int], mask_id: int, top_k: int, num_text_ids: int
) -> list[Candidates]:
    """The `top_k` likeliest tokens of each place where `tokens` have mask_id, each given all the others as
    they are.

    model: forward(tokens_BT) → logits (B, T, V); with BLANK for mask_id forward(tokens_BT, targets_BM=…) →
        (B, M, V). num_text_ids: candidates are below it.
    Raise CheckpointError for a model whose logits are not finite.
    """
    device = next(model.parameters()).device
    tokens_1T = torch.tensor([list(tokens)], device=device)
    places_M = (tokens_1T[0] == mask_id).nonzero().flatten()
    if mask_id == BLANK:
        logits_MV = model(tokens_1T.clamp(min=0), targets_BM=places_M[None])[0].float()
    else:
        logits_MV = model(tokens_1T)[0][places_M].float()
    if not logits_MV.isfinite().all():
        remedy = "take an earlier checkpoint of the run, or another copy of the model"
        raise CheckpointError(Problem("model", "logits that are not finite", remedy=remedy))
    probs_MK, ids_MK = logits_MV.softmax(-1)[:, :num_text_ids].topk(min(top_k, num_text_ids))
    return [
        list(zip(ids_K, probs_K, strict=True))
        for ids_K, probs_K in zip(ids_MK.tolist(), probs_MK.tolist(), strict=True)
    ]
