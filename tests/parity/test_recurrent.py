"""Recurrent networks: two processes equal one, and a resume is bit-exact, for each kind of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.engine.carried import CARRIED
from llmtrain.tensor_boxes import Box
from tests.parity.matrix import TOLERANCES, deviation
from tests.support.tables import rows
from tests.support.training import train

__all__ = ["rows"]
STEPS = 4
SIZE = ("model.hidden_size=16", "model.num_layers=2", "model.dropout=0.2")
BATCH = ("batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=32", "train.steps=20", "seed=7")
GOES_ON = ("data.continued=true", "data.drop_last=true")
KINDS = {
    "RNN": ("model=rnn", "model.nonlinearity=relu"),
    "GRU": ("model=gru",),
    "carried state": ("model=lstm", *GOES_ON),
    "BiLSTM": ("model=bilstm", "objective=tagging", "data.text_field=words", "data.label_field=tags"),
    "RNN of texts": ("model=rnn", "objective=classification"),
    "attention": ("model=attention_lstm", "model.attention=multi_head", "objective=classification"),
    "encoder-decoder": ("model=seq2seq_lstm", "data.label_field=short", "objective.target_length=24"),
    "packed pairs": ("model=seq2seq_lstm", "model.cell=gru"),
}


def settings(kind: str, rows: Path, corpus: Path, pairs: Path, cache: Path) -> tuple[str, ...]:
    common = (*KINDS[kind], *SIZE, *BATCH, "optimizer.lr=3e-3")
    if any(word.startswith(("objective", "data.label_field")) for word in KINDS[kind]):
        data = ("data=table", f"data.path={rows}", f"data.tokenizer={corpus}", f"data.cache.dir={cache}")
        return (*common, *data, "data.split.validation=0.2")
    return (*common, f"data.path={pairs if kind == 'packed pairs' else corpus}")


@pytest.mark.slow
@pytest.mark.in_turns(2)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_and_a_resume_is_bit_exact(
    kind: str, rows: Path, corpus: Path, paired_corpus: Path, tmp_path: Path
) -> None:
    words = settings(kind, rows, corpus, paired_corpus, tmp_path / "tables")
    [whole] = train(1, words, STEPS, save_to=tmp_path / "saved", save_at=2)
    [step] = (tmp_path / "saved").glob("step-*2")
    [rest] = train(1, words, STEPS, resume_from=step)
    assert rest.losses == whole.losses[2:]
    checkpoint = Checkpoint.open(step)
    if kind == "carried state":
        [(_, _, box)] = checkpoint.entry(CARRIED, CARRIED)["boxes"]
        states = checkpoint.read(CARRIED, CARRIED, Box(*box))
        assert (states[:, :-2].abs().sum(1) > 0).all()
        assert (states[:, -2] > 0).any(), "rows that go on"
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
    for trace in train(2, words, STEPS):
        found = deviation(trace, whole)
        assert found.within(TOLERANCES["fp32"]), found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_states_are_carried_under_zero(zero: int, corpus: Path, tmp_path: Path) -> None:
    """And a checkpoint of two ranks is gone on with by one."""
    words = settings("carried state", tmp_path, corpus, corpus, tmp_path)
    [whole] = train(1, words, STEPS)
    layout = (*words, f"parallel.zero={zero}")
    for trace in train(2, layout, STEPS, save_to=tmp_path, save_at=2):
        found = deviation(trace, whole)
        assert found.within(TOLERANCES["fp32"]), found
    [step] = tmp_path.glob("step-*2")
    [rest] = train(1, words, STEPS, resume_from=step)
    assert np.allclose(rest.losses, whole.losses[2:], rtol=1e-5)
