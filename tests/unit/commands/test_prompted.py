"""Prompts on the command line: without training, with shots, tuned, and predicted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
TINY = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0")
SHORT = ("batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=48", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(300):
            words = [*draw.choice(WORDS, draw.integers(4, 10)), ("awful", "fresh")[number % 2]]
            draw.shuffle(words)
            writer.writerow([" ".join(words), ("bad", "good")[number % 2]])
    return path


@pytest.fixture(scope="module")
def words_of(corpus: Path) -> list[str]:
    """Words that are one token."""
    from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(find_tokenizer(corpus) or corpus)
    tried = ["the", "and", "film", "movie", "good", "story", "one", "was", "with", "his"]
    return [word for word in tried if len(tokenizer.encode(f" {word}")) == 1]


def prompt(words: list[str], template: str = "{text} it was {answer}.") -> list[str]:
    of_labels = f"objective.verbalizer={{bad: {words[0]}, good: {words[1]}}}"
    return ["objective=prompted", f"objective.template={template}", of_labels]


def pretrained(model: str, corpus: Path, folder: Path) -> Path:
    words = [f"model={model}", f"data.path={corpus}", f"run.dir={folder}", *TINY, *SHORT, "train.steps=2"]
    assert cli.run_verb("train", [*words, "evaluation.every=null", "evaluation.at_start=false"]) == 0
    return folder


@pytest.fixture(scope="module")
def trunks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trunks")
    return {model: pretrained(model, corpus, folder / model) for model in ("bert_tiny", "gpt_tiny")}


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("evaluate", [*words, "format=json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("model", ["bert_tiny", "gpt_tiny"])
def test_tuned_it_learns(
    model: str,
    reviews: Path,
    trunks: dict[str, Path],
    words_of: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = f"data.cache.dir={tmp_path / 'cache'}"
    words = [f"model.path={trunks[model]}", f"data.path={reviews}", cache, "data.split.validation=0.2"]
    words += [f"run.dir={tmp_path / 'run'}", "train.epochs=12", *SHORT, *prompt(words_of)]
    assert cli.run_verb("finetune", words) == 0
    assert "new, started from the seed" not in capsys.readouterr().err, "the model's own head goes on"
    found = evaluated(capsys, f"checkpoint={tmp_path / 'run'}")
    assert found["accuracy"] > 0.9
    output = tmp_path / "said.jsonl"
    words = [f"checkpoint={tmp_path / 'run'}", f"input={reviews}", f"output={output}"]
    assert cli.run_verb("predict", words) == 0
    said = [json.loads(line) for line in output.read_text().splitlines()]
    assert np.mean([row["prediction"] == row["label"] for row in said]) > 0.9
    assert all(0.5 <= row["probability"] <= 1 for row in said)
    show = [f"run={tmp_path / 'run'}", "step=1", "max_samples=1", f"data.cache.dir={tmp_path}"]
    assert cli.run_verb("data_show", show) == 0
    assert "it was" in capsys.readouterr().out


def test_transformers_fills_the_mask_alike(
    reviews: Path,
    trunks: dict[str, Path],
    words_of: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without training, from a Hugging Face folder: the probabilities of its own model and tokenizer."""
    import torch
    import transformers

    exported = tmp_path / "exported"
    assert cli.run_verb("export", [f"checkpoint={trunks['bert_tiny']}", f"output={exported}"]) == 0
    output = tmp_path / "said.jsonl"
    given = [f"checkpoint={exported}", f"input={reviews}", f"output={output}", *prompt(words_of)]
    assert cli.run_verb("predict", given) == 0
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    answers = [tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in words_of[:2]]
    for row in [json.loads(line) for line in output.read_text().splitlines()][:20]:
        text = f"{row['text']} it was {tokenizer.mask_token}."
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**ids).logits[0]
        place = (ids["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        probabilities = logits[place, answers].softmax(-1)
        assert row["prediction"] == ("bad", "good")[int(probabilities.argmax())]
        assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
    found = evaluated(
        capsys,
        f"checkpoint={exported}",
        "data=table",
        f"data.path={reviews}",
        f"data.cache.dir={tmp_path / 'cache'}",
        "data.split.validation=0.2",
        *prompt(words_of),
    )
    assert 0 <= found["accuracy"] <= 1
    assert found["targets"] > 30


def test_shots_and_answers_of_several_tokens(
    reviews: Path, trunks: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score of each answer is the log-probability that the model gives to it after the shots."""
    import torch

    from llmtrain.interchange.trained import load_trained
    from llmtrain.objectives.prompted import PromptedConfig
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.table import open_table

    words, template = ["dreadfully uninspired", "magnificent"], "Review: {text}\nVerdict: {answer}"
    given = ["data=table", f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}"]
    given += [*prompt(words, template), "objective.shots=4", "sequence_length=256"]
    found = evaluated(capsys, f"checkpoint={trunks['gpt_tiny']}", *given)
    other = evaluated(capsys, f"checkpoint={trunks['gpt_tiny']}", *given, "objective.shots_seed=1")
    assert found["loss"] != other["loss"], "other rows are shown"
    config = PromptedConfig(template=template, verbalizer={"bad": words[0], "good": words[1]}, shots=4)
    trained = load_trained(trunks["gpt_tiny"])
    data = TableDataConfig(path=str(reviews))
    table = open_table(data, config, trained.tokenizer_path)  # type: ignore[arg-type]
    dataset: Any = config.open(trained.config, data, table, "validation", 256)[""]
    model, task = trained.build(torch.device("cpu")), config.build(trained.config, None)
    batch = task.collate(dataset.get(np.arange(3)))
    with torch.no_grad():
        scores = task.predictions(model(**task.inputs(batch)), batch)
        for sample in range(3):
            for number, answer in enumerate(dataset.prompt.answers):
                ids, place = dataset.row(sample, answer)
                whole = torch.from_numpy(np.append(ids, answer[-1]))[None]
                said = model(whole[:, :-1]).log_softmax(-1)[0]
                expected = sum(said[place + i, token] for i, token in enumerate(answer.tolist()))
                assert scores[sample][number] == pytest.approx(float(expected), abs=1e-4)
    text = trained.tokenizer().decode(dataset.row(0, dataset.prompt.answers[0])[0].tolist())
    assert text.count("Verdict:") == 5
    assert sum(text.count(f"Verdict: {word}") for word in words) == 4


def test_calibration_takes_the_mean_over_chosen_rows_from_the_scores(
    reviews: Path,
    trunks: dict[str, Path],
    words_of: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from llmtrain.interchange.trained import load_trained
    from llmtrain.objectives.prompted import PromptedConfig
    from llmtrain.objectives.shots import chosen_rows
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.table import open_table

    given = ["data=table", f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}", *prompt(words_of)]
    given += [f"checkpoint={trunks['bert_tiny']}", "sequence_length=48", "data.split.validation=0.2"]
    found = evaluated(capsys, *given, "objective.calibration=30", "micro_size=7")
    assert found["loss"] != evaluated(capsys, *given)["loss"]

    verbalizer = {"bad": words_of[0], "good": words_of[1]}
    config = PromptedConfig(template="{text} it was {answer}.", verbalizer=verbalizer)
    trained = load_trained(trunks["bert_tiny"]).learned_by(config)
    data = TableDataConfig(path=str(reviews), split=replace(TableDataConfig().split, validation=0.2))
    table = open_table(data, config, trained.tokenizer_path)  # type: ignore[arg-type]
    model, task = trained.build(torch.device("cpu")).eval(), config.build(trained.config, None)

    def scores(split: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        dataset: Any = config.open(trained.config, data, table, split, 48)[""]
        batch = task.collate(dataset.get(np.arange(len(dataset)) if rows is None else rows))
        with torch.no_grad():
            return np.stack(task.predictions(model(**task.inputs(batch)), batch)), batch["labels"].numpy()

    rows = chosen_rows(table.split("train").array("label"), 30, seed=0)
    calibrated, labels = scores("validation")
    calibrated = calibrated - scores("train", rows)[0].mean(0)
    assert found["accuracy"] == pytest.approx((calibrated.argmax(1) == labels).mean())
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(calibrated), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(float(loss), abs=1e-5)

    words = [*given, "objective.calibration=9999"]
    assert cli.run_verb("evaluate", words) == 2
    assert "objective.calibration: got 9999 of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["objective.calibration=2"], "objective.calibration: got 2; allowed: 0 for rows to train on"),
        (["objective.verbalizer.good=unquestionably"], "objective.verbalizer.good: got 'unquestionably', "),
        (["objective.template={text} it was"], "objective.template: got '{text} it was', no {answer}"),
        (["objective.template={txt} was {answer}"], "got no field txt; allowed: text, label"),
        (
            ["objective.verbalizer={bad: the}"],
            "objective.verbalizer: got {'bad': 'the'}; allowed: a word",
        ),
        (["objective.verbalizer={bad: the, fine: and}"], "got the labels good; allowed: those of"),
        (["objective.shots=2"], "objective.shots: got 2 with model.family=bert"),
        (["parallel.pipeline=2"], "parallel.pipeline: got 2; allowed: 1 with objective=prompted"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    said: str,
    reviews: Path,
    corpus: Path,
    words_of: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = [f"data.path={reviews}", f"data.tokenizer={corpus}", f"data.cache.dir={tmp_path / 'cache'}"]
    given = prompt(words_of)
    if more[0].startswith("objective.verbalizer={"):
        given = given[:2]
    words = ["model=bert_tiny", *TINY, *SHORT, *places, f"run.dir={tmp_path / 'run'}", *given, *more]
    assert cli.run_verb("finetune", words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()
