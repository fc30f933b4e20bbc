"""Memory of an encoder-decoder on one rank. Free of torch.

Dim names: B rows, S source tokens, T target tokens.
"""

from __future__ import annotations

from dataclasses import replace

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.nn import attention_choice
from llmtrain.nn.memory import Activations, TransformerToken, VocabularyMemory


class EncoderDecoderMemory(VocabularyMemory[Seq2SeqConfig]):
    """Bytes of a micro-batch: activations that each layer keeps of its own side, and the tensor of both
    sides that layers pass on."""

    def between_layers(self) -> int:
        return self.layout.micro_size * sum(self.model.sides(self.row)) * self.model.hidden_size

    @property
    def head_tokens(self) -> int:
        S, T = self.model.sides(self.row)
        return self.layout.micro_size * (T if self.model.has_decoder else S)

    def copied_weights(self, steps: range) -> int:
        encoder, decoder = self.model.layer_copies_count(self.layout.tensor)
        L, count = self.model.num_layers, self.model.num_layers + self.model.decoder_layers
        sizes = [(encoder if i < L else decoder, again) for i, again in self.layers_of(steps, count)]
        recomputed = max((size for size, again in sizes if again), default=0)
        return sum(size for size, again in sizes if not again) + recomputed

    def activations(self, steps: range) -> Activations:
        model, residual, recompute = self.model, self.numbers.residual, self.conditions.recompute
        L, last = model.num_layers, model.num_layers + model.decoder_layers
        S, T = model.sides(self.row)
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
        ends = ((L, S, T), (last + 1, T, S)) if model.has_decoder else ((L, S, T),)
        for step, length, other in ends:
            if step in steps and model.norm_first:
                kept += length * self._side(length, causal=True).norm() + self._kept_by_norm(other)
        B = self.layout.micro_size
        return Activations(B * kept, B * working)

    def _kept_by_norm(self, places: int) -> int:
        """Return the bytes kept of the other side: a norm at the beginning of a layer keeps the whole
        tensor of which it reads a view, unless it takes an fp32 copy."""
        model, residual = self.model, self.numbers.residual
        copies = model.norm == "rmsnorm" and residual == 2 and self.conditions.device == "cpu"
        return places * model.hidden_size * residual if model.norm_first and not copies else 0

    def _side(self, length: int, *, causal: bool) -> TransformerToken:
        layout = replace(self.layout, sequence_length=length)
        return TransformerToken(self.model.blocks, self.numbers, layout, self.conditions, causal)

    def _encoder_block(self, S: int) -> int:
        return S * self._side(S, causal=False).block()

    def _decoder_block(self, S: int, T: int) -> int:
        """Return the bytes of a decoder layer, including the inputs of cross-attention's query, output and
        key_value, its norm, and attention."""
        model, compute, tensor = self.model, self.numbers.compute, self.layout.tensor
        side, D = self._side(T, causal=True), model.hidden_size
        N = model.num_heads // tensor
        inner = N * model.head_width
        of_target = side.norm() + compute * (D + 2 * inner + (D if model.dropout > 0 else 0))
        of_source = compute * (D + 2 * inner)
        pairs = compute * N * T * S
        in_blocks = self.conditions.device == "cpu" and max(S, T) <= attention_choice.LONGEST_BLOCKWISE
        if model.dropout > 0 and self.conditions.exact_dropout and not in_blocks:
            pairs *= 3  # softmax, dropout mask and dropout output
        elif self.conditions.device != "cpu":
            pairs = T * S if self.conditions.document_mask else 0
        return T * (side.block() + of_target) + S * of_source + pairs

    def _linear_outputs(self, is_encoder: bool, S: int, T: int) -> int:
        """Return the outputs that selective recomputation keeps."""
        side = self._side(S if is_encoder else T, causal=not is_encoder)
        if is_encoder:
            return S * side.linear_outputs()
        inner = self.model.num_heads * self.model.head_width // self.layout.tensor
        cross = T * (inner + self.model.hidden_size) + 2 * S * inner
        return T * side.linear_outputs() + cross * self.numbers.compute
