"""`llmtrain finetune objective=seq2seq`: an encoder–decoder from rows of sources and targets to written texts
and their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from llmtrain.cli import main as cli
from llmtrain.errors import CheckpointError, Problem
from llmtrain.generation.answer import Texts
from llmtrain.interchange.trained import load_trained
from llmtrain.scoring.texts import MEASURES
from llmtrain.train import writing
from tests.unit.commands.test_finetune_trunks import folder_of

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
TARGETS = {"great": ["a good film", "seen twice"], "awful": ["nobody liked it"]}
TINY = ("model=bart_tiny", "model.num_layers=1", "model.hidden_size=64", "model.dropout=0")
SHORT = ("batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=48", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with a word that decides their target; some have two targets, and each number occurs once."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(240):
            key = ("awful", "great")[number % 2]
            words = [*draw.choice(WORDS, draw.integers(1, 6)), key]
            draw.shuffle(words)
            targets = TARGETS[key]
            file.write(
                json.dumps({"long": " ".join(words), "short": targets if key == "great" else targets[0]})
            )
            file.write("\n")
    return path


def settings(rows: Path, corpus: Path, folder: Path, *more: str) -> list[str]:
    data = [f"data.path={rows}", f"data.tokenizer={corpus}", f"data.cache.dir={folder / 'cache'}"]
    fields = [
        "data.text_field=long",
        "data.label_field=short",
        "data.split.validation=0.2",
        "objective=seq2seq",
    ]
    return [*data, *fields, f"run.dir={folder / 'run'}", *SHORT, *more]


@pytest.fixture(scope="module")
def tuned(rows: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    words = settings(rows, corpus, folder, *TINY, "objective.target_length=40", "train.epochs=10")
    assert cli.run_verb("finetune", [*words, "objective.prefix=tl: "]) == 0
    return folder / "run"


def test_texts_are_written_and_scored_during_training(tuned: Path, capsys: Any) -> None:
    """The last figures are those of `evaluate` on as many rows."""
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_bleu" in line][-1]
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={tuned}", "max_samples=32", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == 32
    for name in MEASURES:
        assert last[f"validation_{name}"] == pytest.approx(found[name], rel=1e-6)


def test_checkpoints_are_chosen_by_the_texts(rows: Path, corpus: Path, tmp_path: Path) -> None:
    words = settings(rows, corpus, tmp_path, *TINY, "objective.target_length=40", "train.epochs=2")
    few = ("evaluation.every=6", "evaluation.written=4", "checkpoint.best=bleu", "evaluation.texts=2")
    assert cli.run_verb("finetune", [*words, *few]) == 0
    assert json.loads((tmp_path / "run/figures.json").read_text())["best"]["metric"] == "bleu"
    samples = (tmp_path / "run/samples/step-00000006.jsonl").read_text().splitlines()
    assert len(samples) == 2
    assert all(json.loads(sample)["beginning"] for sample in samples)


def test_a_model_that_cannot_write_goes_on_training(
    rows: Path, corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointError(Problem("model", "logits that are not finite"))

    monkeypatch.setattr(writing, "written_texts", fail)
    words = settings(rows, corpus, tmp_path, *TINY, "objective.target_length=40", "train.epochs=1")
    assert cli.run_verb("finetune", words) == 0
    assert "warning: no texts were scored: model: got logits that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("evaluation.written=4", "parallel.zero=3"), "evaluation.written: got 4 with parallel.zero=3"),
        (("evaluation.written=-1",), "evaluation.written: got -1; allowed: 0 or more, or null"),
        (("evaluation.written=0", "checkpoint.best=bleu"), "checkpoint.best: got bleu; allowed: loss,"),
    ],
)
def test_texts_that_cannot_be_written(
    rows: Path, corpus: Path, tmp_path: Path, capsys: Any, more: tuple[str, ...], said: str
) -> None:
    assert cli.run_verb("finetune", settings(rows, corpus, tmp_path, *TINY, *more)) == 2
    assert said in capsys.readouterr().err


def test_texts_are_written_and_scored(tuned: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    """Figures are those of rouge-score and sacrebleu on what predict writes."""
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={tuned}", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rouge1"] > 0.9
    for name in ("rouge1", "rouge2", "rougeL", "bleu", "chrf"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high
    trained = load_trained(tuned)
    data = {"path": str(rows), "text_field": "long", "label_field": "short"}
    output = tmp_path / "said.jsonl"
    assert cli.run_verb("predict", [f"checkpoint={tuned}", f"input={rows}", f"output={output}"]) == 0
    said = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["long"] for row in said] == [
        json.loads(line)["long"] for line in rows.read_text().splitlines()
    ]
    held_out = held_out_rows(tuned, data)
    of_split = [row for row in said if row["long"] in held_out]
    assert len(of_split) == found["written"] > 20
    right = [row["short"] if isinstance(row["short"], list) else [row["short"]] for row in of_split]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(r, row["prediction"]) for r, row in zip(right, of_split, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(np.mean([score[name].fmeasure for score in scores]))
    written = [row["prediction"] for row in of_split]
    streams: Any = [[r[i] if i < len(r) else None for r in right] for i in range(2)]
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(written, streams).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(written, streams).score)
    # The same sources typed by hand, with their prefix.
    prompt = f"tl: {of_split[0]['long']}"
    capsys.readouterr()
    assert cli.run_verb("generate", [f"checkpoint={tuned}", f"prompt={prompt}"]) == 0
    assert capsys.readouterr().out.strip() == written[0]
    assert trained.tokenizer().decode(Texts(trained).source("a b")[:-1]) == "a b"


def held_out_rows(run: Path, data: dict[str, str]) -> set[str]:
    """Sources of the validation split, as the table of the run has them."""
    from llmtrain.config import decode
    from llmtrain.interchange.trained import describe
    from llmtrain.objectives.reading import data_section, open_data
    from llmtrain.tables.config import TableDataConfig

    described = describe(run)
    section = data_section({"kind": "tokens", "path": None}, described.objective, described.data)
    table: Any = open_data(described.objective, decode(TableDataConfig, section), described.tokenizer)
    split, tokenizer = table.split("validation"), table.load_tokenizer()
    texts = [tokenizer.decode(split.columns["first"][row].tolist()) for row in range(len(split))]
    assert all(text.startswith("tl: ") for text in texts)
    return {text.removeprefix("tl: ") for text in texts}


def test_the_start_counts_pairs_and_cut_rows(rows: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    words = settings(rows, corpus, tmp_path, *TINY, "objective.target_length=6", "batch.sequence_length=8")
    assert cli.run_verb("finetune", [*words, "train.epochs=0.1", "evaluation.every=null"]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("train: "))
    assert " pairs, " in line
    assert "sources cut to 8 tokens" in line
    assert "targets cut to 6 tokens" in line


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_transformers_writes_the_same_after_export(
    name: str, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its sources have the special tokens that its tokenizer puts around them, in predict as in training."""
    folder = folder_of(name, tmp_path / name)
    words = settings(rows, Path("-"), tmp_path, f"model.path={folder}", "train.epochs=3")
    words = [word for word in words if not word.startswith("data.tokenizer")]
    words = [word for word in words if not word.startswith("batch.sequence_length")]
    assert cli.run_verb("finetune", [*words, "batch.sequence_length=96"]) == 0
    output = tmp_path / "said.jsonl"
    predict = [f"checkpoint={tmp_path / 'run'}", f"input={rows}", f"output={output}"]
    assert cli.run_verb("predict", [*predict, "generate.num_beams=2", "generate.max_new_tokens=24"]) == 0
    said = [json.loads(line) for line in output.read_text().splitlines()][:8]
    assert cli.run_verb("export", [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'exported'}"]) == 0
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for row in said:
        ids = tokenizer(row["long"], return_tensors="pt")["input_ids"]
        written = model.generate(ids, num_beams=2, max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True).strip() == row["prediction"].strip()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model=gpt_tiny"], "objective: got seq2seq with model.family=gpt"),
        (["data.label_field=tldr"], "got no field tldr; allowed: long, short"),
        (["data.text_pair_field=short"], "data.text_pair_field: got 'short'; allowed: null"),
        (["objective.target_length=1"], "objective.target_length: got 1; allowed: 2 or more, or null"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], said: str, rows: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    model = () if more[0].startswith("model=") else TINY
    assert cli.run_verb("finetune", [*settings(rows, corpus, tmp_path, *model), *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_figures_of_texts_need_their_packages(tuned: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("llmtrain.scoring.texts.find_spec", lambda name: None)
    assert cli.run_verb("evaluate", [f"checkpoint={tuned}"]) == 2
    said = capsys.readouterr().err
    assert "figures of texts without the packages sacrebleu, rouge-score" in said
    assert 'pip install "llmtrain[seq2seq]", or give bleu=false' in said
    assert cli.run_verb("evaluate", [f"checkpoint={tuned}", "bleu=false"]) == 0
    assert "rouge1" not in capsys.readouterr().out
