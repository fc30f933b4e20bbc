"""Bytes that a forward pass keeps for the backward pass, by model family.

The way of counting is that of Korthikanti et al. (arXiv:2205.05198, section 4), over what these modules
really keep: attention keeps a T² term on the CPU alone, and the head's loss works on a chunk of the
logits. Tests compare with what torch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.models.config import GPTConfig, LSTMConfig, SimpleCNNConfig

ModelConfig = GPTConfig | LSTMConfig | SimpleCNNConfig

LOGITS_PER_CHUNK = 2**23
ATTENTION_BLOCK = 128
LONGEST_BLOCKWISE = 2048
"""As in models/head.py and models/attention.py; a test compares."""


@dataclass(frozen=True)
class Numbers:
    """Bytes of one number: `compute` in matrix products, `residual` between blocks and in norms (autocast
    keeps these in fp32)."""

    compute: int
    residual: int


def activation_bytes(
    model: ModelConfig,
    numbers: Numbers,
    *,
    micro_size: int,
    sequence_length: int,
    device: str,
    document_mask: bool = True,
) -> int:
    """Bytes kept by one micro-batch on one process, up to the head, its loss aside."""
    tokens = micro_size * sequence_length
    match model:
        case GPTConfig():
            per_token = _gpt_bytes(model, numbers, sequence_length, device, document_mask)
        case LSTMConfig():
            per_token = _lstm_bytes(model, numbers)
        case SimpleCNNConfig():
            return micro_size * _simple_cnn_bytes(model, numbers)
    return tokens * per_token


def head_bytes(model: ModelConfig, numbers: Numbers, *, tokens: int, device: str) -> int:
    """Upper estimate of the bytes of a language model's head and loss at their peak: chunks of logits, the
    gradients of the hidden states and of the head's weight, and in low precision copies of both."""
    if isinstance(model, SimpleCNNConfig):
        return 0
    assert model.vocab_size is not None
    V, D = model.vocab_size, model.hidden_size
    chunk = min(tokens, max(1, LOGITS_PER_CHUNK // V))
    is_last = chunk == tokens
    if numbers.compute == 4:
        # Logits and log-probabilities, beside the chunk before.
        return chunk * V * 4 * (2 if is_last else 3) + tokens * D * 4 + V * D * 4
    softmax = chunk * V * (10 if is_last else 16)
    # A chunk's weight gradient is made in low precision, and on a cpu added through an fp32 copy.
    addition = chunk * V * 6 + V * D * (2 + (4 if device == "cpu" else 0))
    return max(softmax, addition) + tokens * D * 4 + V * D * (4 + 2)


def matrix_parameter_count(model: ModelConfig) -> int:
    """Weights that autocast copies into the low precision: all but embeddings, norms and the head."""
    match model:
        case GPTConfig():
            norms = 2 * model.hidden_size * (2 if model.norm == "layernorm" and model.bias else 1)
            return model.num_layers * (model.layer_parameter_count() - norms)
        case LSTMConfig():
            return model.num_layers * (8 * model.hidden_size**2 + 8 * model.hidden_size)
        case SimpleCNNConfig():
            return model.parameter_count()


def _gpt_bytes(
    model: GPTConfig, numbers: Numbers, sequence_length: int, device: str, document_mask: bool
) -> int:
    """Per token."""
    D, F = model.hidden_size, model.mlp_width
    queries = model.num_heads * model.head_width
    norm = numbers.residual * D + 8
    if model.norm == "rmsnorm" and device == "cpu":
        # Composed of single operations, in fp32: the input and the normalized input.
        norm = 2 * 4 * D + 4

    # Inputs of qkv, output, up (and gate) and down, and of the activation.
    kept = D + queries + D + F + (3 * F if model.gated_mlp else F)
    if model.gated_mlp and numbers.residual > numbers.compute:
        kept += D  # autocast copies the norm's output for gate and for up
    if model.dropout > 0:
        kept += 2 * D  # the masks
    block = kept * numbers.compute + _attention_bytes(model, numbers, sequence_length, device, document_mask)

    embedding = 8 + (D * numbers.residual if model.dropout > 0 else 0)
    return embedding + model.num_layers * (2 * norm + block) + norm


def _attention_bytes(
    model: GPTConfig, numbers: Numbers, sequence_length: int, device: str, document_mask: bool
) -> int:
    """Per token, between qkv's output and attention's output."""
    queries, keys = model.num_heads * model.head_width, model.kv_heads * model.head_width
    if device == "cpu" and model.dropout > 0:
        # What replaces flash attention keeps, in fp32, copies of q, k and v, the probabilities, their
        # mask and the masked probabilities.
        return 4 * (3 * queries + 3 * model.num_heads * sequence_length)
    if device == "cpu" and 1 < sequence_length <= LONGEST_BLOCKWISE:
        # Blocks of queries, with copies of q, k and v and the probabilities of the keys they can see.
        return numbers.compute * (3 * queries + model.num_heads * _keys_in_view(sequence_length))
    kept = queries + 2 * keys
    if model.positions == "rope":
        kept += queries + keys
    if document_mask:
        kept += sequence_length  # each layer turns the mask into numbers
    return kept * numbers.compute + 4 * model.num_heads


def _keys_in_view(sequence_length: int) -> int:
    """Keys that blockwise attention multiplies a query with, on average."""
    ends = range(ATTENTION_BLOCK, sequence_length + ATTENTION_BLOCK, ATTENTION_BLOCK)
    pairs = sum(
        (min(end, sequence_length) - (end - ATTENTION_BLOCK)) * min(end, sequence_length) for end in ends
    )
    return -(-pairs // sequence_length)


def _lstm_bytes(model: LSTMConfig, numbers: Numbers) -> int:
    """Per token: inputs, and oneDNN's workspace (measured: 61 bytes a unit in fp32, 43 in bf16)."""
    D = model.hidden_size
    workspace = 61 if numbers.compute == 4 else 43
    dropouts = (model.num_layers + 1) * D * numbers.compute if model.dropout > 0 else 0
    return 8 + (model.num_layers + 1) * D * numbers.compute + model.num_layers * workspace * D + dropouts


def _simple_cnn_bytes(model: SimpleCNNConfig, numbers: Numbers) -> int:
    """Per image: input, both convolutions' rectified outputs, both pools' outputs and int64 places, the
    hidden layer, log-probabilities."""
    kept = 784 + 32 * 784 + 32 * 196 + 64 * 196 + 64 * 49 + 128
    hidden_dropout = 128 if model.dropout > 0 else 0
    return (kept + hidden_dropout) * numbers.compute + 8 * (32 * 196 + 64 * 49) + 4 * model.num_classes + 8
