"""Gradual unfreezing: what trains when, and a run that is killed amid it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from tests.support.warm import PRELUDE, on_ranks

pytestmark = pytest.mark.slow

STEPS, EVERY = 8, 2
WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
LEVELS = (("head",), ("blocks.1",), ("blocks.0",), ("embedding", "positions", "segments", "embedding_norm"))
"""In the order in which they begin to train."""
DIES = """
import os
from llmtrain.engine.base import Engine

step, steps = Engine.train_step, 0

def train_step(self, *arguments, **keys):
    global steps
    steps += 1
    if steps == {at}:
        os.kill(os.getpid(), 9)
    return step(self, *arguments, **keys)

Engine.train_step = train_step
"""
"""A prelude: kill -9 within a step."""


@pytest.fixture(scope="module")
def words(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A fine-tuning, without run.dir."""
    folder = tmp_path_factory.mktemp("gradual")
    draw = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(160):
            text = " ".join(draw.choice(WORDS, draw.integers(2, 30)))
            file.write(json.dumps({"text": text, "label": number % 3}) + "\n")
    size = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=4"]
    batch = ["batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=48"]
    trunk = ["train", "model=bert_tiny", *size, f"data.path={corpus}", f"run.dir={folder / 'trunk'}", *batch]
    run_ranks(1, *trunk, "train.steps=1", "evaluation.every=null", "evaluation.at_start=false")
    data = [f"data.path={folder / 'rows.jsonl'}", f"data.cache.dir={folder / 'cache'}"]
    return [
        *("finetune", f"model.path={folder / 'trunk'}", "objective=classification", "method=gradual"),
        *(*data, "data.split.validation=0.2", *batch, "optimizer.lr=1e-2", "optimizer.layer_decay=0.9"),
        *("train.epochs=null", f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep_last=99"),
        "evaluation.every=5",
    ]


def run_ranks(size: int, *words: str, code: int = 0, **environment: str) -> str:
    """→ what rank 0 said."""
    done = on_ranks(size, *words, **environment)
    assert [process.returncode for process in done] == [code] * size, done[0].stderr
    return done[0].stderr


def checkpoints(run: Path) -> dict[int, Checkpoint]:
    found = [Checkpoint.open(path) for path in (run / "checkpoints").glob("step-*")]
    return {checkpoint.step: checkpoint for checkpoint in found}


def curve(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records if "loss" in r]


def trains(name: str, phase: int) -> bool:
    return any(name.startswith(f"{module}.") for level in LEVELS[: phase + 1] for module in level)


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    said = run_ranks(1, *words, f"run.dir={run}")
    assert said.count("parameters train") == len(LEVELS)
    return run


def test_layer_after_layer_trains(whole: Path) -> None:
    found = checkpoints(whole)
    assert sorted(found) == list(range(1, STEPS + 1))
    names = set(found[1].weights())
    for step, checkpoint in found.items():
        phase = (step - 1) // EVERY
        trained = {name for name in names if trains(name, phase)}
        assert checkpoint.frozen == names - trained
        for kind, entries in checkpoint.manifest["tensors"].items():
            assert set(entries) == (names if kind == "weight" else trained), kind
        for name in trained:
            began = next(p for p in range(len(LEVELS)) if trains(name, p)) * EVERY
            assert checkpoint.updates[name] == step - began
        if step > 1:
            before, after = found[step - 1].weights(), checkpoint.weights()
            moved = {name for name in names if not np.array_equal(before[name], after[name])}
            assert moved == trained
    assert [step for step, *_ in curve(whole)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def divided(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks."""
    run = tmp_path_factory.mktemp("divided")
    run_ranks(2, *words, "parallel.zero=1", f"run.dir={run}")
    return run


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(
    ("size", "layout"), [(1, ()), (2, ("parallel.zero=1",))], ids=["one process", "ZeRO 1 on 2 ranks"]
)
@pytest.mark.parametrize("at", [4, 5], ids=["within a phase", "at its beginning"])
def test_a_killed_run_goes_on_bit_by_bit(
    size: int,
    layout: tuple[str, ...],
    at: int,
    words: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    own, run = [*words, *layout], tmp_path / "run"
    undisturbed: Path = request.getfixturevalue("whole" if size == 1 else "divided")
    prelude = tmp_path / "dies.py"
    prelude.write_text(DIES.format(at=at))
    run_ranks(size, *own, f"run.dir={run}", code=-9, **{PRELUDE: str(prelude)})
    assert 0 < max(checkpoints(run)) < at
    said = run_ranks(size, *own, f"run.dir={run}")
    assert "resuming from" in said
    assert curve(run) == curve(undisturbed)
    ours, theirs = checkpoints(run)[STEPS], checkpoints(undisturbed)[STEPS]
    assert ours.manifest["files"] == theirs.manifest["files"]  # by checksum
    assert ours.manifest["counters"] == theirs.manifest["counters"]


LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "ZeRO 1": ("parallel.zero=1",),
    "ZeRO 3": ("parallel.zero=3",),
    "tensor 2": ("parallel.tensor=2",),
    "pipeline 2": ("parallel.pipeline=2", "parallel.zero=1"),
}


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(layout: str, words: list[str], whole: Path, tmp_path: Path) -> None:
    run_ranks(2, *words, *LAYOUTS[layout], f"run.dir={tmp_path}")
    np.testing.assert_allclose(curve(tmp_path), curve(whole), rtol=2e-4)
    ours, theirs = checkpoints(tmp_path)[STEPS], checkpoints(whole)[STEPS]
    assert ours.frozen == theirs.frozen == frozenset()
    assert ours.updates == theirs.updates


def test_more_steps_freeze_nothing_again(words: list[str], whole: Path, tmp_path: Path) -> None:
    half = tmp_path / "run"
    fork = f"checkpoint.resume={whole / 'checkpoints' / f'step-{EVERY + 1:08d}'}"
    run_ranks(1, *words, f"run.dir={half}", fork, "train.steps=24")
    found = checkpoints(half)
    assert found[EVERY + 2].frozen == checkpoints(whole)[EVERY + 1].frozen, "the upper layer goes on training"
    assert found[24].frozen == frozenset()
