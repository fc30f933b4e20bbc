"""Fine-tuning in every layout equals one process; tolerances as in matrix.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import TOLERANCES, deviation
from tests.support.tables import rows
from tests.support.training import Trace, train

__all__ = ["rows"]
STEPS = 4
SIZE = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0.1")
MODELS = {
    "BERT": ("model=bert_tiny", *SIZE),
    "GPT": ("model=gpt_tiny", *SIZE),
    "XLNet": ("model=xlnet_tiny", *SIZE),
    "T5": ("model=t5_tiny", *SIZE, "model.head_dim=8", "model.num_decoder_layers=1"),
    "BART": ("model=bart_tiny", *SIZE),
}
LAYOUTS = {
    "DDP": (2, ()),
    "ZeRO 1": (2, ("parallel.zero=1",)),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.zero=1")),
    "recompute": (1, ("recompute=full",)),
    "ZeRO 2, bf16": (2, ("parallel.zero=2", "precision=bf16")),
    "tensor, pipeline": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1")),
}


def settings(model: str, task: str, rows: Path, corpus: Path, cache: Path) -> tuple[str, ...]:
    fields = {
        "tagging": ("data.text_field=words", "data.label_field=tags"),
        "seq2seq": ("data.label_field=short", "objective.target_length=40"),
    }.get(task, ())
    return (
        *MODELS[model],
        f"objective={task}",
        "data=table",
        f"data.path={rows}",
        f"data.tokenizer={corpus}",
        f"data.cache.dir={cache}",
        "data.split.validation=0.2",
        *fields,
        "batch.global_size=8",
        "batch.micro_size=2",
        "batch.sequence_length=48",
        "train.steps=20",
        "optimizer.lr=3e-3",
        "seed=7",
    )


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Trace]:
    return {}


@pytest.mark.slow
@pytest.mark.in_turns(4)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("BERT", "classification"),
        ("GPT", "classification"),
        ("XLNet", "classification"),
        ("BERT", "tagging"),
        ("T5", "classification"),
        ("T5", "tagging"),
        ("BART", "classification"),
        ("T5", "seq2seq"),
    ],
)
def test_equals_one_process(
    layout: str,
    model: str,
    task: str,
    rows: Path,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
    references: dict[tuple[str, ...], Trace],
) -> None:
    plain = settings(model, task, rows, corpus, tmp_path_factory.getbasetemp() / "tables")
    if plain not in references:
        [references[plain]] = train(1, plain, STEPS)
    size, more = LAYOUTS[layout]
    tolerance = TOLERANCES["bf16" if "precision=bf16" in more else "fp32"]
    if model == "T5" and "precision=bf16" in more:
        tolerance = replace(tolerance, loss=0.02)  # attention scores are not divided, so that they round more
    for trace in train(size, (*plain, *more), STEPS):
        found = deviation(trace, references[plain])
        assert found.within(tolerance), found


@pytest.mark.slow
def test_a_resume_is_bit_exact(rows: Path, corpus: Path, tmp_path: Path) -> None:
    words = settings("BERT", "classification", rows, corpus, tmp_path / "tables")
    [whole] = train(1, words, STEPS, save_to=tmp_path / "saved", save_at=2)
    [step] = (tmp_path / "saved").glob("step-*2")
    [rest] = train(1, words, STEPS, resume_from=step)
    assert rest.losses == whole.losses[2:]
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
