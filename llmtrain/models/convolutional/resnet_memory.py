"""Memory of a residual network on one rank. Free of torch."""

from __future__ import annotations

from llmtrain.models.convolutional.resnet_config import ResNetConfig
from llmtrain.nn.memory import Activations, ModelMemory


class ResNetMemory(ModelMemory[ResNetConfig]):
    """Per image: the input, what each convolution makes, which its norm keeps, the ReLU of all but those of
    shortcuts, the pool's output and int64 indices, and the mean with the log-probabilities."""

    def activations(self, steps: range) -> Activations:
        model, compute = self.model, self.numbers.compute
        kept, pooled = model.channels * model.image_size**2, 0
        for each in model.convolutions():
            is_shortcut = each.name.endswith(".shortcut")
            kept += each.outputs * each.size**2 * (1 if is_shortcut else 2)
            if each.name == "stem" and model.stem == "imagenet":
                pooled = each.outputs * (-(-each.size // 2)) ** 2
        kept += pooled + model.widths[-1]
        per_image = kept * compute + 8 * pooled + 4 * model.num_classes + 8
        return Activations(self.layout.micro_size * per_image, 0)

    def copied_weights(self, steps: range) -> int:
        return self.model.parameter_count()
