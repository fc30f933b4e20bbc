"""Programs `llmtrain` and, where asked for, `torchrun` and `python` for shell commands, which start warm (see
warm.py).

with warm_program(folder) as path:      # a folder for PATH
    subprocess.run(["bash", "-c", "llmtrain plan …"], env={**os.environ, "PATH": f"{path}:{…}"})
    environment = warm_environment(folder, path)    # for VIRTUAL_ENV

What `python` is asked beside `-m` of llmtrain or of a launcher starts from scratch. The warm process is a
child of the one that made the folder; the program hands on signals, its exit code and its own end.
"""

from __future__ import annotations

import array
import json
import os
import select
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.warm import TORCHRUN, Popen

PROGRAM = """#!{python} -IS
import array, json, os, signal, socket, sys

program, words = {module!r}, sys.argv[1:]
if not program:
    if words[:1] != ["-m"] or words[1] not in {programs}:
        os.execv({python!r}, [{python!r}, *words])
    program, words = words[1], words[2:]
process, early = 0, []

def hand_on(number, frame):
    os.kill(process, number) if process else early.append(number)

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, hand_on)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([program, words, os.getcwd(), dict(os.environ)]).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(8, "little")], streams)
    connection.sendall(request)
    process = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
    for number in early:
        os.kill(process, number)
    sys.exit(connection.recv(1)[0])
"""
MODULES = {"llmtrain": "llmtrain", "torchrun": "torch.distributed.run", "python": ""}
"""Program → the module that it runs; python: the one that its arguments name."""
PROGRAMS = ("llmtrain", TORCHRUN)
"""Modules that `python -m` starts warm."""


@contextmanager
def warm_program(folder: Path, names: Sequence[str] = ("llmtrain",)) -> Iterator[Path]:
    path, address = folder / "bin", folder / "socket"
    path.mkdir()
    for name in names:
        content = PROGRAM.format(
            python=sys.executable, address=str(address), module=MODULES[name], programs=PROGRAMS
        )
        (path / name).write_text(content)
        (path / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        threading.Thread(target=_answer_all, args=(listener,), daemon=True).start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)


def warm_environment(folder: Path, programs: Path) -> Path:
    """Make an environment of Python, set up as this one is, with the programs of `warm_program`."""
    (folder / "bin").mkdir(parents=True)
    for name in ("llmtrain", "python"):
        (folder / "bin" / name).symlink_to(programs / name)
    for stamp in Path(sys.prefix).glob(".llmtrain-*"):
        shutil.copy(stamp, folder)
    return folder


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, suppress(ConnectionError):
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        size = int.from_bytes(head, "little")
        program, words, cwd, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
        stdin, stdout, stderr = streams
        process = Popen(words, program, cwd=cwd, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
        for stream in streams:
            os.close(stream)
        connection.sendall(process.pid.to_bytes(8, "little"))
        while process.poll() is None:
            has_ended, _, _ = select.select([connection], [], [], 0.05)
            if has_ended:  # it never says more
                process.kill()
                process.wait()
        code = process.returncode
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
