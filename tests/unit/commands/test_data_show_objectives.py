"""`llmtrain data show objective=…`: what it prints is the corpus' text with what the objective did to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.cli import main as cli
from tests.support.corpora import write_pairs


def show(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    """What is printed of each sample, its title before."""
    code = cli.run_verb("data", ["show", "sequence_length=64", "max_samples=6", *overrides])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.strip().split("\n\n")


@pytest.fixture(scope="session")
def text(corpus: Path) -> str:
    """All training text, in its order, as a row may hold it."""
    from llmtrain.corpus.corpus import Corpus
    from llmtrain.tokenizers.folder import load_tokenizer

    opened = Corpus.open(corpus)
    tokens, _ = opened.split("train").read(0, opened.manifest.splits["train"].num_tokens)
    return load_tokenizer(opened.tokenizer_path).decode(tokens.tolist())


def sides(sample: str) -> tuple[str, str]:
    source, target = re.findall(r"^    (?:source|target)  (.*?)(?=^    target|\Z)", sample, re.M | re.S)
    assert source.strip().endswith("</s>")
    assert target.strip().endswith("</s>")
    return source.strip().removesuffix("</s>"), target.strip().removesuffix("</s>")


def test_gaps_are_sentinels(corpus: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for sample in show(capsys, f"data.path={corpus}", "objective=span_corruption"):
        source, target = sides(sample)
        numbers = re.findall(r"<extra_(\d+)>", source)
        assert numbers == [str(i) for i in range(len(numbers))] == re.findall(r"<extra_(\d+)>", target)
        filled = re.split(r"<extra_\d+>", source)
        gaps = re.split(r"<extra_\d+>", target)[1:]
        whole = "".join(kept + gap for kept, gap in zip(filled, [*gaps, ""], strict=True))
        assert whole.replace("</s>", "") in text


def test_noise_is_marked(corpus: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for sample in show(capsys, f"data.path={corpus}", "objective=denoising"):
        source, target = sides(sample)
        assert "[MASK]" in source
        assert target.replace("</s>", "") in text


@pytest.mark.parametrize("objective", ["mlm", "permuted_lm"])
def test_hidden_tokens_are_marked(
    corpus: Path, text: str, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    for sample in show(capsys, f"data.path={corpus}", f"objective={objective}"):
        title, *lines = sample.split("\n")
        assert all(line.startswith("    ") for line in lines)
        row = "".join(line[4:] for line in lines)
        assert row.count("⟦") == int(re.search(r"(\d+) of them", title)[1]) > 0  # type: ignore[index]
        whole = re.sub(r"⟦(?:[^⟧]*→|\d+: )([^⟧]*)⟧", r"\1", row)
        # Ends of documents are where lines are.
        assert whole in text


@pytest.mark.parametrize(
    ("objective", "labels"), [("mlm_nsp", "follows|another"), ("mlm_sop", "order|first")]
)
def test_pairs_of_texts_stand_apart(
    corpus: Path, capsys: pytest.CaptureFixture[str], objective: str, labels: str
) -> None:
    for sample in show(capsys, f"data.path={corpus}", f"objective={objective}"):
        title, first, second = sample.split("\n")
        assert re.search(labels, title)
        assert first.startswith("    [CLS]")
        assert first.endswith("[SEP]")
        assert second.endswith("[SEP]")


def test_packed_pairs_stand_apart(
    paired_corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    known = dict(line.split("\t") for line in write_pairs(tmp_path / "pairs.tsv").read_text().splitlines())
    settings = (f"data.path={paired_corpus}", f"data.cache.dir={tmp_path}", "objective=seq2seq")
    for sample in show(capsys, *settings):
        title, *pairs = re.split(r"^  pair \d+$", sample, flags=re.M)
        assert f"{len(pairs)} pairs" in title
        for source, target in map(sides, pairs):
            assert known[source.strip()] == target.strip()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=seq2seq"], ["data.path: got", "a corpus of single texts", "target_field"]),
        (
            ["objective=span_corruption", "objective.pairs=none"],
            ["objective.pairs: got an unknown key", "kind, share"],
        ),
        (["objective=denoising", "objective.infiling=0.2"], ["objective.infiling", "infilling"]),
        (["objective=span_corruption", "sequence_length=2"], ["sequence_length: got 2"]),
        (["objective=mlm", "objective.share=2"], ["objective.share: got 2"]),
        (["objective=mlmm"], ["objective: got 'mlmm'", "mlm"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    assert cli.run_verb("data", ["show", f"data.path={corpus}", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_a_run_over_pairs_is_read_back(
    paired_corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sizes = ["model.hidden_size=32", "model.num_layers=1", "batch.sequence_length=64", "batch.global_size=4"]
    settings = [f"data.path={paired_corpus}", f"data.cache.dir={tmp_path}", f"run.dir={run}", "train.steps=2"]
    quiet = ["batch.micro_size=4", "evaluation.every=null", "evaluation.at_start=false"]
    assert cli.run_verb("train", ["model=transformer_tiny", *sizes, *settings, *quiet]) == 0
    capsys.readouterr()
    assert cli.run_verb("data", ["trace", f"run={run}", "step=2"]) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict.endswith("as recorded")
    traced = [line.split() for line in lines[1:]]
    assert cli.run_verb("data", ["show", f"run={run}", "step=2"]) == 0
    shown = capsys.readouterr().out.strip().split("\n\n")
    assert len(shown) == 4
    for sample in shown:
        number = re.match(r"step 2, sample (\d+):", sample)[1]  # type: ignore[index]
        documents = [int(words[-2]) for words in traced if words[0] == number]
        # A pair is two documents, the source's number even.
        assert documents == [n + side for n in documents[::2] for side in (0, 1)]
        assert all(n % 2 == 0 for n in documents[::2])
        assert len(documents) == 2 * sample.count("source  ")
