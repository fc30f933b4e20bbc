"""`llmtrain finetune objective=dpo`: answers that are preferred become likelier than the others."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmtrain.cli import main as cli
from llmtrain.train.reference_parts import FOLDER
from tests.support.chat_templates import STYLES
from tests.support.tokenizers import write_chat_tokenizer
from tests.support.warm import PRELUDE, llmtrain

TINY = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0.1")
WORDS = ["tell", "me", "about", "the", "colour", "please", "what", "is", "like", "now"]

DIES = """
import os
from llmtrain.train import reference, reference_parts

reference_parts.SECONDS = 0.0
reference._BATCHES = 1
add, calls = reference_parts.ReferenceParts.add, 0

def counted(self, *arguments):
    global calls
    calls += 1
    if calls == 7:
        os.kill(os.getpid(), 9)
    return add(self, *arguments)

reference_parts.ReferenceParts.add = counted
"""
"""A prelude: kill -9 in the middle of the reference."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with open(path, "w") as file:
        for _ in range(96):
            prompt = " ".join(draw.choice(WORDS, draw.integers(2, 9)))
            row = {"prompt": prompt, "chosen": "It is a fine colour.", "rejected": "No, it is not."}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    style = STYLES["llama 3"]
    return write_chat_tokenizer(tmp_path_factory.mktemp("llama3"), "gpt2", style.tokens, style.plain)


def settings(pairs: Path, tokenizer: Path, folder: Path, cache: Path, *more: str) -> list[str]:
    return [
        *("objective=dpo", "model=gpt_tiny", *TINY, f"data.path={pairs}", f"data.tokenizer={tokenizer}"),
        *(f"data.cache.dir={cache}", "data.split.validation=0.2", "batch.global_size=8"),
        *("batch.micro_size=4", "batch.sequence_length=48", "optimizer.lr=3e-3", f"run.dir={folder}"),
        *("train.epochs=null", "evaluation.at_start=true", *more),
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_preferences_are_learned_and_a_resume_is_exact(
    pairs: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.run_verb("finetune", settings(pairs, tokenizer, whole, tmp_path, "train.steps=12")) == 0
    first, *_, last = [row for row in metrics(whole) if "validation_loss" in row]
    assert first["validation_loss"] == pytest.approx(math.log(2), rel=1e-6), "the model is its reference"
    assert last["validation_loss"] < 0.5
    assert last["validation_accuracy"] == 1.0
    assert last["validation_margin"] > 0.3
    [file] = whole.glob("reference-*.safetensors")

    steps = ("train.steps=12", "checkpoint.every=5", "schedule=constant")
    assert (
        cli.run_verb("finetune", settings(pairs, tokenizer, parts, tmp_path, *steps[1:], "train.steps=5"))
        == 0
    )
    capsys.readouterr()
    assert cli.run_verb("finetune", settings(pairs, tokenizer, parts, tmp_path, *steps)) == 0
    assert "computing the reference" not in capsys.readouterr().err
    other = tmp_path / "other"
    assert cli.run_verb("finetune", settings(pairs, tokenizer, other, tmp_path, *steps)) == 0
    losses = [{row["step"]: row["loss"] for row in metrics(run) if "loss" in row} for run in (parts, other)]
    assert losses[0] == losses[1]

    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={other}", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    said = [row for row in metrics(other) if "validation_loss" in row][-1]
    assert found["margin"] == pytest.approx(said["validation_margin"], rel=1e-5)
    low, high = found["margin_interval"]
    assert low < found["margin"] < high
    assert found["accuracy_interval"] == [1.0, 1.0]

    [file] = other.glob("reference-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    capsys.readouterr()
    assert (
        cli.run_verb("finetune", settings(pairs, tokenizer, other, tmp_path, *steps[1:], "train.steps=14"))
        == 2
    )
    assert "restore the file, or begin another run.dir" in capsys.readouterr().err


def test_loss_and_gradients_are_those_of_the_formula(pairs: Path, tokenizer: Path, tmp_path: Path) -> None:
    import torch
    import torch.nn.functional as F

    from llmtrain.models.gpt.model import GPT
    from llmtrain.train.resolve import resolve
    from tests.support.huggingface import random_weights
    from tests.support.training import compose

    words = settings(pairs, tokenizer, tmp_path / "run", tmp_path, "train.steps=1", "model.dropout=0")
    resolved = resolve(compose(words, "finetune"))
    config = resolved.config
    model = GPT(config.model)
    model.load_state_dict({name: w * 0.1 for name, w in random_weights(model).items()}, strict=False)
    [dataset] = config.objective.open(config.model, config.data, resolved.corpora, "train", 48).values()
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    draw = np.random.default_rng(1)
    references = draw.normal(-30, 3, (len(dataset), 2)).astype(np.float32)
    objective.references = {False: references, True: references}
    indices = np.array([3, 0, 7, -1])
    raw = dataset.get(indices)
    terms = objective(model, objective.collate(raw))
    terms.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.zeros(())
    for sample, index in enumerate(indices[:-1].tolist()):
        gains = []
        for side in range(2):
            here = raw["documents"][sample, side] >= 0
            ids = torch.from_numpy(raw["tokens"][sample, side][here])
            answer = torch.from_numpy(~raw["contexts"][sample, side][here])
            scores = F.log_softmax(model(ids[None, :-1])[0], -1)
            of_tokens = scores[torch.arange(len(ids) - 1), ids[1:]]
            gains.append((of_tokens * answer[1:]).sum() - float(references[index, side]))
        loss = loss - F.logsigmoid(0.1 * (gains[0] - gains[1]))
    loss.backward()
    assert int(terms.num_targets) == 3
    assert terms.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max())), name


@pytest.mark.slow
def test_a_reference_that_is_killed_goes_on(pairs: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Six parts of four pairs are kept; the next start computes the rest, and has what one without a kill
    has. A damaged part is computed again; other weights take none."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    prelude = tmp_path / "dies.py"
    prelude.write_text(DIES)

    def words(run: Path, *more: str) -> list[str]:
        return ["finetune", *settings(pairs, tokenizer, run, tmp_path, "train.steps=2", *more)]

    for seed in ("seed=1", "seed=0"):
        done = llmtrain(*words(killed, seed), **{PRELUDE: str(prelude)})
        assert done.returncode == -9, done.stderr
        assert "an earlier start" not in done.stderr
        assert len(list((killed / FOLDER).iterdir())) == 6
    last = max((killed / FOLDER).iterdir())
    last.write_bytes(last.read_bytes()[:-1] + b"\1")
    done = llmtrain(*words(killed, "seed=0"))
    assert done.returncode == 0, done.stderr
    said = re.search(r"reference: 20 of (\d+) rows were computed by an earlier start", done.stderr)
    assert said, done.stderr
    assert f"reference: {said[1]} of {said[1]} rows, " in done.stderr
    assert not (killed / FOLDER).exists()

    assert llmtrain(*words(whole, "seed=0")).returncode == 0
    ours, theirs = (load_file(*run.glob("reference-*.safetensors")) for run in (killed, whole))
    assert {*ours} == {*theirs} == {"train", "validation"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours), "bit for bit"
    assert [row["loss"] for row in metrics(killed) if "loss" in row] == [
        row["loss"] for row in metrics(whole) if "loss" in row
    ]


@pytest.mark.slow
def test_rows_without_a_reference_are_measured_against_the_base(
    pairs: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of LoRA is there still, and gives the figures that the reference of the run gives; the weights
    that other methods start from are not."""
    base, run = tmp_path / "base", tmp_path / "lora"
    assert cli.run_verb("finetune", settings(pairs, tokenizer, base, tmp_path, "train.steps=1")) == 0
    words = [
        w
        for w in settings(pairs, tokenizer, run, tmp_path, "train.steps=4", "method=lora")
        if not w.startswith(("model", "data.tokenizer"))
    ]
    assert cli.run_verb("finetune", [*words, f"model.path={base}", "model.dropout=0"]) == 0

    def margin() -> Any:
        capsys.readouterr()
        assert cli.run_verb("evaluate", [f"checkpoint={run}", "format=json"]) == 0
        return json.loads(capsys.readouterr().out)["margin"]

    kept = margin()
    for folder in (base, run):
        [file] = folder.glob("reference-*.safetensors")
        file.unlink()
    assert margin() == pytest.approx(kept, rel=1e-4)
    assert abs(kept) > 1e-3
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={base}"]) == 2
    assert "a run with method=lora can be evaluated on any rows" in capsys.readouterr().err
