"""Send files of the copies in memory from host to host, over TCP.

    server → client   a nonce of 16 bytes
    client → server   the length of the name (2 bytes), the name, and a seal of both
    server → client   the size (8 bytes), and a seal of nonce, name and size; then the bytes

A seal is an HMAC-SHA256 under a secret that the ranks of a job agree on at each start. Names are those of the
files of copies alone. What arrives is compared with the checksum that its manifest has.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

import xxhash

from llmtrain import files
from llmtrain.checkpoint.manifest import MANIFEST

NONCE_BYTES = 16
SEAL_BYTES = 32
CHUNK_BYTES = 2**22
TIMEOUT_SECONDS = 30.0
"""How long the other side may be silent."""
MOST_CLIENTS = 16
NOT_THERE = 2**64 - 1
"""The size of a file that is not there (yet)."""
_NAME = re.compile(rf"step-[0-9]{{8,18}}/(rank-[0-9]{{5,9}}\.safetensors|{re.escape(MANIFEST)})", re.ASCII)


class NotThereError(Exception):
    """The other host does not hold the file."""


class Server:
    """Serves the files of the copies in `folder` from threads."""

    def __init__(self, address: str, secret: bytes, folder: Path, patience: float = TIMEOUT_SECONDS) -> None:
        """Listen at `address` on a free port. Raise OSError if that is impossible.

        patience: seconds that a client may be silent."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        self._secret, self._folder, self._patience = secret, folder, patience
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        self.address: tuple[str, int] = (address, self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="copies", daemon=True).start()

    def close(self) -> None:
        """Accept no more clients."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), name="copy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            # A client that does not follow the protocol, or is gone, gets no answer.
            with client, suppress(OSError, ValueError):
                client.settimeout(self._patience)
                self._answer(client)
        finally:
            self._places.release()

    def _answer(self, client: socket.socket) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        client.sendall(nonce)
        name = _receive(client, int.from_bytes(_receive(client, 2), "big"))
        seal = _receive(client, SEAL_BYTES)
        if not hmac.compare_digest(seal, _seal(self._secret, nonce, name)):
            return
        text = name.decode()
        if not _NAME.fullmatch(text):
            return
        path = self._folder / text
        if not path.is_file():
            size = NOT_THERE.to_bytes(8, "big")
            client.sendall(size + _seal(self._secret, nonce, name, size))
            return
        with open(path, "rb", opener=files.open_regular) as file:
            size = os.fstat(file.fileno()).st_size.to_bytes(8, "big")
            client.sendall(size + _seal(self._secret, nonce, name, size))
            client.sendfile(file)


def fetch(where: tuple[str, int], secret: bytes, name: str, path: Path, checksum: str | None) -> None:
    """Copy the file `name` of the host whose server is at `where` to `path`, which appears whole or not at
    all.

    checksum: xxh3-128 of its content, in hex; None: the caller checks it.
    Raise NotThereError if the host lacks it; ValueError for a wrong seal or checksum; OSError if the host
    does not answer, or `path` cannot be written.
    """
    with socket.create_connection(where, TIMEOUT_SECONDS) as connection:
        nonce, asked = _receive(connection, NONCE_BYTES), name.encode()
        connection.sendall(len(asked).to_bytes(2, "big") + asked + _seal(secret, nonce, asked))
        size = _receive(connection, 8)
        if not hmac.compare_digest(_receive(connection, SEAL_BYTES), _seal(secret, nonce, asked, size)):
            raise ValueError("an answer with a wrong seal")
        left = int.from_bytes(size, "big")
        if left == NOT_THERE:
            raise NotThereError(name)
        digest = xxhash.xxh3_128()
        with files.atomic_writer(path) as file:
            while left:
                chunk = connection.recv(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ConnectionError(f"{left:,} bytes of {name} are missing")
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
            if checksum is not None and digest.hexdigest() != checksum:
                raise ValueError("another checksum than when it was written")


def _receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes. Raise ConnectionError if the other side has closed before."""
    found = bytearray()
    while len(found) < count:
        chunk = connection.recv(count - len(found))
        if not chunk:
            raise ConnectionError("the other side has closed the connection")
        found += chunk
    return bytes(found)


def _seal(secret: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, b"\0".join(part.hex().encode() for part in parts), hashlib.sha256).digest()
