"""What sources name: files of folders, links, globs and packages; what is left out or refused, in words."""

import os
import socket
from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.prepare.remote import local_copy
from llmtrain.prepare.sources import contents_fingerprint, find_files, plan_units
from tests.unit.prepare.test_sources import COMPRESS, WRITERS, read, write_jsonl


def test_files_of_folders_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b/two.txt", "a.txt", "b/one.jsonl.gz", "b/notes.md", "b/.hidden.txt", "corpus/out.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def names(*given: str) -> list[str]:
        return [file.name for file in find_files(given, exclude=Path("corpus"))[0]]

    assert names(".") == ["a.txt", "b/one.jsonl.gz", "b/two.txt"]
    assert find_files(["."], exclude=Path("corpus"))[1].other == ["b/notes.md"]
    assert names("b/t*.txt", ".") == ["b/two.txt", "a.txt", "b/one.jsonl.gz"]
    assert names("**/*.txt") == ["a.txt", "b/two.txt"]
    assert names("*") == names(".")
    (tmp_path / "[odd].txt").touch()
    assert names("[odd].txt") == ["[odd].txt"]


def test_json_lines_by_another_name(tmp_path: Path):
    for name in ("c4.json.gz", "dolma.json.zst", "plain.json", "config.json"):
        data = b'{"text": "%s"}\n' % name.encode()
        (tmp_path / name).write_bytes(COMPRESS.get(name[-2:], COMPRESS.get(name[-3:], bytes))(data))
    files, skipped = find_files([str(tmp_path)])
    assert [file.path.name for file in files] == ["c4.json.gz", "dolma.json.zst"]
    assert skipped.notes() == ["2 files of other extensions left out: .json"]
    assert read(tmp_path / "c4.json.gz") == ["c4.json.gz"]
    assert read(tmp_path / "dolma.json.zst") == ["dolma.json.zst"]
    for source in ("plain.json", "pl*.json", "**/plain.json"):
        assert read(tmp_path / source) == ["plain.json"]


def test_linked_folders_are_entered_once_and_cycles_told(tmp_path: Path):
    for name in ("top/a/one.txt", "top/b/two.txt", "beside/three.txt", "top/name.jsonl/four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for link, target in (("a/link", "../../beside"), ("b/again", "../a"), ("b/up", "../.."), ("b/self", ".")):
        (tmp_path / "top" / link).symlink_to(target)
    for source in ("top", "top/**", "top/**/*.txt", "top/*"):
        files, skipped = find_files([str(tmp_path / source)])
        assert sorted(file.path.name for file in files) == ["four.txt", "one.txt", "three.txt", "two.txt"]
        if source != "top/*":
            assert {Path(name).name for name in skipped.cycles} == {"up", "self"}


def test_what_cannot_be_read_in_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("fine/a.txt", "shut/b.txt", "fine/.hidden/c.txt", "fine/lost+found/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    scandir = os.scandir

    def refuse(folder: Path):
        if Path(folder).name in ("shut", "lost+found"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    # Root may read everything.
    monkeypatch.setattr(os, "scandir", refuse)
    for source in ("", "*", "**", "**/*.txt", "*/*.txt"):
        with pytest.raises(
            DataError, match=r"shut: got Permission denied; allowed: a readable file or folder"
        ):
            find_files([str(tmp_path / source)])
    _, skipped = find_files([str(tmp_path / "fine")])
    assert [note.partition(":")[0] for note in skipped.notes()] == ["2 hidden files and folders left out"]


def test_links_that_lead_nowhere_are_told(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone").symlink_to("no/such/folder")
    for source in ("self.txt", "gone", "", "*"):
        with pytest.raises(DataError, match=r"(self\.txt|gone): got a broken link") as caught:
            find_files([str(tmp_path / source)])
        assert len(caught.value.problems) == (1 if source in ("self.txt", "gone") else 2)
        assert all("broken link" in problem.got for problem in caught.value.problems)


def test_what_is_no_file_is_left_out_or_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "fifo.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
        files, skipped = find_files([str(tmp_path)])
    assert [file.path.name for file in files] == ["a.txt"]
    assert [Path(name).name for name in skipped.special] == ["fifo.txt", "socket.jsonl"]
    with pytest.raises(DataError, match=r"fifo\.txt: got a FIFO, socket or device"):
        find_files([str(tmp_path / "fifo.txt")])


def test_names_that_are_no_utf_8(tmp_path: Path):
    folder = os.fsencode(tmp_path)
    for kind in ("jsonl", "parquet", "csv"):
        WRITERS[kind](tmp_path / "plain", ["text"])
        os.rename(tmp_path / "plain", os.path.join(folder, b"caf\xe9." + kind.encode()))
    files, _ = find_files([str(tmp_path)])
    assert [Path(file.name).name for file in files] == [
        f"caf\\xe9.{kind}" for kind in ("csv", "jsonl", "parquet")
    ]
    assert len(contents_fingerprint(files)) == 32
    assert all(read(file.path) == ["text"] for file in files)


def test_any_edit_changes_the_fingerprint(tmp_path: Path):
    path = tmp_path / "a.txt"
    data = bytearray(b"x" * (5 << 20))
    path.write_bytes(data)
    (file,), _ = find_files([str(path)])
    before = contents_fingerprint([file])
    data[1_000_003] = ord("y")
    path.write_bytes(data)
    os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
    (again,), _ = find_files([str(path)])
    assert again == file
    assert contents_fingerprint([again]) != before


def test_a_file_that_changes_while_it_is_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ["one", "two"])
    ((part,),) = plan_units(find_files([str(path)])[0], "auto")
    grown = pytest.raises(DataError, match=r"a\.jsonl: got another state .* \(51 bytes, and 50 then\)")
    with grown, local_copy(part, tmp_path), open(path, "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="another state"), local_copy(part, tmp_path):
        pass
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: got No such file or directory; allowed: a readable file"):
        contents_fingerprint([part.file])


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "package_with_data"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.txt").write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    for source in ("package:package_with_data/data/a.txt", "package:package_with_data/data"):
        (file,) = find_files([source])[0]
        assert file.name == "package:package_with_data/data/a.txt"
    with pytest.raises(DataError, match=r"package:package_with_data/data/b\.txt: got no such file"):
        find_files(["package:package_with_data/data/b.txt"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"missing\.txt: got no such file or folder"),
        ("*.jsonl", r"\*\.jsonl: got a pattern that matches no file"),
        ("a.doc", r"a\.doc: got the extension \.doc; allowed: \.txt"),
        ("empty_folder", "empty_folder: got no readable file"),
        ("package:no_such_package/a.txt", "pip install no-such-package"),
        ("package:", "incomplete name"),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str):
    (tmp_path / "a.doc").touch()
    (tmp_path / "empty_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        find_files([source])


def test_all_problems_are_told_at_once(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert len(caught.value.problems) == 2
