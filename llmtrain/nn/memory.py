"""Bytes that a model keeps on one rank from the forward to the backward pass: the base of each family's
memory.py. Free of torch.

Counts as Korthikanti et al. (arXiv:2205.05198, section 4) do, but for what these modules actually keep:
attention keeps a T² term only on the CPU. Tests compare with what torch keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Generic, NamedTuple, TypeVar

from llmtrain.nn import attention_choice
from llmtrain.nn.attention_choice import AttentionCall, DropoutMask, Kernel, choose_kernel
from llmtrain.nn.layer_config import LayerConfig, OfLayers
from llmtrain.nn.model_config import ModelConfig, OfVocabulary, Row
from llmtrain.nn.recompute_config import RecomputeConfig

LOGITS_PER_CHUNK = 2**23
CACHED_LOGITS = 2**20
"""As in nn/head.py, which a test checks."""

WHOLE_LOGITS_BYTES = 12
"""Bytes of each logit where all are held: the logit, those that bear a loss, and their log-probabilities; or
the latter with their gradient and the logit's."""

AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)
AnyVocabulary = TypeVar("AnyVocabulary", bound=OfVocabulary)


@dataclass(frozen=True)
class Division:
    """How the ranks of a layout divide a model's work, as far as memory depends on it."""

    micro_size: int
    """Rows of a micro-batch."""
    sequence_length: int
    tensor: int = 1
    sequence: int = 1
    tensor_sequence: bool = False
    """Whether the ranks of a tensor group divide tokens between the matrices (arXiv:2205.05198)."""


@dataclass(frozen=True)
class Numbers:
    """Bytes per number: `compute` in matrix products, `residual` between layers and in norms, which
    autocast keeps in fp32."""

    compute: int
    residual: int


@dataclass(frozen=True)
class Conditions:
    """What, besides sizes, determines what a forward pass keeps."""

    device: str
    document_mask: bool = True
    exact_dropout: bool = True
    """Whether dropout masks come from keys; otherwise from torch's generator, as fused attention kernels
    can."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    has_bf16: bool = True
    """Whether the CPU has bf16; without it autocast leaves LSTM cells in fp32."""
    trains_head: bool = True
    """Whether the head's weight has a gradient."""


class Activations(NamedTuple):
    """Bytes on one rank."""

    kept: int
    """Kept by one micro-batch from its forward to its backward pass, without head and loss."""
    working: int
    """Needed in addition while a layer is recomputed."""


@dataclass(frozen=True)
class ModelMemory(ABC, Generic[AnyConfig]):
    """Memory of one rank for one micro-batch; each family has a subclass."""

    causal: ClassVar[bool] = False
    """True if a token attends only to itself and to earlier tokens."""

    model: AnyConfig
    row: Row
    numbers: Numbers
    layout: Division
    conditions: Conditions

    @abstractmethod
    def activations(self, steps: range) -> Activations:
        """Return what `steps` of the forward pass keep, without the loss."""

    @abstractmethod
    def copied_weights(self, steps: range) -> int:
        """Return the weights of which autocast holds low-precision copies at once: those of linear layers,
        of recomputed layers one layer at a time. The head's are part of `head_bytes`."""

    def low_precision_copies(self, steps: range) -> int:
        """Return `copied_weights`, or 0 on a processor without bf16, which rounds weights at each product."""
        return self.copied_weights(steps) if self.conditions.has_bf16 else 0

    def attention_kernel(self) -> Kernel | None:
        """Return the kernel of the first layer's self-attention; None: it is not known."""
        return None

    def between_layers(self) -> int:
        """Return the elements that one layer passes to the next."""
        return 0

    def head_bytes(self) -> int:
        """Return the peak bytes of head and loss."""
        return 0

    def head_backward_bytes(self) -> int:
        """Return the bytes of the gradients of head and loss when the backward pass begins."""
        return 0

    def layers_of(self, steps: range, count: int) -> Iterator[tuple[int, bool]]:
        """Yield the layers, from 0, among `steps` of a model of `count` layers, and whether each is
        recomputed."""
        for step in steps:
            if 1 <= step <= count:
                yield step - 1, self.conditions.recompute.covers(step - 1)


class VocabularyMemory(ModelMemory[AnyVocabulary]):
    """Memory of a language model, whose loss works on chunks of logits."""

    @property
    @abstractmethod
    def head_tokens(self) -> int:
        """Return the hidden states of a micro-batch that the head reads on this rank."""

    @property
    def has_softcap(self) -> bool:
        """Return whether the head caps its logits."""
        return False

    def head_bytes(self) -> int:
        """Return the peak bytes of head and loss: chunks of logits, the gradients of the hidden states and of
        the head's weight, and, in low precision, copies of both."""
        model, numbers, tensor = self.model, self.numbers, self.layout.tensor
        if not model.predicts_tokens:
            of_weight = model.head_matrix_count() * (4 + numbers.compute)
            return self.head_tokens * model.hidden_size * 4 + of_weight
        assert model.vocab_size is not None
        V, D = -(-model.vocab_size // tensor), model.hidden_size
        tokens = self.head_tokens
        if self.row.whole_logits:
            return tokens * V * WHOLE_LOGITS_BYTES
        chunk = min(tokens, max(1, LOGITS_PER_CHUNK // V)) * V
        # Beside its own logits a chunk may have those of the one before.
        logits = chunk * numbers.compute * (1 if tokens * V == chunk else 2)
        if self.has_softcap:
            logits += 2 * chunk * numbers.compute  # slopes of the cap, and the tanh squared
        trained = V * D if self.conditions.trains_head else 0
        held = tokens * D * 4 + trained * 4
        if numbers.compute == 4:
            return held + logits + self._softmax_bytes(chunk)
        held += V * D * 2 if numbers.residual > numbers.compute else 0  # autocast's copy
        if self.conditions.has_bf16:
            # A chunk's weight gradient is computed in low precision, and added on a CPU through an fp32 copy.
            product = trained * (2 + (4 if self.conditions.device == "cpu" else 0))
        else:
            product = 4 * (chunk + V * D)  # of logits and weight, in fp32
        return held + logits + max(self._softmax_bytes(chunk), product)

    def _softmax_bytes(self, logits: int) -> int:
        """Return the bytes of the loss of so many logits beside these: copies and log-probabilities in fp32.
        A CPU computes them in parts, of which two meet; with several ranks fairscale keeps exponentials."""
        is_low = self.numbers.compute < 4
        if self.layout.tensor > 1:
            return 8 * logits
        if self.conditions.device == "cpu":
            return 4 * (2 + is_low) * min(logits, CACHED_LOGITS)
        return 4 * (1 + is_low) * logits

    def head_backward_bytes(self) -> int:
        """Return the bytes of the gradients that the loss computed, of the hidden states and the head's
        weight, and of their products with the gradient of the loss."""
        model, numbers = self.model, self.numbers
        if not model.predicts_tokens or self.row.whole_logits:
            return self.head_bytes()
        hidden, weights = self.head_tokens * model.hidden_size, 0
        if self.conditions.trains_head:
            weights = model.embedding_count(self.layout.tensor)
        of_hidden = 2 * numbers.compute + (numbers.residual if numbers.residual != numbers.compute else 0)
        return hidden * of_hidden + weights * (8 + (2 if numbers.residual == 2 else 0))


@dataclass(frozen=True)
class TransformerToken:
    """Bytes per token held, if `layout.sequence` ranks share the tokens."""

    model: LayerConfig
    numbers: Numbers
    layout: Division
    conditions: Conditions
    causal: bool = True

    def of_steps(self, steps: range) -> Activations:
        model, mode = self.model, self.conditions.recompute.mode
        covers = self.conditions.recompute.covers
        windows = [(covers(step - 1), model.window_of(step - 1)) for step in steps if self._is_block(step)]
        sizes = {window: self.block(window) for window in {window for _, window in windows}}
        kept = sum(sizes[window] for is_recomputed, window in windows if not is_recomputed)
        again = [sizes[window] for is_recomputed, window in windows if is_recomputed]
        if recomputed := len(again):
            # Offloaded inputs are in host memory, which on a CPU is the process's own.
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
        """Return the size per token of activations between matrices, which Megatron's sequence parallelism
        divides."""
        return -(-size // self.layout.tensor) if self.layout.tensor_sequence else size

    def norm(self) -> int:
        D = self.model.hidden_size
        if self.model.norm == "rmsnorm" and self.conditions.device == "cpu":
            # Composed of single operations in fp32: the input and the normalized input.
            return self._between(2 * 4 * D + 4)
        input_bytes = 4 if self.model.norm_adds_one else self.numbers.residual
        return self._between(input_bytes * D + 8)

    def block(self, window: int | None = None) -> int:
        """Return the bytes that a layer keeps per token. window: of its attention."""
        model, numbers, layout = self.model, self.numbers, self.layout
        D, F = model.hidden_size, model.mlp_width // layout.tensor
        queries = model.num_heads * model.head_width // layout.tensor

        # Inputs of qkv, output, up (and gate) and down, and of the activation. Those of qkv, up and gate are
        # of all tokens, even if the ranks of the tensor group shared them before.
        kept = D + queries + D + F + (3 * F if model.gated_mlp else F)
        if model.activation == "relu":
            kept -= F  # which keeps its output
        if model.gated_mlp and numbers.residual > numbers.compute:
            kept += D  # autocast copies the norm's output for gate and for up
        if model.dropout > 0:
            kept += self._between(2 * D)  # dropout masks
        kept *= numbers.compute
        return model.norms_per_block * self.norm() + kept + self._head_norms() + self._attention(window)

    def _head_norms(self) -> int:
        """Return the bytes kept by the norms of queries and keys: a copy of the queries, and, for the
        keys, qkv's whole output, which fused kernels keep anyway. On a CPU it is fp32, and the output is
        kept too."""
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
        """Return the bytes kept between qkv's output and attention's output."""
        model, compute, T = self.model, self.numbers.compute, self.layout.sequence_length
        on_cpu, tensor = self.conditions.device == "cpu", self.layout.tensor
        N = model.num_heads // tensor
        queries, keys = N * model.head_width, model.kv_heads * model.head_width // tensor
        kernel = self.kernel(window)
        has_cap = model.attention_softcap is not None
        if kernel == "all_scores":
            # q, k and v, the softmax (fp32 under a GPU's autocast), the dropout mask and output, the slopes
            # of a cap, and the document mask.
            softmax = compute if on_cpu else self.numbers.residual
            hidden = self._mask() if self._is_masked(window) else 0
            of_pairs = compute * ((2 if model.dropout > 0 else 1) + has_cap) + softmax
            return compute * 3 * queries + of_pairs * N * T + hidden
        if model.dropout > 0 and on_cpu and kernel == "torch":
            # The replacement of flash attention keeps fp32 copies of q, k and v, the probabilities, the mask
            # and the masked probabilities.
            return 4 * (3 * queries + 3 * N * T)
        if kernel == "blockwise":
            # Copies of q, k and v, probabilities of keys that blocks can see, slopes of a cap; or less.
            in_view = self._keys_in_view(window) if self.causal else T
            return compute * (3 * queries + (1 + has_cap) * N * in_view)
        kept = queries + 2 * keys
        if model.positions == "rope":
            kept += queries + keys
        if self._is_masked(window) and kernel != "by_document":
            kept += self._mask()  # each layer converts the mask to numbers
        return kept * compute + 4 * N

    def kernel(self, window: int | None) -> Kernel:
        """Return the kernel of self-attention, assuming an A100 or later if on a GPU."""
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
        """Return what selective recomputation keeps: the outputs of the matrices, after the sum over the
        tensor group where these are summands, and inputs that the group gathered."""
        model, numbers, tensor = self.model, self.numbers, self.layout.tensor
        divided = model.qkv_width + model.mlp_width * (2 if model.gated_mlp else 1)
        summed = self._between(2 * model.hidden_size * numbers.compute)
        shares = tensor > 1 and self.layout.tensor_sequence
        gathered = 2 * model.hidden_size * numbers.residual if shares else 0
        return divided // tensor * numbers.compute + summed + gathered

    def _context(self, windows: set[int | None]) -> int:
        """Return what recomputed layers share: rotary tables, and masks of bytes, or of fp32 in blocks."""
        rotary = 4 * self.model.rotary_width if self.model.positions == "rope" else 0
        tables = (self.model.local_rope_theta is not None) + 1
        sizes = {"by_document": 0, "blockwise": 4}
        masks = sum(sizes.get(self.kernel(window), 1) for window in windows if self._is_masked(window))
        return tables * rotary + masks * self._mask()

    def _is_masked(self, window: int | None) -> bool:
        """Return whether attention has a mask besides the causal one."""
        is_narrow = window is not None and window < self.layout.sequence_length
        return self.conditions.document_mask or is_narrow

    def _keys_in_view(self, window: int | None) -> int:
        """Return the average number of keys that blockwise attention multiplies a query with: from the
        first key that a query of its block sees, if a window skips keys."""
        T = self.layout.sequence_length
        window = window or T
        pairs = 0
        for start in range(0, T, attention_choice.BLOCK):
            end = min(start + attention_choice.BLOCK, T)
            pairs += (end - start) * (end - max(0, start - window + 1))
        return -(-pairs // T)

    def _mask(self) -> int:
        """Return the elements of the mask, which covers all tokens, per token held."""
        return self.layout.sequence_length * self.layout.sequence


AnyLayers = TypeVar("AnyLayers", bound=OfLayers)


class LayersMemory(VocabularyMemory[AnyLayers]):
    """A stack of layers over one sequence, with a language-model head."""

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch on this rank."""
        return self.layout.micro_size * self.row.tokens // self.layout.sequence

    def activations(self, steps: range) -> Activations:
        layers = self.model.blocks
        token = TransformerToken(layers, self.numbers, self.layout, self.conditions, self.causal)
        kept, working = token.of_steps(steps)
        return Activations(self.tokens * kept, self.tokens * working)

    def attention_kernel(self) -> Kernel:
        layers = self.model.blocks
        token = TransformerToken(layers, self.numbers, self.layout, self.conditions, self.causal)
        return token.kernel(layers.window_of(0))

    def between_layers(self) -> int:
        return self.tokens * self.model.hidden_size

    @property
    def head_tokens(self) -> int:
        return self.tokens

    def copied_weights(self, steps: range) -> int:
        layers, tensor = self.model.blocks, self.layout.tensor
        layer = layers.layer_parameter_count(tensor) - layers.layer_norm_parameter_count(tensor)
        return layer * self.copied_layers(steps)

    def copied_layers(self, steps: range) -> int:
        """Return the number of layers among `steps` that have low-precision weight copies at the same
        time."""
        recomputed = [again for _, again in self.layers_of(steps, self.model.num_layers)]
        return recomputed.count(False) + min(1, recomputed.count(True))
