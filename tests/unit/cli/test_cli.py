"""The command line: help, mistakes, quoting, and every preset composed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.cli import main as cli
from llmtrain.cli import verbs
from llmtrain.cli.explain import conf_folder, group_options
from llmtrain.config import encode
from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.objectives.registry import objective_config_type
from llmtrain.plan.keys import PlanKeys
from llmtrain.standard_streams import PIPE_CLOSED
from llmtrain.track.config import TrackConfig
from llmtrain.train.config import TrainConfig
from llmtrain.train.resolve import resolve
from llmtrain.train.run_folder import environment
from llmtrain.train.vectors_config import decode_run
from llmtrain.vectors.config import VECTORS_CONFIGS
from tests.support.training import REPOSITORY, compose


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
        (["optimizer.lrr=1"], ["optimizer.lrr", "allowed: lr;"]),
        (["modell=gpt_tiny"], ["modell", "model"]),
        (["model=gpt_tny"], ["model", "gpt_tiny"]),
        (["optimizer=adamm"], ["optimizer", "adamw"]),
        (
            ["model=bert_tiny", "objective=denoising"],
            ["objective: got denoising with model.family=bert; allowed: mlm"],
        ),
        (
            ["model=t5_tiny", "objective=permuted_lm"],
            ["objective: got permuted_lm", "seq2seq, span_corruption, denoising"],
        ),
        (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "a finite number"]),
        (["train.steps=1.5"], ["train.steps", "1.5", "a whole number"]),
        (["batch.micro_size=3"], ["batch.global_size", "nearest", "micro_size"]),
        (["model.num_heads=5"], ["model.hidden_size", "a multiple of num_heads=5"]),
        (["parallel.tensor=2"], ["parallel: got", "tensor 2 · pipeline 1", "start 2 processes"]),
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
        *[
            ([f"{key}={value}"], [f"{key}: got '{value}'", "a number, a word", "quote"])
            for key, value in (("seed", "(1"), ("optimizer.lr", "a=b"), ("data.mixture", "{a=1}"))
        ],
        (["=3"], ["override", "'=3'", "key=value"]),
        (["nokey=1"], ["nokey", "batch, checkpoint", "seed"]),
        (["precision=fp8"], ["precision", "fp32", "bf16", "fp16"]),
        (["track=[jsonl,tensorbord]"], ["track", "jsonl", "tensorboard", "wandb"]),
        (["optimizer.eps=inf"], ["optimizer.eps", "inf", "finite"]),
        ([f"seed={2**63}"], ["seed", "2^63"]),
        (["modell.head_dim=8"], ["modell", "model"]),
        (["run.dir="], ["run.dir", "nothing", "a path"]),
        (["run.dir=''"], ["run.dir", "nothing", "a path"]),
        (["data.path="], ["data.path", "nothing", "a path"]),
        (["checkpoint.resume="], ["checkpoint.resume", "nothing", "a path"]),
        (["run.dir=r\udce9"], ["run.dir", "a path in UTF-8"]),
        (["run.dir=https://u:s3cret@h/x?sig=s3cret"], ["run.dir", "https://h/x", "a path on this machine"]),
        (["run.dir='https://u:s3cret@h/x?sig=s3cret'"], ["run.dir", "https://h/x", "a path on this machine"]),
        (["data.path='~nobody.of.that.name/x'"], ["no such folder"]),
        ([f"checkpoint.resume={'r' * 300}"], ["rrr…", "a name that is too long", "255 bytes"]),
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
    ("verb", "arguments", "key"),
    [
        ("prepare", ["source=", "output=x"], "source"),
        ("prepare", ["source=x", "output="], "output"),
        ("evaluate", ["checkpoint=", "data.path=x"], "checkpoint"),
        ("generate", ["checkpoint=x", "prompt_file="], "prompt_file"),
    ],
)
def test_empty_paths_are_refused(
    verb: str, arguments: list[str], key: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.run_verb(verb, arguments) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"llmtrain: error: {key}: got nothing; allowed: a path or name; give {key}=…"
    ]


def test_every_field_can_be_given_though_its_yaml_lacks_it():
    overrides = [
        *("model.head_dim=16", "model.rope_theta=5000", "model.rope_scaling.factor=4"),
        *("schedule.decay_steps=3", "optimizer.momentum=0.5", "optimizer.alpha=0.5", "model.vocab_size=320"),
    ]
    config = decoded(compose(overrides, "plan"))
    assert isinstance(config.model, GPTConfig)
    assert config.model.rope_scaling is not None
    assert (config.model.head_dim, config.model.rope_theta, config.model.rope_scaling.factor) == (16, 5000, 4)
    assert (config.schedule.decay_steps, config.optimizer.momentum, config.optimizer.alpha) == (3, 0.5, 0.5)


def test_no_tracker_at_all():
    assert decoded(compose(["track=[]"], "plan")).track == TrackConfig()
    assert set(compose([], "plan")["track"]) == {"alerts", "jsonl"}


def test_the_command_is_remembered_as_typed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "_command", None)
    monkeypatch.setattr(sys, "argv", ["llmtrain", "plan", "run.name=1_000", "--cfg", "job"])
    with pytest.raises(SystemExit):
        cli.main()
    assert sys.argv[1:] != ["plan", "run.name=1_000", "--cfg", "job"]
    assert environment()["command"] == ["llmtrain", "plan", "run.name=1_000", "--cfg", "job"]


PAIRED_MODELS = {
    "encoder": "bert_tiny",
    "permuted_encoder": "xlnet_tiny",
    "encoder_decoder": "bart_tiny",
    "decoder": "gpt_tiny",
    "classifier": "mlp",
    "generator": "gan",
}
"""Kind of model → a preset that objectives are tried with."""


NEEDED_KEYS = {
    "multi_task": ["objective.tasks.topic.kind=classification", "objective.tasks.names.kind=tagging"],
    "prompted": ["objective.verbalizer={bad: terrible, good: great}"],
}
"""Keys that an objective has no default for."""


OWN_DATA = ("mnist_cnn", "gan_digits", "optimizers", "xor")
"""Experiments on data of a package."""


def test_every_preset_composes_and_decodes():
    """Hydra takes a fifth of a second for a configuration: those of models have an option of each of these
    groups too, while there are more."""
    groups = ("optimizer", "schedule", "precision", "cluster")
    rest = {group: group_options(group) for group in groups}
    others = {"pretrained", "_word_vectors", *VECTORS_CONFIGS}  # the first needs a folder
    models = [model for model in group_options("model") if model not in others]
    assert len(models) >= 14
    composed = {}
    for model in models:
        words = [f"{group}={options.pop()}" for group, options in rest.items() if options]
        words += ["device=cuda"] if "precision=fp16" in words else []
        chosen = (conf_folder() / "model" / f"{model}.yaml").read_text()
        words += ["data=mnist"] if "image_size:" in chosen else []
        words += ["data=table"] if "objective: classification" in chosen else []
        composed[model] = compose([f"model={model}", *words, "batch.sequence_length=128"], "plan")
        assert decoded(composed[model]).model.parameter_count() > 0
    assert not any(rest.values())
    for model in VECTORS_CONFIGS:
        mapping = compose([f"model={model}", "data.path=texts"], "train")
        assert holds(encode(decode_run(mapping).model), mapping["model"])
    for option in group_options("objective"):
        given = yaml.safe_load((conf_folder() / "objective" / f"{option}.yaml").read_text())
        objective = objective_config_type(given)
        kind = objective.teaches[0]
        data = [] if objective.data == "tokens" else [f"data={objective.data.replace('images', 'mnist')}"]
        words = [f"model={PAIRED_MODELS[kind]}", f"objective={option}", "batch.sequence_length=96", *data]
        words += NEEDED_KEYS.get(option, [])
        mapping = compose(words, "plan")
        assert holds(encode(decoded(mapping).objective), mapping["objective"])
        for other, model in PAIRED_MODELS.items():
            if other not in objective.teaches:
                with pytest.raises(ConfigError) as refusal:
                    decoded({**composed[model], "objective": mapping["objective"]})
                assert [problem.where for problem in refusal.value.problems] == ["objective"]
    for experiment in group_options("experiment"):
        no_data = [] if experiment in OWN_DATA else ["data.path=null"]
        decoded(compose([f"experiment={experiment}", *no_data], "plan"))


def holds(whole: Any, part: Any) -> bool:
    """Whether a section has all that another says, in its own sections too."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    return bool(whole == part)


def decoded(mapping: dict[str, Any]) -> TrainConfig:
    """A composed configuration of `plan`, as one process without data has it."""
    of_plan = {field.name for field in fields(PlanKeys)}
    own = {key: value for key, value in mapping.items() if key not in of_plan}
    return resolve(own, 1, data_optional=True).config


def test_help_answers_without_torch():
    code = (
        "import sys; from llmtrain.cli import main; main.usage(); main.second_usage('data');"
        "sys.exit(bool({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plan_needs_no_torch():
    code = (
        "import sys; from llmtrain.cli.main import run_verb;"
        "code = run_verb('plan', ['model=llama3_8b', 'world_size=64', 'parallel.zero=3',"
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


def test_all_that_hydra_cannot_read_is_told_at_once(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("plan", ["seed=(1", "train.steps=2;3"]) == 2
    told = capsys.readouterr().err
    assert "seed: got '(1'" in told
    assert "train.steps: got '2;3'" in told


def test_multirun_makes_a_plan_for_each(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("plan", ["model=gpt_tiny,gpt2_124m", "--multirun", "model.vocab_size=50257"]) == 0
    shown = capsys.readouterr().out
    assert "124,439,808 parameters" in shown
    assert shown.count("layout ") == 2


@pytest.mark.parametrize(
    ("overrides", "folders"),
    [
        (["run.dir=ma,mb"], ["ma", "mb"]),
        (["run.dir=ma,mb", "seed=1,2"], ["ma/seed=1", "ma/seed=2", "mb/seed=1", "mb/seed=2"]),
        (["run.name=x,y"], ["runs/x/run.name=x", "runs/y/run.name=y"]),
        (
            ["run.dir=m", "seed=2", "optimizer.lr=1e-3,3e-4"],
            ["m/optimizer.lr=0.001,seed=2", "m/optimizer.lr=0.0003,seed=2"],
        ),
        (["run.dir=m", "seed=2"], ["m"]),
        (["run.dir=${x}'\\,1_0"], ["${x}'\\", "1_0"]),
    ],
)
def test_each_job_of_a_sweep_has_a_run_folder_of_its_own(
    overrides: list[str], folders: list[str], monkeypatch: pytest.MonkeyPatch
):
    from llmtrain.commands import plan

    seen: list[str] = []
    monkeypatch.setattr(plan, "run", lambda mapping: seen.append(mapping["run"]["dir"]))
    assert cli.run_verb("plan", ["--multirun", *overrides]) == 0
    assert seen == folders


def test_a_job_that_is_asked_to_stop_ends_its_sweep(monkeypatch: pytest.MonkeyPatch):
    from llmtrain.commands import plan

    codes = iter([0, 75, 0])
    monkeypatch.setattr(plan, "run", lambda mapping: next(codes))
    assert cli.run_verb("plan", ["--multirun", "seed=1,2,3"]) == 75
    assert next(codes) == 0, "the third was begun"


def test_every_failed_job_of_a_sweep_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("plan", ["--multirun", "optimizer.lr=-1,0.1,-2"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("llmtrain: error: ")]
    assert [line.split("; ")[0] for line in lines] == [
        "llmtrain: error: job 0: optimizer.lr: got -1.0",
        "llmtrain: error: job 2: optimizer.lr: got -2.0",
    ]
    assert captured.out.count("layout ") == 1


def test_a_crash_is_told_as_it_is_and_other_jobs_of_its_sweep_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran = []

    def run(mapping: dict) -> None:
        ran.append(mapping["seed"])
        if mapping["seed"] == 2:
            raise RuntimeError("out of order")

    monkeypatch.setattr(verbs, "runner", lambda name: run)
    with pytest.raises(RuntimeError, match="out of order"):
        cli.run_verb("plan", ["--multirun", "seed=1,2,3"])
    assert ran == [1, 2, 3]
    with pytest.raises(RuntimeError, match="out of order"):
        cli.run_verb("plan", ["seed=2"])
    assert "Error executing job" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["=3"], ["hello"], ["--multirun", "=3"], ["--cfg", "job", "a b=3"]])
def test_words_that_are_no_override_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("prepare", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmtrain: error: override: got {arguments[-1]!r}; allowed: key=value")


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `llmtrain plan … | head -1`."""
    command = [sys.executable, "-m", "llmtrain", "plan", "model=gpt_tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == PIPE_CLOSED
    assert said == b""
