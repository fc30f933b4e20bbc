"""Bytes that a forward pass keeps for the backward pass, by model family, and what its head takes, whose loss
works on a chunk of the logits. What blocks keep is counted in blocks.py. Tests compare with what torch keeps.
"""

from __future__ import annotations

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.configs import ModelConfig, TransformerConfig
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.blocks import (
    Activations,
    Conditions,
    Numbers,
    PairRow,
    TransformerToken,
    XLNetRow,
    divided,
)

LOGITS_PER_CHUNK = 2**23
"""As in models/head.py; a test compares."""


def activations(
    model: ModelConfig, numbers: Numbers, layout: Layout, conditions: Conditions, steps: range | None = None
) -> Activations:
    """Of one process that runs `steps` of the model's forward: 0 the embedding, 1 to num_layers the blocks,
    then the head; None: all."""
    tokens = layout.micro_size * layout.sequence_length // layout.sequence
    match model:
        case GPTConfig() | BertConfig():
            blocks, causal = (model, True) if isinstance(model, GPTConfig) else (model.blocks, False)
            per_token = TransformerToken(blocks, numbers, layout, conditions, causal).activations(
                range(model.num_layers + 2) if steps is None else steps
            )
            return Activations(tokens * per_token.kept, tokens * per_token.working)
        case XLNetConfig():
            return XLNetRow(model, numbers, layout, conditions).activations(
                range(model.num_layers + 2) if steps is None else steps
            )
        case Seq2SeqConfig():
            return PairRow(model, numbers, layout, conditions).activations(steps)
        case LSTMConfig():
            in_fp32 = numbers.residual == 4 and not conditions.has_bf16
            return Activations(tokens * _lstm_bytes(model, Numbers(4, 4) if in_fp32 else numbers), 0)
        case SimpleCNNConfig():
            return Activations(layout.micro_size * _simple_cnn_bytes(model, numbers), 0)


def block_places(model: TransformerConfig, layout: Layout) -> int:
    """Hidden states between the blocks of one process, of one micro-batch."""
    T = layout.sequence_length // layout.sequence
    if isinstance(model, Seq2SeqConfig):
        lengths = model.objective.lengths(T)
        return layout.micro_size * (lengths.source + lengths.target)
    return layout.micro_size * (model.num_places(T) if isinstance(model, XLNetConfig) else T)


def head_places(model: ModelConfig, layout: Layout) -> int:
    """Hidden states that a language model's head reads, of one micro-batch on one process."""
    T = layout.sequence_length // layout.sequence
    if isinstance(model, Seq2SeqConfig):
        T = model.objective.lengths(T).target
    if isinstance(model, XLNetConfig):
        T = model.objective.num_predicted(T)
    return layout.micro_size * T


def head_bytes(model: ModelConfig, numbers: Numbers, *, tokens: int, device: str, tensor: int = 1) -> int:
    """Upper estimate of the bytes of a language model's head and loss at their peak, on one of `tensor`
    processes: chunks of logits, the gradients of the hidden states and of the head's weight, and in low
    precision copies of both."""
    if isinstance(model, SimpleCNNConfig):
        return 0
    assert model.vocab_size is not None
    V, D = -(-model.vocab_size // tensor), model.hidden_size
    chunk = min(tokens, max(1, LOGITS_PER_CHUNK // V))
    is_last = chunk == tokens
    # Over several processes the softmax is fairscale's: copies, exponentials and a gradient, in fp32.
    besides = 16 if tensor > 1 else 0
    if isinstance(model, GPTConfig) and model.logit_softcap is not None:
        besides += 2 * numbers.compute  # the cap's slopes, and the tanh's square
    if numbers.compute == 4:
        # Logits and log-probabilities, beside the chunk before.
        softmax = chunk * V * (4 * (2 if is_last else 3) + besides)
        return softmax + tokens * D * 4 + V * D * 4
    softmax = chunk * V * ((10 if is_last else 16) + besides)
    # A chunk's weight gradient is made in low precision, and on a cpu added through an fp32 copy.
    addition = chunk * V * 6 + V * D * (2 + (4 if device == "cpu" else 0))
    return max(softmax, addition) + tokens * D * 4 + V * D * (4 + 2)


def low_precision_copies(model: ModelConfig, steps: range | None, tensor: int, conditions: Conditions) -> int:
    """Weights of which autocast holds copies in the low precision at once, on one process: those of linear
    layers, of recomputed blocks one at a time; the head's are counted with it. A processor without bf16
    rounds weights in passing, at each product."""
    if not conditions.has_bf16:
        return 0
    recompute = conditions.recompute
    match model:
        case GPTConfig() | BertConfig():
            blocks = model if isinstance(model, GPTConfig) else model.blocks
            block = blocks.layer_parameter_count(tensor) - blocks.layer_norm_parameter_count(tensor)
            recomputed, kept = divided(
                blocks, range(model.num_layers + 2) if steps is None else steps, recompute
            )
            return block * (kept + min(1, recomputed))
        case XLNetConfig():
            block = model.layer_matrix_count(tensor) + model.mlp_width // tensor + model.hidden_size
            recomputed, kept = divided(
                model, range(model.num_layers + 2) if steps is None else steps, recompute
            )
            return block * (kept + min(1, recomputed))
        case Seq2SeqConfig():
            sides = model.layer_copies_count(tensor)
            last, L = model.num_layers + model.decoder_layers, model.num_layers
            layers = [step for step in (range(last + 2) if steps is None else steps) if 1 <= step <= last]
            sizes = [(sides[step > L], recompute.covers(step - 1)) for step in layers]
            recomputed_sizes = [size for size, is_recomputed in sizes if is_recomputed]
            return sum(size for size, again in sizes if not again) + max(recomputed_sizes, default=0)
        case LSTMConfig():
            layer = 8 * model.hidden_size**2 + 8 * model.hidden_size
            return model.num_layers * layer
        case SimpleCNNConfig():
            return model.parameter_count()


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
