"""The parts of a transformer: norms, positions, attention, MLP, layer, key-value cache.

Dim names: B batch, T sequence, S keys (T, or the cache's length including them), D hidden width, N query
heads, K key-value heads, G = N/K query heads per key-value head, H head width, R rotated dims, F MLP
width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.nn.attention import attend
from llmtrain.nn.documents import CrossDocuments, Documents
from llmtrain.nn.dropout import HIDDEN, AttentionDropout, Dropout
from llmtrain.nn.layer_config import LayerConfig
from llmtrain.nn.linear import Linear
from llmtrain.nn.norms import make_head_norm, make_norm
from llmtrain.nn.relative import PerHead, RelativePositions
from llmtrain.nn.rotary import rotate


class KVCache:
    """Keys and values of the tokens seen so far, for generation.

    The first append allocates `max_length` tokens per layer, with the shape, dtype and device of its
    arguments; nothing is copied later.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        """Tokens held; the model's forward advances it after its last layer."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens after those held; return all keys and values, (B, K, S, H) each.

        Raise ValueError past max_length.
        """
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

    def select(self, rows_R: Tensor) -> None:
        """Keep only these rows, in this order; a row may occur several times."""
        self._put([None if held is None else held[rows_R] for held in self._held()])

    def reorder(self, rows_B: Tensor) -> None:
        """Let row b continue from the tokens of row rows_B[b]. State of a source is not moved, so rows may
        only continue from rows of the same source."""
        for held in self._held():
            if held is not None:
                held[:, :, : self.length] = held[rows_B, :, : self.length]

    def _held(self) -> list[Tensor | None]:
        return [*self._keys, *self._values]

    def _put(self, held: list[Tensor | None]) -> None:
        self._keys, self._values = held[: len(self._keys)], held[len(self._keys) :]


@dataclass(frozen=True)
class Context:
    """Arguments shared by all stages of a forward."""

    positions: Tensor
    """Position of each token in its document, (B, T), or (1, T) if all rows are alike."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosine and sine of the rotary angles, (B or 1, T, 1, R/2) fp32; None with learned positions."""
    documents: Documents | None = None
    """Documents of the rows; None: a row is one."""
    labels: Tensor | None = None
    """Next token at each position, (B, T), -100 where no loss is borne; None: return logits."""
    cache: KVCache | None = None
    dropout_keys: Tensor | None = None
    """A key for each row, (B,), from which dropout masks are generated; None: torch's generator."""
    last_only: bool = False
    """Whether to return logits of the last token only."""
    local_rotary: tuple[Tensor, Tensor] | None = None
    """Like `rotary`, for layers with a window if theirs differ."""
    lengths: Tensor | None = None
    """Tokens of each row, (B,), which a task head needs."""
    with_metrics: bool = False
    """Whether to return sums by name in place of the loss."""
    asked: Tensor | None = None
    """Positions of each row whose logits are returned, (B, M); None: all."""
    read: Tensor | None = None
    """Positions of each row that the head reads, (B, M), if these are few: the last layer may give their
    states alone. None: all."""

    @property
    def num_states(self) -> int:
        """Return the number of hidden states of a row between layers."""
        return self.positions.shape[1]


def asked_states(x_BTD: Tensor, asked_BM: Tensor | None) -> Tensor:
    """Return the hidden states of the asked positions, (B, M, D); all if none are given."""
    if asked_BM is None:
        return x_BTD
    return x_BTD.gather(1, asked_BM[..., None].expand(-1, -1, x_BTD.shape[-1]))


class Attention(nn.Module):
    """Self-attention with grouped queries (arXiv:1706.03762, 2305.13245).

    Rows of `qkv.weight` are ordered by key-value head: its G query heads, its key, its value. A slice of
    whole groups is a tensor-parallel shard; forward takes the number of groups from the weight, not from
    the config.
    """

    attend: Callable[..., Tensor]
    """The attention function; sequence parallelism wraps its communication around it."""

    def __init__(
        self,
        config: LayerConfig,
        layer: int,
        *,
        causal: bool = True,
        scale: float | None = None,
        relative: RelativePositions | None = None,
    ) -> None:
        """causal: a token sees itself and preceding tokens; else all of its document.
        scale: factor of the scores; None: 1 / sqrt(head_dim)."""
        super().__init__()
        self.layer = layer
        self.causal = causal
        self.window = config.window_of(layer)
        self.has_rotary = layer not in config.no_rope_layers
        self.has_local_rotary = self.window is not None and config.local_rope_theta is not None
        self.num_heads = config.num_heads
        self.head_dim = config.head_width
        self.queries_per_kv = config.num_heads // config.kv_heads
        self.dropout = config.dropout
        self.first_head = 0
        """Index in the whole layer of the first query head held here."""
        scalar = config.query_pre_attn_scalar
        if scale is None and scalar is not None and scalar != self.head_dim:
            scale = scalar**-0.5
        self.attend = functools.partial(attend, scale=scale, softcap=config.attention_softcap)
        self.positions = relative
        self.relative = None if relative is None else PerHead(config.num_heads, relative.num_buckets)
        qkv_width = config.kv_heads * (self.queries_per_kv + 2) * self.head_dim
        self.qkv = Linear(config.hidden_size, qkv_width, bias=config.has_qkv_bias)
        self.query_norm = make_head_norm(config, config.num_heads) if config.qk_norm else None
        self.key_norm = make_head_norm(config, config.kv_heads) if config.qk_norm else None
        self.output = Linear(
            config.num_heads * self.head_dim, config.hidden_size, bias=config.has_output_bias
        )

    def forward(self, x_BTD: Tensor, context: Context, places_BM: Tensor | None = None) -> Tensor:
        """places_BM: positions whose outputs are returned, (B, M, D); None: all."""
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim))
        q_BTKGH, k_BTKH, v_BTKH = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q_BTNH = q_BTKGH.flatten(2, 3)
        if self.query_norm is not None and self.key_norm is not None:
            # Autocast may leave a norm's output in fp32.
            q_BTNH = self.query_norm(q_BTNH).to(v_BTKH.dtype)
            k_BTKH = self.key_norm(k_BTKH).to(v_BTKH.dtype)
        rotary = context.local_rotary if self.has_local_rotary else context.rotary
        if rotary is not None and self.has_rotary:
            q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
        some = {}
        if places_BM is not None:
            some["places_BM"] = places_BM
            q_BTNH = asked_states(q_BTNH.flatten(2), places_BM).unflatten(-1, (-1, self.head_dim))
        q, k, v = q_BTNH.transpose(1, 2), k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        dropout = None
        if self.training and self.dropout > 0.0:
            keys_B = context.dropout_keys
            dropout = AttentionDropout(self.dropout, self.layer, keys_B, self.first_head, places_BM)
        bias = {}
        if self.positions is not None and self.relative is not None:
            both_ways = not self.causal
            bias["bias_NTS"] = self.positions.bias(
                self.relative(), q.shape[2], k.shape[2], both_ways=both_ways
            )
        y_BNTH = self.attend(
            q,
            k,
            v,
            documents=context.documents,
            dropout=dropout,
            causal=self.causal,
            window=self.window,
            **bias,
            **some,
        )
        return self.output(y_BNTH.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of one sequence to another (arXiv:1706.03762, section 3.2.3).

    Rows of `key_value.weight` are ordered by head: its key, then its value. A slice of whole heads is a
    tensor-parallel shard.
    """

    def __init__(self, config: LayerConfig, layer: int, *, scale: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.head_dim = config.head_width
        self.dropout = config.dropout
        self.first_head = 0
        """Index in the whole layer of the first head held here."""
        self.attend = attend if scale is None else functools.partial(attend, scale=scale)
        D, width = config.hidden_size, config.num_heads * config.head_width
        self.query = Linear(D, width, bias=config.bias)
        self.key_value = Linear(D, 2 * width, bias=config.bias)
        self.output = Linear(width, D, bias=config.bias)

    def keys_and_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the source, (B, N, S, H) each."""
        kv_BSN2H = self.key_value(source_BSD).unflatten(-1, (-1, 2, self.head_dim))
        k_BSNH, v_BSNH = kv_BSN2H.unbind(-2)
        return k_BSNH.transpose(1, 2), v_BSNH.transpose(1, 2)

    def forward(
        self,
        x_BTD: Tensor,
        keys_values: tuple[Tensor, Tensor],
        documents: CrossDocuments | None,
        dropout_keys: Tensor | None,
    ) -> Tensor:
        q_BNTH = self.query(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        dropout = None
        if self.training and self.dropout > 0.0:
            dropout = AttentionDropout(self.dropout, self.layer, dropout_keys, self.first_head)
        y_BNTH = self.attend(q_BNTH, *keys_values, documents=documents, dropout=dropout, causal=False)
        return self.output(y_BNTH.transpose(1, 2).flatten(2))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) · up(x)) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.mlp_width
        self.activation = config.activation
        self.gate = Linear(D, F_, bias=config.bias) if config.gated_mlp else None
        self.up = Linear(D, F_, bias=config.bias)
        self.down = Linear(F_, D, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x_BTD)))
        return self.down(act(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """A layer: attention, then an MLP, each with a residual connection.

    Norms are at `config.norm_place`: before each, x + f(norm(x)), as in GPT-2, Llama and T5; after it, x +
    norm(f(x)); or both. Without norm_first they are after the sum, norm(x + f(x)), as in the Transformer
    (arXiv:1706.03762), BERT and BART.
    """

    def __init__(
        self,
        config: LayerConfig,
        layer: int,
        *,
        norm_first: bool = True,
        causal: bool = True,
        scale: float | None = None,
        relative: RelativePositions | None = None,
    ) -> None:
        """For the arguments after `norm_first` see Attention."""
        super().__init__()
        self.norm_first = norm_first
        has_before, has_after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = make_norm(config) if has_before else nn.Identity()
        self.attention = Attention(config, layer, causal=causal, scale=scale, relative=relative)
        self.attention_output_norm = make_norm(config) if has_after else nn.Identity()
        self.mlp_norm = make_norm(config) if has_before else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_output_norm = make_norm(config) if has_after else nn.Identity()
        self.attention_dropout = Dropout(config.dropout, layer, HIDDEN)
        self.mlp_dropout = Dropout(config.dropout, layer, HIDDEN + 1)
        self.gives_what_is_read = layer == config.num_layers - 1 and relative is None
        """Whether, where `context.read` names positions, the layer returns their states alone, (B, M, D):
        queries, the rest of attention and the MLP are not computed for others."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.with_mlp(self.with_attention(x_BTD, context), context)

    def _read(self, context: Context) -> Tensor | None:
        return context.read if self.gives_what_is_read else None

    def with_attention(self, x_BTD: Tensor, context: Context) -> Tensor:
        read_BM = self._read(context)

        def attention(x_BTD: Tensor) -> Tensor:
            return self.attention_output_norm(self.attention(x_BTD, context, read_BM))

        return self.add(x_BTD, attention, self.attention_norm, self.attention_dropout, context, read_BM)

    def with_mlp(self, x_BTD: Tensor, context: Context) -> Tensor:
        def mlp(x_BTD: Tensor) -> Tensor:
            return self.mlp_output_norm(self.mlp(x_BTD))

        return self.add(x_BTD, mlp, self.mlp_norm, self.mlp_dropout, context)

    def add(
        self,
        x_BTD: Tensor,
        function: Callable[[Tensor], Tensor],
        norm: nn.Module,
        dropout: Dropout,
        context: Context,
        read_BM: Tensor | None = None,
    ) -> Tensor:
        """Return x + function(x), with its norm before or after. read_BM: positions that function returns."""
        y_BTD = function(norm(x_BTD) if self.norm_first else x_BTD)
        x_BTD = asked_states(x_BTD, read_BM) + dropout(y_BTD, context.dropout_keys, self._read(context))
        return x_BTD if self.norm_first else norm(x_BTD)
