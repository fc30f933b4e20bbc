"""Memory of a generator and a discriminator on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.adversarial.config import GANConfig
from llmtrain.nn.memory import Activations, ModelMemory


class GANMemory(ModelMemory[GANConfig]):
    """The turn that keeps more: the discriminator's, which scores a real and a generated image, or the
    generator's, in which the discriminator's frozen layers keep no inputs. The gradient penalty's third score
    is not counted."""

    def activations(self, steps: range) -> Activations:
        numbers = self.model.numbers
        inputs, between = self._discriminator()
        of_score = numbers + inputs + between
        of_turns = 2 * of_score, self._generator() + between
        per_image = max(of_turns) * self.numbers.compute + 8
        return Activations(self.layout.micro_size * per_image, 0)

    def _discriminator(self) -> tuple[int, int]:
        """Return the numbers that layers keep as inputs, but the image, and those that all else keeps."""
        model = self.model
        if model.layers == "linear":
            units = sum(model.hidden)
            return units, units * (2 if model.dropout > 0 else 1)
        outputs = [w * s**2 for w, s in zip(model.widths[:-1], model.sides[:-1], strict=True)][::-1]
        norms = sum(outputs[1:]) if model.discriminator_norm == "batch" else 0
        return sum(outputs), sum(outputs) + norms

    def _generator(self) -> int:
        """Return the numbers that the generator keeps of an image."""
        model = self.model
        if model.layers == "linear":
            return model.latent_size + 2 * sum(model.hidden) + model.numbers
        normed = sum(w * s**2 for w, s in zip(model.widths[:-1], model.sides[:-1], strict=True))
        return model.latent_size + 2 * normed + model.numbers

    def copied_weights(self, steps: range) -> int:
        return self.model.parameter_count()
