"""Scaled dot-product attention: `attend` selects a kernel for each call and runs it.

attention_choice.py selects; attention_kernels.py and attention_blocks.py hold the kernels.
Dim names: B batch, N query heads, K key-value heads, T queries, S keys, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.nn import attention_kernels as kernels
from llmtrain.nn.attention_blocks import BlockwiseAttention, bidirectional_blocks, causal_blocks
from llmtrain.nn.attention_choice import AttentionCall, DropoutMask, choose_kernel
from llmtrain.nn.documents import CrossDocuments, Documents
from llmtrain.nn.dropout import AttentionDropout


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    documents: Documents | CrossDocuments | None = None,
    dropout: AttentionDropout | None = None,
    causal: bool = True,
    scale: float | None = None,
    bias_NTS: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    places_BM: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale · q·kᵀ + bias)·v, (B, N, T, H), laid out in memory as (B, T, N, H).

    causal: a query sees the keys up to its own; the queries are the last T of the S tokens.
    documents: documents of all tokens, T = S, with the same `causal`; or those of queries and of other keys;
        None: each row is one document.
    scale: factor of the scores; None: 1 / sqrt(H).
    dropout: dropout of the softmax probabilities.
    window: maximum number of keys that a query sees, its own the last (Mistral, arXiv:2310.06825); needs
        `causal`.
    softcap: scaled scores s become softcap · tanh(s / softcap) (Gemma 2, arXiv:2408.00118).
    places_BM: the tokens whose queries are given, T = M, where these are few; None: the last T.
    """
    mask: Tensor | None = None
    if places_BM is not None:
        mask = _mask_of_places(places_BM, k_BKSH.shape[2], documents, causal, window)
        return kernels.attend_with_all_scores(
            q_BNTH, k_BKSH, v_BKSH, mask, dropout, causal, scale, bias_NTS, softcap
        )
    N, T, S = q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
    if window is not None and window < S and T == S:
        documents = _windowed(documents, window, q_BNTH)
        window = None
    flash = kernels.document_kernel(q_BNTH, k_BKSH, v_BKSH) if isinstance(documents, Documents) else None
    call = AttentionCall(
        device=q_BNTH.device.type,
        num_queries=T,
        num_keys=S,
        causal=causal,
        has_documents=documents is not None,
        dropout=_dropout_kind(dropout),
        has_bias=bias_NTS is not None,
        has_scale=scale is not None,
        has_softcap=softcap is not None,
        for_inference=torch.is_inference_mode_enabled(),
        runs_flash=flash is not None,
    )
    kernel = choose_kernel(call)
    if kernel == "by_document":
        assert flash is not None
        assert isinstance(documents, Documents)
        return kernels.attend_by_document(flash, q_BNTH, k_BKSH, v_BKSH, documents)
    if kernel == "blockwise":
        k_BNSH, v_BNSH = kernels.repeat_heads(k_BKSH, N), kernels.repeat_heads(v_BKSH, N)
        if documents is not None:
            blocks = documents.blocks
        elif causal:
            blocks = list(causal_blocks(q_BNTH.shape[0], T))
        else:
            blocks = list(bidirectional_blocks(q_BNTH.shape[0], T, S))
        y_BNTH: Tensor = BlockwiseAttention.apply(
            q_BNTH, k_BNSH, v_BNSH, bias_NTS, scale, softcap, blocks, torch.is_grad_enabled(), dropout
        )
        return y_BNTH
    if documents is not None:
        mask = documents.mask
    elif (causal and T > 1 and (T < S or bias_NTS is not None)) or (window is not None and window < S):
        mask = _last_queries_mask(T, S, window, q_BNTH.device)
    if kernel == "all_scores":
        return kernels.attend_with_all_scores(
            q_BNTH, k_BKSH, v_BKSH, mask, dropout, causal, scale, bias_NTS, softcap
        )
    return kernels.attend_by_torch(q_BNTH, k_BKSH, v_BKSH, mask, dropout, causal, scale, bias_NTS)


def _windowed(documents: Documents | CrossDocuments | None, window: int, q_BNTH: Tensor) -> Documents:
    """Return the documents seen through a window; without documents each row is one."""
    if not isinstance(documents, Documents):
        B, _, T, _ = q_BNTH.shape
        documents = Documents(torch.zeros(B, T, dtype=torch.int32, device=q_BNTH.device))
    return documents.within(window)


def _mask_of_places(
    places_BM: Tensor, S: int, documents: Documents | CrossDocuments | None, causal: bool, window: int | None
) -> Tensor:
    """Return (B, 1, M, S), True where the query of a token sees a key."""
    key_S, place_BM1 = torch.arange(S, device=places_BM.device), places_BM[..., None]
    seen_BMS = key_S <= place_BM1 if causal else key_S.expand(*places_BM.shape, S) >= 0
    if window is not None:
        seen_BMS = seen_BMS & (key_S > place_BM1 - window)
    if documents is not None:
        starts_BM1, ends_BM1 = (x.gather(1, places_BM)[..., None] for x in (documents.starts, documents.ends))
        seen_BMS = seen_BMS & (key_S >= starts_BM1) & (key_S < ends_BM1)
    return seen_BMS[:, None]


def _dropout_kind(dropout: AttentionDropout | None) -> DropoutMask:
    if dropout is None:
        return "none"
    return "generator" if dropout.keys is None else "sample_keys"


def _last_queries_mask(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Return (T, S), True where one of the last T of S tokens sees a key, through a window if given."""
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen_TS if window is None or window >= S else seen_TS.triu(S - T - window + 1)
