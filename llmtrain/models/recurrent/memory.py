"""Memory of a recurrent network on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.recurrent.config import RecurrentConfig
from llmtrain.nn.memory import Activations, VocabularyMemory


class RecurrentMemory(VocabularyMemory[RecurrentConfig]):
    """Inputs of each layer, what its kernel keeps of each step, and what the attention keeps."""

    def activations(self, steps: range) -> Activations:
        model = self.model
        per_token = 8 + sum(self._direction(width) for width in model.input_widths) * model.directions
        per_token += self._attention() * self._compute
        if self._is_fused:
            per_token += model.output_width * self._compute
        if model.bidirectional:
            per_token += 16  # where each token is in the reversed text, and back
        if model.dropout > 0:
            widths = model.embedding_width + model.num_layers * model.output_width
            per_token += widths * self._compute
        return Activations(self.layout.micro_size * self.row.tokens * per_token, 0)

    @property
    def _compute(self) -> int:
        in_fp32 = self.numbers.residual == 4 and not self.conditions.has_bf16
        return 4 if in_fp32 else self.numbers.compute

    @property
    def _is_fused(self) -> bool:
        """Return whether one kernel computes all tokens and keeps its outputs: on a CPU that of an LSTM."""
        return self.model.gates == 4

    def _direction(self, width: int) -> int:
        """Return bytes per token of one direction of a layer whose input has this width."""
        D, compute = self.model.hidden_size, self._compute
        if not self._is_fused:
            # Each step keeps its state, and with gates six more of what they are made of.
            return (width + (7 if self.model.gates == 3 else 1) * D) * compute
        # oneDNN's workspace, as measured; a part of it is as wide as the wider of input and state.
        own, wide = (37, 24) if compute == 4 else (26, 17)
        return width * compute + own * D + wide * max(width, D)

    def _attention(self) -> int:
        """Return the numbers per token that attention over the states keeps."""
        model, W = self.model, self.model.output_width
        if model.attention is None:
            return 0
        own = {"additive": 1, "dot": 0, "multi_head": 2}[model.attention]
        keeps_states = model.bidirectional or not self._is_fused
        copies = model.attention != "dot" and not model.bidirectional
        return (own + keeps_states + copies) * W

    @property
    def head_tokens(self) -> int:
        return self.layout.micro_size * self.row.tokens

    def copied_weights(self, steps: range) -> int:
        return self.model.layer_parameter_count + self.model.attention_matrix_count
