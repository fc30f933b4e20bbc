"""A BERT from training to filled masks, through the verbs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmtrain.cli import main as cli

TINY = (
    "model=bert_tiny",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "batch.global_size=8",
    "batch.micro_size=8",
    "batch.sequence_length=32",
    "train.steps=3",
    "evaluation.max_samples=16",
    "evaluation.every=null",
    "data.workers=0",
)
CORPUS_IDS = 320


@pytest.fixture(scope="module", params=["mlm", "mlm_nsp", "mlm_sop"])
def run(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = ["objective.whole_words=true"] if request.param == "mlm" else []
    arguments = [*TINY, f"objective={request.param}", *words, f"data.path={corpus}", f"run.dir={folder}"]
    assert cli.run_verb("train", arguments) == 0
    return folder


def has_pairs(run: Path) -> bool:
    return run.name != "mlm"


def test_metrics_of_a_run(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation_loss" in line][-1]
    assert 0 <= last["validation_masked_accuracy"] <= 1
    assert ("validation_pair_accuracy" in last) == has_pairs(run)
    if has_pairs(run):
        assert last["validation_pair_loss"] == pytest.approx(math.log(2), abs=0.3)
        assert last["validation_loss"] == pytest.approx(
            last["validation_masked_loss"] + last["validation_pair_loss"], abs=0.1
        )


def test_the_checkpoint_knows_the_special_ids(run: Path) -> None:
    [manifest] = (run / "checkpoints").glob("step-*/manifest.json")
    model = json.loads(manifest.read_text())["model"]
    assert (model["vocab_size"], model["mask_id"]) == (CORPUS_IDS + 3, CORPUS_IDS)
    assert (model["cls_id"], model["sep_id"]) == (CORPUS_IDS + 1, CORPUS_IDS + 2)


def test_evaluate(run: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments = [f"checkpoint={run}", f"data.path={corpus}", f"output={output}", "data.workers=0"]
    assert cli.run_verb("evaluate", arguments) == 0
    figures = json.loads(output.read_text())
    tokens_alone = figures["masked_loss"] if has_pairs(run) else figures["loss"]
    assert figures["perplexity"] == pytest.approx(math.exp(tokens_alone))
    assert "bits_per_byte" not in figures
    # The same tokens are asked for again, whoever evaluates.
    again = tmp_path / "again.json"
    arguments[2] = f"output={again}"
    assert cli.run_verb("evaluate", [*arguments, "micro_size=3"]) == 0
    assert json.loads(again.read_text())["targets"] == figures["targets"]
    assert json.loads(again.read_text())["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_generate_fills_masks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "the film was a [MASK] story with [MASK]."
    assert cli.run_verb("generate", [f"checkpoint={run}", f"prompt={prompt}", "generate.top_k=3"]) == 0
    text, *candidates = capsys.readouterr().out.splitlines()
    assert text.startswith("the film was a")
    assert "[MASK]" not in text
    assert [line.split(":")[0] for line in candidates] == ["  [MASK] 1", "  [MASK] 2"]
    assert all(line.count("', ") + line.count('", ') <= 3 for line in candidates)


def test_prompts_that_cannot_be_filled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb("generate", [f"checkpoint={run}", "prompt=the film"]) == 2
    assert "a text with [MASK]" in capsys.readouterr().err
    long = "the film " * 300 + "[MASK]"
    assert cli.run_verb("generate", [f"checkpoint={run}", f"prompt={long}"]) == 2
    assert "max_sequence_length" in capsys.readouterr().err
    beams = ["prompt=the [MASK]", "generate.num_beams=2", "output=filled.txt"]
    assert cli.run_verb("generate", [f"checkpoint={run}", *beams]) == 2
    error = capsys.readouterr().err
    assert "output: got filled.txt; allowed: null with a model that fills [MASK]" in error
    assert "generate.num_beams: got 2; allowed: 1 with a model that fills [MASK]" in error


def test_export(run: Path, tmp_path: Path) -> None:
    assert cli.run_verb("export", [f"checkpoint={run}", f"output={tmp_path / 'out'}"]) == 0
    config, tokenizer = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    has_head = config["architectures"] == ["BertForPreTraining"]
    assert (config["model_type"], has_head) == ("bert", has_pairs(run))
    assert (config["mask_token_id"], tokenizer["mask_token"]) == (CORPUS_IDS, "[MASK]")


def test_data_show_tells_what_is_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb("data", ["show", f"run={run}", "step=2", "max_samples=8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("step 2, sample") == 8
    predicted = sum(
        int(line.split(" of them predicted")[0].split()[-1])
        for line in shown.splitlines()
        if "of them predicted" in line
    )
    assert shown.count("→") == predicted > 0
    assert ("[CLS]" in shown) == has_pairs(run)


def test_data_trace_confirms_the_digest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb("data", ["trace", f"run={run}", "step=2"]) == 0
    assert "another" not in capsys.readouterr().err
