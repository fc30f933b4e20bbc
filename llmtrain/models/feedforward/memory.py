"""Memory of a feedforward network on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.feedforward.config import MLPConfig
from llmtrain.nn.memory import Activations, ModelMemory


class MLPMemory(ModelMemory[MLPConfig]):
    """Per image or row: the input, of each hidden unit what its nonlinearity and the next layer keep, the
    log-probabilities and the label."""

    def activations(self, steps: range) -> Activations:
        model, compute = self.model, self.numbers.compute
        of_unit = 2 if model.activation == "gelu" else 1  # which keeps its input
        if model.dropout > 0:
            of_unit = 3  # the nonlinearity's one, the mask, and what is left
        per_row = (model.sizes[0] + of_unit * sum(model.hidden)) * compute + 4 * model.num_classes + 8
        return Activations(self.layout.micro_size * per_row, 0)

    def copied_weights(self, steps: range) -> int:
        return self.model.parameter_count()
