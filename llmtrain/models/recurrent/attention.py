"""Attention over the hidden states of a text: the vector that stands for it, and the weight of each token.

Dim names: B texts, T tokens, W width of a state, N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.models.recurrent.config import RecurrentConfig
from llmtrain.nn.linear import Linear


class AdditiveAttention(nn.Module):
    """Score of a state h: q · tanh(W h + b), with a learned q (Yang et al., NAACL 2016, equations 5 to 7)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = Linear(width, width)
        self.query = nn.Parameter(torch.empty(width))

    def forward(self, x_BTW: Tensor, final_BW: Tensor, is_token_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighed mean of the states, (B, W), and the weights of the tokens, (B, N, T) fp32."""
        scores_BT = torch.tanh(self.hidden(x_BTW)) @ self.query
        weights_B1T = weights_of(scores_BT[:, None], is_token_BT)
        return (weights_B1T.to(x_BTW.dtype) @ x_BTW)[:, 0], weights_B1T


class DotAttention(nn.Module):
    """Score of a state: its product with the final state (Luong et al., arXiv:1508.04025, section 3.1),
    divided by √W, as the final state grows with the width."""

    def forward(self, x_BTW: Tensor, final_BW: Tensor, is_token_BT: Tensor) -> tuple[Tensor, Tensor]:
        """As AdditiveAttention.forward."""
        scores_BT1 = x_BTW @ final_BW[..., None] * x_BTW.shape[-1] ** -0.5
        weights_B1T = weights_of(scores_BT1.transpose(1, 2), is_token_BT)
        return (weights_B1T.to(x_BTW.dtype) @ x_BTW)[:, 0], weights_B1T


class MultiHeadAttention(nn.Module):
    """Heads whose query is the final state (Vaswani et al., arXiv:1706.03762, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = Linear(width, width), Linear(width, width)
        self.value, self.output = Linear(width, width), Linear(width, width)

    def forward(self, x_BTW: Tensor, final_BW: Tensor, is_token_BT: Tensor) -> tuple[Tensor, Tensor]:
        """As AdditiveAttention.forward."""
        query_BN1H = self._of_heads(self.query(final_BW)[:, None])
        keys_BNTH, values_BNTH = self._of_heads(self.key(x_BTW)), self._of_heads(self.value(x_BTW))
        scores_BN1T = query_BN1H @ keys_BNTH.transpose(2, 3) * query_BN1H.shape[-1] ** -0.5
        weights_BNT = weights_of(scores_BN1T[:, :, 0], is_token_BT)
        mixed_BN1H = weights_BNT[:, :, None].to(values_BNTH.dtype) @ values_BNTH
        return self.output(mixed_BN1H.flatten(1)), weights_BNT

    def _of_heads(self, x_BTW: Tensor) -> Tensor:
        return x_BTW.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def weights_of(scores_BNT: Tensor, is_token_BT: Tensor) -> Tensor:
    """Return the softmax of the scores over the tokens, fp32; padding has a weight of 0."""
    scores_BNT = scores_BNT.float().masked_fill(~is_token_BT[:, None], torch.finfo(torch.float32).min)
    return scores_BNT.softmax(-1)


def make_attention(config: RecurrentConfig) -> nn.Module | None:
    """Return the attention over the states that the config asks for; None: none."""
    width = config.output_width
    match config.attention:
        case None:
            return None
        case "additive":
            return AdditiveAttention(width)
        case "dot":
            return DotAttention()
        case "multi_head":
            return MultiHeadAttention(width, config.attention_heads)
