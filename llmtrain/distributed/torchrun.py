"""Launch `llmtrain train` on the processes of this host, configured by environment variables as torchrun is.

`launch/torchrun.sh` and `launch/slurm.sbatch` call it, `launch/preflight.sh` with another verb. It runs
torch's elastic agent, as `torchrun` does, and adds three things: the exit code of the rank that failed
(torchrun always returns 1), one log per global rank, and ports on one network interface only: the loopback
for one host, the interface that reaches the other hosts for several.

Environment:
  NPROC_PER_NODE           number of processes on this host; default: one per accelerator, or 1
  NNODES                   number of hosts; default 1
  MASTER_ADDR MASTER_PORT  address and port of host 0; required if NNODES > 1; the port defaults to 29500
  NODE_RANK                rank of this host, 0 … NNODES-1; required with MASTER_ADDR if NNODES > 1
  RDZV_ENDPOINT            instead of MASTER_ADDR, MASTER_PORT and NODE_RANK: HOST:PORT of one of the hosts;
                           the hosts then get their ranks in order of arrival
  RDZV_ID                  name of the run; launchers of another run are rejected
  START_TIMEOUT            seconds to wait for all hosts and ranks at the start; default 600
  STOP_TIMEOUT             seconds that ranks have to save and exit after a stop request (SIGTERM, SIGUSR1,
                           Ctrl-C); default 3600
  LOG_DIR                  folder of the logs rankR.log; default: logs/ in the run folder
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
from llmtrain.distributed.hosts import Hosts, Route, hosts_from_environment, restrict_to_interface, route_to
from llmtrain.distributed.launcher import start_seconds, stop_seconds
from llmtrain.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    LaunchError,
    Problem,
    UserError,
)
from llmtrain.files import expand_home, write_atomically
from llmtrain.orphans import end_with_launcher
from llmtrain.reading import read_bytes

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHOWN_LOG_LINES = 20

# Exit codes that a rank can also have because another rank failed: it was terminated, it stopped on request,
# a connection broke (an exception), or its communication library aborted. Any other code has its own cause.
_SIGTERM, _EXCEPTION, _SIGABRT = 128 + 15, 1, 128 + 6
_LEAST_SPECIFIC_FIRST = (_SIGTERM, INTERRUPTED_EXIT_CODE, _EXCEPTION, _SIGABRT)

# torch's agent waits 30 s before it kills the peers of a failed rank; later exit codes are consequences.
_SAME_FAILURE_SECONDS = 5


def root_cause(exit_codes: Sequence[int]) -> int:
    """Return the index of the nonzero exit code that best identifies why a job failed; the first in a tie.

    After one rank fails the others follow in any order, and hosts have different clocks, so the codes are
    better evidence than the times. Negative codes are signals, as in subprocess.
    """

    def specificity(index: int) -> int:
        code = shell_code(exit_codes[index])
        known = _LEAST_SPECIFIC_FIRST
        return known.index(code) if code in known else len(known)

    return max((i for i, code in enumerate(exit_codes) if code), key=specificity)


def shell_code(exit_code: int) -> int:
    """Return the exit code as a shell reports it: 128 + n for a process ended by signal n."""
    return 128 - exit_code if exit_code < 0 else exit_code


def log_folder(environment: Mapping[str, str], overrides: Iterable[str]) -> Path:
    """Return LOG_DIR, or logs/ in the run folder that the overrides select (by default as in
    conf/train.yaml)."""
    if environment.get("LOG_DIR"):
        return expand_home(environment["LOG_DIR"]).absolute()
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (o.partition("=") for o in overrides)}
    run_folder = given.get("run.dir") or f"runs/{given.get('run.name') or 'default'}"
    return expand_home(run_folder).absolute() / "logs"


def keep_previous(log: Path) -> None:
    """Rename the log of an earlier launch to the next free number (rank0.log → rank0.1.log): a resumed run
    keeps it."""
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
    """Return the exit code of a job of several hosts from the reports in `folder`; 0 if there are none."""
    reports = [read_bytes(report, 16).strip() for report in sorted(folder.glob(_exit_report("*")))]
    codes = [int(code) for code in reports if code.lstrip(b"-").isdigit()]
    return codes[root_cause(codes)] if any(codes) else 0


def launch(overrides: Sequence[str], environment: Mapping[str, str], verb: str = "train") -> int:
    """Run `python -m llmtrain VERB OVERRIDES` on every rank of this host.

    Return 0, INTERRUPTED_EXIT_CODE after a stop request, or the exit code of the rank that failed, as a shell
    reports it.

    Raise ConfigError if the environment or the log folder is invalid, LaunchError if hosts are missing.
    """
    hosts = hosts_from_environment(environment)
    patience = math.ceil(start_seconds())
    forwarder = Forwarder(stop_seconds())
    route = route_to(hosts.address, hosts.address_variable)
    folder = log_folder(environment, overrides)
    exit_report = folder / _exit_report(socket.gethostname() if hosts.node_rank is None else hosts.node_rank)
    if folder.is_symlink() and "LOG_DIR" not in environment:
        # Whoever supplied the run folder chose the target of the link.
        got = f"a link to {os.readlink(folder)}"
        remedy = "remove it, or name the folder in LOG_DIR"
        raise ConfigError(Problem(str(folder), got, "a folder, not a link", remedy))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exit_report.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(Problem("LOG_DIR", repr(str(folder)), f"a writable folder ({error})")) from None

    restrict_to_interface(route.interface)
    with forwarder.listening():
        code = _run_agent(hosts, route, folder, [verb, *overrides], patience, forwarder)
    if forwarder.asked and code == _SIGTERM:  # before the rank installed its signal handlers
        code = INTERRUPTED_EXIT_CODE
    if code and hosts.num_nodes > 1:
        write_atomically(exit_report, f"{code}\n")
    return code


def _run_agent(
    hosts: Hosts,
    route: Route,
    folder: Path,
    arguments: Sequence[str],
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
        # _explain reports a failed rank in two lines, in place of the agent's long log.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    num_processes = hosts.num_processes or max(1, torch.accelerator.device_count())
    # By default torch uses all cores in every process.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    # Both streams of a rank go to one file, because the agent opens a log only once.
    merge_streams = ("-c", 'exec "$0" "$@" 2>&1')
    command = [sys.executable, "-u", "-m", "llmtrain", *arguments]
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
            logs_specs=_one_log_per_rank(folder, forwarder.ranks_start),
            # The forwarder handles all other signals.
            signals_to_handle="SIGQUIT",
            # An empty prefix: the console shows the lines as rank 0 wrote them.
            role="",
            log_line_prefix_template="${role_name}",
        )
        # The agent substitutes ${local_rank} in arguments; `$$` escapes a `$` of an override.
        elastic_launch(config, "/bin/sh")(*merge_streams, *(word.replace("$", "$$") for word in command))
    except ChildFailedError as error:
        return _explain(error.failures, folder)
    except DistError as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        got = f"no answer from the other hosts ({reason})"
        raise LaunchError(Problem("start", got, remedy="see their messages")) from error
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
    if code == INTERRUPTED_EXIT_CODE:  # rank 0 has reported the stop request
        return code
    if rank or code != EXIT_CODE:
        print(f"llmtrain: rank {rank} exited with {code}{_meaning(code)}; its log: {log}", file=sys.stderr)
    if rank:
        print(*_tail(log), sep="\n", file=sys.stderr)
    return code


def _meaning(code: int) -> str:
    """Describe the signal behind a shell's exit code; return "" for any other code."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return ""
    return f" (killed by {name}{', as when memory runs out' if name == 'SIGKILL' else ''})"


def _one_log_per_rank(folder: Path, on_start: Callable[[], None]) -> LogsSpecs:
    """Direct the output of each rank to FOLDER/rankR.log, that of rank 0 also to the console.

    on_start: called right before the agent starts the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class OneLogPerRank(LogsSpecs):
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

    return OneLogPerRank()


def main(arguments: Sequence[str]) -> int:
    """Launch with the given overrides, with `--verb VERB` another verb than train; or with
    `--job-exit-code FOLDER` print the exit code in its reports."""
    standard_streams.replace_streams()
    standard_streams.tolerate_lost_output()
    # The agent copies rank 0's log to this stream: print each line at once.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments[:1] == ["--job-exit-code"]:
        print(job_exit_code(Path(arguments[1])))
        return 0
    end_with_launcher()
    verb = "train"
    if arguments[:1] == ["--verb"]:
        verb, arguments = arguments[1], arguments[2:]
    try:
        return launch(arguments, os.environ, verb)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
