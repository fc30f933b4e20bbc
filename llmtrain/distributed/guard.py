"""End the ranks that a launcher leaves behind and that cannot end by themselves, as they are stopped. Free
the memory that its copies of the state take.

    python -m llmtrain.distributed.guard PROCESS    of a launcher, whose end closes the standard input

A rank ends soon after its launcher (see llmtrain.orphans), but a process under SIGSTOP runs nothing, and
would hold the run folder.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from llmtrain.distributed import memory_folder
from llmtrain.orphans import is_running

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 7.0
"""Seconds that ranks have to end by themselves and say why."""


def start() -> int:
    """Start the guard of this process; return its process number."""
    command = [sys.executable, "-m", "llmtrain.distributed.guard", str(os.getpid())]
    # It lives in a session of its own, so that what ends the launcher's group does not end it.
    guard = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _OPEN.append(guard)
    return guard.pid


def dismiss() -> None:
    """End the guards of this process, which goes on as another program."""
    for guard in _OPEN:
        guard.kill()
        guard.wait()


_OPEN: list[subprocess.Popen[bytes]] = []
"""The guard of this process, whose standard input must stay open."""


def watch(launcher: psutil.Process) -> None:
    """Wait until `launcher` has ended, then kill those of its children that are left."""
    children: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        with suppress(psutil.Error):
            children = {child for child in launcher.children() if child.pid != os.getpid()}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while children and time.monotonic() < deadline:
        children = {child for child in children if is_running(child)}
        time.sleep(0.2)
    for child in children:
        with suppress(psutil.Error):
            for process in (*child.children(recursive=True), child):
                process.kill()


def main(number: int) -> None:
    """Guard the ranks of the process `number`."""
    # A scheduler may signal all processes of a job; this one ends with the launcher.
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with suppress(psutil.NoSuchProcess):
        watch(psutil.Process(number))
    memory_folder.remove_own()


if __name__ == "__main__":
    main(int(sys.argv[1]))
