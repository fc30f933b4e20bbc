"""Memory of a recurrent network on one rank. Free of torch."""

from __future__ import annotations

from typing import Any

from llmtrain.models.recurrent.config import RecurrentConfig
from llmtrain.nn.memory import Activations, ModelMemory, VocabularyMemory


class RecurrentMemory(VocabularyMemory[RecurrentConfig]):
    """Inputs of each layer, what its kernel keeps of each step, and what the attention keeps."""

    def activations(self, steps: range) -> Activations:
        model = self.model
        compute = compute_bytes(self)
        of_direction = (
            direction_bytes(model.gates, w, model.hidden_size, compute) for w in model.input_widths
        )
        per_token = 8 + sum(of_direction) * model.directions
        per_token += self._attention() * compute
        if is_fused(model.gates):
            per_token += model.output_width * compute
        if model.bidirectional:
            per_token += 16  # where each token is in the reversed text, and back
        if model.dropout > 0:
            widths = model.embedding_width + model.num_layers * model.output_width
            per_token += widths * compute
        return Activations(self.layout.micro_size * self.row.tokens * per_token, 0)

    def _attention(self) -> int:
        """Return the numbers per token that attention over the states keeps."""
        model, W = self.model, self.model.output_width
        if model.attention is None:
            return 0
        own = {"additive": 1, "dot": 0, "multi_head": 2}[model.attention]
        keeps_states = model.bidirectional or not is_fused(model.gates)
        copies = model.attention != "dot" and not model.bidirectional
        return (own + keeps_states + copies) * W

    @property
    def head_tokens(self) -> int:
        return self.layout.micro_size * self.row.tokens

    def copied_weights(self, steps: range) -> int:
        return self.model.layer_parameter_count + self.model.attention_matrix_count


def compute_bytes(memory: ModelMemory[Any]) -> int:
    """Return the bytes of a number that cells compute with: autocast leaves them in fp32 on a processor
    without bf16."""
    in_fp32 = memory.numbers.residual == 4 and not memory.conditions.has_bf16
    return 4 if in_fp32 else memory.numbers.compute


def is_fused(gates: int) -> bool:
    """Return whether one kernel computes all tokens and keeps its outputs: on a CPU that of an LSTM."""
    return gates == 4


def direction_bytes(gates: int, width: int, D: int, compute: int) -> int:
    """Return what one direction of a layer keeps of each token: the input, of this width, and what the D
    cells of so many gates keep."""
    if not is_fused(gates):
        # Each step keeps its state, and with gates six more of what they are made of.
        return (width + (7 if gates == 3 else 1) * D) * compute
    # oneDNN's workspace, as measured; a part of it is as wide as the wider of input and state.
    own, wide = (37, 24) if compute == 4 else (26, 17)
    return width * compute + own * D + wide * max(width, D)
