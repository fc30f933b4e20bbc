"""The run folder's hold and its record of the working folder's git checkout."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from llmtrain import git
from llmtrain.errors import CheckpointError, TrainingError
from llmtrain.train import folder_lock
from llmtrain.train.run_folder import RunFolder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one committed file, as the working folder."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "code.py").write_text("old\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    return folder


def describe(run: Path) -> dict:
    folder = RunFolder(run)
    folder.describe({"seed": 0}, {}, {})
    folder.close()
    return json.loads((run / "git.json").read_text())


def test_the_diff_is_that_of_the_latest_start(checkout: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert describe(run)["clean"] is True
    assert not (run / "git.diff").exists()
    (checkout / "code.py").write_bytes(b"caf\xe9\n")  # no UTF-8
    assert describe(run)["clean"] is False
    assert b"+caf\xe9\n" in (run / "git.diff").read_bytes()
    (checkout / "code.py").write_text("old\n")
    assert describe(run)["clean"] is True
    assert not (run / "git.diff").exists()


def test_a_cut_diff_says_so(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (checkout / "code.py").write_text("new\n" * 100)
    whole = subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=True).stdout
    describe(tmp_path / "run")
    assert (tmp_path / "run" / "git.diff").read_bytes() == whole
    monkeypatch.setattr(git, "MAX_DIFF_BYTES", 100)
    describe(tmp_path / "run")
    note, _, rest = (tmp_path / "run" / "git.diff").read_bytes().partition(b"\n")
    assert note.decode() == f"# cut: the first 100 of {len(whole)} bytes"
    assert rest == whole[:100]


def test_one_process_holds_it(tmp_path: Path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "):
        RunFolder(tmp_path / "run")
    first.close()
    RunFolder(tmp_path / "run").close()


def test_a_file_system_without_locks_is_taken_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 0.0)
    RunFolder(tmp_path / "run").close()
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"run\.dir=.*got a location that is not writable") as caught:
        RunFolder(tmp_path / "file" / "run")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["checkpoints", ".lock", "metrics.jsonl", "checkpoints/step-00000001"])
@pytest.mark.parametrize("target", ["outside", "/dev/full", "../outside"])
def test_parts_that_lead_out_of_a_folder_are_refused(tmp_path: Path, part: str, target: str):
    run = tmp_path / "run"
    (run / part).parent.mkdir(parents=True)
    (tmp_path / "outside").write_text("precious")
    (run / part).symlink_to(tmp_path / target if target == "outside" else target)
    with pytest.raises(CheckpointError, match=rf"a link that leads out of it: {part} → .*; remove the link"):
        RunFolder(run)
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (run / ".lock").exists() or part == ".lock"


def test_links_that_lead_to_each_other_are_refused(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="a link that leads out of it: loop → loop"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("kind", ["hard link", "pipe"])
def test_a_lock_that_is_another_s_file_is_not_written(tmp_path: Path, kind: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    if kind == "pipe":
        os.mkfifo(tmp_path / "run/.lock")
    else:
        (tmp_path / "run/.lock").hardlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match=r"got a (file with another|location that is not)"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_a_held_lock_says_is_shown_in_part(tmp_path: Path):
    lock = tmp_path / ".lock"
    lock.write_bytes(b"\xff\x1b[2J" + b"x" * 100_000)
    with open(lock, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"in use by .\\x1b\[2Jxxx") as caught:
            RunFolder(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "data.json", "git.json"])
def test_a_folder_in_place_of_a_file_is_told(checkout: Path, tmp_path: Path, name: str):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"got a location that is not writable \(Is a directory\)"):
        describe(tmp_path / "run")


def test_links_inside_a_folder_and_to_it_are_taken(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest").symlink_to("checkpoints")
    (tmp_path / "other name").symlink_to("run")
    RunFolder(tmp_path / "other name").close()


def test_a_folder_that_another_host_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where locks end at the host, the note tells: it is renewed, or its process has ended."""
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "RENEW_SECONDS", 0.2)
    elsewhere = RunFolder(tmp_path)
    lock = tmp_path / ".lock"
    lock.write_text("process 7 on elsewhere")
    monkeypatch.setattr("llmtrain.files.fcntl.flock", lambda *_: None)
    with pytest.raises(CheckpointError, match="in use by process 7 on elsewhere; allowed"):
        RunFolder(tmp_path)
    elsewhere._lock._is_over.set()  # as if that process had been killed
    lock.write_text("process 7 on elsewhere")
    RunFolder(tmp_path).close()
    lock.write_text("process 7 on elsewhere")
    os.utime(lock, (0, 0))
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 1e6)  # an old note is not watched
    RunFolder(tmp_path).close()
    assert lock.read_text() == "", "a folder that was left in order has no holder"
    with pytest.MonkeyPatch.context() as other_clock:
        lock.write_text("process 7 on elsewhere")
        other_clock.setattr(folder_lock.time, "time", lambda: 1e12)  # that of this host tells nothing
        other_clock.setattr(folder_lock, "WATCH_SECONDS", 1.0)
        other_clock.setattr(folder_lock.time, "sleep", lambda _: os.utime(lock))
        with pytest.raises(CheckpointError, match="in use by process 7 on elsewhere"):
            RunFolder(tmp_path)


def test_two_hosts_that_start_at_once_where_locks_end_at_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock = tmp_path / ".lock"
    monkeypatch.setattr("llmtrain.train.folder_lock._file_system", lambda _: "nfs4")
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: lock.write_text("process 7 on elsewhere"))
    with pytest.raises(CheckpointError, match="in use by process 7 on elsewhere; allowed"):
        RunFolder(tmp_path)
    lock.write_text("")
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: None)
    RunFolder(tmp_path).close()
