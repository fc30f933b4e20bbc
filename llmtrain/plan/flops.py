"""FLOPs of training a model, some of whose weights may be frozen. Free of torch."""

from __future__ import annotations

from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.plan.memory import Trainable


def training_flops(model: ModelConfig, row: Row, trainable: Trainable | None) -> float:
    """Return the forward and backward FLOPs per counted token of `row` that are really computed.

    A third of a whole step's is the forward pass, which all layers have. A frozen weight has no gradient of
    its own, which is a third of a matrix's FLOPs; below the lowest layer that trains there is no backward
    pass. Weights that an adaptation added have 6 each.
    """
    whole = model.flops_per_token(row)
    if trainable is None:
        return whole
    added = 6.0 * sum(trainable.added)
    if len(trainable.shares) == 1:
        return whole * (2.0 + min(1.0, trainable.shares[0])) / 3 + added
    counts = [float(count) for count in model.step_multiplications(1, max(1, row.tokens))]
    matrices = [float(count) for count in model.step_multiplications(1, 0)]
    if not any(counts):
        return whole + added
    passing = trainable.kept(range(len(counts)))
    shares = list(trainable.shares)
    if trainable.added:
        own = model.step_parameter_counts()
        shares = [max(0.0, s - a / max(1, n)) for s, a, n in zip(shares, trainable.added, own, strict=True)]
    done = 0.0
    for step, (count, of_matrices) in enumerate(zip(counts, matrices, strict=True)):
        done += count / 3
        if step in passing:
            # Of attention's scores both gradients are of activations.
            done += (count - of_matrices) * 2 / 3
            done += of_matrices * (1 + min(1.0, shares[step])) / 3
    return whole * done / sum(counts) + added
