"""Servers on this machine: a web server whose faults a test turns on, and one of the S3 protocol."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple


class Request(NamedTuple):
    path: str
    """Without the leading slash."""
    range: str | None
    if_range: str | None
    authorization: str | None
    status: int
    """What was answered."""


@dataclass
class Faults:
    """What goes wrong; a path is that of a file below the server's folder."""

    cut_every: int = 0
    """The connection breaks in the middle of the body of every n-th answer."""
    cuts: list[int] = field(default_factory=list)
    """Bytes of the body after which the next answers break, one each."""
    unavailable: int = 0
    """So many of the next answers are `status`."""
    status: int = 503
    retry_after: str | None = None
    stall: float = 0.0
    """Seconds of silence in the middle of the body of the next `stalls` answers."""
    stalls: int = 0
    slow: float = 0.0
    """Seconds before each 64 KiB of a body."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Path → bytes that the file has."""
    flipped: dict[str, int] = field(default_factory=dict)
    """Path → byte that is wrong."""
    replaced: dict[str, bytes] = field(default_factory=dict)
    """Path → another content."""
    missing: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    """Paths that are always answered with `status`."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Path → where it is said to be."""
    ignore_range: bool = False
    etag: bool = True
    length: bool = True
    """Whether an answer says how long it is; without, it ends with the connection."""
    password: str | None = None
    """`user:password` that each request must show."""


class FileServer:
    """Serves the files of a folder over HTTP with ranges. `log` holds every request with its answer."""

    def __init__(
        self,
        folder: Path,
        faults: Faults | None = None,
        certificate: Path | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        """certificate: a PEM file with certificate and key, for https."""
        self.folder = folder
        self.faults = faults or Faults()
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.answers = 0
        self._server = _Server((address, 0), _handler(self))
        self._scheme = "http"
        if certificate is not None:
            self._scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        address, port = self._server.server_address[:2]
        return f"{self._scheme}://{address}:{port}"

    def content(self, path: str) -> bytes | None:
        faults = self.faults
        if path in faults.missing:
            return None
        if path in faults.replaced:
            return faults.replaced[path]
        file = self.folder / path
        if not file.is_file():
            return None
        content = bytearray(file.read_bytes())
        if path in faults.flipped:
            content[faults.flipped[path]] ^= 1
        return bytes(content[: faults.truncated.get(path)])

    def ranges(self, path: str) -> list[str | None]:
        return [request.range for request in self.log if request.path == path]

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = re.sub(r"^(http://[^/]*)?/", "", self.path).partition("?")[0]
            faults = server.faults
            with server.lock:
                busy = faults.unavailable > 0
                faults.unavailable -= busy
            if busy or path in faults.broken:
                headers = {"Retry-After": faults.retry_after} if faults.retry_after else {}
                return self.answer(path, faults.status, b"busy", headers)
            if faults.password is not None and self.authorization() != faults.password:
                return self.answer(path, 401, b"who are you", {})
            if path in faults.redirects:
                return self.answer(path, 302, b"", {"Location": faults.redirects[path]})
            content = server.content(path)
            if content is None:
                return self.answer(path, 404, b"not here", {})
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            headers = {"ETag": etag} if faults.etag else {}
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            if wanted and not faults.ignore_range and condition in (None, etag):
                start = int(wanted[1])
                if start >= len(content):
                    headers["Content-Range"] = f"bytes */{len(content)}"
                    return self.answer(path, 416, b"", headers)
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return self.answer(path, 206, content[start:], headers)
            return self.answer(path, 200, content, headers)

        def authorization(self) -> str | None:
            given = self.headers.get("Authorization", "")
            return base64.b64decode(given[6:]).decode() if given.startswith("Basic ") else None

        def answer(self, path: str, status: int, body: bytes, headers: dict[str, str]) -> None:
            faults = server.faults
            cut, stall = None, False
            with server.lock:
                server.log.append(
                    Request(
                        path,
                        self.headers.get("Range"),
                        self.headers.get("If-Range"),
                        self.headers.get("Authorization"),
                        status,
                    )
                )
                if status in (200, 206):
                    server.answers += 1
                    if faults.cuts:
                        cut = min(faults.cuts.pop(0), len(body))
                    elif faults.cut_every and server.answers % faults.cut_every == 0:
                        cut = len(body) // 2
                    stall = faults.stalls > 0
                    faults.stalls -= stall
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if faults.length or status >= 400:
                self.send_header("Content-Length", str(len(body)))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            try:
                self.send_body(body if cut is None else body[:cut], stall)
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.close_connection = True

        def send_body(self, body: bytes, stall: bool) -> None:
            for start in range(0, len(body), 1 << 16):
                if server.faults.slow:
                    time.sleep(server.faults.slow)
                piece = body[start : start + (1 << 16)]
                if stall and start + len(piece) >= len(body) / 2:
                    stall = False
                    half = len(piece) // 2
                    self.wfile.write(piece[:half])
                    self.wfile.flush()
                    time.sleep(server.faults.stall)
                    piece = piece[half:]
                self.wfile.write(piece)

    return Handler


def write_certificate(path: Path) -> Path:
    """A PEM file with a key and a certificate for 127.0.0.1, signed by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return path


class CuttingProxy:
    """Passes TCP on to a port of this machine and breaks every `cut_every`-th connection after `cut_after`
    bytes of answers; the first too."""

    def __init__(self, port: int, cut_every: int, cut_after: int) -> None:
        self._target = port
        self._cut_every, self._cut_after = cut_every, cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        self.cuts = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            limit = self._cut_after if self.connections % self._cut_every == 0 else None
            self.connections += 1
            threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, limit), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 14):
                if limit is not None and passed + len(data) > limit:
                    target.sendall(data[: limit - passed])
                    self.cuts += 1
                    break
                target.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


S3_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of the S3 protocol in a process of its own; yields the environment that leads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **S3_CREDENTIALS}
    finally:
        process.kill()
        process.wait()


def upload(folder: Path, environment: dict[str, str], bucket: str, prefix: str) -> None:
    """Put the files of `folder` into a bucket, which is made if need be."""
    client = s3_client(environment)
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(
                Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes()
            )


def s3_client(environment: dict[str, str]):  # type: ignore[no-untyped-def]
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


class RawServer:
    """A web server of a few lines: `answer` gives the pieces, header first, that are sent to whoever asks,
    until they end or the asker leaves."""

    def __init__(self, answer: Callable[[], Iterable[bytes]]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._speak, args=(connection,), daemon=True).start()

    def _speak(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            for piece in self._answer():
                connection.sendall(piece)
