"""Processes whose launcher or parent is killed end soon, whatever they do, and say why; a run that a shell
started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

BUSY = {
    "sleeping": "time.sleep(60)",
    "in a C call that holds the interpreter": (
        "lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); "
        "lock(mutex); lock(mutex)"
    ),
}
RANK = """
import ctypes, os, subprocess, sys, time
from llmtrain import orphans
orphans.end_with_{whom}()
subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(os.getpid(), flush=True)
{busy}
"""
STARTER = """
import os, subprocess, sys, time
environment = {**os.environ, **dict(word.split("=", 1) for word in sys.argv[2:])}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
time.sleep(60)
"""


def start(rank: str, *environment: str, shell: bool = False) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that starts `rank` with more environment, and what it started."""
    inherited = {name: value for name, value in os.environ.items() if name != "SLURM_PROCID"}
    command = [sys.executable, "-c", STARTER, rank, *environment]
    if shell:
        command = [
            "bash",
            "-c",
            '"$@" & wait',
            "bash",
            "env",
            *environment,
            sys.executable,
            "-c",
            rank,
        ]
    starter = subprocess.Popen(
        command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    return starter, psutil.Process(int(starter.stdout.readline()))


def ends(process: psutil.Process, seconds: float) -> bool:
    gone, _ = psutil.wait_procs([process], timeout=seconds)
    return bool(gone) or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY.keys())
def test_a_rank_ends_with_its_launcher(busy: str):
    launcher, rank = start(RANK.format(whom="launcher", busy=busy), "TORCHELASTIC_RUN_ID=none", "RANK=3")
    child = rank.children()[0]
    try:
        # Nobody waits for it: it stays as a zombie, as in a container without an init.
        os.kill(launcher.pid, signal.SIGKILL)
        assert ends(rank, 40)
        if busy == BUSY["sleeping"]:
            assert ends(child, 40)
            assert launcher.stderr is not None
            assert launcher.stderr.read() == (
                f"llmtrain: error: rank 3: got a launcher (process {launcher.pid}, {python_name()}) that has "
                "ended; this process ends with it; run the same command again\n"
            )
    finally:
        for process in (rank, child):
            if process.is_running():
                process.kill()
        launcher.communicate()


def python_name() -> str:
    return (
        psutil.Process().name() if "python" in psutil.Process().name() else os.path.basename(sys.executable)
    )


def test_a_rank_behind_a_wrapper_ends_with_the_launcher():
    """torchrun --no-python wrapper.sh: the wrapper lives on."""
    rank = RANK.format(whom="launcher", busy="time.sleep(60)")
    wrapper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    launcher, process = start(wrapper, "TORCHELASTIC_RUN_ID=none")
    parent = process.parent()
    try:
        launcher.kill()
        assert ends(process, 40)
    finally:
        for left in (process, parent):
            if left is not None and left.is_running():
                left.kill()
        launcher.communicate()


def test_a_run_outlives_the_shell_that_started_it():
    """Even from a shell with a rank's environment."""
    rank = RANK.format(whom="launcher", busy="time.sleep(60)")
    shell, run = start(rank, "TORCHELASTIC_RUN_ID=none", "RANK=0", "WORLD_SIZE=2", shell=True)
    child = run.children()[0]
    try:
        shell.kill()
        time.sleep(2.5)
        assert run.is_running()
        assert run.status() != psutil.STATUS_ZOMBIE
    finally:
        run.kill()
        child.kill()
        shell.communicate()


def test_a_worker_ends_with_its_parent_within_a_c_call():
    parent, worker = start(RANK.format(whom="parent", busy=[*BUSY.values()][1]))
    child = worker.children()[0]
    try:
        parent.kill()
        assert ends(worker, 40)
    finally:
        child.kill()
        if worker.is_running():
            worker.kill()
        parent.communicate()


def test_a_stopped_rank_ends_with_its_launcher():
    """It runs nothing of its own: the launcher's guard ends it."""
    program = (
        "import subprocess, sys, time; from llmtrain.distributed import guard; guard.start(); "
        "rank = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL); print(rank.pid, flush=True); "
        "time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    try:
        time.sleep(2)  # the guard looks every second
        rank.suspend()
        launcher.kill()
        assert ends(rank, 40)
    finally:
        if rank.is_running():
            rank.kill()
        launcher.communicate()
