"""The parts of a transformer: norms, positions, attention, MLP, block, key-value cache.

Dim names: B batch, T sequence, S keys (T, or what the cache holds with it), D hidden width,
N query heads, K key-value heads, G = N/K query heads a key-value head, H head width, F MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.attention import Documents, attend
from llmtrain.models.config import GPTConfig, RopeScaling
from llmtrain.models.dropout import HIDDEN, AttentionDropout, Dropout


class KVCache:
    """Keys and values of the tokens seen so far, for generation.

    Room for `max_length` tokens a layer is taken at the first append, in the shape, type and place of
    what is appended; nothing is copied later.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        """Tokens held; the model's forward moves it after its last layer."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens behind those held; returns all keys and values, (B, K, S, H) each.

        Raises ValueError past max_length."""
        B, K, T, H = k_BKTH.shape
        end = self.length + T
        if end > self.max_length:
            raise ValueError(f"a cache of {self.max_length} tokens cannot take {end}")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            keys = k_BKTH.new_empty(B, K, self.max_length, H)
            values = v_BKTH.new_empty(B, K, self.max_length, H)
            self._keys[layer], self._values[layer] = keys, values
        keys[:, :, self.length : end] = k_BKTH
        values[:, :, self.length : end] = v_BKTH
        return keys[:, :, :end], values[:, :, :end]


@dataclass(frozen=True)
class Context:
    """What all stages of one forward share."""

    positions: Tensor
    """Place of each token in its document, (B, T), or (1, T) when all rows are alike."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosine and sine, (B or 1, T, 1, H/2) fp32; None with learned positions."""
    documents: Documents | None = None
    """Those that the rows hold; None: a row is one."""
    labels: Tensor | None = None
    """The token that should follow each, (B, T), -100 where none counts; None: logits are wanted."""
    cache: KVCache | None = None
    dropout_keys: Tensor | None = None
    """A key for each row, (B,), that dropout's masks are made from; None: torch's generator."""


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Radians a position for each pair of a head's dims: (H/2,) fp32 (RoFormer, arXiv:2104.09864).

    With `scaling`, wavelengths beyond the original context are stretched by `factor`, those well
    inside it are kept, and the band between is interpolated (Llama 3.1, arXiv:2407.21783).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_sequence_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotary_tables(config: GPTConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (B, T, 1, H/2) fp32."""
    frequencies = rotary_frequencies(
        config.head_width, config.rope_theta, config.rope_scaling, positions_BT.device
    )
    angles = positions_BT[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) by its angle: Llama's half-split pairing, as Hugging Face stores it."""
    first, second = x_BTNH.chunk(2, dim=-1)
    cos, sin = cos.to(x_BTNH.dtype), sin.to(x_BTNH.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PerHead(nn.Module):
    """Learned numbers of each head, (N, width): positions' biases, vectors added to queries.

    Their rows are divided as heads are; forward asks the weight how many are here."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))

    def forward(self) -> Tensor:
        """(N, width)."""
        return self.weight


class Attention(nn.Module):
    """Self-attention with grouped queries (arXiv:1706.03762, 2305.13245).

    Rows of `qkv.weight` stand by key-value head: its G query heads, its key, its value. A slice of
    whole groups is a tensor-parallel shard, and forward asks the weight, not the config, how many
    groups it holds.
    """

    attend: Callable[..., Tensor]
    """Attention itself; sequence parallelism puts its exchange around it."""

    def __init__(self, config: GPTConfig, layer: int, *, causal: bool = True) -> None:
        """causal: a token sees itself and those before it; else all of its document."""
        super().__init__()
        self.layer = layer
        self.causal = causal
        self.num_heads = config.num_heads
        self.head_dim = config.head_width
        self.queries_per_kv = config.num_heads // config.kv_heads
        self.dropout = config.dropout
        self.first_head = 0
        """Number in the whole layer of the first query head held here."""
        self.attend = attend
        qkv_width = config.kv_heads * (self.queries_per_kv + 2) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, qkv_width, bias=config.bias)
        self.output = nn.Linear(config.num_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim))
        q_BTKGH, k_BTKH, v_BTKH = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q_BTNH = q_BTKGH.flatten(2, 3)
        if context.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *context.rotary), rotate(k_BTKH, *context.rotary)
        q, k, v = q_BTNH.transpose(1, 2), k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        dropout = None
        if self.training and self.dropout > 0.0:
            dropout = AttentionDropout(self.dropout, self.layer, context.dropout_keys, self.first_head)
        y_BNTH = self.attend(q, k, v, documents=context.documents, dropout=dropout, causal=self.causal)
        return self.output(y_BNTH.transpose(1, 2).flatten(2))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.mlp_width
        self.activation = config.activation
        self.gate = nn.Linear(D, F_, bias=config.bias) if config.gated_mlp else None
        self.up = nn.Linear(D, F_, bias=config.bias)
        self.down = nn.Linear(F_, D, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x_BTD)))
        return self.down(act(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm, as in GPT-2 and Llama."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.attention_dropout = Dropout(config.dropout, layer, HIDDEN)
        self.mlp_dropout = Dropout(config.dropout, layer, HIDDEN + 1)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        y_BTD = self.attention(self.attention_norm(x_BTD), context)
        x_BTD = x_BTD + self.attention_dropout(y_BTD, context.dropout_keys)
        return x_BTD + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTD)), context.dropout_keys)
