"""What the layers of a transformer are made of: attention, MLP, norms. Free of torch.

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
    """Layers of attention and an MLP. Families of decoders are configs of this kind; others make one of their
    own keys."""

    hidden_size: int = 768
    """Width of the model: elements of the vector that stands for a token."""
    num_layers: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Attention heads of a layer."""
    num_kv_heads: int | None = None
    """Key and value heads of grouped-query attention (arXiv:2305.13245); null: as many as num_heads."""
    head_dim: int | None = None
    """Width of one head; null: hidden_size / num_heads."""
    mlp_hidden_size: int | None = None
    """Width of the MLP; null: 4 · hidden_size."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"
    """Nonlinearity of the MLP."""
    gated_mlp: bool = False
    """SwiGLU form (arXiv:2002.05202): down(act(gate(x)) · up(x)), three matrices."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of the norms."""
    norm_eps: float = 1e-5
    """Added to the variance, or mean square, in norms."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Of a block's norms: before attention and MLP, x + f(norm(x)); after them, x + norm(f(x)) (OLMo 2); or
    both (Gemma 2)."""
    norm_adds_one: bool = False
    """RMS norms multiply by 1 + weight (Gemma)."""
    positions: Literal["learned", "rope"] = "learned"
    """learned: an embedding of each position; rope: rotary positions (arXiv:2104.09864)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    """Share of a head's dims that rotary positions turn: the first of them."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers, from 0, without rotary positions (arXiv:2501.18795)."""
    local_rope_theta: float | None = None
    """Base of the layers with a window, which rope_scaling then leaves as they are (Gemma 3); null: they have
    the rotary positions of the others."""
    sliding_window: int | None = None
    """A token attends to the last so many tokens, itself included; null: to all before it."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, from 0, without the window."""
    query_pre_attn_scalar: int | None = None
    """Scores are divided by its square root; null: by that of head_dim."""
    attention_softcap: float | None = None
    """Scores s become cap · tanh(s / cap) before the softmax (Gemma 2); null: they stay."""
    bias: bool = True
    """Biases in all linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; null: as `bias`."""
    output_bias: bool | None = None
    """Biases of attention's output; null: as `bias`."""
    qk_norm: bool = False
    """RMSNorm over queries' and keys' dims, before rotary positions."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Each head's dims by themselves (Qwen 3, Gemma 3), or those of all heads together (OLMo 2)."""
    dropout: float = 0.0
    """Probability that dropout zeroes an element; 0 turns it off."""

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
        """Dims of a head that rotary positions turn."""
        return int(self.head_width * self.partial_rotary_factor)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.kv_heads) * self.head_width

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden_size if self.mlp_hidden_size is None else self.mlp_hidden_size

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer."""
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
        """What keeps its heads from being turned by rotary positions."""
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
        """Weights of one block's matrices, on one of `tensor` processes that divide them."""
        D = self.hidden_size
        attention = D * self.qkv_width + self.num_heads * self.head_width * D
        return (attention + (3 if self.gated_mlp else 2) * D * self.mlp_width) // tensor

    def layer_parameter_count(self, tensor: int = 1) -> int:
        """Parameters of one block, on one of `tensor` processes that divide its matrices: biases of what
        is divided by outputs are divided too, those of the others and norms are whole on each."""
        D, F = self.hidden_size, self.mlp_width
        divided_biases = (F * (2 if self.gated_mlp else 1)) if self.bias else 0
        divided_biases += self.qkv_width if self.has_qkv_bias else 0
        whole_biases = D * (self.has_output_bias + self.bias)
        divided = self.layer_matrix_count() + divided_biases
        return divided // tensor + whole_biases + self.layer_norm_parameter_count(tensor)

    def layer_norm_parameter_count(self, tensor: int = 1) -> int:
        """Parameters of one block's norms, which are whole on each of `tensor` processes, but for those over
        all heads."""
        of_heads = 0
        if self.qk_norm:
            is_whole = self.qk_norm_over == "head"
            of_heads = (2 if is_whole else (self.num_heads + self.kv_heads) // tensor) * self.head_width
        return self.norms_per_block * self._norm_parameter_count() + of_heads

    @property
    def norms_per_block(self) -> int:
        """Those of queries and keys aside."""
        return 4 if self.norm_place == "both" else 2

    def _norm_parameter_count(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" and self.bias else 1)

    def largest_layer_parameter_count(self, tensor: int = 1) -> int:
        """Elements of the largest parameter of one layer, on one of `tensor` ranks that divide it."""
        return (
            max(self.qkv_width, self.num_heads * self.head_width, self.mlp_width) * self.hidden_size // tensor
        )


class OfLayers(OfVocabulary):
    """A config of a model whose layers are attention and an MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int

    @property
    def blocks(self) -> LayerConfig:
        """What its attention and MLPs are made of."""
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
        """Return the weights of one layer's matrices, on one of `tensor` ranks that divide them."""
        return self.blocks.layer_matrix_count(tensor)

    def step_multiplications(self, tensor: int, sequence_length: int) -> list[int]:
        """Return the multiplications of each step for one token of a sequence, attention's included."""
        layer = self.layer_matrix_count(tensor) + sequence_length * self.num_heads * self.head_width
        return [0, *[layer] * self.num_layers, self.head_matrix_count(tensor)]
