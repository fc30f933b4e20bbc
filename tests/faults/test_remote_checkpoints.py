"""Copies of checkpoints elsewhere: a run whose folder is lost goes on from there, and no kill leaves one that
looks whole but is not."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.errors import UserError
from llmtrain.track.jsonl import read_metrics
from llmtrain.train.resolve import resolve
from tests.support.servers import s3_client, s3_server
from tests.support.training import TINY_GPT, compose
from tests.support.warm import finish, llmtrain, on_ranks, start

pytestmark = pytest.mark.slow


def arguments(corpus: Path, run: Path, remote: str, *overrides: str) -> list[str]:
    return [
        *("train", *TINY_GPT, "train.steps=12", "checkpoint.every=2", "evaluation.every=6"),
        "evaluation.max_samples=16",
        *(f"checkpoint.remote={remote}", f"data.path={corpus}", f"run.dir={run}", *overrides),
    ]


def curve(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl")), default=0)


def files_of(checkpoints: Path) -> list[Any]:
    files = Checkpoint.open(list_steps(checkpoints)[-1]).manifest["files"]
    assert isinstance(files, list)
    return files


def assert_whole(remote: Path) -> list[int]:
    """That each checkpoint that counts is whole; → their steps."""
    found = [Checkpoint.open(path) for path in list_steps(remote / "checkpoints")]
    for checkpoint in found:
        assert checkpoint.damage() is None
    return [checkpoint.step for checkpoint in found]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that nothing disturbed, and its copy."""
    root = tmp_path_factory.mktemp("whole")
    done = llmtrain(*arguments(corpus, root / "run", f"file://{root}/remote"))
    assert done.returncode == 0, done.stderr
    return root / "run", root / "remote"


def test_the_copy_has_what_the_run_keeps(whole: tuple[Path, Path]):
    run, remote = whole
    kept = [path.name for path in list_steps(run / "checkpoints")]
    assert kept == [path.name for path in list_steps(remote / "checkpoints")]
    assert_whole(remote)
    assert curve(remote) == curve(run)
    assert not [path for path in remote.rglob("*") if path.name.startswith(".")]


def test_killed_runs_leave_whole_copies_and_a_new_machine_goes_on(
    corpus: Path, tmp_path: Path, whole: tuple[Path, Path]
):
    """Every start but the last is killed at a random moment after a step, and every other folder is lost."""
    remote, draw = tmp_path / "remote", random.Random()
    steps: list[int] = []
    for number in range(8):
        run = tmp_path / f"run-{number // 2}"
        before = max(steps, default=0)
        reached = max(before, last_step(run))
        process = start(*arguments(corpus, run, f"file://{remote}"))
        while process.poll() is None and last_step(run) <= reached + 2:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        finish([process])
        steps = assert_whole(remote)
        assert max(steps, default=0) >= before
        if max(steps, default=0) >= 6:
            break
    run = tmp_path / "last"
    done = llmtrain(*arguments(corpus, run, f"file://{remote}"))
    assert done.returncode == 0, done.stderr
    assert f"fetching step-{max(steps):08d} from file://" in done.stderr
    assert curve(run) == curve(whole[0])
    assert files_of(run / "checkpoints") == files_of(whole[0] / "checkpoints")
    assert assert_whole(remote)[-1] == 12


def test_ranks_share_what_is_fetched(corpus: Path, tmp_path: Path, whole: tuple[Path, Path]):
    remote = Path(shutil.copytree(whole[1], tmp_path / "remote"))
    command = arguments(corpus, tmp_path / "run", f"file://{remote}", "train.steps=14", "parallel.zero=1")
    for done in on_ranks(2, *command):
        assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run")[:12] == curve(whole[0])
    assert assert_whole(remote)[-1] == 14


def test_a_damaged_copy_is_passed_over(corpus: Path, tmp_path: Path, whole: tuple[Path, Path]):
    remote = Path(shutil.copytree(whole[1], tmp_path / "remote"))
    newest = list_steps(remote / "checkpoints")[-1]
    file = newest / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = llmtrain(*arguments(corpus, tmp_path / "run", f"file://{remote}"))
    assert done.returncode == 0, done.stderr
    assert f"damaged remote checkpoint passed over: {newest.name}: rank-00000.safetensors" in done.stderr
    assert curve(tmp_path / "run") == curve(whole[0])
    assert assert_whole(remote)[-1] == 12  # replaced by the good one


def test_a_run_that_is_sent_back_takes_its_copy_with_it(
    corpus: Path, tmp_path: Path, whole: tuple[Path, Path]
):
    run, remote = tmp_path / "run", f"file://{tmp_path}/remote"
    assert (
        llmtrain(*arguments(corpus, run, remote, "train.steps=6", "checkpoint.keep_last=9")).returncode == 0
    )
    again = ("train.steps=5", f"checkpoint.resume={run}/checkpoints/step-00000004", "checkpoint.keep_last=9")
    assert llmtrain(*arguments(corpus, run, remote, *again)).returncode == 0
    assert assert_whole(tmp_path / "remote") == [2, 4, 5]


@pytest.mark.parametrize(
    ("remote", "words"),
    [
        ("nowhere://bucket/run", ("an unknown scheme",)),
        ("file:///proc/run", ("checkpoint.remote: file:///proc/run",)),
    ],
)
def test_refusals_of_stores_before_training(
    corpus: Path, tmp_path: Path, remote: str, words: tuple[str, ...]
):
    done = llmtrain(*arguments(corpus, tmp_path / "run", remote))
    [line] = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert done.returncode == 2
    assert not list_steps(tmp_path / "run" / "checkpoints")
    for word in words:
        assert word in line


@pytest.mark.parametrize("remote", ["http://127.0.0.1:9/run", "runs/copy"])
def test_refusals_before_ranks_start(corpus: Path, remote: str):
    with pytest.raises(UserError) as caught:
        resolve(compose(arguments(corpus, Path("run"), remote)[1:]))
    said = f"checkpoint.remote: got '{remote}'; allowed: a URL such as s3://bucket/run"
    assert str(caught.value).startswith(said)


def test_the_copy_of_another_run_is_left_alone(corpus: Path, tmp_path: Path, whole: tuple[Path, Path]):
    other = tmp_path / "other"
    plain = [word for word in arguments(corpus, other, "") if not word.startswith("checkpoint.remote")]
    assert llmtrain(*plain, "train.steps=2").returncode == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in whole[1].rglob("*") if path.is_file())
    done = llmtrain(*arguments(corpus, other, f"file://{whole[1]}"))
    assert done.returncode == 2
    assert f"got the copy of another run than {other}" in done.stderr
    assert before == sorted((path, path.stat().st_mtime_ns) for path in whole[1].rglob("*") if path.is_file())


def test_never_refuses_a_copy(corpus: Path, tmp_path: Path, whole: tuple[Path, Path]):
    done = llmtrain(*arguments(corpus, tmp_path / "run", f"file://{whole[1]}", "checkpoint.resume=never"))
    assert done.returncode == 2
    assert "got a folder that holds step-00000012; allowed: no run" in done.stderr


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        s3_client(environment).create_bucket(Bucket="runs")
        yield environment


def test_s3(corpus: Path, tmp_path: Path, bucket: dict[str, str]):
    url = "s3://runs/some/run"
    first = llmtrain(*arguments(corpus, tmp_path / "a", url, "train.steps=6"), **bucket)
    assert first.returncode == 0, first.stderr
    done = llmtrain(*arguments(corpus, tmp_path / "b", url), **bucket)
    assert done.returncode == 0, done.stderr
    assert "fetching step-00000006 from s3://runs/some/run" in done.stderr
    assert [step for step, *_ in curve(tmp_path / "b")] == list(range(1, 13))
    assert curve(tmp_path / "b")[:6] == curve(tmp_path / "a")
    client = s3_client(bucket)
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="runs", Prefix="some/run/")["Contents"]}
    kept = {path.name for path in list_steps(tmp_path / "b" / "checkpoints")}
    assert {key.split("/")[3] for key in keys if key.endswith("/manifest.json")} == kept


def test_a_bucket_that_is_not_there(corpus: Path, tmp_path: Path, bucket: dict[str, str]):
    done = llmtrain(*arguments(corpus, tmp_path / "run", "s3://other/run"), **bucket)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert done.returncode == 2
    assert "checkpoint.remote: s3://other/run" in line
