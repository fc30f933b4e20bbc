"""Bytes that come from local files, from S3 and from other stores are those that lie there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.corpus import transport_stores
from llmtrain.corpus.remote_folder import RemoteFolder
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.corpus.transport import Transport
from llmtrain.errors import DataError
from tests.support.remote_files import CONTENT, SIZE
from tests.support.servers import CuttingProxy, s3_client, s3_server

pytestmark = pytest.mark.usefixtures("short_waits")


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


class HttpResponseError(Exception):
    """As azure-core's and gcsfs's: they tell the status in a field."""

    def __init__(self, text: str, **facts: object) -> None:
        super().__init__(text)
        self.__dict__.update(facts)


class ClientAuthenticationError(HttpResponseError):
    pass


def wrapped(cause: Exception) -> Exception:
    """As adlfs raises an error of azure-core while it uploads."""
    error = RuntimeError(f"Failed to upload block: {cause}!")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            wrapped(HttpResponseError("Server failed\nRequestId:1\nContent: <?xml ?>", status_code=403)),
            "access refused (Failed to upload block: Server failed); give credentials",
        ),
        (
            wrapped(ClientAuthenticationError("No token.\nAttempted credentials:\n\tCLI")),
            "access refused (Failed to upload block: No token.)",
        ),
        (ValueError("unable to connect to account for Must provide credentials!!"), "access refused (unable"),
        (OSError("Forbidden: b/bucket/o\nme has no storage.objects.create"), "access refused (Forbidden: b/"),
        (
            HttpResponseError("Invalid Credentials, 401", code=401),
            "access refused (Invalid Credentials, 401)",
        ),
        (
            wrapped(HttpResponseError("No container.\nRequestId:1", error_code="ContainerNotFound")),
            "no such bucket (Failed to upload block: No container.); create it",
        ),
    ],
)
def test_what_other_stores_refuse_is_not_tried_again(error: Exception, told: str):
    """The errors are those that adlfs and gcsfs raised for servers of their protocols."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    attempts: list[str] = []

    class Refusing(MemoryFileSystem):
        protocol = "refusing"
        cachable = False

        def _open(self, path: str, *arguments: object, **named: object) -> None:
            attempts.append(path)
            raise error

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(DataError) as caught:
        RemoteFolder("refusing://bucket/run").probe()
    assert len(attempts) == 1
    line = str(caught.value)
    assert line.startswith("refusing://bucket/run/.probe-")
    assert told in line
    assert "RequestId" not in line


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
