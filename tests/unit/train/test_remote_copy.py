"""A run and its copy elsewhere when starts, stores and uploads fail: no good checkpoint there is lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llmtrain.checkpoint import retention
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.remote import RemoteRun
from llmtrain.corpus.remote_folder import RemoteFolder
from llmtrain.errors import CheckpointError, DataError, Problem, TrainingError
from llmtrain.train import remote as remote_module
from llmtrain.train import time_limit
from tests.support.fake_engine import FakeRun, stop_at

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(corpus, tmp_path / "run", monkeypatch)


@pytest.fixture
def other(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(corpus, tmp_path / "other", monkeypatch)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"checkpoint.remote=file://{tmp_path}/copy"


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints at `root`, all of them whole."""
    found = [Checkpoint.open(path) for path in retention.list_steps(root / "checkpoints")]
    assert all(checkpoint.damage() is None for checkpoint in found)
    return [checkpoint.step for checkpoint in found]


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "failure",
    [DataError(Problem("copy", "no success in 9 attempts")), OSError(errno.ENOSPC, "No space left")],
)
def test_a_download_that_fails_for_a_moment_costs_no_checkpoint(
    run: FakeRun,
    other: FakeRun,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(remote_module, "WAIT_SECONDS", 0.001)  # many rounds
    assert run.start(url)

    def fails(self: RemoteFolder, name: str, target: Path) -> str:
        raise failure

    before = content(tmp_path / "copy")
    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "get", fails)
        with pytest.raises(CheckpointError, match=r"no success|No space left"):
            other.start(url)
    assert content(tmp_path / "copy") == before
    assert not other.calls
    assert other.start(url)
    assert "already at step 6" in capsys.readouterr().err
    assert steps(other.folder) == [6]


def test_what_a_run_went_back_behind_is_not_fetched_again(run: FakeRun, url: str, tmp_path: Path):
    assert run.start(url)
    # As a run that is killed in the moment in which it goes back.
    retention.set_aside_after(run.folder / "checkpoints", 2, print)
    run.calls.clear()
    assert run.start(url)
    assert run.calls[0] == "train 16:24"
    assert steps(tmp_path / "copy") == [2, 4, 6]
    # The new ones are the run's own.
    retention.set_aside_after(run.folder / "checkpoints", 9, print)
    run.calls.clear()
    assert run.start(url)
    assert not run.calls


def test_a_fork_leaves_the_copy_of_another_run_alone(run: FakeRun, other: FakeRun, url: str, tmp_path: Path):
    assert run.start(url)
    before = content(tmp_path / "copy")
    fork = f"checkpoint.resume={run.folder}/checkpoints/step-00000002"
    with pytest.raises(CheckpointError, match="a folder that holds step-00000006; allowed: no run"):
        other.start(url, fork)
    assert content(tmp_path / "copy") == before
    own = f"checkpoint.remote=file://{tmp_path}/own"
    assert not other.start(own, fork, on_call=stop_at("train 24:32"))
    assert other.start(own, fork)
    assert steps(tmp_path / "own") == [3, 4, 6]


def test_a_stopped_run_does_not_wait_for_a_slow_upload(
    run: FakeRun,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(time_limit, "UPLOAD_SECONDS", 0.1)

    def hangs(self: RemoteRun, path: Path) -> bool:
        self.folder._stopped.wait()
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(RemoteRun, "upload", hangs)
        assert not run.start(url, on_call=stop_at("train 16:24"))
    said = capsys.readouterr().err
    assert "is not complete yet; the next start uploads the rest" in said
    assert "stopped at step 2" in said
    assert not steps(tmp_path / "copy")
    assert run.start(url)
    assert steps(tmp_path / "copy")[-1] == 6


def test_an_upload_that_fails_is_an_error_only_at_the_end_of_training(
    run: FakeRun,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fails(self: RemoteRun, path: Path) -> bool:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(RemoteRun, "upload", fails)
        assert not run.start(url, on_call=stop_at("train 16:24"))
        said = capsys.readouterr().err
        assert "was not uploaded" in said
        assert "the next start uploads the rest" in said
        with pytest.raises(TrainingError, match="Permission denied"):
            run.start(url)
    assert run.start(url)
    assert steps(tmp_path / "copy")[-1] == 6
