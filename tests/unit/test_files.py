"""Why a place refuses to be written, and locks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain import files


def read_only(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda folder: (folder / "no" / "file").write_text("x"),
            ["No such file", "create its folder first"],
        ),
        (lambda folder: folder.write_text("x"), ["Is a directory", "name a file"]),
        (lambda folder: (folder / "file" / "x").write_text("x"), ["Not a directory", "choose another"]),
        (read_only, ["Read-only", "choose another"]),
    ],
)
def test_a_refusal_is_one_line_with_its_remedy(
    tmp_path: Path, write: Callable[[Path], object], words: list[str]
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Errno") as caught:
        write(tmp_path)
    line = str(files.disk_problem(caught.value, tmp_path, key="output"))
    assert line.startswith(f"output={tmp_path}: got a location that is not writable (")
    for word in words:
        assert word in line
    assert "full" not in line


def test_a_full_disk_is_told_with_what_is_left_of_it(tmp_path: Path):
    with pytest.raises(OSError, match="No space") as caught:
        Path("/dev/full").write_text("x")
    line = str(files.disk_problem(caught.value, tmp_path / "not" / "yet", if_full="make room, then resume"))
    assert "got a full disk (No space left on device, " in line
    assert " MiB free)" in line
    assert line.endswith("make room, then resume")


def test_a_library_s_own_error_of_a_full_disk(tmp_path: Path):
    error = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "got a full disk" in str(files.disk_problem(error, tmp_path))


def test_a_lock_keeps_another_process_out_until_it_is_closed(tmp_path: Path):
    path = tmp_path / "lock"
    code = f"import llmtrain.files as f, pathlib; f.lock(open({str(path)!r}, 'a'), pathlib.Path())"
    with path.open("a") as file:
        files.lock(file, path)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), (tmp_path / "lock").open("a") as file:
        files.lock(file, tmp_path)
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert os.strerror(number) in record.getMessage()


def test_names_that_are_not_utf8_stay_what_they_are_in_json(tmp_path: Path):
    name = os.fsdecode(b"t\xe9.model")
    files.write_json_atomically(tmp_path / "x.json", {"path": name, "text": "é"})
    content = (tmp_path / "x.json").read_text()
    assert "é" in content
    assert json.loads(content) == {"path": name, "text": "é"}


def test_nothing_is_written_through_a_link_that_waits_at_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "foreseen")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.foreseen.tmp").symlink_to("precious")
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_at_the_name_itself_is_replaced(tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a").symlink_to("precious")
    files.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()
