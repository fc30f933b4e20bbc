"""Runs that train a few parameters over a base: small checkpoints, a kill, and a base that has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.interchange.trained import load_trained
from tests.faults.test_gradual import DIES, WORDS, curve, run_ranks
from tests.support.warm import PRELUDE, llmtrain

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and `trunk`: a BERT that was trained for a step."""
    folder = tmp_path_factory.mktemp("adaptations")
    draw = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(160):
            text = " ".join(draw.choice(WORDS, draw.integers(2, 30)))
            file.write(json.dumps({"text": text, "label": number % 3}) + "\n")
    size = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=4"]
    trunk = ["train", "model=bert_tiny", *size, f"data.path={corpus}", f"run.dir={folder / 'trunk'}"]
    batch = ["batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=48"]
    run_ranks(1, *trunk, *batch, "train.steps=1", "evaluation.every=null", "evaluation.at_start=false")
    return folder


def words(folder: Path, *more: str, base: str = "trunk") -> list[str]:
    data = [f"data.path={folder / 'rows.jsonl'}", f"data.cache.dir={folder / 'cache'}"]
    batch = ["batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=48"]
    return [
        *("finetune", f"model.path={folder / base}", "objective=classification", *data, *batch),
        *("data.split.validation=0.2", "optimizer.lr=1e-2", "train.epochs=null", f"train.steps={STEPS}"),
        *("checkpoint.every=2", "checkpoint.keep_last=9", "evaluation.every=3", *more),
    ]


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """A run of LoRA."""
    said = run_ranks(1, *words(folder, "method=lora", "lora.dropout=0.1", f"run.dir={folder / 'tuned'}"))
    assert " train; " in said.replace("\n", " ")
    return folder / "tuned"


def last(run: Path) -> Checkpoint:
    return Checkpoint.open(run / "checkpoints" / f"step-{STEPS:08d}")


def refusal(*command: str) -> str:
    done = llmtrain(*command)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_a_checkpoint_holds_what_trains(tuned: Path, folder: Path) -> None:
    checkpoint = last(tuned)
    for entries in checkpoint.manifest["tensors"].values():
        assert all(".lora." in name or name.startswith("head.") for name in entries)
    held = sum(int(np.prod(e["shape"])) for e in checkpoint.manifest["tensors"]["weight"].values())
    whole = load_trained(tuned)
    assert sum(weight.numel() for weight in whole.weights.values()) > 5 * held
    trunk = load_trained(folder / "trunk").weights
    for name in checkpoint.left_out:
        assert np.array_equal(whole.weights[name], trunk[name])
    for verb in (("show", f"path={tuned}"), ("verify", f"path={tuned}")):
        done = llmtrain("checkpoint", *verb)
        assert done.returncode == 0, done.stderr
    assert "of them in the base" in llmtrain("checkpoint", "show", f"path={tuned}").stdout


@pytest.mark.parametrize("at", [2, 5])
def test_a_kill_and_a_resume_are_bit_exact(at: int, tuned: Path, folder: Path) -> None:
    run = folder / f"killed{at}"
    command = words(folder, "method=lora", "lora.dropout=0.1", f"run.dir={run}")
    prelude = folder / f"dies{at}.py"
    prelude.write_text(DIES.format(at=at))
    run_ranks(1, *command, code=-9, **{PRELUDE: str(prelude)})
    run_ranks(1, *command)
    assert curve(run) == curve(tuned)
    assert same_tensors(last(run), last(tuned))


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    kinds: Mapping[str, Any] = a.manifest["tensors"]
    assert {kind: set(of) for kind, of in kinds.items()} == {
        kind: set(of) for kind, of in b.manifest["tensors"].items()
    }
    ours, theirs = a.weights(), b.weights()
    return all(np.array_equal(ours[name], theirs[name]) for name in kinds["weight"])


def test_every_verb_takes_it(tuned: Path, folder: Path) -> None:
    merged = folder / "merged"
    done = llmtrain("export", f"checkpoint={tuned}", f"output={merged}", "overwrite=true")
    assert done.returncode == 0, done.stderr
    said = []
    for source in (tuned, merged):
        output = folder / f"{source.name}.jsonl"
        done = llmtrain(
            *("predict", f"checkpoint={source}", f"input={folder / 'rows.jsonl'}", f"output={output}"),
            "sequence_length=48",
        )
        assert done.returncode == 0, done.stderr
        said.append([json.loads(line)["probability"] for line in output.read_text().splitlines()])
    assert np.allclose(*said, atol=1e-5)
    done = llmtrain("evaluate", f"checkpoint={tuned}", "format=json")
    assert done.returncode == 0, done.stderr
    assert 0.0 <= json.loads(done.stdout)["accuracy"] <= 1.0


def test_a_base_that_changed_or_is_gone(tuned: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "trunk", copy / "trunk")
    shutil.copytree(tuned, copy / "tuned")
    predict = ["predict", f"checkpoint={copy / 'tuned'}", f"input={folder / 'rows.jsonl'}"]
    hidden = folder / "hidden"
    os.rename(folder / "trunk", hidden)
    try:
        done = llmtrain(*predict, f"output={tmp_path / 'beside.jsonl'}")
        assert done.returncode == 0, done.stderr  # the base moved with it
        [file] = (copy / "trunk" / "checkpoints").glob("step-*/rank-*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "damaged" in refusal(*predict, f"output={tmp_path / 'out.jsonl'}")
        shutil.rmtree(copy / "trunk")
        told = refusal(*predict, f"output={tmp_path / 'out.jsonl'}")
        assert f"{folder / 'trunk'}" in told
        assert "which is gone" in told
    finally:
        os.rename(hidden, folder / "trunk")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("method=lora", "lora.targets=[qvk]"), "which no matrix of the layers matches"),
        (("method=lora", "lora.rank=33"), "lora.rank: got 33"),
        (("method=lora", "model=lstm", "model.path=null"), "method"),
    ],
)
def test_refusals(more: tuple[str, ...], told: str, folder: Path) -> None:
    if "model=lstm" in more:
        command = [word for word in words(folder, *more, "run.dir=none") if not word.startswith("model.path")]
        assert told in refusal(*command)
        return
    assert told in refusal(*words(folder, *more, f"run.dir={folder / 'none'}"))
    assert not (folder / "none").exists()


def test_an_adapted_model_goes_on_or_is_merged(tuned: Path, folder: Path) -> None:
    more = ("objective.new_head=false", f"run.dir={folder / 'more'}")
    assert "merge it first" in refusal(*words(folder, *more, base="tuned"))
    run_ranks(1, *words(folder, "method=lora", *more, base="tuned"))
    again = last(folder / "more")
    assert again.manifest["base"] == last(tuned).manifest["base"]
    before, after = load_trained(tuned).weights, load_trained(folder / "more").weights
    name = "blocks.0.mlp.up.lora.b"
    assert before[name].any()
    assert not np.array_equal(before[name], after[name])
