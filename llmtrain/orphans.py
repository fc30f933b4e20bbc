"""No process outlives the one that started it: ranks end with their launcher, workers with their parent.

A launcher that is killed (kill -9, for want of memory) ends nobody. Its ranks would train on and hold the run
folder, or wait for ever. A run that a person started, from a shell that may end before it, has no launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

from llmtrain.errors import Problem

MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""What torchrun, DeepSpeed, Open MPI, MPICH and Slurm tell the processes that they start."""
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "csh", "tcsh"}
CHECK_SECONDS = 1.0
LAST_WORDS_SECONDS = 5

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel kill this process with its parent, whatever it is doing (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """Let this process end soon after the launcher that started it, with a line that says so; a process that
    no launcher started goes its own way."""
    launcher = find_launcher()
    if launcher is None:
        return
    if launcher.pid == os.getppid():
        _end_though_the_interpreter_is_held()
    threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def find_launcher() -> psutil.Process | None:
    """The nearest ancestor that lacks what launchers tell their processes, where this process has it."""
    mark = next((name for name in MARKS if name in os.environ), None)
    if mark is None:
        return None
    for ancestor in psutil.Process().parents():
        with suppress(psutil.Error):  # another user's, such as Slurm's
            if mark in ancestor.environ():
                continue
        # Who exports the variables in a shell is no launcher.
        return None if _name(ancestor) in SHELLS else ancestor
    return None


def is_there(process: psutil.Process) -> bool:
    """Whether it runs: neither gone nor dead and waiting for its parent to notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _watch(launcher: psutil.Process) -> None:
    name = _name(launcher)
    while is_there(launcher):
        # The kernel takes the end of the thread that started this process for its parent's.
        signal.alarm(0)
        time.sleep(CHECK_SECONDS)
    # In case nobody reads what is said below, so that it cannot be written.
    signal.alarm(LAST_WORDS_SECONDS)
    problem = Problem(
        f"rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0}",
        f"a launcher (process {launcher.pid}, {name}) that is gone",
        remedy="this process ends with it; start the same command again",
    )
    with suppress(OSError):
        os.write(2, f"llmtrain: error: {problem}\n".encode())
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(1)


def _end_though_the_interpreter_is_held() -> None:
    """End this process LAST_WORDS_SECONDS after its parent, unless a thread of it has done so or stops that.

    A long call into C may hold the interpreter, without which no thread and no handler of Python's runs. So
    the signal for a parent's death has a handler of the C library's own: alarm(), which takes the signal's
    number for the seconds until SIGALRM, left to itself, ends the process.
    """
    if sys.platform != "linux":
        return
    assert signal.SIGTRAP == LAST_WORDS_SECONDS
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGTRAP, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTRAP)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "?"
