"""Recurrent networks through the verbs: texts that an encoder-decoder writes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli
from tests.unit.commands.test_finetune_texts import TARGETS, WORDS

SHORT = ("batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=32", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with a word that decides their target."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(160):
            key = ("awful", "great")[number % 2]
            words = [*draw.choice(WORDS, draw.integers(1, 5)), key]
            draw.shuffle(words)
            file.write(json.dumps({"long": " ".join(words), "short": TARGETS[key][0], "label": key}) + "\n")
    return path


def settings(rows: Path, corpus: Path, folder: Path, *more: str) -> list[str]:
    data = [f"data.path={rows}", f"data.tokenizer={corpus}", f"data.cache.dir={folder / 'cache'}"]
    fields = ["data.text_field=long", "data.split.validation=0.2", f"run.dir={folder / 'run'}"]
    return [*data, *fields, *SHORT, *more]


def test_an_encoder_decoder_learns_to_write(rows: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    model = ("model=seq2seq_lstm", "model.hidden_size=32", "model.dropout=0", "objective=seq2seq")
    fields = ("data.label_field=short", "objective.target_length=24", "train.epochs=12")
    assert cli.run_verb("finetune", settings(rows, corpus, tmp_path, *model, *fields)) == 0
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["chrf"] > 80  # three words are too few for BLEU
    said = tmp_path / "said.jsonl"
    beams = ["generate.num_beams=3", f"input={rows}", f"output={said}"]
    assert cli.run_verb("predict", [f"checkpoint={tmp_path / 'run'}", *beams]) == 0
    rows_said = [json.loads(line) for line in said.read_text().splitlines()]
    assert np.mean([row["prediction"] == row["short"] for row in rows_said]) > 0.8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("model=seq2seq_lstm", "objective=classification"),
            "model.family: got recurrent_seq2seq with the head of a task; allowed: a family with such heads",
        ),
        (
            ("model=attention_lstm", "objective=tagging"),
            "model.attention: got additive with a head over tags",
        ),
        (
            ("model=attention_lstm", "model.attention=multi_head", "model.attention_heads=3"),
            "model.attention_heads: got 3; allowed: a divisor of 256, the width of a state",
        ),
        (("model=gru", "model.attention=luong"), "model.attention: got 'luong'"),
        (("model=gru", "parallel.tensor=2"), "gru runs data-parallel"),
        (("model=rnn", "parallel.pipeline=2", "parallel.zero=1"), "rnn runs data-parallel"),
        (
            ("model=seq2seq_lstm", "objective=seq2seq", "parallel.zero=3"),
            "parallel.zero: got '3 with model.family=recurrent_seq2seq, which goes from token to token'",
        ),
        (
            ("model=seq2seq_lstm", "objective=seq2seq", "parallel.tensor=2"),
            "recurrent_seq2seq runs data-parallel",
        ),
        (
            ("model=bilstm", "model.embedding_size=0"),
            "model.embedding_size: got 0; allowed: 1 or more, or null",
        ),
    ],
)
def test_what_a_recurrent_network_cannot_be(
    more: tuple[str, ...], said: str, rows: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    words = settings(rows, corpus, tmp_path, *more)
    words += [] if any(word.startswith("objective=") for word in more) else ["objective=classification"]
    assert cli.run_verb("finetune", words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in " ".join(lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("model=bilstm",), "model.bidirectional: got true; allowed: false with a language model"),
        (("model=attention_lstm",), "model.attention: got additive; allowed: null with a language model"),
        (("model=gru", "model.embedding_size=9"), "model.embedding_size: got 9; allowed: hidden_size=256"),
        (
            ("model=gru", "data.continued=true"),
            "data.drop_last: got False; allowed: true with continued=true",
        ),
        (
            ("model=gpt_tiny", "data.continued=true", "data.drop_last=true"),
            "data.continued: got True; allowed: false with model.family=gpt",
        ),
    ],
)
def test_language_models_that_cannot_be(
    more: tuple[str, ...], said: str, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [*more, "objective=causal_lm", f"data.path={corpus}", f"run.dir={tmp_path / 'run'}"]
    assert cli.run_verb("train", words) == 2
    assert said in capsys.readouterr().err
