"""Read from the Linux kernel what another process of this host is doing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

ENDED = "ended"
STOPPED = "stopped by a signal or a debugger"
RUNNING = "running"
STATES = {
    "R": RUNNING,
    "S": "sleeping",
    "D": "in a sleep that no signal ends, as of a disk or a network file system",
    "T": STOPPED,
    "t": STOPPED,
    "Z": ENDED,
    "X": ENDED,
}

_START_FIELD = 19


def state_of(pid: int, started: int = 0) -> str:
    """Return what a process does, one of the values of STATES; RUNNING where that cannot be read.

    started: result of `start_of`; a process of this number that was started later is another one.
    """
    try:
        fields = _fields(pid)
    except FileNotFoundError:
        return ENDED if Path("/proc/self/stat").exists() else RUNNING
    except OSError:
        return RUNNING
    if started and int(fields[_START_FIELD]) != started:
        return ENDED
    return STATES.get(fields[0], RUNNING)


def start_of(pid: int) -> int:
    """Return when a process was started, in ticks of the kernel; 0 where that cannot be read."""
    try:
        return int(_fields(pid)[_START_FIELD])
    except OSError:
        return 0


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on. The name of the program before them, in
    parentheses, may have parentheses and blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_of(pid: int) -> str:
    """Return the kernel's function in which a process waits; "" where that cannot be read."""
    with suppress(OSError):
        function = Path(f"/proc/{pid}/wchan").read_text().strip()
        return "" if function == "0" else function
    return ""
