"""The command line: help, mistakes, quoting, and every preset composed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.commands.resolve import resolve
from tests.support.training import compose


def mistakes(
    corpus: Path, run: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], verb: str = "train"
) -> list[str]:
    """The lines that a verb prints for a mistake, without what it says of a plan before."""
    settings = ["train.steps=12", "batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=32"]
    code = cli.run_verb(verb, [*settings, f"data.path={corpus}", f"run.dir={run}", *overrides])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    return [line for line in captured.err.splitlines() if line.startswith("llmtrain: error: ")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "optimizer.lr"]),
        (["modell=gpt_tiny"], ["modell", "model"]),
        (["model=gpt_tny"], ["model", "gpt_tiny"]),
        (["optimizer=adamm"], ["optimizer", "adamw"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "a number"]),
        (["train.steps=1.5"], ["train.steps", "1.5", "a whole number"]),
        (["batch.micro_size=3"], ["batch.global_size", "nearest", "micro_size"]),
        (["model.num_heads=5"], ["model.hidden_size", "a multiple of num_heads=5"]),
        (["parallel.tensor=2"], ["parallel.tensor", "not available"]),
        (["parallel.zero=4"], ["parallel.zero", "4", "0, 1, 2, 3"]),
        (["precision=fp16"], ["precision", "bf16"]),
        (["precision=int8"], ["precision", "bf16"]),
        (["batch.sequence_length=100000"], ["batch.sequence_length", "max_sequence_length"]),
        (["data.path=/no/such/corpus"], ["/no/such/corpus", "llmtrain prepare"]),
        (["model.vocab_size=100"], ["model.vocab_size", "320 or more"]),
        (["model=simple_cnn"], ["data.kind", "data=mnist"]),
        (["schedule.warmup_steps=50"], ["schedule.warmup_steps", "12"]),
        (["track=[tensorbord]"], ["track", "tensorboard"]),
        (["checkpoint.resume=/no/such/run"], ["/no/such/run", "no such folder"]),
        (["engine=megatron"], ["engine", "'megatron'", "deepspeed"]),
        (["device=cuda"], ["device", "no GPU"]),
        (["seed=(1"], ["override", "key=value"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_one_line_for_a_mistake(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
):
    run = tmp_path / "run"
    (line,) = mistakes(corpus, run, overrides, capsys)
    for word in words:
        assert word in line
    assert not (run / "checkpoints").exists()


def test_several_mistakes_are_told_together(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["optimizer.lr=-1", "train.steps=0", "model.dropout=2"]
    lines = mistakes(corpus, tmp_path / "run", overrides, capsys)
    assert [line.split(": ")[2] for line in lines] == ["model.dropout", "optimizer.lr", "train.steps"]


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("prompt=The film, was (not) good", "prompt='The film, was (not) good'"),
        ("prompt=it's", r"prompt='it\'s'"),
        ("prompt=", "prompt=''"),
        ("prompt=['one','two']", "prompt=['one','two']"),
        ("source=/data/*.txt", "source='/data/*.txt'"),
        ("run.dir=/tmp/run-1", "run.dir=/tmp/run-1"),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-3"),
        ("--multirun", "--multirun"),
    ],
)
def test_free_text_is_quoted(given: str, quoted: str):
    assert cli.quote(given) == quoted


@pytest.mark.parametrize(
    "text", ["a, b", "it's", 'say "so"', "back\\slash", "ends\\", "\\'", "${x}", "ü ★", "=", "{a: 1}"]
)
def test_quoted_text_arrives_as_typed(text: str):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(cli.quote(f"prompt={text}"))
    assert override.value() == text


def test_every_preset_composes_and_decodes():
    models = cli.group_options("model")
    assert len(models) >= 14
    for model in models:
        data = ["data=mnist"] if model == "simple_cnn" else []
        mapping = compose([f"model={model}", *data, "batch.sequence_length=128"], "plan")
        mapping.pop("world_size")
        assert resolve(mapping, 1, data_optional=True).config.model.parameter_count() > 0
    for group in ("optimizer", "schedule", "precision", "cluster"):
        for option in cli.group_options(group):
            device = "cuda" if option == "fp16" else "cpu"
            mapping = compose([f"{group}={option}", f"device={device}"], "plan")
            mapping.pop("world_size")
            resolve(mapping, 1, data_optional=True)


def test_help_answers_without_torch():
    code = (
        "import sys; from llmtrain import cli; cli.usage();"
        "sys.exit(bool({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plan_needs_no_torch():
    code = (
        "import sys; from llmtrain import cli;"
        "code = cli.run_verb('plan', ['model=llama3_8b', 'world_size=64', 'parallel.zero=3',"
        "'precision=bf16', 'cluster=h100_80g', 'batch.global_size=64', 'batch.micro_size=1']);"
        "sys.exit(code or bool({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248 parameters" in done.stdout


def test_unknown_verb_and_hydras_own_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert "train" in capsys.readouterr().err
    assert cli.run_verb("plan", ["seed=7", "--cfg", "job", "train.steps=3"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 7" in shown
    assert "steps: 3" in shown


def test_multirun_makes_a_plan_for_each(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("plan", ["model=gpt_tiny,gpt2_124m", "--multirun", "model.vocab_size=50257"]) == 0
    shown = capsys.readouterr().out
    assert "124,439,808 parameters" in shown
    assert shown.count("layout ") == 2
