"""One run through several layouts by the command line: trained in three dimensions, killed, taken up by
other numbers of processes, exported, evaluated and sampled from, also on a pipeline."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training import TINY_GPT
from tests.support.warm import finish, llmtrain, on_ranks, start_ranks

pytestmark = pytest.mark.slow

STEPS = 24
OF_EIGHT = "of_eight"
SETTINGS = (*TINY_GPT, "model.dropout=0.1", "optimizer.lr=3e-3", "seed=7", "device=cpu", "data.workers=0")
NO_EVALUATION = ("evaluation.every=null", "evaluation.at_start=false")
ALL = (*SETTINGS, f"train.steps={STEPS}", *NO_EVALUATION)


def run(processes: int, *arguments: str) -> str:
    """What the ranks printed."""
    ranks = on_ranks(processes, *arguments)
    for done in ranks:
        assert done.returncode == 0, done.stderr[-3000:]
    return "".join(done.stdout for done in ranks)


def losses(folder: Path) -> dict[int, float]:
    """Step → training loss, the last told of it."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in told if "loss" in record}


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("plain")
    done = llmtrain("train", *ALL, f"data.path={corpus}", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def moved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run: killed at pipeline 2 · tensor 2 · data 2, then ZeRO 3 over 4, then one process. OF_EIGHT
    beside it is the checkpoint of the eight ranks."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    common = ("train", *SETTINGS, f"data.path={corpus}", f"run.dir={folder}", "checkpoint.every=2")
    common = (*common, *NO_EVALUATION)
    three_d = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.zero=1", "recompute=full")
    first = start_ranks(8, *common, *three_d, f"train.steps={STEPS}")
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / "step-00000006" / "manifest.json").exists():
        assert time.monotonic() < deadline
        assert first[0].poll() is None, first[0].communicate()[1][-9000:]
        time.sleep(0.02)
    for rank in first:
        rank.kill()
    finish(first)
    newest = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    assert 6 <= newest < STEPS
    shutil.copytree(folder / "checkpoints" / f"step-{newest:08d}", folder.parent / OF_EIGHT)
    middle = folder / "checkpoints" / f"step-{newest + 2:08d}" / "manifest.json"
    # The second start ends as a job does whose time is over: told to stop, it saves and leaves.
    second = start_ranks(4, *common, "parallel.zero=3", "batch.micro_size=1", f"train.steps={STEPS}")
    while not middle.exists():
        assert second[0].poll() is None, second[0].communicate()[1][-9000:]
        time.sleep(0.01)
    for rank in second:
        rank.terminate()
    stopped = [rank.communicate(timeout=120)[1] for rank in second]
    assert [rank.returncode for rank in second] == [75] * 4, stopped
    assert "stopped at step" in stopped[0]
    done = llmtrain(*common, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_curve_is_that_of_one_process(plain: Path, moved: Path):
    expected, found = losses(plain), losses(moved)
    assert sorted(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-5)


def test_a_checkpoint_of_eight_ranks_is_exported(moved: Path, tmp_path: Path):
    """To Hugging Face, with equal logits."""
    from transformers import AutoModelForCausalLM

    from llmtrain.interchange.trained import load_trained

    checkpoint, output = moved.parent / OF_EIGHT, tmp_path / "export"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    written = [entry["file"] for entry in manifest["files"] if entry["file"].startswith("rank-")]
    assert len(written) == 8  # every rank its own
    done = llmtrain("export", f"checkpoint={checkpoint}", f"output={output}")
    assert done.returncode == 0, done.stderr
    ours = load_trained(checkpoint).build(torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(output).eval()
    tokens_BT = torch.arange(2 * 24).view(2, 24) % 300
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("division", [("pipeline", 2), ("tensor", 2)])
def test_generation_and_evaluation_on_many_processes(
    corpus: Path, moved: Path, tmp_path: Path, division: tuple[str, int]
):
    axis, size = division
    prompts = ("generate", f"checkpoint={moved}", 'prompt=["1: the film","9: slow rain on"]')
    prompts = (*prompts, "generate.max_new_tokens=24", "device=cpu")
    alone = llmtrain(*prompts)
    assert alone.returncode == 0, alone.stderr
    assert run(size, *prompts, f"parallel.{axis}={size}") == alone.stdout

    figures = ("evaluate", f"checkpoint={moved}", f"data.path={corpus}", "device=cpu", "data.workers=0")
    figures = (*figures, "max_samples=30")
    done = llmtrain(*figures, f"output={tmp_path / 'alone.json'}")
    assert done.returncode == 0, done.stderr
    run(4, *figures, f"parallel.{axis}={size}", f"output={tmp_path / 'many.json'}")
    expected, found = (json.loads((tmp_path / name).read_text()) for name in ("alone.json", "many.json"))
    assert found["targets"] == expected["targets"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
