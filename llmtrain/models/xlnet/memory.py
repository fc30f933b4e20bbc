"""Memory of an XLNet on one rank. Free of torch.

Dim names: B rows, T tokens, M predicted tokens, Q = T + M hidden states of a row between layers.
"""

from __future__ import annotations

from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.memory import Activations, LayersMemory


class XLNetMemory(LayersMemory[XLNetConfig]):
    """Bytes of a micro-batch: Q = T + M hidden states per row between layers, T of them keys.

    Kept are the inputs of each matrix product, the softmax of the scores, and, once, what the layers
    share.
    """

    @property
    def hidden_states(self) -> int:
        """Return Q = T + M hidden states of a row."""
        return self.row.tokens + int(self.row.predicted)

    def between_layers(self) -> int:
        return self.layout.micro_size * self.hidden_states * self.model.hidden_size

    @property
    def head_tokens(self) -> int:
        return self.layout.micro_size * int(self.row.predicted)

    def copied_weights(self, steps: range) -> int:
        model, tensor = self.model, self.layout.tensor
        layer = model.layer_matrix_count(tensor) + model.mlp_width // tensor + model.hidden_size
        return layer * self.copied_layers(steps)

    def activations(self, steps: range) -> Activations:
        model, layout, mode = self.model, self.layout, self.conditions.recompute.mode
        B, T, D = layout.micro_size, layout.sequence_length, model.hidden_size
        Q, residual = self.hidden_states, self.numbers.residual
        again = [again for _, again in self.layers_of(steps, model.num_layers)]
        recomputed, plain = again.count(True), again.count(False)
        block = B * self._block() + self._distances()
        kept = plain * block
        if recomputed:
            away = mode == "offload" and self.conditions.device != "cpu"
            kept += recomputed * (0 if away else B * Q * D * residual)
            kept += recomputed * (self._linear_outputs() if mode == "selective" else 0)
        if plain or recomputed:
            # For each query and key the distance, the mask and whether segments differ; sinusoids of
            # distances.
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
            self.hidden_states,
        )
        softmax = compute if self.conditions.device == "cpu" else residual
        of_place = 2 * (D * residual + 8)  # the norms' inputs
        # Inputs of query, output, up and down, and of the activation; queries with two or three biases.
        of_place += compute * (2 * D + A + 2 * F + 2 * A)
        of_place += N * T * softmax
        if model.has_segments:
            of_place += compute * (A + N + T)
        if model.dropout > 0:
            of_place += 2 * D * residual + 2 * N * T * compute  # masks, and dropout outputs
        of_key = compute * (D + 2 * A)  # only tokens' hidden states, keys and values
        return Q * of_place + T * of_key

    def _distances(self) -> int:
        """Return the bytes of the distances' keys, which all rows share."""
        return (
            (2 * self.layout.sequence_length - 1)
            * self.model.hidden_size
            // self.layout.tensor
            * (self.numbers.compute)
        )

    def _linear_outputs(self) -> int:
        """Return the outputs that selective recomputation keeps."""
        model, tensor, T = self.model, self.layout.tensor, self.layout.sequence_length
        D, A, Q = model.hidden_size, model.hidden_size // tensor, self.hidden_states
        of_rows = Q * (A + model.mlp_width // tensor + 2 * D) + 2 * T * A
        return (self.layout.micro_size * of_rows + (2 * T - 1) * A) * self.numbers.compute
