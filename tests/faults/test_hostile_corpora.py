"""A corpus that somebody else made, or serves: whatever it says is checked before it costs anything."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from llmtrain.corpus import transport
from llmtrain.corpus.cache import Cache, CacheConfig
from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.errors import DataError
from tests.support.corpora import random_documents, write_corpus, write_manifest
from tests.support.servers import FileServer, RawServer

Split = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    documents = random_documents(40)
    return write_corpus(tmp_path / "corpus", {"train": documents, "validation": documents[:5]})


def read_all(path: Path | str, cache: Cache | None = None, rows: Path | None = None) -> None:
    """As training does: each token of each split, and rows of whole documents."""
    corpus = Corpus.open(path, cache=cache)
    for name in corpus.manifest.splits:
        split = corpus.split(name)
        split.read(0, split.num_tokens)
        TokenSequences(split, 16, packing="best_fit", cache=rows)


def refusal(path: Path | str, cache: Cache | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_all(path, cache)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, which then vouches for itself."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    write_manifest(path, manifest)


def replace_file(path: Path, split: str, name: str, content: bytes) -> None:
    """Other bytes in index.npy, lengths.npy or the first shard, for which the manifest vouches."""
    file = path / split / name
    file.write_bytes(content)
    checksum = xxhash.xxh3_128_hexdigest(content)

    def vouch(manifest: dict[str, Any]) -> None:
        entry = manifest["splits"][split]
        if name.endswith(".npy"):
            entry[f"{name.removesuffix('.npy')}_xxh3_128"] = checksum
        else:
            entry["shards"][0] |= {"xxh3_128": checksum, "bytes": len(content)}

    rewrite(path, vouch)


def test_every_single_digit_of_a_manifest_is_vouched_for(path: Path):
    read_all(path)
    content = (path / "manifest.json").read_bytes()
    digits = [i for i, byte in enumerate(content) if byte in b"0123456789"]
    assert len(digits) > 100
    for i in digits:
        changed = bytearray(content)
        changed[i] = ord("0") + (changed[i] - ord("0") + 1) % 10
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(DataError, match=r"manifest\.json"):
            Corpus.open(path)


def test_a_corpus_with_the_fingerprint_of_another_is_refused(path: Path, tmp_path: Path):
    other = write_corpus(tmp_path / "other", {"train": random_documents(40, seed=1)})
    theirs = json.loads((path / "manifest.json").read_text())["fingerprint"]
    rewrite(other, lambda manifest: manifest.update(fingerprint=theirs))
    assert "of another corpus; allowed: that of its tar files and its tokenizer" in refusal(other)


def test_a_forged_corpus_does_not_spoil_the_rows_of_an_honest_one(path: Path, tmp_path: Path):
    """Its shards, and so its fingerprint, may be the same, and its lengths others."""
    rows = tmp_path / "rows"
    forged = write_corpus(tmp_path / "forged", {"train": random_documents(40)})
    lengths = np.load(forged / "train" / "lengths.npy")
    lengths[0], lengths[1] = lengths[:2].sum() - 1, 1
    np.save(tmp_path / "lengths.npy", lengths)
    replace_file(forged, "train", "lengths.npy", (tmp_path / "lengths.npy").read_bytes())
    for corpus in (forged, path):
        rewrite(corpus, lambda manifest: manifest.update(fingerprint="0" * 64, version=2))
    honest = TokenSequences(Corpus.open(path).split("train"), 16, packing="best_fit")
    TokenSequences(Corpus.open(forged).split("train"), 16, packing="best_fit", cache=rows)
    after = TokenSequences(Corpus.open(path).split("train"), 16, packing="best_fit", cache=rows)
    assert after.tar_sizes.tolist() == honest.tar_sizes.tolist()
    assert len(list((rows / "rows").glob("*.counts"))) == 2


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.model", "train/index.npy", "train/lengths.npy"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_in_place_of_a_file(path: Path, name: str, kind: str):
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to("/dev/zero")
    message = refusal(path)
    assert name in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("verify", ["size", "checksum"])
def test_a_pipe_in_place_of_a_shard(path: Path, verify: Any):
    shard = path / "train" / "train-000000.tar"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DataError, match=r"train-000000\.tar: got no file"):
        Corpus.open(path, verify)
    corpus = Corpus.open(path, verify, on_bad_tar="skip")
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        corpus.split("train").read(0, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_offset", 2**63),
        ("tokens_offset", 0),
        ("tokens_offset", 10**6),
        ("ends_offset", 2**64 - 1),
        ("num_tokens", 2**62),
        ("num_documents", 2**32 - 1),
        ("shard", 7),
        ("shard", 2**32 - 1),
    ],
)
def test_an_index_that_leads_out_of_its_shards(path: Path, tmp_path: Path, field: str, value: int):
    index = np.load(path / "train" / "index.npy")
    index[field][1] = value
    np.save(tmp_path / "index.npy", index)
    replace_file(path, "train", "index.npy", (tmp_path / "index.npy").read_bytes())
    message = refusal(path)
    assert "index.npy: got a sample" in message


@pytest.mark.parametrize(
    "ends", [lambda e: e * 0 + 2**31, lambda e: e[::-1].copy(), lambda e: np.maximum(e, e[1])]
)
def test_ends_of_documents_that_are_none(path: Path, ends: Callable[[np.ndarray], np.ndarray]):
    shard = path / "train" / "train-000000.tar"
    index, content = np.load(path / "train" / "index.npy"), bytearray(shard.read_bytes())
    offset, count = int(index["ends_offset"][0]), int(index["num_documents"][0])
    there = np.frombuffer(content, "<u4", count, offset)
    content[offset : offset + 4 * count] = ends(there).astype("<u4").tobytes()
    replace_file(path, "train", shard.name, bytes(content))
    rewrite(path, lambda manifest: manifest.update(version=2))
    assert "train-000000.tar: got documents that do not end one after the other" in refusal(path)


def test_lengths_of_documents_that_are_none(path: Path, tmp_path: Path):
    lengths = np.load(path / "train" / "lengths.npy")
    lengths[0], lengths[1] = lengths[:2].sum(), 0
    np.save(tmp_path / "lengths.npy", lengths)
    replace_file(path, "train", "lengths.npy", (tmp_path / "lengths.npy").read_bytes())
    assert "lengths.npy: got documents of train/train-000000.tar" in refusal(path)


def npy_header(dtype: str, length: int) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


@pytest.mark.parametrize("name", ["index.npy", "lengths.npy"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        npy_header("<u4", 1 << 60),
        npy_header("|O", 8),
        b"\x80\x04cos\nsystem\n",
    ],
)
def test_what_is_no_array(path: Path, name: str, content: bytes):
    replace_file(path, "train", name, content)
    message = refusal(path)
    assert f"{name}: got " in message
    assert len(message.splitlines()) == 1


def test_an_index_beyond_memory_is_refused_before_it_is_read(path: Path):
    def claim(manifest: dict[str, Any]) -> None:
        split = manifest["splits"]["train"]
        split["num_samples"] += 10**12
        split["shards"][0]["num_samples"] += 10**12

    rewrite(path, claim)
    message = refusal(path)
    assert "index.npy: got 32,000,000,000,256 bytes; allowed: " in message
    assert message.endswith(", the memory that is free")


def test_a_manifest_beyond_all_bounds_is_refused_before_it_is_read(path: Path):
    with open(path / "manifest.json", "ab") as file:
        file.truncate(8 << 30)
    assert "manifest.json: got a file of 8,589,934,592 bytes, more than 67,108,864" in refusal(path)


# Servers.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Cache]:
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)
    cache = Cache(CacheConfig(dir=tmp_path / "cache", retries=1, timeout=1.0))
    yield cache
    cache.close()


def endless() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\n\r\n"
    while True:
        yield b" " * (1 << 20)


def long() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 8589934592\r\n\r\n"
    while True:
        yield b" " * (1 << 20)


def dripping() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    while True:
        yield b" "
        time.sleep(0.2)


def dripping_header() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nX-Patience: "
    while True:
        yield b"1"
        time.sleep(0.2)


def dripping_chunk() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;"
    while True:
        yield b"x"
        time.sleep(0.2)


def redirecting() -> Iterable[bytes]:
    yield b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n"
    while True:
        yield b"x" * (1 << 20)


def going_on() -> Iterable[bytes]:
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n" * 1000


def trailing() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    while True:
        yield b"A: b\r\n" * 1000


def by_the_byte() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"1\r\n{\r\n" * 1000


def redirected(location: bytes) -> Callable[[], Iterable[bytes]]:
    return lambda: [b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (redirecting, "got too many redirects; allowed: 5"),
        (going_on, "a header without end"),
        (trailing, "a header without end"),
        (by_the_byte, "pieces of 1 bytes; allowed: larger pieces"),
        (redirected(b"http://["), "got a redirect to 'http://['; allowed: a web address"),
        (redirected(b"http://[::1"), "got a redirect to"),
        (redirected(b"http://\x1b[31m/"), "got a redirect to"),
        (redirected(b"http://h:x/"), "got a redirect to"),
        (redirected(b"ftp://h/"), "got a redirect to"),
        (endless, "got a file of 67,"),
        (long, "got a file of 8,589,934,592 bytes or more; allowed: 67,108,864 bytes at most"),
        (dripping, "got no answer that can be used in 2 attempts (almost no bytes for 1 s)"),
        (dripping_header, "got no answer that can be used in 2 attempts (almost no bytes for 1 s)"),
        (dripping_chunk, "got no answer that can be used in 2 attempts (almost no bytes for 1 s)"),
        (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"], "invalid JSON"),
        (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n"], "invalid JSON"),
        (lambda: [b"HTTP/1.1 503 No\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n"], "HTTP 503"),
        (redirected(b"file:///etc/passwd"), "got a redirect to 'file:///etc/passwd'"),
        (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}\x1b"], "invalid JSON"),
        (lambda: [b"\x1b]0;title\x07"], "manifest.json"),
    ],
)
def test_a_server_that_means_no_good(cache: Cache, answer: Callable[[], Iterable[bytes]], said: str):
    server = RawServer(answer)
    began = time.monotonic()
    try:
        message = refusal(server.url, cache)
    finally:
        server.close()
    assert said in message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert time.monotonic() - began < 30


def test_credentials_do_not_follow_a_redirect_to_another_host(path: Path, cache: Cache):
    with FileServer(path) as server, FileServer(path) as other:
        server.faults.password = "user:s3cret"
        server.faults.redirects["tokenizer.model"] = f"{other.url}/tokenizer.model"
        server.faults.redirects["train/index.npy"] = "/validation/../train/index.npy"
        server.faults.redirects["validation/../train/index.npy"] = "/train/lengths.npy"
        read = Corpus.open(server.url.replace("//", "//user:s3cret@"), cache=cache)
        assert [request.authorization for request in other.log] == [None]
        assert {request.authorization for request in server.log} != {None}
        with pytest.raises(DataError, match=r"index\.npy"):
            read.split("train")


@pytest.mark.parametrize("url", ["https://u:S3CRET@[::1/x", "http://h:S3CRET/x", "https://u:S3CRET@[zz]/x"])
def test_what_is_no_url_is_told_without_its_password(cache: Cache, url: str):
    message = refusal(url, cache)
    assert "got no URL" in message
    assert "S3CRET" not in message.replace("h:S3CRET", "")


def test_a_long_wait_that_a_server_asks_for_is_told(
    path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with FileServer(path) as server:
        server.faults.unavailable, server.faults.retry_after = 1, "300"
        monkeypatch.setattr(cache._transport._closed, "wait", lambda seconds: None)
        read_all(server.url, cache)
    assert [record.getMessage() for record in caplog.records] == [
        f"{server.url}/manifest.json: HTTP 503: trying again in 300 s, 1 times at most"
    ]


def test_a_corpus_is_read_within_its_own_path(path: Path, cache: Cache, tmp_path: Path):
    """Not beside it, whatever its manifest and the server's folders are."""
    (tmp_path / "secret").write_bytes(b"not a real model")
    with FileServer(tmp_path) as server:
        for name in ("../secret", "%2e%2e/secret", "/secret", "http://127.0.0.1/secret", "a/../../secret"):
            rewrite(path, lambda manifest, name=name: manifest["tokenizer"].update(file=name))  # type: ignore[misc]
            assert "manifest.json: tokenizer.file: got" in refusal(f"{server.url}/corpus", cache)
        assert {request.path for request in server.log} == {"corpus/manifest.json"}
