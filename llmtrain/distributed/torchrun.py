"""torchrun for `llmtrain train`: one agent a host, processes and rendezvous found from the environment.

`launch/torchrun.sh` and `launch/slurm.sbatch` call it. It runs torch's own elastic agent, as `torchrun`
does, and adds what that command lacks: the exit code of the rank that failed (torchrun always gives
1), one log a global rank, and ports on one network interface alone: the loopback on one host, the one that
the other hosts can reach on several.

Environment:
  NPROC_PER_NODE           processes on this host; default: its accelerators, or 1
  NNODES                   hosts; default 1
  MASTER_ADDR MASTER_PORT  host 0, as every host reaches it; needed with NNODES > 1; port 29500
  NODE_RANK                this host's place, 0 … NNODES-1; needed with MASTER_ADDR and NNODES > 1
  RDZV_ENDPOINT            in place of MASTER_ADDR, MASTER_PORT and NODE_RANK: HOST:PORT of one of the hosts,
                           where all meet and number themselves
  RDZV_ID                  a name of the run: launchers of another are not let in there
  START_TIMEOUT            seconds in which all hosts and ranks must have come; 600
  STOP_TIMEOUT             seconds in which ranks must have saved and ended once it is asked to stop
                           (SIGTERM, SIGUSR1, Ctrl-C); 3600
  LOG_DIR                  where rankR.log of each rank goes; default: logs/ in the run folder
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain import standard_streams
from llmtrain.distributed.forwarding import Forwarder
from llmtrain.distributed.hosts import Hosts, Route, hosts_from_environment, keep_to, route_to
from llmtrain.distributed.launcher import start_seconds, stop_seconds
from llmtrain.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    LaunchError,
    Problem,
    UserError,
)
from llmtrain.files import at_home, write_atomically
from llmtrain.orphans import end_with_launcher
from llmtrain.reading import read_bytes

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHOWN_LOG_LINES = 20

# Codes that a rank also gets when another one failed: it was terminated, it ended as when asked to stop, its
# peer's connection broke (an exception), or its communication library aborted. Any other code tells of a
# cause of its own.
_SIGTERM, _EXCEPTION, _SIGABRT = 128 + 15, 1, 128 + 6
_LEAST_TELLING_FIRST = (_SIGTERM, INTERRUPTED_EXIT_CODE, _EXCEPTION, _SIGABRT)

# torch's agent waits 30 s before it kills the peers of a failed rank; their codes are no cause.
_SAME_FAILURE_SECONDS = 5


def root_cause(exit_codes: Sequence[int]) -> int:
    """The index of the exit code that tells most of why a job failed; the first among equals.

    When one rank fails, the others soon do, in any order and on other hosts with other clocks: what they
    exit with says more than when. Negative codes are signals, as subprocess gives them.
    """

    def telling(index: int) -> int:
        code = shell_code(exit_codes[index])
        return _LEAST_TELLING_FIRST.index(code) if code in _LEAST_TELLING_FIRST else len(_LEAST_TELLING_FIRST)

    return max((i for i, code in enumerate(exit_codes) if code), key=telling)


def shell_code(exit_code: int) -> int:
    """The code as a shell gives it: 128 + n for a process ended by signal n."""
    return 128 - exit_code if exit_code < 0 else exit_code


def log_folder(environment: Mapping[str, str], overrides: Iterable[str]) -> Path:
    """LOG_DIR, or logs/ in the run folder that the overrides name (as conf/train.yaml does without them)."""
    if environment.get("LOG_DIR"):
        return at_home(environment["LOG_DIR"]).absolute()
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (o.partition("=") for o in overrides)}
    run_folder = given.get("run.dir") or f"runs/{given.get('run.name') or 'default'}"
    return at_home(run_folder).absolute() / "logs"


def keep_previous(log: Path) -> None:
    """Move an earlier launch's log aside (rank0.log → rank0.1.log, and so on up): a resumed run keeps it."""
    if os.path.lexists(log):
        number = 1
        while os.path.lexists(kept := log.with_suffix(f".{number}{log.suffix}")):
            number += 1
        log.rename(kept)


def _tail(log: Path) -> Iterator[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            yield from file.read().decode(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
    except OSError as error:
        yield f"({error})"


def _exit_report(node: object) -> str:
    return f".exit-code-of-node-{node}"


def job_exit_code(folder: Path) -> int:
    """The exit code of a job of several hosts, as each left it in `folder`; 0 if none did."""
    said = [read_bytes(report, 16).strip() for report in sorted(folder.glob(_exit_report("*")))]
    codes = [int(code) for code in said if code.lstrip(b"-").isdigit()]
    return codes[root_cause(codes)] if any(codes) else 0


def launch(overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m llmtrain train OVERRIDES` on every rank of this host.

    Returns 0, INTERRUPTED_EXIT_CODE where it was asked to stop, or the exit code of the rank that failed, as
    a shell gives it.

    Raises ConfigError where the environment or the log folder cannot be used, LaunchError when hosts are
    missing.
    """
    hosts = hosts_from_environment(environment)
    patience = math.ceil(start_seconds())
    forwarder = Forwarder(stop_seconds())
    route = route_to(hosts.address, hosts.address_variable)
    folder = log_folder(environment, overrides)
    exit_report = folder / _exit_report(socket.gethostname() if hosts.node_rank is None else hosts.node_rank)
    if folder.is_symlink() and "LOG_DIR" not in environment:
        # Whoever gave the run folder chose where to.
        got = f"a link to {os.readlink(folder)}"
        remedy = "remove it, or name the folder in LOG_DIR"
        raise ConfigError(Problem(str(folder), got, "a folder of the run's own", remedy))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exit_report.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(Problem("LOG_DIR", repr(str(folder)), f"a folder to write in ({error})")) from None

    keep_to(route.interface)
    with forwarder.listening():
        code = _run_agent(hosts, route, folder, overrides, patience, forwarder)
    if forwarder.asked and code == _SIGTERM:  # before a rank could listen
        code = INTERRUPTED_EXIT_CODE
    if code and hosts.num_nodes > 1:
        write_atomically(exit_report, f"{code}\n")
    return code


def _run_agent(
    hosts: Hosts,
    route: Route,
    folder: Path,
    overrides: Sequence[str],
    patience: int,
    forwarder: Forwarder,
) -> int:
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from llmtrain.distributed.rendezvous import BACKEND, Rendezvous

    if "LOGLEVEL" not in os.environ:
        # What the agent logs of a failed rank is said below, in two lines.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    num_processes = hosts.num_processes or max(1, torch.accelerator.device_count())
    # Left alone, torch takes all cores in every process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    # Both streams of a rank go to one file, which the agent opens once.
    merge_streams = ("-c", 'exec "$0" "$@" 2>&1')
    command = [sys.executable, "-u", "-m", "llmtrain", "train", *overrides]
    try:
        config = LaunchConfig(
            min_nodes=hosts.num_nodes,
            max_nodes=hosts.num_nodes,
            nproc_per_node=num_processes,
            run_id=hosts.run_id,
            rdzv_backend=BACKEND,
            rdzv_configs=Rendezvous(hosts, route, patience).settings(),
            max_restarts=0,
            start_method="spawn",
            logs_specs=_one_log_a_rank(folder, forwarder.ranks_start),
            # All but this one are the forwarder's.
            signals_to_handle="SIGQUIT",
            # An empty role as the prefix: the console's lines stand as rank 0 wrote them.
            role="",
            log_line_prefix_template="${role_name}",
        )
        # The agent substitutes ${local_rank} in arguments; `$$` gives the overrides' own `$`.
        elastic_launch(config, "/bin/sh")(*merge_streams, *(word.replace("$", "$$") for word in command))
    except ChildFailedError as error:
        return _explain(error.failures, folder)
    except DistError as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        got = f"no word from the other hosts ({reason})"
        raise LaunchError(Problem("start", got, remedy="their own messages tell why")) from error
    except SignalException as error:
        print(f"llmtrain: stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + int(error.sigval)
    return 0


def _explain(failures: Mapping[int, ProcessFailure], folder: Path) -> int:
    earliest = min(failure.timestamp for failure in failures.values())
    causes = {
        rank: failure.exitcode
        for rank, failure in sorted(failures.items())
        if failure.timestamp - earliest <= _SAME_FAILURE_SECONDS
    }
    rank = list(causes)[root_cause(list(causes.values()))]
    code, log = shell_code(causes[rank]), folder / f"rank{rank}.log"
    if code == INTERRUPTED_EXIT_CODE:  # as asked, which rank 0 says
        return code
    if rank or code != EXIT_CODE:
        print(f"llmtrain: rank {rank} exited with {code}{_meaning(code)}; its log: {log}", file=sys.stderr)
    if rank:
        print(*_tail(log), sep="\n", file=sys.stderr)
    return code


def _meaning(code: int) -> str:
    """What a shell's exit code tells of a signal; nothing of any other code."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return ""
    return f" (killed by {name}{', as when memory runs out' if name == 'SIGKILL' else ''})"


def _one_log_a_rank(folder: Path, on_start: Callable[[], None]) -> LogsSpecs:
    """Where the agent puts the ranks' output: FOLDER/rankR.log, rank 0's on the console too; it asks for that
    right before it starts them."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class OneLogARank(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(folder)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            logs = {local_rank: folder / f"rank{env['RANK']}.log" for local_rank, env in envs.items()}
            for log in logs.values():
                keep_previous(log)
            on_start()
            paths = {local_rank: str(log) for local_rank, log in logs.items()}
            console = {
                local_rank: path for local_rank, path in paths.items() if envs[local_rank]["RANK"] == "0"
            }
            nowhere = dict.fromkeys(envs, os.devnull)
            return LogsDest(
                stdouts=paths,
                stderrs=dict.fromkeys(envs, ""),
                tee_stdouts=console,
                error_files=nowhere,
                filtered_stdout=os.devnull,
                filtered_stderr=os.devnull,
            )

    return OneLogARank()


def main(arguments: Sequence[str]) -> int:
    """`OVERRIDES…` launches; `--job-exit-code FOLDER` prints what the hosts left there."""
    standard_streams.take_over()
    standard_streams.go_on_without_output()
    # The agent copies rank 0's log to this stream: let each line out at once.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments[:1] == ["--job-exit-code"]:
        print(job_exit_code(Path(arguments[1])))
        return 0
    end_with_launcher()
    try:
        return launch(arguments, os.environ)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
