"""Memory of a recurrent encoder-decoder on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.recurrent.memory import compute_bytes, direction_bytes, is_fused
from llmtrain.models.recurrent_seq2seq.config import RecurrentSeq2SeqConfig
from llmtrain.nn.memory import Activations, VocabularyMemory


class RecurrentSeq2SeqMemory(VocabularyMemory[RecurrentSeq2SeqConfig]):
    """What the layers of each side keep, and the attention of each target token over its source."""

    def activations(self, steps: range) -> Activations:
        model, compute = self.model, compute_bytes(self)
        D, E = model.hidden_size, model.embedding_width
        S, T = self.row.tokens, self.row.target
        of_layers = [direction_bytes(model.gates, width, D, compute) for width in model.encoder_widths]
        of_source = 2 * sum(of_layers) + 2 * D * compute + 24
        # Of the first layer each step: what the cell reads, and its gates. Then what the head reads.
        of_cell = model.embedding_width + 2 * D + (1 if model.gates == 1 else 7) * D
        of_target = (of_cell + D + model.readout_width + 2 * E) * compute + 8
        of_target += sum(direction_bytes(model.gates, w, D, compute) for w in model.decoder_widths[1:])
        if is_fused(model.gates):
            of_source += 2 * D * compute * model.num_layers
            of_target += D * compute * (model.decoder_layers - 1)
        if model.dropout > 0:
            of_source += (E + model.num_layers * 2 * D) * compute
            of_target += (E + model.decoder_layers * D) * compute
        # For each token of both sides a hidden layer, a weight, and a mark of padding.
        of_both = S * T * (D * compute + 5)
        return Activations(self.layout.micro_size * (S * of_source + T * of_target + of_both), 0)

    @property
    def head_tokens(self) -> int:
        return self.layout.micro_size * self.row.target

    def copied_weights(self, steps: range) -> int:
        return self.model.parameter_count() - self.model.embedding_count()
