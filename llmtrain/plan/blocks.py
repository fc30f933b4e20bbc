"""Bytes that blocks of attention keep for the backward pass, by kind of block.

The way of counting is that of Korthikanti et al. (arXiv:2205.05198, section 4), over what these modules
really keep: attention keeps a T² term on the CPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn import attention_choice
from llmtrain.nn.attention_choice import AttentionCall, DropoutMask, Kernel, choose_kernel
from llmtrain.nn.layer_config import LayerConfig
from llmtrain.parallel.config import RecomputeConfig
from llmtrain.parallel.layout import Layout


@dataclass(frozen=True)
class Numbers:
    """Bytes of one number: `compute` in matrix products, `residual` between blocks and in norms (autocast
    keeps these in fp32)."""

    compute: int
    residual: int


@dataclass(frozen=True)
class Conditions:
    """What, besides sizes, decides what a forward pass keeps."""

    device: str
    document_mask: bool = True
    exact_dropout: bool = True
    """Dropout by keys; else by torch's generator, which fused kernels of attention take."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    has_bf16: bool = True
    """Without it autocast on a CPU leaves the cells of an LSTM in fp32."""


class Activations(NamedTuple):
    """Bytes on one process."""

    kept: int
    """By one micro-batch from its forward to its backward pass, up to the head, its loss aside."""
    working: int
    """While a block is recomputed, besides."""


def divided(model: LayerConfig | XLNetConfig, steps: range, recompute: RecomputeConfig) -> tuple[int, int]:
    """How many blocks among `steps` are recomputed, and how many are not."""
    blocks = [step - 1 for step in steps if 1 <= step <= model.num_layers]
    recomputed = sum(recompute.covers(block) for block in blocks)
    return recomputed, len(blocks) - recomputed


@dataclass(frozen=True)
class TransformerToken:
    """Bytes a token at hand, which is one of `layout.sequence` processes' tokens."""

    model: LayerConfig
    numbers: Numbers
    layout: Layout
    conditions: Conditions
    causal: bool = True

    def activations(self, steps: range) -> Activations:
        model, mode = self.model, self.conditions.recompute.mode
        covers = self.conditions.recompute.covers
        windows = [(covers(step - 1), model.window_of(step - 1)) for step in steps if self._is_block(step)]
        sizes = {window: self.block(window) for _, window in windows}
        kept = sum(sizes[window] for is_recomputed, window in windows if not is_recomputed)
        again = [sizes[window] for is_recomputed, window in windows if is_recomputed]
        if recomputed := len(again):
            # Offloaded inputs lie in host memory: that of the process itself on a cpu.
            away = mode == "offload" and self.conditions.device != "cpu"
            kept += recomputed * (0 if away else self._between(model.hidden_size * self.numbers.residual))
            kept += recomputed * (self.linear_outputs() if mode == "selective" else 0)
            kept += self._context({window for _, window in windows})
        if 0 in steps:
            kept += 8 + (model.hidden_size * self.numbers.residual if model.dropout > 0 else 0)
        if model.num_layers + 1 in steps:
            kept += self.norm()
        return Activations(kept, max(again, default=0))

    def _is_block(self, step: int) -> bool:
        return 1 <= step <= self.model.num_layers

    def _between(self, size: int) -> int:
        """What lies between the matrices: Megatron's sequence parallelism divides it."""
        return -(-size // self.layout.tensor) if self.layout.tensor_sequence else size

    def norm(self) -> int:
        D = self.model.hidden_size
        if self.model.norm == "rmsnorm" and self.conditions.device == "cpu":
            # Composed of single operations, in fp32: the input and the normalized input.
            return self._between(2 * 4 * D + 4)
        input_bytes = 4 if self.model.norm_adds_one else self.numbers.residual
        return self._between(input_bytes * D + 8)

    def block(self, window: int | None = None) -> int:
        """window: of its attention."""
        model, numbers, layout = self.model, self.numbers, self.layout
        D, F = model.hidden_size, model.mlp_width // layout.tensor
        queries = model.num_heads * model.head_width // layout.tensor

        # Inputs of qkv, output, up (and gate) and down, and of the activation. Those of qkv, up and gate are
        # of all tokens, also where the tensor group's processes have shared them before.
        kept = D + queries + D + F + (3 * F if model.gated_mlp else F)
        if model.activation == "relu":
            kept -= F  # which keeps what it gives
        if model.gated_mlp and (numbers.residual > numbers.compute or layout.tensor_sequence):
            kept += D  # autocast copies the norm's output, and the group gathers it, for gate and for up
        if model.dropout > 0:
            kept += self._between(2 * D)  # the masks
        kept *= numbers.compute
        return model.norms_per_block * self.norm() + kept + self._head_norms() + self._attention(window)

    def _head_norms(self) -> int:
        """Of queries and keys: what goes in - a copy of the queries, and for the keys qkv's whole output,
        which a kernel in one piece keeps anyway; on a CPU it is fp32, and there is what comes out besides."""
        model, compute, tensor = self.model, self.numbers.compute, self.layout.tensor
        if not model.qk_norm:
            return 0
        queries, heads = model.num_heads // tensor, (model.num_heads + model.kv_heads) // tensor
        on_cpu, fp32 = self.conditions.device == "cpu", 4 * heads * model.head_width
        if model.qk_norm_over == "all_heads":
            return 2 * fp32 + 8
        inputs = queries * model.head_width * compute
        if on_cpu and self.layout.sequence_length <= attention_choice.LONGEST_BLOCKWISE:
            inputs += model.qkv_width // tensor * compute
        if on_cpu:
            return (inputs if compute == 4 else fp32) + fp32 + 8 * heads
        return inputs + 8 * heads

    def _attention(self, window: int | None) -> int:
        """Between qkv's output and attention's output."""
        model, compute, T = self.model, self.numbers.compute, self.layout.sequence_length
        N, tensor, on_cpu = (
            model.num_heads // self.layout.tensor,
            self.layout.tensor,
            self.conditions.device == "cpu",
        )
        queries, keys = N * model.head_width, model.kv_heads * model.head_width // tensor
        kernel = self._kernel(window)
        has_cap = model.attention_softcap is not None
        if kernel == "all_scores":
            # q, k and v, the softmax (in fp32 by a GPU's autocast), dropout's mask and what it leaves, what a
            # cap makes of scores, and what the mask of documents hides.
            softmax = compute if on_cpu else self.numbers.residual
            hidden = self._mask() if self._is_masked(window) else 0
            of_pairs = compute * ((2 if model.dropout > 0 else 1) + has_cap) + softmax
            return compute * 3 * queries + of_pairs * N * T + hidden
        if model.dropout > 0 and on_cpu:
            # What replaces flash attention keeps, in fp32, copies of q, k and v, the probabilities, their
            # mask and the masked probabilities.
            return 4 * (3 * queries + 3 * N * T)
        if kernel == "blockwise":
            # Blocks of queries, with copies of q, k and v and the probabilities of the keys they can see, and
            # slopes of a cap; short documents see fewer.
            in_view = self._keys_in_view(window) if self.causal else T
            return compute * (3 * queries + (1 + has_cap) * N * in_view)
        kept = queries + 2 * keys
        if model.positions == "rope":
            kept += queries + keys
        if self._is_masked(window) and kernel != "by_document":
            kept += self._mask()  # each layer turns the mask into numbers
        return kept * compute + 4 * N

    def _kernel(self, window: int | None) -> Kernel:
        """The kernel of self-attention; a GPU is taken to be an A100 or later."""
        model, T, on_gpu = self.model, self.layout.sequence_length, self.conditions.device != "cpu"
        mask: DropoutMask = "sample_keys" if self.conditions.exact_dropout else "generator"
        call = AttentionCall(
            device=self.conditions.device,
            num_queries=T,
            num_keys=T,
            causal=self.causal,
            has_documents=self._is_masked(window),
            dropout="none" if model.dropout == 0 else mask,
            has_scale=model.query_pre_attn_scalar not in (None, model.head_width),
            has_softcap=model.attention_softcap is not None,
            runs_flash=on_gpu and self.numbers.compute == 2 and model.head_width % 8 == 0,
        )
        return choose_kernel(call)

    def linear_outputs(self) -> int:
        """What selective recomputation keeps: a row-divided layer's output is a whole summand."""
        model, tensor = self.model, self.layout.tensor
        divided = model.qkv_width + model.mlp_width * (2 if model.gated_mlp else 1)
        return (divided // tensor + 2 * model.hidden_size) * self.numbers.compute

    def _context(self, windows: set[int | None]) -> int:
        """What recomputed blocks share: rotary tables and the masks."""
        rotary = 4 * self.model.rotary_width if self.model.positions == "rope" else 0
        tables = 1 if self.model.local_rope_theta is None else 2
        masks = sum(self._is_masked(window) and self._kernel(window) != "by_document" for window in windows)
        return tables * rotary + masks * self._mask()

    def _is_masked(self, window: int | None) -> bool:
        """Whether attention is told which keys a query sees, besides those before it."""
        is_narrow = window is not None and window < self.layout.sequence_length
        return self.conditions.document_mask or is_narrow

    def _keys_in_view(self, window: int | None) -> int:
        """Keys that blockwise attention multiplies a query with, on average: from the first that some query
        of its block sees, where a window leaves keys out."""
        T = self.layout.sequence_length
        window = window or T
        pairs = 0
        for start in range(0, T, attention_choice.BLOCK):
            end = min(start + attention_choice.BLOCK, T)
            pairs += (end - start) * (end - max(0, start - window + 1))
        return -(-pairs // T)

    def _mask(self) -> int:
        """Elements of the mask, which is over all tokens, for a token at hand."""
        return self.layout.sequence_length * self.layout.sequence


@dataclass(frozen=True)
class XLNetRow:
    """Bytes of a micro-batch, row by row: Q = T + M hidden states between blocks, T of them keys.

    What each matrix product takes is kept, of scores the softmax alone, and what the blocks share once."""

    model: XLNetConfig
    numbers: Numbers
    layout: Layout
    conditions: Conditions

    def activations(self, steps: range) -> Activations:
        model, layout, mode = self.model, self.layout, self.conditions.recompute.mode
        B, T, D = layout.micro_size, layout.sequence_length, model.hidden_size
        Q, residual = model.num_places(T), self.numbers.residual
        recomputed, plain = divided(model, steps, self.conditions.recompute)
        block = B * self._block() + self._distances()
        kept = plain * block
        if recomputed:
            away = mode == "offload" and self.conditions.device != "cpu"
            kept += recomputed * (0 if away else B * Q * D * residual)
            kept += recomputed * (self._linear_outputs() if mode == "selective" else 0)
        if plain or recomputed:
            # Of each query and key the distance, what is not seen, other segments; sines of distances.
            kept += B * Q * T * (8 + 1 + int(model.has_segments)) + (2 * T - 1) * D * 4
        if 0 in steps:
            kept += 8 * B * Q + (B * Q * D * residual if model.dropout > 0 else 0)
        if model.num_layers + 1 in steps and model.dropout > 0:
            kept += B * (Q - T) * D * residual
        return Activations(kept, block if recomputed else 0)

    def _block(self) -> int:
        model, tensor, T = self.model, self.layout.tensor, self.layout.sequence_length
        compute, residual = self.numbers.compute, self.numbers.residual
        D, F, A, N, Q = (
            model.hidden_size,
            model.mlp_width // tensor,
            model.hidden_size // tensor,
            model.num_heads // tensor,
            model.num_places(T),
        )
        softmax = compute if self.conditions.device == "cpu" else residual
        of_place = 2 * (D * residual + 8)  # the norms' inputs
        # Inputs of query, output, up and down, and of the activation; queries with two biases, or three.
        of_place += compute * (2 * D + A + 2 * F + 2 * A)
        of_place += N * T * softmax
        if model.has_segments:
            of_place += compute * (A + N + T)
        if model.dropout > 0:
            of_place += 2 * D * residual + 2 * N * T * compute  # masks, and weights that are left
        of_key = compute * (D + 2 * A)  # the tokens' hidden states alone, keys and values
        return Q * of_place + T * of_key

    def _distances(self) -> int:
        """Their keys, which all rows share."""
        return (
            (2 * self.layout.sequence_length - 1)
            * self.model.hidden_size
            // self.layout.tensor
            * (self.numbers.compute)
        )

    def _linear_outputs(self) -> int:
        """What selective recomputation keeps."""
        model, tensor, T = self.model, self.layout.tensor, self.layout.sequence_length
        D, A, Q = model.hidden_size, model.hidden_size // tensor, model.num_places(T)
        of_rows = Q * (A + model.mlp_width // tensor + 2 * D) + 2 * T * A
        return (self.layout.micro_size * of_rows + (2 * T - 1) * A) * self.numbers.compute


@dataclass(frozen=True)
class PairRow:
    """Bytes of a micro-batch of an encoder–decoder: what its layers keep of their own side, and the tensor of
    both sides that goes from one to the next."""

    model: Seq2SeqConfig
    numbers: Numbers
    layout: Layout
    conditions: Conditions

    def activations(self, steps: range | None) -> Activations:
        model, residual, recompute = self.model, self.numbers.residual, self.conditions.recompute
        L, last = model.num_layers, model.num_layers + model.decoder_layers
        _, S, T = model.objective.lengths(self.layout.sequence_length)
        steps = range(last + 2) if steps is None else steps
        between = (S + T) * model.hidden_size * residual
        kept, working = 0, 0
        for step in steps:
            if not 1 <= step <= last:
                continue
            block = self._encoder_block(S) if step <= L else self._decoder_block(S, T)
            if not recompute.covers(step - 1):
                kept += block + self._kept_by_norm(T if step <= L else S)
                continue
            working = max(working, block)
            away = recompute.mode == "offload" and self.conditions.device != "cpu"
            kept += 0 if away else between
            kept += self._linear_outputs(step <= L, S, T) if recompute.mode == "selective" else 0
        if 0 in steps:
            kept += 8 * (S + T) + (between if model.dropout > 0 else 0)
            kept += between if model.embedding_norm else 0
        for step, length, other in ((L, S, T), (last + 1, T, S)):
            if step in steps and model.norm_first:
                kept += length * self._side(length, causal=True).norm() + self._kept_by_norm(other)
        B = self.layout.micro_size
        return Activations(B * kept, B * working)

    def _kept_by_norm(self, places: int) -> int:
        """Of the other side's places: a norm that begins a step keeps the whole of what it takes a side of,
        unless it takes a copy in fp32."""
        model, residual = self.model, self.numbers.residual
        copies = model.norm == "rmsnorm" and residual == 2 and self.conditions.device == "cpu"
        return places * model.hidden_size * residual if model.norm_first and not copies else 0

    def _side(self, length: int, *, causal: bool) -> TransformerToken:
        layout = replace(self.layout, sequence_length=length)
        return TransformerToken(self.model.blocks, self.numbers, layout, self.conditions, causal)

    def _encoder_block(self, S: int) -> int:
        return S * self._side(S, causal=False).block()

    def _decoder_block(self, S: int, T: int) -> int:
        """With the inputs of cross-attention's query, output and key_value, its norm, and attention."""
        model, compute, tensor = self.model, self.numbers.compute, self.layout.tensor
        side, D = self._side(T, causal=True), model.hidden_size
        N = model.num_heads // tensor
        inner = N * model.head_width
        of_target = side.norm() + compute * (D + 2 * inner + (D if model.dropout > 0 else 0))
        of_source = compute * (D + 2 * inner)
        pairs = compute * N * T * S
        if model.dropout > 0 and self.conditions.exact_dropout:
            pairs *= 3  # the softmax, dropout's mask and what it leaves
        elif self.conditions.device != "cpu":
            pairs = T * S if self.conditions.document_mask else 0
        return T * (side.block() + of_target) + S * of_source + pairs

    def _linear_outputs(self, is_encoder: bool, S: int, T: int) -> int:
        """What selective recomputation keeps."""
        side = self._side(S if is_encoder else T, causal=not is_encoder)
        if is_encoder:
            return S * side.linear_outputs()
        inner = self.model.num_heads * self.model.head_width // self.layout.tensor
        cross = T * (inner + self.model.hidden_size) + 2 * S * inner
        return T * side.linear_outputs() + cross * self.numbers.compute
