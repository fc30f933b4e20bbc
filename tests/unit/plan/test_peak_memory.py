"""The plan's total against the most that real ranks held; `tests.bench.plan_memory` has the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.registry import family_of
from llmtrain.nn.memory import Conditions, Division, Numbers
from llmtrain.objectives.preferences import Preference, PreferenceConfig
from tests.support import ranks
from tests.support.memory import allocated
from tests.support.peak_memory import forecasts, measure, warm_up
from tests.support.planned_memory import built
from tests.support.training import compose

MODEL = (
    "model=gpt_tiny",
    "model.hidden_size=384",
    "model.num_layers=3",
    "model.num_heads=6",
    "model.vocab_size=4096",
    "batch.global_size=4",
    "batch.micro_size=1",
    "batch.sequence_length=64",
    "data.document_mask=false",
    "checkpoint.asynchronous=false",
)


@pytest.mark.slow
def test_ranks(corpus: Path) -> None:
    ranks.renew(2)
    ranks.run(2, warm_up, str(corpus))
    for own in ("engine=local", "parallel.zero=2 precision=bf16", "parallel.pipeline=2 parallel.zero=1"):
        mapping = compose((*MODEL, *own.split(), f"data.path={corpus}"))
        for held, terms in zip(ranks.run(2, measure, mapping), forecasts(mapping, 2), strict=True):
            # Of a small model the libraries' own buffers are a larger part.
            assert held.most == pytest.approx(sum(terms.values()), rel=0.2), own
    ranks.renew(2)  # they give blocks back, as no other test's ranks do


def test_preferences_hold_all_logits() -> None:
    """Of both answers of each pair, in fp32, where a language model's loss holds a chunk."""
    V, T, pairs = 4000, 64, 2
    config = GPTConfig(vocab_size=V, max_sequence_length=T, hidden_size=32, num_layers=1, num_heads=2)
    model, objective = built(GPT(config), "fp32"), Preference(0.1)
    tokens = torch.randint(V, (2 * pairs, T))
    batch = {"tokens": tokens, "labels": tokens, "rows": torch.arange(pairs)}
    peak = allocated(lambda: objective(model, batch).loss_sum).peak
    memory = family_of(config).memory
    assert memory is not None
    row = PreferenceConfig().row(T)
    planned = memory(config, row, Numbers(4, 4), Division(pairs, T), Conditions("cpu"))
    kept = planned.activations(range(3)).kept
    assert peak == pytest.approx(planned.head_bytes() + kept, rel=0.25)
