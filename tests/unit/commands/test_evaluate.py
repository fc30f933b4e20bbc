"""What `llmtrain evaluate` refuses before it works, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.commands import evaluate
from llmtrain.errors import ConfigError
from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from tests.support.corpora import random_documents, write_corpus
from tests.support.training import compose


def export(path: Path, vocab_size: int) -> Path:
    """An exported model without a tokenizer."""
    config = GPTConfig(
        vocab_size=vocab_size, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=32
    )
    model = GPT(config)
    initialize(model, seed=0)
    export_folder(config, dict(model.named_parameters()), None, path)
    return path


def run(model: Path, corpus: Path, *overrides: str) -> None:
    evaluate.run(compose([f"checkpoint={model}", f"data.path={corpus}", *overrides], "evaluate"))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("no/such/f.json", "No such file or directory.*create its folder first"),
        (".", "Is a directory.*name a file"),
        ("file/f.json", "Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, output: str, words: str):
    (tmp_path / "file").write_text("")
    # Neither model nor corpus exists: whoever looked at them first would say so.
    with pytest.raises(ConfigError, match=f"output=.*{words}") as caught:
        run(tmp_path / "model", tmp_path / "corpus", f"output={tmp_path / output}")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_corpus_of_a_larger_vocabulary_is_refused(tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus", {"validation": random_documents(20)}, vocab_size=100)
    with pytest.raises(
        ConfigError, match=r"data\.path: got data with a vocabulary of 100 tokens.*at most 64"
    ) as caught:
        run(export(tmp_path / "model", 64), corpus)
    assert len(caught.value.problems) == 1


def test_the_figures_are_written(corpus: Path, tmp_path: Path):
    output = tmp_path / "figures.json"
    run(export(tmp_path / "model", 400), corpus, f"output={output}", "max_samples=2")
    figures = json.loads(output.read_text())
    assert figures["split"] == "validation"
    assert 5 < figures["loss"] < 7
