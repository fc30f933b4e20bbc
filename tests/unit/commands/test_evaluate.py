"""What `llmtrain evaluate` refuses before it works, and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from llmtrain.commands import evaluate
from llmtrain.errors import ConfigError
from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from tests.support import warm
from tests.support.corpora import random_documents, write_corpus
from tests.support.training import TINY_GPT, compose


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


@pytest.fixture
def mixture(corpus: Path, tmp_path: Path) -> Path:
    """A folder of two corpora with one tokenizer: prose, and random tokens."""
    shutil.copytree(corpus, tmp_path / "corpora/prose")
    documents = {split: random_documents(30, vocab_size=320) for split in ("train", "validation")}
    tokenizer = (corpus / "tokenizer.model").read_bytes()
    write_corpus(tmp_path / "corpora/noise", documents, vocab_size=320, tokenizer=tokenizer)
    return tmp_path / "corpora"


MIXED = "data.mixture={prose: 3, noise: 1}"


def test_the_loss_of_each_corpus_of_a_mixture(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = export(tmp_path / "model", 320)
    words = [f"checkpoint={model}", "format=json", "micro_size=3"]

    def figures(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.run_verb("evaluate", [*words, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    alone = {name: figures(f"data.path={mixture / name}") for name in ("prose", "noise")}
    both = figures(f"data.path={mixture}", MIXED)
    for name, found in alone.items():
        assert both[f"loss/{name}"] == pytest.approx(found["loss"], rel=1e-6)
        assert "loss/" not in str(found)
    total = sum(found["loss"] * found["targets"] for found in alone.values())
    assert both["targets"] == sum(found["targets"] for found in alone.values())
    assert both["loss"] == pytest.approx(total / both["targets"], rel=1e-6)
    done = warm.on_ranks(2, "evaluate", *words, f"data.path={mixture}", MIXED)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    shared = json.loads(done[0].stdout)
    for name in ("loss", "loss/prose", "loss/noise"):
        assert shared[name] == pytest.approx(both[name], rel=1e-6)


def test_the_loss_of_each_corpus_during_training(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*TINY_GPT, f"data.path={mixture}", MIXED, f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    words += ["evaluation.every=1", "evaluation.max_samples=8", "checkpoint.best=loss/prose"]
    assert cli.run_verb("train", words) == 0
    said = capsys.readouterr().err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found = [each for each in map(json.loads, lines) if "validation_loss" in each]
    assert [each["step"] for each in found] == [0, 1, 2]
    for each in found:
        parts = [each["validation_loss/prose"], each["validation_loss/noise"]]
        assert min(parts) < each["validation_loss"] < max(parts)
    assert f"step 2: validation loss {found[2]['validation_loss']:.4f}, validation loss/noise " in said
    assert f"the best was loss/prose {found[2]['validation_loss/prose']:.4f} at step 2" in said
    assert cli.run_verb("train", [*words[:-1], "checkpoint.best=loss/verse"]) == 2
    assert "checkpoint.best: got loss/verse; allowed: loss, loss/noise, loss/prose" in capsys.readouterr().err
