"""A program `llmtrain` for shell commands that starts warm (see warm.py).

with warm_program(folder) as path:      # a folder for PATH
    subprocess.run(["bash", "-c", "llmtrain plan …"], env={**os.environ, "PATH": f"{path}:{…}"})
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.warm import Popen

PROGRAM = """#!{python} -IS
import array, json, os, socket, sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(8, "little")], streams)
    connection.sendall(request)
    sys.exit(connection.recv(1)[0])
"""


@contextmanager
def warm_program(folder: Path) -> Iterator[Path]:
    path, address = folder / "bin", folder / "socket"
    path.mkdir()
    program = path / "llmtrain"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        threading.Thread(target=_answer_all, args=(listener,), daemon=True).start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        with connection:
            head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
            streams = array.array("i")
            streams.frombytes(ancillary[0][2])
            size = int.from_bytes(head, "little")
            arguments, cwd, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
            stdin, stdout, stderr = streams
            process = Popen(arguments, cwd=cwd, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
            for stream in streams:
                os.close(stream)
            code = process.wait()
            connection.sendall(bytes([code if code >= 0 else 128 - code]))
