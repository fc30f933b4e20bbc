"""Files that one host serves to another: the right ones, to who knows the secret, whole or not at all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from llmtrain.checkpoint import memory_transfer
from llmtrain.checkpoint.memory_transfer import NotThereError, Server, fetch

NAME = "step-00000010/rank-00001.safetensors"
CONTENT = bytes(range(256)) * 40_000
SECRET = b"s" * 32


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "there/step-00000010").mkdir(parents=True)
    (tmp_path / "there" / NAME).write_bytes(CONTENT)
    (tmp_path / "secret").write_text("of others")
    found = Server("127.0.0.1", SECRET, tmp_path / "there")
    yield found
    found.close()


def test_a_file_arrives_whole(server: Server, tmp_path: Path) -> None:
    checksum = xxhash.xxh3_128_hexdigest(CONTENT)
    fetch(server.address, SECRET, NAME, tmp_path / "here", checksum)
    assert (tmp_path / "here").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("secret", "name", "checksum", "error"),
    [
        (b"x" * 32, NAME, None, ConnectionError),
        (SECRET, NAME, "0" * 32, ValueError),
        (SECRET, "step-00000020/manifest.json", None, NotThereError),
        (SECRET, "../secret", None, ConnectionError),
        (SECRET, "step-00000010/../../secret", None, ConnectionError),
    ],
)
def test_what_is_refused(
    server: Server, tmp_path: Path, secret: bytes, name: str, checksum: str | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        fetch(server.address, secret, name, tmp_path / "here", checksum)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "there"]


def test_a_server_without_the_secret_is_not_believed(server: Server, tmp_path: Path) -> None:
    """One that lets everybody in, as an impostor does."""
    server._secret = b"x" * 32
    seals = memory_transfer.hmac.compare_digest
    answers = iter([True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_transfer.hmac, "compare_digest", lambda *both: next(answers, seals(*both)))
        with pytest.raises(ValueError, match="an answer with a wrong seal"):
            fetch(server.address, SECRET, NAME, tmp_path / "here", None)


def test_clients_that_say_nothing_do_not_keep_others_out(server: Server, tmp_path: Path) -> None:
    impatient = Server("127.0.0.1", SECRET, tmp_path / "there", patience=0.5)
    silent = [socket.create_connection(impatient.address) for _ in range(memory_transfer.MOST_CLIENTS + 2)]
    fetch(impatient.address, SECRET, NAME, tmp_path / "here", None)
    for connection in silent:
        connection.close()
    impatient.close()
