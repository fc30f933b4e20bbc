"""Every family away from the CPU, where no kernel of the CPU's own is taken: the meta device refuses a tensor
that was made elsewhere, as a GPU would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.models.registry import family_of
from llmtrain.nn.dropout import sample_keys
from llmtrain.objectives.base import DROPOUT_KEYS
from llmtrain.train.resolve import resolve
from tests.parity.matrix import FAMILIES, TRANSFORMER
from tests.support.training import compose, open_loader


def test_the_meta_device_refuses_tensors_of_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device="meta") + torch.empty(3)


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family: str, dropout: float, request: pytest.FixtureRequest) -> None:
    """Up to the logits: which labels count is data, which the meta device has not."""
    corpus = request.getfixturevalue("paired_corpus" if family == TRANSFORMER else "corpus")
    words = [*FAMILIES[family], f"data.path={corpus}", f"model.dropout={dropout}"]
    if family == "LSTM":
        words.append("data.document_mask=false")  # where documents begin is data too
    resolved = resolve(compose(words), world_size=1)
    model_config = resolved.config.model
    objective: Any = resolved.config.objective.build(model_config, resolved.config.data, resolved.corpora)
    steps = open_loader(resolved).steps(0)
    micro = next(steps).micro_batches[0]
    with torch.device("meta"):
        model = family_of(model_config).build(model_config)
    batch = {**micro.batch, DROPOUT_KEYS: sample_keys(0, list(micro.samples))}
    arguments = objective.arguments({name: value.to("meta") for name, value in batch.items()})
    logits = model(**{name: value for name, value in arguments.items() if "labels" not in name})
    logits.sum().backward()
    without = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without <= {"pooler", "pair_head"}, "heads that give no logits of tokens"
