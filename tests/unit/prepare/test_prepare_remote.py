"""Sources elsewhere make the corpus that the same files make here; what cannot be had is named."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.config import decode
from llmtrain.corpus import transport
from llmtrain.errors import DataError
from llmtrain.prepare import source_file
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.folder_scan import SkippedFiles
from llmtrain.prepare.job import prepare
from llmtrain.prepare.sources import find_files
from tests.support.corpora import WORDS
from tests.support.servers import Faults, FileServer, s3_server, upload

NAMES = ["a.jsonl", "b.txt", "c.parquet", "d.csv", "e.tar", "f.jsonl.gz"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    source = random.Random(0)
    text = lambda name, i: f"{name} {i} " + " ".join(source.choices(WORDS, k=20))  # noqa: E731
    texts = {name: [text(name, i) for i in range(60)] for name in NAMES}
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts["a.jsonl"])
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.txt").write_text("\n\n".join(texts["b.txt"]))
    table = pyarrow.table({"text": texts["c.parquet"]})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=10)
    (folder / "d.csv").write_text("text\n" + "\n".join(texts["d.csv"]))
    with tarfile.open(folder / "e.tar", "w") as tar:
        for i, text in enumerate(texts["e.tar"]):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(rows.replace("the", "another").encode(), mtime=0))
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)
    with FileServer(folder, Faults()) as server:
        yield server


def make(sources: list[str], output: Path, **changes: object) -> None:
    mapping = {
        "source": sources,
        "output": str(output),
        "tokenizer": {"vocab_size": 310},
        "tar_bytes": 5000,
        "sample_tokens": 300,
        "workers": 1,
        **changes,
    }
    prepare(decode(PrepareConfig, mapping))


def tree(folder: Path) -> dict[str, bytes]:
    """All but the manifest, which names the sources."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }


@pytest.mark.parametrize("unit_bytes", [1000, 1 << 24])
def test_a_server_gives_the_corpus_of_the_files(
    tmp_path: Path, folder: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
):
    monkeypatch.setattr(source_file, "UNIT_BYTES", unit_bytes)
    local, remote = [str(folder / name) for name in NAMES], [f"{server.url}/{name}" for name in NAMES]
    if unit_bytes == 1000:
        # A .txt is cut where a part ends, and a file elsewhere is one part.
        del local[1], remote[1]
    make(local, tmp_path / "local")
    server.faults.cut_every = 3
    make(remote, tmp_path / "remote")
    assert tree(tmp_path / "remote") == tree(tmp_path / "local")
    before = server.answers
    make(remote, tmp_path / "remote")
    # A finished corpus is left as it is for the price of a look at each file.
    assert server.answers - before == len(remote)


@pytest.mark.slow
def test_a_bucket_gives_the_corpus_of_the_files(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    make([str(folder / name) for name in NAMES], tmp_path / "local")
    with s3_server() as environment:
        upload(folder, environment, "bucket", "raw")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        make([f"s3://bucket/raw/{name}" for name in NAMES], tmp_path / "remote")
        assert tree(tmp_path / "remote") == tree(tmp_path / "local")
        with pytest.raises(DataError, match=r"s3://bucket/raw/none\.txt: got no such file"):
            find_files(["s3://bucket/raw/none.txt"])


def test_what_cannot_be_had_is_named_without_its_secrets(tmp_path: Path, server: FileServer):
    server.faults.password = "user:s3cret"
    with pytest.raises(DataError, match=r"127.*/a\.jsonl: got access refused \(HTTP 401\)"):
        find_files([f"{server.url}/a.jsonl?signature=s3cret"])
    url = server.url.replace("://", "://user:s3cret@")
    with pytest.raises(DataError) as caught:
        find_files([f"{url}/none.jsonl", f"{url}/a.png", f"{url}/"])
    missing, kind, folder = map(str, caught.value.problems)
    assert missing.endswith("/none.jsonl: got no such file (HTTP 404); check the URL")
    assert "a.png: got another extension; allowed: .txt .jsonl" in kind
    assert "got another extension" in folder
    assert "s3cret" not in str(caught.value)
    server.faults.length = False
    with pytest.raises(DataError, match="got a file of unknown size"):
        find_files([f"{url}/a.jsonl"])
    server.faults.length = True
    make([f"{url}/a.jsonl"], tmp_path / "corpus")
    assert b"s3cret" not in (tmp_path / "corpus" / "manifest.json").read_bytes()


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path, folder: Path, server: FileServer):
    source = [f"{server.url}/a.jsonl"]
    (found,), _ = find_files(source)
    server.faults.replaced["a.jsonl"] = (folder / "a.jsonl").read_bytes().replace(b"the", b"The")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtrain.prepare.job.find_files", lambda *_, **__: ([found], SkippedFiles()))
        with pytest.raises(DataError, match=r"a\.jsonl: got another state of the file than"):
            make(source, tmp_path / "corpus")
    make(source, tmp_path / "corpus")
    server.faults.replaced.clear()
    with pytest.raises(DataError, match=r"sources\.hash is .* there and .* here"):
        make(source, tmp_path / "corpus")
