"""Select the attention kernel of a call. Free of torch, so that `llmtrain plan` makes the same choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["by_document", "blockwise", "all_scores", "torch"]
"""by_document: torch's flash attention over packed documents, on a GPU. blockwise: blocks of queries, each
with the keys that it sees, on a CPU. all_scores: plain operations on all scores, (B, N, T, S). torch:
scaled_dot_product_attention."""

DropoutMask = Literal["none", "generator", "sample_keys"]
"""Source of the dropout mask: none, torch's generator, or hashes of the samples' keys."""

BLOCK = 128
"""Queries per block of the blockwise kernel: the fastest of 64, 128 and 256."""
LONGEST_BLOCKWISE = 2048
"""Maximum queries or keys for the blockwise kernel, which keeps B·N·T²/2 probabilities for backward."""
LONGEST_MASKED = 512
"""Maximum keys for torch's kernel with a mask of documents, (B, 1, T, S), in inference on a CPU."""


@dataclass(frozen=True)
class AttentionCall:
    """The properties of an attention call that determine its kernel."""

    device: str
    """Device type: cpu or cuda."""
    num_queries: int
    num_keys: int
    causal: bool = True
    has_documents: bool = False
    """Whether the tokens are packed documents or attention has a window."""
    dropout: DropoutMask = "none"
    has_bias: bool = False
    """Whether a bias is added to the scores."""
    has_scale: bool = False
    """Whether scores are scaled by a factor other than 1 / sqrt(head width)."""
    has_softcap: bool = False
    for_inference: bool = False
    """Whether torch's inference mode is on: nothing is kept for gradients."""
    runs_flash: bool = False
    """Whether torch's flash attention for packed documents supports this device, dtype and head width."""


def choose_kernel(call: AttentionCall) -> Kernel:
    """Return the fastest kernel that supports the call."""
    is_plain = call.dropout == "none" and not (call.has_bias or call.has_scale or call.has_softcap)
    if call.has_documents and call.runs_flash and is_plain:
        return "by_document"
    longest = max(call.num_queries, call.num_keys)
    # With a cache, the last queries see keys before the first query, which causal blocks don't handle.
    fits_blocks = call.num_queries == call.num_keys or not call.causal
    is_short = call.num_queries > 1 and longest <= LONGEST_BLOCKWISE
    if call.device == "cpu" and call.dropout != "generator" and fits_blocks and is_short:
        # torch's kernel is the faster one forward and the slower one backward.
        masks_pay = not call.has_documents or (not call.causal and longest <= LONGEST_MASKED)
        if not (call.for_inference and is_plain and masks_pay):
            return "blockwise"
    # No fused kernel supports a soft cap or a given dropout mask.
    if call.has_softcap or call.dropout == "sample_keys":
        return "all_scores"
    return "torch"
