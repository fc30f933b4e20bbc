"""Config of the layers of a transformer: attention, MLP, norms. Free of torch.

Dim names: D hidden_size, L num_layers, N num_heads, K num_kv_heads, H head_dim, F mlp_hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.model_config import OfVocabulary
from llmtrain.nn.rope_config import RopeScaling


@dataclass(frozen=True)
class LayerConfig:
    """Layers of attention and an MLP. Configs of decoder families inherit from it; others build one from
    their own keys."""

    hidden_size: int = 768
    """Width of the model: elements of a token's hidden state."""
    num_layers: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Number of attention heads per layer."""
    num_kv_heads: int | None = None
    """Number of key-value heads of grouped-query attention (arXiv:2305.13245); null: num_heads."""
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_heads."""
    mlp_hidden_size: int | None = None
    """Width of the MLP; null: 4 · hidden_size."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"
    """Nonlinearity of the MLP."""
    gated_mlp: bool = False
    """Gated MLP (SwiGLU, arXiv:2002.05202): down(act(gate(x)) · up(x)), three matrices."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of norm."""
    norm_eps: float = 1e-5
    """Constant added to the variance, or mean square, in norms."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Position of a layer's norms. before: x + f(norm(x)); after: x + norm(f(x)) (OLMo 2); both: x +
    norm(f(norm(x))) (Gemma 2)."""
    norm_adds_one: bool = False
    """RMS norms multiply by 1 + weight (Gemma)."""
    positions: Literal["learned", "rope"] = "learned"
    """Kind of positions. learned: an embedding for each position; rope: rotary positions
    (arXiv:2104.09864)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    """Share of a head's dims that are rotated, from the first."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers, from 0, without rotary positions (arXiv:2501.18795)."""
    local_rope_theta: float | None = None
    """Base of the rotary wavelengths in layers with a window, which rope_scaling does not change (Gemma
    3); null: as in the other layers."""
    sliding_window: int | None = None
    """Number of last tokens that a token attends to, including itself; null: all preceding tokens."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, from 0, without the sliding window."""
    query_pre_attn_scalar: int | None = None
    """Divide attention scores by the square root of this number; null: of head_dim."""
    attention_softcap: float | None = None
    """Soft cap of attention scores: cap · tanh(scores / cap) (Gemma 2); null: none."""
    bias: bool = True
    """Biases in all linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; null: as `bias`."""
    output_bias: bool | None = None
    """Bias of attention's output; null: as `bias`."""
    qk_norm: bool = False
    """RMS norms of queries and keys, before rotary positions."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Whether the norms of queries and keys are over each head's dims (Qwen 3, Gemma 3) or over those of
    all heads together (OLMo 2)."""
    dropout: float = 0.0
    """Dropout probability; 0: no dropout."""

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_output_bias(self) -> bool:
        return self.bias if self.output_bias is None else self.output_bias

    @property
    def rotary_width(self) -> int:
        """Return the number of a head's dims that are rotated."""
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.kv_heads) * self.head_width

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden_size if self.mlp_hidden_size is None else self.mlp_hidden_size

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of one layer."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def problems(self) -> Iterator[Problem]:
        for name in ("hidden_size", "num_layers", "num_heads"):
            yield from require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("num_kv_heads", "head_dim", "mlp_hidden_size"):
            value = getattr(self, name)
            yield from require(value is None or value >= 1, name, value, "1 or more, or null")
        yield from require(self.rope_theta > 0, "rope_theta", self.rope_theta, "more than 0")
        if min(self.hidden_size, self.num_heads, self.kv_heads) < 1:
            return
        if self.head_dim is None:
            yield from require(
                self.hidden_size % self.num_heads == 0,
                "hidden_size",
                self.hidden_size,
                f"a multiple of num_heads={self.num_heads}",
                f"the nearest is {max(1, round(self.hidden_size / self.num_heads)) * self.num_heads}",
            )
        yield from require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            self.kv_heads,
            f"a divisor of num_heads={self.num_heads}, or null",
        )
        if self.positions == "rope":
            yield from self._rotary_problems()
        for name in ("no_rope_layers", "full_attention_layers"):
            unknown = [layer for layer in getattr(self, name) if not 0 <= layer < self.num_layers]
            yield from require(not unknown, name, unknown, f"0 to {self.num_layers - 1}")
        for name in ("local_rope_theta", "query_pre_attn_scalar", "attention_softcap"):
            value = getattr(self, name)
            yield from require(value is None or value > 0, name, value, "more than 0, or null")
        yield from require(
            not self.norm_adds_one or self.norm == "rmsnorm", "norm", self.norm, "rmsnorm with norm_adds_one"
        )
        has_windows = any(self.window_of(layer) is not None for layer in range(self.num_layers))
        yield from require(
            self.local_rope_theta is None or (has_windows and self.positions == "rope"),
            "local_rope_theta",
            self.local_rope_theta,
            "null, without rope or layers that have a sliding_window",
        )
        yield from require(
            self.sliding_window is None or self.sliding_window >= 1,
            "sliding_window",
            self.sliding_window,
            "1 or more, or null",
        )
        yield from require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "0 up to, not including, 1")

    def _rotary_problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the rotary positions."""
        share = self.partial_rotary_factor
        yield from require(0 < share <= 1, "partial_rotary_factor", share, "above 0, up to 1")
        width = self.rotary_width
        if share == 1:
            yield from require(width % 2 == 0, "head_dim", width, "an even number with rope")
        else:
            got = f"{share}, {width} of a head's {self.head_width} dims"
            yield from require(
                width % 2 == 0 and width > 0, "partial_rotary_factor", got, "an even number of dims"
            )
        if self.rope_scaling is not None:
            for problem in self.rope_scaling.width_problems(width):
                yield problem.within("rope_scaling")

    def layer_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of one layer's matrices on one of `tensor` ranks that divide them."""
        D = self.hidden_size
        attention = D * self.qkv_width + self.num_heads * self.head_width * D
        return (attention + (3 if self.gated_mlp else 2) * D * self.mlp_width) // tensor

    def layer_parameter_count(self, tensor: int = 1) -> int:
        """Return the parameters of one layer on one of `tensor` ranks that divide its matrices. Biases of
        matrices divided by outputs are divided too; other biases and norms are whole on each rank."""
        D, F = self.hidden_size, self.mlp_width
        divided_biases = (F * (2 if self.gated_mlp else 1)) if self.bias else 0
        divided_biases += self.qkv_width if self.has_qkv_bias else 0
        whole_biases = D * (self.has_output_bias + self.bias)
        divided = self.layer_matrix_count() + divided_biases
        return divided // tensor + whole_biases + self.layer_norm_parameter_count(tensor)

    def layer_norm_parameter_count(self, tensor: int = 1) -> int:
        """Return the parameters of one layer's norms, which are whole on each of `tensor` ranks except
        those over all heads."""
        of_heads = 0
        if self.qk_norm:
            is_whole = self.qk_norm_over == "head"
            of_heads = (2 if is_whole else (self.num_heads + self.kv_heads) // tensor) * self.head_width
        return self.norms_per_block * self._norm_parameter_count() + of_heads

    @property
    def norms_per_block(self) -> int:
        """Return the number of norms per layer, without those of queries and keys."""
        return 4 if self.norm_place == "both" else 2

    def _norm_parameter_count(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" and self.bias else 1)

    def largest_layer_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest parameter of one layer on one of `tensor` ranks that divide
        it."""
        return (
            max(self.qkv_width, self.num_heads * self.head_width, self.mlp_width) * self.hidden_size // tensor
        )


class OfLayers(OfVocabulary):
    """Base of configs whose layers are attention and an MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int

    @property
    def blocks(self) -> LayerConfig:
        """Return the config of its layers."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_width(self) -> int:
        return self.blocks.head_width

    @property
    def mlp_width(self) -> int:
        return self.blocks.mlp_width

    def layer_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of one layer's matrices on one of `tensor` ranks that divide them."""
        return self.blocks.layer_matrix_count(tensor)

    def step_multiplications(self, tensor: int, sequence_length: int) -> list[int]:
        """Return the multiplications of each step for one token of a sequence, attention's included."""
        layer = self.layer_matrix_count(tensor) + sequence_length * self.num_heads * self.head_width
        return [0, *[layer] * self.num_layers, self.head_matrix_count(tensor)]
