"""FLOPs of models of which some weights are frozen, against what torch computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import Row
from llmtrain.optim.freezing import freeze
from llmtrain.plan.flops import training_flops
from llmtrain.plan.memory import Trainable
from llmtrain.train.methods import trainable_of

T = 256
MODEL = GPTConfig(
    vocab_size=512, max_sequence_length=T, hidden_size=128, num_layers=4, num_heads=4, tie_embeddings=False
)


@pytest.mark.parametrize(
    "frozen",
    [(), ("embedding.*", "positions.*", "blocks.0.*", "blocks.1.*"), ("blocks.*.weight",), ("blocks.*",)],
    ids=["nothing", "the lower half", "matrices", "all layers"],
)
def test_as_torch_counts(frozen: tuple[str, ...]) -> None:
    """Of matrix products; torch's attention computes all scores, of which a plan counts the causal half."""
    with torch.device("meta"):
        model = family_of(MODEL).build(MODEL)
    freeze(model, frozen)
    tokens = torch.zeros(1, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        logits.sum().backward()
    row = Row(T, predicted=T)
    planned = T * training_flops(MODEL, row, trainable_of(MODEL, frozen))
    # Of 4 · D · T multiplications and additions of a layer, the plan's half, forward and twice backward.
    causal = 2.0 * MODEL.hidden_size * T * T
    layers = len(trainable_of(MODEL, frozen).kept(range(6))) if frozen else 6  # type: ignore[union-attr]
    with_backward = min(4, layers - 1)
    assert planned + causal * (4 + 2 * with_backward) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_an_adaptation_adds() -> None:
    """Frozen layers still pass gradients on, and the added weights have 6 FLOPs each."""
    whole = training_flops(MODEL, Row(T, predicted=T), None)
    counts = MODEL.step_parameter_counts()
    added = (0, *(1000,) * 4, 0)
    shares = tuple(a / c for a, c in zip(added, counts, strict=True))
    found = training_flops(MODEL, Row(T, predicted=T), Trainable(4000, shares, added))
    matrices = 6.0 * (4 * MODEL.layer_matrix_count() + MODEL.head_matrix_count())
    assert found == pytest.approx(whole - matrices / 3 + 6 * 4000, rel=1e-9)
    nothing = training_flops(MODEL, Row(T, predicted=T), Trainable(0, (0.0,) * 6))
    assert nothing == pytest.approx(whole / 3)
