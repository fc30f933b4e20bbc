"""Launch `llmtrain train` on the processes of this host, configured by environment variables as torchrun is.

`launch/torchrun.sh` and `launch/slurm.sbatch` call it, `launch/preflight.sh` with another verb. It runs
torch's elastic agent, as `torchrun` does, and adds: the exit code of the rank that failed (torchrun always
returns 1), one log per global rank, ports on one network interface only (the loopback for one host, the
interface that reaches the other hosts for several), and restarts that tell what failed and go on with the
hosts that are left.

Environment:
  NPROC_PER_NODE           number of processes on this host; default: one per accelerator, or 1
  NNODES                   number of hosts; default 1; MIN:MAX: the job goes on with hosts that are left
  MASTER_ADDR MASTER_PORT  address and port of host 0; required if NNODES > 1; the port defaults to 29500
  NODE_RANK                rank of this host, 0 … NNODES-1; required with MASTER_ADDR if NNODES > 1
  RDZV_ENDPOINT            instead of MASTER_ADDR, MASTER_PORT and NODE_RANK: HOST:PORT of one of the hosts;
                           the hosts then get their ranks in order of arrival
  RDZV_ID                  name of the run; launchers of another run are rejected
  START_TIMEOUT            seconds to wait for all hosts and ranks at the start; default 600
  STOP_TIMEOUT             seconds that ranks have to save and exit after a stop request (SIGTERM, SIGUSR1,
                           Ctrl-C); default 3600
  MAX_RESTARTS             how often ranks are started anew after a failure, from the last checkpoint; default
                           0, with NNODES=MIN:MAX 100; 3 failures without a new step end the job before
  JOIN_TIMEOUT             seconds to wait at the start for more than MIN hosts; default 30
  LOG_DIR                  folder of the logs rankR.log; default: logs/ in the run folder
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain import standard_streams
from llmtrain.distributed import job_time, succession
from llmtrain.distributed.elastic import Folders, composed_folders, elastic_bounds
from llmtrain.distributed.failures import explain
from llmtrain.distributed.folders import log_folder, run_folder
from llmtrain.distributed.forwarding import Forwarder
from llmtrain.distributed.hosts import Hosts, Route, hosts_from_environment, restrict_to_interface, route_to
from llmtrain.distributed.launcher import MissingHostsError, join_seconds, start_seconds, stop_seconds
from llmtrain.distributed.memory_folder import MEMORY, empty, memory_folder
from llmtrain.distributed.restarts import (
    ATTEMPT,
    ELASTIC,
    SIGTERM_CODE,
    Ending,
    Restarts,
    Verdict,
    root_cause,
)
from llmtrain.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    LaunchError,
    Problem,
    UserError,
)
from llmtrain.files import write_atomically
from llmtrain.orphans import end_with_launcher
from llmtrain.reading import read_bytes
from llmtrain.track.events import note_event

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs

    from llmtrain.distributed.rendezvous import Rendezvous


def keep_previous(log: Path) -> None:
    """Rename the log of an earlier launch to the next free number (rank0.log → rank0.1.log): a resumed run
    keeps it."""
    if os.path.lexists(log):
        number = 1
        while os.path.lexists(kept := log.with_suffix(f".{number}{log.suffix}")):
            number += 1
        log.rename(kept)


def _exit_report(node: object) -> str:
    return f".exit-code-of-node-{node}"


def job_exit_code(folder: Path) -> int:
    """Return the exit code of a job of several hosts from the reports in `folder`; 0 if there are none."""
    reports = [read_bytes(report, 16).strip() for report in sorted(folder.glob(_exit_report("*")))]
    codes = [int(code) for code in reports if code.lstrip(b"-").isdigit()]
    return codes[root_cause(codes)] if any(codes) else 0


def launch(overrides: Sequence[str], environment: Mapping[str, str], verb: str = "train") -> int:
    """Run `python -m llmtrain VERB OVERRIDES` on every rank of this host; training anew after a failure where
    MAX_RESTARTS allows it, any other verb once on all hosts.

    Return 0, INTERRUPTED_EXIT_CODE after a stop request, or the exit code of the rank that failed, as a shell
    reports it.

    Raise ConfigError if the environment or the log folder is invalid, LaunchError for one host too many or of
    another run, MissingHostsError if hosts are missing.
    """
    if verb != "train":
        environment = once_on_all_hosts(environment)
    hosts = hosts_from_environment(environment)
    folder = log_folder(environment, overrides)
    exit_report = folder / _exit_report(socket.gethostname() if hosts.node_rank is None else hosts.node_rank)
    if folder.is_symlink() and "LOG_DIR" not in environment:
        # Whoever supplied the run folder chose the target of the link.
        got = f"a link to {os.readlink(folder)}"
        remedy = "remove it, or name the folder in LOG_DIR"
        raise ConfigError(Problem(str(folder), got, "a folder, not a link", remedy))
    with suppress(OSError):
        exit_report.unlink()  # of an earlier launch, whatever this one refuses
    heir = succession.inherited(os.environ)
    if heir is not None:
        hosts = heir.meeting_place(hosts)
    patience = math.ceil(start_seconds())
    forwarder = Forwarder(stop_seconds())
    fits = elastic_bounds(hosts, overrides)
    route = route_to(hosts.address, hosts.address_variable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(Problem("LOG_DIR", repr(str(folder)), f"a writable folder ({error})")) from None

    restrict_to_interface(route.interface)
    job_time.tell_ranks()
    if hosts.is_elastic:
        os.environ[ELASTIC] = "1"
    first = 1 if heir is None else heir.attempt
    job = _Job(hosts, route, folder, [verb, *overrides], forwarder, fits, patience, first)
    with forwarder.listening():
        code = job.run(needs_shared_folder(hosts, environment))
    if code and hosts.num_nodes > 1:
        write_atomically(exit_report, f"{code}\n")
    return code


def once_on_all_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job that neither restarts nor goes on with fewer hosts."""
    kept = {name: value for name, value in environment.items() if name not in ("MAX_RESTARTS", "REQUEUE")}
    if "NNODES" in kept:
        kept["NNODES"] = kept["NNODES"].rpartition(":")[2]
    return kept


def needs_shared_folder(hosts: Hosts, environment: Mapping[str, str]) -> str:
    """Return the setting that needs a run folder which all hosts share; "" if none does.

    Raise ConfigError for a REQUEUE that is neither 0 nor 1."""
    requeue = environment.get("REQUEUE", "").strip()
    if requeue not in ("", "0", "1"):
        raise ConfigError(Problem("REQUEUE", repr(requeue), "0, 1", "correct this environment variable"))
    if requeue == "1":
        return "REQUEUE=1"
    return f"MAX_RESTARTS={hosts.max_restarts}" if hosts.max_restarts else ""


class _Job:
    """The part of this host in a job: an attempt, and after a failure further ones."""

    def __init__(
        self,
        hosts: Hosts,
        route: Route,
        folder: Path,
        words: Sequence[str],
        forwarder: Forwarder,
        fits: Callable[[int], bool],
        patience: int,
        first: int,
    ) -> None:
        """first: number of the first attempt; more than 1 if this launcher has lost host 0 before."""
        self._hosts, self._route, self._folder, self._words = hosts, route, folder, words
        self._forwarder, self._fits, self._patience, self._first = forwarder, fits, patience, first

    def run(self, needs_shared: str) -> int:
        """Return the exit code of the job. needs_shared: why all hosts must share the run folder, if so."""
        folders = Folders(run_folder(self._words), None)
        if needs_shared:
            folders = composed_folders(self._words[1:])
        place = folders.memory if self._hosts.max_restarts else None
        with memory_folder(place, folders.run, keeps=self._first > 1) as memory:
            return self._run(needs_shared, folders.run, memory)

    def _run(self, needs_shared: str, run: Path, memory: Path | None) -> int:
        from torch.distributed import DistError, PrefixStore

        from llmtrain.distributed.admission import Helpers
        from llmtrain.distributed.rendezvous import JobOverError, Rendezvous, StoppedWaitingError
        from llmtrain.distributed.shared_folder import require_shared

        def check_folder(store: Store, node_rank: int, num_nodes: int) -> None:
            if needs_shared:
                require_shared(PrefixStore("folder", store), node_rank, num_nodes, run, needs_shared)

        forwarder = self._forwarder
        helpers = Helpers(
            end_ranks=forwarder.end_ranks,
            is_stopping=lambda: forwarder.asked,
            fits=self._fits,
            check_folder=check_folder,
            left_out=lambda: empty(memory),
            on_lost=self._pass_on,
            join_seconds=join_seconds(),
        )
        rendezvous = Rendezvous(self._hosts, self._route, self._patience, helpers, self._first)
        restarts = Restarts(self._hosts.max_restarts, run, memory)
        restarts.made = self._first - 1
        if rendezvous.serves and restarts.made:
            self._tell(Verdict(True, 1, "host 0 is lost, and this host takes its place"), restarts, run)
        is_running = True
        try:
            while True:
                is_running = True
                ending = self._attempt(rendezvous)
                is_running = ending.code not in (0, EXIT_CODE, INTERRUPTED_EXIT_CODE)
                if not rendezvous.is_supervised:
                    return ending.code
                verdict = rendezvous.conclude(ending, restarts.decide)
                if rendezvous.serves and verdict.why:
                    self._tell(verdict, restarts, run)
                if not verdict.restart:
                    return verdict.code
        except StoppedWaitingError:
            return INTERRUPTED_EXIT_CODE
        except JobOverError as over:
            return over.code
        except (ConfigError, LaunchError) as error:
            if rendezvous.attempt < (2 if isinstance(error, ConfigError) else 1):
                raise
            print(error, file=sys.stderr)  # what worked before the failure is no mistake of the user
            return 1
        except DistError as error:
            if self._forwarder.asked:  # host 0, which was asked too, serves no longer
                return INTERRUPTED_EXIT_CODE
            if is_running and (known := rendezvous.succession) is not None:
                forwarder.end_ranks()
                self._pass_on(known)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if rendezvous.is_supervised and rendezvous.attempt:  # it had begun: no mistake of the user
                print(f"llmtrain: no answer from host 0 ({reason})", file=sys.stderr)
                return 1
            got = f"no answer from the other hosts ({reason})"
            raise MissingHostsError(Problem("start", got, remedy="see their messages")) from error
        finally:
            rendezvous.close()

    def _pass_on(self, known: succession.Succession) -> None:
        """Go on without host 0, as another process; return if no restart is left."""
        if known.attempt - 1 <= self._hosts.max_restarts and not self._forwarder.asked:
            succession.begin_anew(known, self._words[1:])

    def _tell(self, verdict: Verdict, restarts: Restarts, run: Path) -> None:
        if not verdict.restart:
            print(f"llmtrain: no restart: {verdict.why}", file=sys.stderr)
            return
        count = f"restart {restarts.made} of {restarts.most}"
        later = " or a later one in memory" if MEMORY in os.environ else ""
        print(f"llmtrain: {verdict.why}: {count}, from step {restarts.step:,}{later}", file=sys.stderr)
        note_event(run, "restart", restarts.step, number=restarts.made, why=verdict.why)

    def _attempt(self, rendezvous: Rendezvous) -> Ending:
        """Run the ranks of this host to their end, once."""
        import torch
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from llmtrain.distributed.rendezvous import BACKEND

        if "LOGLEVEL" not in os.environ:
            # explain() reports a failed rank in two lines, in place of the agent's long log.
            for name in list(logging.root.manager.loggerDict):
                if name.startswith("torch.distributed.elastic"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
        num_processes = self._hosts.num_processes or max(1, torch.accelerator.device_count())
        # By default torch uses all cores in every process.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
        # Both streams of a rank go to one file, because the agent opens a log only once.
        merge_streams = ("-c", 'exec "$0" "$@" 2>&1')
        command = [sys.executable, "-u", "-m", "llmtrain", *self._words]

        def on_start() -> None:
            os.environ[ATTEMPT] = str(rendezvous.attempt)
            self._forwarder.ranks_start()

        config = LaunchConfig(
            min_nodes=self._hosts.num_nodes,
            max_nodes=self._hosts.num_nodes,
            nproc_per_node=num_processes,
            run_id=self._hosts.run_id,
            rdzv_backend=BACKEND,
            rdzv_configs=rendezvous.settings(),
            max_restarts=0,
            start_method="spawn",
            logs_specs=_one_log_per_rank(self._folder, on_start),
            # The forwarder handles all other signals.
            signals_to_handle="SIGQUIT",
            # An empty prefix: the console shows the lines as rank 0 wrote them.
            role="",
            log_line_prefix_template="${role_name}",
        )
        code, what = 0, ""
        try:
            # The agent substitutes ${local_rank} in arguments; `$$` escapes a `$` of an override.
            elastic_launch(config, "/bin/sh")(*merge_streams, *(word.replace("$", "$$") for word in command))
        except ChildFailedError as error:
            code, what = explain(error.failures, self._folder, rendezvous.followed)
        except SignalException as error:
            print(f"llmtrain: stopped by {error.sigval.name}", file=sys.stderr)
            return Ending(128 + int(error.sigval), error.sigval.name, asked=True)
        asked = self._forwarder.asked
        if asked and code == SIGTERM_CODE:  # before the rank installed its signal handlers
            code = INTERRUPTED_EXIT_CODE
        return Ending(code, what, asked)


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
    verb = "train"
    if arguments[:1] == ["--verb"]:
        verb, arguments = arguments[1], arguments[2:]
    end_with_launcher()
    try:
        return launch(arguments, os.environ, verb)
    except MissingHostsError as error:  # they may come to the next start
        print(error, file=sys.stderr)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
