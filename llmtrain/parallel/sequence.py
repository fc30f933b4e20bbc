"""Sequence parallelism: processes divide the tokens of every sequence, and exchange tokens for heads around
attention (DeepSpeed-Ulysses, arXiv:2309.14509).

Dim names: B batch, T all tokens, N local query heads, K local key-value heads, H head width, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from llmtrain.adapt.virtual import PrefixedAttention
from llmtrain.nn.documents import Documents
from llmtrain.nn.dropout import AttentionDropout
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.upstream import import_deepspeed


def share_attention(model: nn.Module, mesh: Mesh) -> None:
    """Wrap the `attend` of each module that has one in the exchange of tokens and heads.

    Raise ValueError for a model without attention.
    """
    modules = [module for module in model.modules() if hasattr(module, "attend")]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention to share")
    for module in modules:
        module.attend = SharedAttention(module.attend, mesh)  # type: ignore[arg-type,assignment]


class SharedAttention:
    """Attention over a slice of the tokens with all heads: (B, N, T/P, H) → (B, N, T/P, H).

    Each process receives all tokens of N/P heads, computes attention, and returns the tokens. `documents`
    covers all tokens.
    """

    def __init__(self, attend: Callable[..., Tensor], mesh: Mesh) -> None:
        import_deepspeed()
        from deepspeed.sequence.layer import DistributedAttention

        if isinstance(attend, PrefixedAttention):
            attend.part = mesh.coordinates.sequence
        self._attend = attend
        self._part = mesh.coordinates.sequence
        self._exchange: Any = DistributedAttention(
            self._attend_to_all_tokens, mesh.sequence_group, scatter_idx=2, gather_idx=1
        )

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKTH: Tensor,
        v_BKTH: Tensor,
        *,
        documents: Documents | None = None,
        dropout: AttentionDropout | None = None,
        causal: bool = True,
        window: int | None = None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BNTH, k_BKTH, v_BKTH))
        y_BTNH: Tensor = self._exchange(
            q, k, v, 0, documents=documents, dropout=dropout, causal=causal, window=window
        )
        return y_BTNH.transpose(1, 2)

    def _attend_to_all_tokens(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        documents: Documents | None,
        dropout: AttentionDropout | None,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        if dropout is not None:
            dropout = replace(dropout, first_head=dropout.first_head + self._part * q.shape[1])
        y_BNTH = self._attend(q, k, v, documents=documents, dropout=dropout, causal=causal, window=window)
        return y_BNTH.transpose(1, 2).contiguous()
