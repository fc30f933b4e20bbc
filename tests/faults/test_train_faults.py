"""What goes wrong around a training run: kills, damage, mistakes. Each mistake is one line and exit code
2; each kill loses at most the steps since the last checkpoint.

What needs no process of its own is in tests/unit/train/test_session.py."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from tests.support.corpora import write_text
from tests.support.training import TINY_GPT
from tests.support.warm import finish, llmtrain, on_ranks, start, start_ranks

pytestmark = pytest.mark.slow


def arguments(corpus: Path, run: Path, *overrides: str) -> list[str]:
    settings = [*TINY_GPT, "train.steps=12", "checkpoint.every=3", "evaluation.every=6", "model.dropout=0.1"]
    settings += ["evaluation.max_samples=16"]
    return ["train", *settings, f"data.path={corpus}", f"run.dir={run}", *overrides]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> dict[int, tuple]:
    """Everything that training computes, by step; not what the clock says."""
    return {
        m["step"]: (m["loss"], m["grad_norm"], m["lr"], m["num_targets"]) for m in metrics(run) if "loss" in m
    }


def assert_mistake(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line that holds all `words`, no traceback."""
    assert done.returncode == 2, f"{done.returncode}: {done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in lines[0], lines[0]


def kill_at(step: int, command: list[str], run: Path, sig: int = signal.SIGKILL) -> subprocess.Popen[str]:
    """Start `llmtrain command` and signal it as soon as `step` is in its metrics."""
    process = start(*command)
    wait_for_step(step, run, process)
    process.send_signal(sig)
    process.wait(60)
    return process


def wait_for_step(step: int, run: Path, process: subprocess.Popen) -> None:
    """Until `step` is in the run's metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else "it ended"
        time.sleep(0.002)
    raise AssertionError(f"step {step} did not come")


def wait_until_free(run: Path) -> None:
    """Until no rank of a killed run holds its folder any more."""
    import fcntl

    with open(run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = llmtrain(*arguments(corpus, run))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_kill_and_resume_is_bit_exact(corpus: Path, finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    step = random.SystemRandom().randint(1, 10)
    kill_at(step, arguments(corpus, run), run)
    assert llmtrain(*arguments(corpus, run)).returncode == 0
    assert curve(run) == curve(finished), f"killed at step {step}"
    ours, theirs = (Checkpoint.open(list_steps(path / "checkpoints")[-1]) for path in (run, finished))
    assert ours.step == theirs.step == 12
    for entry, expected in zip(ours.manifest["files"], theirs.manifest["files"], strict=True):
        assert entry == expected  # weights and optimizer state, by checksum


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (3, "fp32")])
def test_kill_of_all_ranks_and_resume_is_bit_exact(corpus: Path, tmp_path: Path, zero: int, precision: str):
    overrides = [f"parallel.zero={zero}", f"precision={precision}", "train.steps=9"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    for done in on_ranks(2, *arguments(corpus, whole, *overrides)):
        assert done.returncode == 0, done.stderr

    command = arguments(corpus, run, *overrides)
    ranks = start_ranks(2, *command)
    wait_for_step(random.SystemRandom().randint(3, 5), run, ranks[0])
    for rank in ranks:
        rank.kill()
    finish(ranks)
    assert max(curve(run)) < 9, "killed too late"
    for done in on_ranks(2, *command):
        assert done.returncode == 0, done.stderr

    assert curve(run) == curve(whole)
    ours, theirs = (Checkpoint.open(list_steps(path / "checkpoints")[-1]) for path in (run, whole))
    assert ours.manifest["files"] == theirs.manifest["files"]  # checksums of weights and optimizer state


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_termination_saves_and_resumes(corpus: Path, finished: Path, tmp_path: Path, number: signal.Signals):
    run = tmp_path / "run"
    command = arguments(corpus, run, "checkpoint.every=null")
    process = kill_at(2, command, run, number)
    assert process.returncode == 75
    assert list_steps(run / "checkpoints"), "no checkpoint on SIGTERM"
    assert llmtrain(*command).returncode == 0
    assert curve(run) == curve(finished)


def test_generate_says_what_it_passes_over(copy: Path):
    newest = list_steps(copy / "checkpoints")[-1]
    (newest / "rank-00000.safetensors").write_bytes(b"cut")
    done = llmtrain("generate", f"checkpoint={copy}", "prompt=the film", "generate.max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    assert f"damaged checkpoint passed over: {newest.name}" in done.stderr


def test_metrics_that_cannot_be_written_end_the_run_on_all_ranks(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    said = "".join(done.stderr for done in on_ranks(2, *arguments(corpus, run)))
    mistakes = [line for line in said.splitlines() if line.startswith("llmtrain: error: ")]
    assert len(mistakes) == 1, said
    assert "metrics.jsonl" in mistakes[0]
    assert "closed by peer" not in said


def test_only_damaged_checkpoints_are_not_evaluated(corpus: Path, copy: Path):
    for path in list_steps(copy / "checkpoints"):
        (path / "rank-00000.safetensors").write_bytes(b"cut")
    assert_mistake(
        llmtrain("evaluate", f"checkpoint={copy}", f"data.path={corpus}"), "rank-00000.safetensors"
    )


def test_loss_that_is_not_finite(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    overrides = ["optimizer=sgd", "optimizer.lr=1e20", "optimizer.max_grad_norm=0", "checkpoint.every=1"]
    done = llmtrain(*arguments(corpus, run, *overrides, "schedule=constant", "schedule.warmup_steps=0"))
    assert_mistake(done, "step ", "samples", "is kept")
    assert list_steps(run / "checkpoints")


def test_run_folder_in_use(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    command = arguments(corpus, run, "train.steps=100000")
    process = start(*command)
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert_mistake(llmtrain(*command), "run.dir", "in use by process")
    finally:
        process.kill()
        process.wait()


def test_other_tokenizer(copy: Path, tmp_path: Path):
    source = write_text(tmp_path / "text.jsonl", 300)
    output = tmp_path / "other"
    prepared = llmtrain(
        "prepare", f"source={source}", f"output={output}", "tokenizer.vocab_size=300", "workers=1"
    )
    assert prepared.returncode == 0, prepared.stderr
    vocabulary = "model.vocab_size=320"
    assert_mistake(llmtrain(*arguments(output, copy, vocabulary)), "another tokenizer", "tokenizer.model=")
    done = llmtrain("evaluate", f"checkpoint={copy}", f"data.path={output}")
    assert_mistake(done, "another tokenizer")


def test_altered_shard(corpus: Path, tmp_path: Path):
    altered = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    (altered / ".verified.json").unlink(missing_ok=True)
    shard = next(iter(sorted((altered / "train").glob("*.tar"))))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert_mistake(llmtrain(*arguments(altered, tmp_path / "run")), shard.name, "altered")
    shard.write_bytes(content[:-512])
    assert_mistake(llmtrain(*arguments(altered, tmp_path / "run")), shard.name)
    assert not (tmp_path / "run").exists()


def test_full_disk(corpus: Path, small_disk: Path):
    """Checkpoints of some 500 kB on 1 MiB: the second does not fit beside the first."""
    run = small_disk / "run"
    done = llmtrain(*arguments(corpus, run))
    assert_mistake(done, "a full disk", "MiB free", "resume")
    kept = list_steps(run / "checkpoints")
    assert [Checkpoint.open(path).damage() for path in kept] == [None] * len(kept)
    assert kept
    assert not list((run / "checkpoints").glob(".*partial"))
