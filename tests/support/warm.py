"""`python -m llmtrain …` started warm: forked from a process that has imported everything already.

    done = llmtrain("plan", "model=gpt_tiny")      # as subprocess.run, both streams captured
    process = Popen(["train", …], cwd=…, env=…)    # as subprocess.Popen
    done = on_ranks(4, "train", …)                 # on four ranks, without a launcher
    process = Popen(["…"], LAUNCHERS[0])           # as `python -m` of a launcher, whose ranks are warm too

Imports are most of what a tiny run costs. The process is a child of the one that asks for it, so that its
pid, signals, pipes and exit code are those of any other. Three things differ from a cold start: modules are
loaded before the environment is known, /proc shows the first process' command and environment (its name is
"rank R" where it has a RANK, and "launcher" where it starts others), and resource limits are that process'
own. Tests of start-up, of launchers themselves and of other environments of Python start cold.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support.ports import free_port
from tests.support.training import REPOSITORY

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NAME = 15
PRELUDE = "LLMTRAIN_TEST_PRELUDE"
"""Variable with the path of a program that a warm process runs before all else, as sitecustomize."""
_SERVER: _Server | None = None
_SERVER_LOCK = threading.Lock()
_COLD = subprocess.Popen
TORCHRUN = "llmtrain.distributed.torchrun"
LAUNCHERS = (TORCHRUN, "torch.distributed.run", "tests.gpu")
"""Programs that start others, which are warm too."""
PART_WITH_RUNS = "tests.gpu.resume:check"
"""An argument of a program that does so."""


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


def start(*arguments: str, cwd: Path = REPOSITORY, program: str = "llmtrain", **environment: str) -> Popen:
    """`python -m PROGRAM ARGUMENTS`, with pipes for both streams."""
    return Popen(
        arguments,
        program,
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
    """A subprocess.Popen of `python -m PROGRAM ARGUMENTS`; takes cwd, env, the streams and start_new_session.

    It starts cold where the environment has what an interpreter and its libraries read at their start.
    """

    def __init__(
        self, arguments: Sequence[str], program: str = "llmtrain", *, unbuffered: bool = False, **options: Any
    ) -> None:
        flags = ["-u"] if unbuffered else []
        self._request = {
            "program": program,
            "arguments": list(arguments),
            "ignores_hangup": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
            "unbuffered": unbuffered,
        }
        super().__init__([sys.executable, *flags, "-m", program, *arguments], **options)

    def _execute_child(self, *settings: Any) -> None:  # type: ignore[override]
        _, _, _, _, _, cwd, env, _, _, _, *pipes_and_rest = settings
        pipes, start_new_session = pipes_and_rest[:6], pipes_and_rest[11]
        environment = dict(os.environ if env is None else env)
        if _read_at_start(environment) != _read_at_start(_server_environment()):
            super()._execute_child(*settings)
            return
        request = {
            **self._request,
            "folder": os.fspath(cwd or os.getcwd()),
            "environment": environment,
            "start_new_session": bool(start_new_session),
        }
        streams = [own if own != -1 else usual for usual, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = _server().start(request, streams)
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    prefixes = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "MKL_", "MALLOC_")
    return {name: value for name, value in environment.items() if name.startswith(prefixes)}


def _server_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class _Server:
    """The other end of a process that has imported everything."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        """→ the new process' pid."""
        content = json.dumps(request).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        with self._lock:
            # Only while its parent ends: other orphans go to init, as they do.
            _adopt_orphans(True)
            try:
                self._socket.sendmsg([len(content).to_bytes(8, "little")], ancillary)
                self._socket.sendall(content)
                answer = self._socket.recv(8, socket.MSG_WAITALL)
            finally:
                _adopt_orphans(False)
        assert len(answer) == 8, "the warm process ended"
        return int.from_bytes(answer, "little")


def _server() -> _Server:
    global _SERVER
    with _SERVER_LOCK:
        if _SERVER is None:
            _SERVER = _start_server()
        return _SERVER


def _start_server() -> _Server:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=REPOSITORY,
            env=_server_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    atexit.register(lambda: (ours.close(), process.wait(10)))
    return _Server(ours)


def name_this_process(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Answer each request with the pid of a new process, until the other end is closed; → the request, in the
    new process."""
    while True:
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4), socket.MSG_WAITALL)
        if not head:
            os._exit(0)
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        request = json.loads(connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            if os.fork():
                os._exit(0)
            if request["start_new_session"]:
                os.setsid()  # before it is known: who asks may signal the group
            os.write(write, os.getpid().to_bytes(8, "little"))
            while os.getppid() == parent:  # soon it is who asked: ranks look for their launcher
                time.sleep(0.001)
            _become(request, list(streams))
            return request
        pid = os.read(read, 8)
        os.waitpid(between, 0)
        for descriptor in (read, write, *streams):
            os.close(descriptor)
        connection.sendall(pid)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take up streams, folder and environment, as a new interpreter would."""
    for usual, given in enumerate(streams):
        os.dup2(given, usual)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # Whether it is ignored is what the asking process says now, not what it said when this one began.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if request["ignores_hangup"] else signal.SIG_DFL)
    if "RANK" in os.environ:
        name_this_process(f"rank {os.environ['RANK']}")
    unbuffered = request["unbuffered"]
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.__stdout__ = _stream(1, "strict", unbuffered, line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = _stream(2, "backslashreplace", unbuffered, line_buffering=True)


def _stream(descriptor: int, errors: str, unbuffered: bool, line_buffering: bool) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    if unbuffered:
        return io.TextIOWrapper(raw, errors=errors, write_through=True)  # type: ignore[type-var]
    return io.TextIOWrapper(io.BufferedWriter(raw), errors=errors, line_buffering=line_buffering)


def _serve_ranks() -> dict[str, Any]:
    """Let the processes that a launcher starts in this process be warm; → what to run, in each of them."""
    global _SERVER
    ours, theirs = socket.socketpair()
    own = os.fork()
    if own == 0:
        ours.close()
        name_this_process("warm")
        # The launcher's output ends with the launcher.
        with open(os.devnull, "r+b", buffering=0) as nowhere:
            for usual in range(3):
                os.dup2(nowhere.fileno(), usual)
        return _serve(theirs)
    theirs.close()
    _SERVER = _Server(ours)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from llmtrain.distributed import forwarding

    for module in (subprocess, subprocess_handler):
        module.Popen = _start  # type: ignore[attr-defined,misc,assignment]
    children = forwarding._ranks
    forwarding._ranks = lambda: [child for child in children() if child.pid != own]
    return {}


def _start(args: Sequence[str], **options: Any) -> subprocess.Popen:
    """As subprocess.Popen; `python [-u] -m PROGRAM`, alone or behind a shell that joins its streams, starts
    warm."""
    joined = list(args[:3]) == ["/bin/sh", "-c", 'exec "$0" "$@" 2>&1']
    python, *words = args[3:] if joined else args
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    if (python, words[:1]) != (sys.executable, ["-m"]):
        return _COLD(args, **options)
    if joined:
        options["stderr"] = subprocess.STDOUT
    return Popen(words[2:], words[1], unbuffered=unbuffered, **options)


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


def _main(connection: socket.socket) -> None:
    request = _serve(connection)
    if request["program"] in LAUNCHERS or PART_WITH_RUNS in request["arguments"]:
        name_this_process("launcher")
        request = _serve_ranks() or request
    sys.argv = [request["program"], *request["arguments"]]
    try:
        if PRELUDE in os.environ:
            runpy.run_path(os.environ[PRELUDE])
        sys.modules.pop(request["program"], None)  # a module that is run is made anew
        runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        _end(ended.code)
    except Exception:
        traceback.print_exc()
        _end(1)
    _end(0)


if __name__ == "__main__":
    gc.disable()  # a tenth of the time, for nothing
    importlib.import_module("tests.support.everything")
    gc.enable()
    _main(socket.socket(fileno=int(sys.argv[1])))
