"""Memory of an LSTM language model on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.nn.memory import Activations, VocabularyMemory


class LSTMMemory(VocabularyMemory[LSTMConfig]):
    """Inputs of each layer, and oneDNN's workspace (measured: 61 bytes per unit in fp32, 43 in bf16)."""

    def activations(self, steps: range) -> Activations:
        in_fp32 = self.numbers.residual == 4 and not self.conditions.has_bf16
        compute = 4 if in_fp32 else self.numbers.compute
        model, D = self.model, self.model.hidden_size
        workspace = 61 if compute == 4 else 43
        dropouts = (model.num_layers + 1) * D * compute if model.dropout > 0 else 0
        per_token = 8 + (model.num_layers + 1) * D * compute + model.num_layers * workspace * D + dropouts
        return Activations(self.layout.micro_size * self.row.tokens * per_token, 0)

    @property
    def head_tokens(self) -> int:
        return self.layout.micro_size * self.row.tokens

    def copied_weights(self, steps: range) -> int:
        D = self.model.hidden_size
        return self.model.num_layers * (8 * D * D + 8 * D)
