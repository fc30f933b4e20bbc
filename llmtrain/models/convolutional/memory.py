"""Memory of a convolutional network on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.nn.memory import Activations, ModelMemory


class SimpleCNNMemory(ModelMemory[SimpleCNNConfig]):
    """Per image: the input, both convolutions' ReLU outputs, both pools' outputs and int64 indices, the
    hidden layer and the log-probabilities."""

    def activations(self, steps: range) -> Activations:
        S, half, quarter = (self.model.image_size // n for n in (1, 2, 4))
        pooled = 32 * half**2 + 64 * quarter**2
        kept = (self.model.channels + 32) * S**2 + 64 * half**2 + pooled + 128
        hidden_dropout = 128 if self.model.dropout > 0 else 0
        indices = 8 * pooled
        per_image = (kept + hidden_dropout) * self.numbers.compute + indices + 4 * self.model.num_classes + 8
        return Activations(self.layout.micro_size * per_image, 0)

    def copied_weights(self, steps: range) -> int:
        return self.model.parameter_count()
