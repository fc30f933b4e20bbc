"""A program `llmtrain` for shell commands that starts warm (see warm.py).

with warm_program(folder) as path:      # a folder for PATH
    subprocess.run(["bash", "-c", "llmtrain plan …"], env={**os.environ, "PATH": f"{path}:{…}"})
    environment = warm_environment(folder, path)    # for VIRTUAL_ENV, of scripts with `python -m llmtrain`

Where the program is killed, so is the process that does its work.
"""

from __future__ import annotations

import array
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
PYTHON = """#!/usr/bin/env bash
if [[ ${{1:-}} == -m && ${{2:-}} == llmtrain ]]; then exec {programs}/llmtrain "${{@:3}}"; fi
exec {python} "$@"
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


def warm_environment(folder: Path, programs: Path) -> Path:
    """Make an environment of Python, set up as this one is, whose `python -m llmtrain` is the warm program
    and whose `python` is the present one for all else."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(PYTHON.format(programs=programs, python=sys.executable))
    python.chmod(0o755)
    (folder / "bin" / "llmtrain").symlink_to(programs / "llmtrain")
    for stamp in Path(sys.prefix).glob(".llmtrain-*"):
        shutil.copy(stamp, folder)
    return folder


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        size = int.from_bytes(head, "little")
        arguments, cwd, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
        stdin, stdout, stderr = streams
        process = Popen(arguments, cwd=cwd, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
        for stream in streams:
            os.close(stream)
        threading.Thread(target=_wait_for, args=(process, connection), daemon=True).start()


def _wait_for(process: Popen, connection: socket.socket) -> None:
    with connection:
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(0.05)
                break
            if select.select([connection], [], [], 0)[0]:  # the program ended before its work
                process.kill()
        with suppress(BrokenPipeError):
            connection.sendall(bytes([code if code >= 0 else 128 - code]))
