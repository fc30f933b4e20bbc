"""The copy of checkpoints elsewhere, file by file."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from llmtrain.checkpoint.remote import RemoteRun
from llmtrain.checkpoint.retention import Rules
from llmtrain.checkpoint.store import amend
from llmtrain.checkpoint.uploader import Uploader
from llmtrain.corpus.remote_folder import RemoteFolder
from llmtrain.errors import CheckpointError, DataError, Problem
from tests.support.owners import MATRIX, Owner, save

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/remote"
        return
    yield "memory://remote"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint of two files, of step 5."""
    save(tmp_path / "run" / "checkpoints", [Owner(MATRIX, []), Owner(MATRIX)], 5)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    return tmp_path / "run"


class Counting(RemoteFolder):
    """A folder that notes what is put there, and whose machine dies after so many files."""

    def __init__(self, url: str, dies_after: int = 99) -> None:
        super().__init__(url)
        self.put_there: list[str] = []
        self._left = dies_after
        self._counts = threading.Lock()

    def put(self, name: str, source: Path) -> None:
        if not source.exists():
            raise FileNotFoundError(source)
        with self._counts:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            self.put_there.append(name.rpartition("/")[2])
        super().put(name, source)

    def write(self, name: str, content: bytes) -> None:
        self.put_there.append(name.rpartition("/")[2])
        super().write(name, content)


def counting(run: Path, url: str, dies_after: int = 99) -> tuple[RemoteRun, Counting]:
    remote, folder = RemoteRun(url, run), Counting(url, dies_after)
    remote.folder = folder
    return remote, folder


def step(run: Path, number: int = 5) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def test_there_and_back(run: Path, url: str, tmp_path: Path):
    remote = RemoteRun(url, run)
    assert remote.refresh() == []
    assert remote.upload(step(run))
    assert not remote.upload(step(run))
    other = tmp_path / "other"
    fetching = RemoteRun(url, other)
    assert fetching.refresh() == [step(run).name]
    partial = other / "partial"
    partial.mkdir()
    for entry in fetching.listed(step(run).name):
        assert fetching.fetch_file(step(run).name, entry, partial) is None
    fetched = fetching.settle(step(run).name, partial)
    fetching.fetch_record()
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {
        p.name: p.read_bytes() for p in step(run).iterdir()
    }
    assert (other / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_an_upload_that_was_cut_goes_on(run: Path, url: str):
    remote, folder = counting(run, url, dies_after=1)
    with pytest.raises(KeyboardInterrupt):
        remote.upload(step(run))
    assert RemoteRun(url, run).refresh() == []
    first = folder.put_there
    remote, folder = counting(run, url)
    remote.upload(step(run))
    assert len(first) == 1
    assert sorted([*first, *folder.put_there]) == [
        "manifest.json",
        "metrics.jsonl",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert folder.put_there[-1] == "manifest.json"


def test_a_changed_manifest_is_all_that_is_copied(run: Path, url: str):
    RemoteRun(url, run).upload(step(run))
    amend(step(run), {"note": "evaluated"})
    remote, folder = counting(run, url)
    assert remote.upload(step(run))
    assert folder.put_there == ["metrics.jsonl", "manifest.json"]
    assert b"evaluated" in folder.read(f"checkpoints/{step(run).name}/manifest.json", 1 << 20)


def test_another_checkpoint_of_a_step_is_not_whole_until_its_manifest_is_there(run: Path, url: str):
    RemoteRun(url, run).upload(step(run))
    shutil.rmtree(step(run))
    save(run / "checkpoints", [Owner({name: 2 * values for name, values in MATRIX.items()})], 5)
    remote, _ = counting(run, url, dies_after=0)
    with pytest.raises(KeyboardInterrupt):
        remote.upload(step(run))
    assert RemoteRun(url, run).refresh() == []
    assert RemoteRun(url, run).upload(step(run))
    assert RemoteRun(url, run).refresh() == [step(run).name]


def test_what_comes_to_harm_on_its_way_does_not_count(run: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    remote = RemoteRun(url, run)
    monkeypatch.setattr(RemoteFolder, "checksum", lambda self, name: "0" * 32)
    with pytest.raises(DataError, match="other bytes than those of"):
        remote.upload(step(run))
    assert remote.refresh() == []
    assert not [name for name in remote.folder.sizes() if name.endswith(".safetensors")]


def test_retention_and_the_uploader(run: Path, url: str):
    """The newest goes first, and what retention deletes of the run folder meanwhile is passed over."""
    for number in (6, 7, 8):
        save(run / "checkpoints", [Owner(MATRIX)], number)
    remote, uploaded = RemoteRun(url, run), []
    for number in (5, 6):
        remote.upload(step(run, number))
    uploader = Uploader(remote, lambda: Rules(keep_last=2), uploaded.append)
    uploader.submit(step(run, 9))
    uploader.submit(step(run, 8))
    assert uploader.wait(20)
    assert uploader.failure is None
    uploader.close()
    assert uploaded == [step(run, 8)]
    assert RemoteRun(url, run).refresh() == [step(run, number).name for number in (6, 8)]
    remote = RemoteRun(url, run)
    remote.delete_after(6)
    assert remote.refresh() == [step(run, 6).name]


def test_a_failing_store_is_said_and_tried_again(run: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    def fails(self: RemoteFolder, name: str, source: Path) -> None:
        raise DataError([])

    uploader = Uploader(RemoteRun(url, run), Rules, lambda path: None)
    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "put", fails)
        uploader.submit(step(run))
        assert uploader.wait(20)
    assert uploader.failure is not None
    assert uploader.notes() == [f"warning: {step(run).name} was not uploaded: {uploader.failure}"]
    uploader.submit(step(run))
    assert uploader.wait(20)
    assert uploader.failure is None
    uploader.close()


def test_whatever_fails_the_thread_that_uploads_lives(run: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    """A full disk, a damaged checkpoint, a mistake; but a checkpoint that is gone is nothing to report."""
    remote = RemoteRun(url, run)
    uploader = Uploader(remote, Rules, lambda path: None)
    damage = CheckpointError(Problem("manifest.json", "another checksum"))
    for error in (OSError(errno.ENOSPC, "No space left on device"), damage, ZeroDivisionError("a mistake")):

        def fails(path: Path, error: Exception = error) -> bool:
            raise error

        monkeypatch.setattr(remote, "upload", fails)
        uploader.submit(step(run))
        assert uploader.wait(20)
        assert str(getattr(error, "strerror", error)) in str(uploader.failure)
        uploader.submit(step(run, 9))
        assert uploader.wait(20)
        assert uploader.failure is None
    uploader.close()


def test_a_store_that_fails_says_nothing_of_a_checkpoint(
    run: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    remote = RemoteRun(url, run)
    remote.upload(step(run))
    entry, _ = remote.listed(step(run).name)

    def fails(self: RemoteFolder, name: str, target: Path) -> str:
        raise DataError(Problem(name, "no success in 9 attempts"))

    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "get", fails)
        with pytest.raises(DataError, match="no success"):
            remote.fetch_file(step(run).name, entry, tmp_path)
    remote.folder.delete([f"checkpoints/{step(run).name}/{entry['file']}"])
    assert remote.fetch_file(step(run).name, entry, tmp_path) == f"{entry['file']}: nothing there"


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("a file is in place of the folder")
    with pytest.raises(DataError, match=r"file/run"):
        RemoteFolder(f"file://{tmp_path}/file/run", retries=1).probe()
    with pytest.raises(DataError, match="a web server, which takes no files"):
        RemoteFolder("https://user:secret@host/run")


def test_a_probe_leaves_nothing(url: str):
    folder = RemoteFolder(url)
    folder.probe()
    assert folder.sizes() == {}
