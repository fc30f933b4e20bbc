"""`python -m llmtrain …` started warm: forked from a process that has imported everything already.

    done = llmtrain("plan", "model=gpt_tiny")      # as subprocess.run, both streams captured
    process = Popen(["train", …], cwd=…, env=…)    # as subprocess.Popen
    done = on_ranks(4, "train", …)                 # on four ranks, without a launcher

Imports are most of what a tiny run costs. The process is a child of the one that asks for it, so that its
pid, signals, pipes and exit code are those of any other. Three things differ from a cold start: modules are
loaded before the environment is known, /proc shows the first process' command and environment, and resource
limits are that process' own. Tests of start-up, launchers and other environments of Python start cold.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support.ranks import free_port
from tests.support.training import REPOSITORY

_PR_SET_CHILD_SUBREAPER = 36
_SERVER: _Server | None = None


def llmtrain(
    *arguments: str, cwd: Path = REPOSITORY, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`llmtrain ARGUMENTS` to its end, from the repository's folder, on one thread."""
    [done] = finish([start(*arguments, cwd=cwd, **environment)], timeout)
    return done


def on_ranks(
    size: int, *arguments: str, timeout: float = 300, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """`llmtrain ARGUMENTS` on each of `size` ranks that no launcher started; → how each ended."""
    return finish(start_ranks(size, *arguments, **environment), timeout)


def start_ranks(size: int, *arguments: str, **environment: str) -> list[Popen]:
    shared = {**environment, **rank_environment(size)}
    return [start(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]


def rank_environment(size: int) -> dict[str, str]:
    """What a launcher tells `size` ranks alike, with a port that is free."""
    return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def start(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> Popen:
    """`llmtrain ARGUMENTS`, with pipes for both streams."""
    return Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(processes: Sequence[Popen], timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


class Popen(subprocess.Popen):
    """A subprocess.Popen of `python -m llmtrain ARGUMENTS`; takes cwd, env and the streams.

    It starts cold where the environment has what an interpreter and its libraries read at their start.
    """

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        super().__init__([sys.executable, "-m", "llmtrain", *arguments], **options)

    def _execute_child(self, *settings: Any) -> None:  # type: ignore[override]
        args, _, _, _, _, cwd, env, _, _, _, *pipes_and_rest = settings
        pipes = pipes_and_rest[:6]
        environment = dict(os.environ if env is None else env)
        if _read_at_start(environment) != _read_at_start(_server_environment()):
            super()._execute_child(*settings)
            return
        streams = [own if own != -1 else usual for usual, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = _server().start(args[3:], cwd or os.getcwd(), environment, streams)
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    prefixes = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "MKL_", "MALLOC_")
    return {name: value for name, value in environment.items() if name.startswith(prefixes)}


def _server_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class _Server:
    """The process that has imported everything."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=REPOSITORY,
                env=_server_environment(),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def start(self, arguments: list[str], cwd: Any, environment: dict[str, str], streams: list[int]) -> int:
        """→ the new process' pid."""
        request = json.dumps([arguments, os.fspath(cwd), environment]).encode()
        # Only while its parent ends is the new process ours by this; other orphans go to init, as they do.
        _adopt_orphans(True)
        try:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
            self._socket.sendmsg([len(request).to_bytes(8, "little")], ancillary)
            self._socket.sendall(request)
            answer = self._socket.recv(8, socket.MSG_WAITALL)
        finally:
            _adopt_orphans(False)
        assert len(answer) == 8, "the warm process ended"
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def _server() -> _Server:
    global _SERVER
    if _SERVER is None:
        _SERVER = _Server()
        atexit.register(_SERVER.close)
    return _SERVER


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _serve(connection: socket.socket) -> list[str]:
    """Answer each request with the pid of a new process, until the other end is closed; → the arguments, in
    the new process."""
    while True:
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
        if not head:
            os._exit(0)
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        request = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(write, child.to_bytes(8, "little"))
                os._exit(0)
            arguments, folder, environment = json.loads(request)
            _become(folder, environment, list(streams))
            return arguments
        pid = os.read(read, 8)
        os.waitpid(between, 0)
        for descriptor in (read, write, *streams):
            os.close(descriptor)
        connection.sendall(pid)


def _become(folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Take up streams, folder and environment, as a new interpreter would."""
    for usual, given in enumerate(streams):
        os.dup2(given, usual)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), line_buffering=os.isatty(1)
    )
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), errors="backslashreplace", line_buffering=True
    )


def _end(code: object) -> NoReturn:
    """As the interpreter ends for sys.exit(code), without a second spent to take its modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    importlib.import_module("tests.support.everything")
    sys.argv = ["llmtrain", *_serve(socket.socket(fileno=int(sys.argv[1])))]
    try:
        runpy.run_module("llmtrain", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        _end(ended.code)
    except Exception:
        traceback.print_exc()
        _end(1)
    _end(0)
