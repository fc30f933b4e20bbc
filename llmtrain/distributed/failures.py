"""Tell in few lines which rank of a host failed, and how."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.distributed.folders import last_report
from llmtrain.distributed.restarts import root_cause, shell_code
from llmtrain.errors import EXIT_CODE, INTERRUPTED_EXIT_CODE, WATCH_EXIT_CODE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHOWN_LOG_LINES = 20

# torch's agent waits 30 s before it kills the peers of a failed rank; later exit codes are consequences.
_SAME_FAILURE_SECONDS = 5


def explain(failures: Mapping[int, ProcessFailure], folder: Path, followed: bool) -> tuple[int, str]:
    """Print what failed; return the exit code and what failed in few words.

    folder: of the logs. followed: whether the launcher ended the ranks because those of another host failed.
    """
    earliest = min(failure.timestamp for failure in failures.values())
    causes = {
        rank: failure.exitcode
        for rank, failure in sorted(failures.items())
        if failure.timestamp - earliest <= _SAME_FAILURE_SECONDS
    }
    if said := last_report(folder, earliest - _SAME_FAILURE_SECONDS):
        print(f"llmtrain: the watch ended this job ({WATCH_EXIT_CODE}): {said}", file=sys.stderr)
        return WATCH_EXIT_CODE, said.partition(";")[0]
    rank = list(causes)[root_cause(list(causes.values()))]
    code, log = shell_code(causes[rank]), folder / f"rank{rank}.log"
    what = f"rank {rank} exited with {code}{_meaning(code)}"
    if code == INTERRUPTED_EXIT_CODE:  # rank 0 has reported the stop request
        return code, what
    if followed:
        print("llmtrain: ended this host's ranks, as those of another host failed", file=sys.stderr)
        return code, what
    if rank or code != EXIT_CODE:
        print(f"llmtrain: {what}; its log: {log}", file=sys.stderr)
    if rank:
        print(*_tail(log), sep="\n", file=sys.stderr)
    return code, what


def _meaning(code: int) -> str:
    """Describe the signal behind a shell's exit code; return "" for any other code."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return ""
    return f" (killed by {name}{', maybe out of memory' if name == 'SIGKILL' else ''})"


def _tail(log: Path) -> Iterator[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            yield from file.read().decode(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
    except OSError as error:
        yield f"({error})"
