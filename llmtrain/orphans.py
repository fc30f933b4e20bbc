"""End processes together with the one that started them: ranks with their launcher, workers with their
parent.

A killed launcher (kill -9, out of memory) does not end its ranks, which would continue training and hold the
run folder, or wait forever. A run started by a person from a shell, which may end earlier, has no launcher.
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
"""Environment variables by which torchrun, DeepSpeed, Open MPI, MPICH and Slurm mark the processes that they
start."""
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "csh", "tcsh"}
CHECK_SECONDS = 1.0
LAST_WORDS_SECONDS = 5

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """End this process, with a message, soon after the launcher that started it. Do nothing without a
    launcher."""
    launcher = find_launcher()
    if launcher is None:
        return
    if launcher.pid == os.getppid():
        _end_without_interpreter()
    threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def find_launcher() -> psutil.Process | None:
    """Return the nearest ancestor without the launcher's environment variable that this process has; None if
    it has none."""
    mark = next((name for name in MARKS if name in os.environ), None)
    if mark is None:
        return None
    for ancestor in psutil.Process().parents():
        with suppress(psutil.Error):  # a process of another user, such as Slurm's
            if mark in ancestor.environ():
                continue
        # A shell in which the user exported the variables is not a launcher.
        return None if _name(ancestor) in SHELLS else ancestor
    return None


def is_running(process: psutil.Process) -> bool:
    """Return whether the process is running, and is not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _watch(launcher: psutil.Process) -> None:
    name = _name(launcher)
    while is_running(launcher):
        # The parent-death signal also arrives when the thread that started this process ends: cancel its
        # alarm.
        signal.alarm(0)
        time.sleep(CHECK_SECONDS)
    # End this process even if the message below blocks because nobody reads it.
    signal.alarm(LAST_WORDS_SECONDS)
    problem = Problem(
        f"rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0}",
        f"a launcher (process {launcher.pid}, {name}) that has ended",
        remedy="this process ends with it; run the same command again",
    )
    with suppress(OSError):
        os.write(2, f"llmtrain: error: {problem}\n".encode())
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(1)


def _end_without_interpreter() -> None:
    """Schedule the end of this process LAST_WORDS_SECONDS after its parent's, unless a thread does it earlier
    or cancels it.

    A long C call may hold the GIL, so that neither Python threads nor signal handlers run. The parent-death
    signal
    therefore uses a function of the C library as handler: alarm(), which interprets the number of the signal
    as the seconds until SIGALRM, whose default action ends the process.
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
