"""The process group, and helpers that answer for a single process when nothing is distributed.

Every collective that llmtrain itself issues goes through here; the engines' own libraries issue
theirs over the same group.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from llmtrain.distributed import agreement, hosts, launcher, stores
from llmtrain.distributed.agreement import Fact
from llmtrain.errors import INTERRUPTED_EXIT_CODE, ConfigError, LaunchError, Problem, UserError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str = "auto") -> torch.device:
    """The device of this process: `auto` takes this rank's GPU where there is one, else the CPU, and says so
    where a GPU lies idle.

    Raises ConfigError when `cuda` is asked for and not to be had.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and launcher.has_gpu_driver() and launcher.rank() == 0:
            print(
                f"warning: this machine has an NVIDIA driver, and torch {torch.__version__} sees no GPU: all "
                "runs on the CPU; install a torch that is built for this driver's CUDA, or give device=cpu",
                file=sys.stderr,
            )
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                Problem("device", "cuda, and torch sees no GPU here", "auto, cpu", "use device=auto")
            )
        device = torch.device("cuda", launcher.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def start(
    device: torch.device,
    *,
    single_process_group: bool = False,
    timeout_minutes: float = 10.0,
    facts: Mapping[str, Fact] | None = None,
) -> None:
    """Join the process group that the launcher's environment describes (torchrun, Slurm).

    A single process gets a group only with `single_process_group`, for engines that need one; what that
    listens on is on the loopback.

    Raises LaunchError when ranks are missing, or differ in their `facts`; ConfigError when no route leads to
    rank 0.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launcher.world_size() > 1:
        rank, size, seconds = launcher.rank(), launcher.world_size(), launcher.start_seconds()
        store = _open_store(rank, seconds)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        agreement.meet(dist.PrefixStore(f"meeting/{attempt}", store), rank, size, facts or {}, seconds)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    elif single_process_group:
        hosts.keep_to(hosts.route_to(hosts.LOOPBACK).interface)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        return
    atexit.register(_destroy)


def _open_store(rank: int, seconds: float) -> dist.TCPStore:
    """Return the ranks' store, as the launcher's environment names it: torchrun's agent serves it, or rank 0.
    What this process opens from now on, it opens on the interface that leads there.

    torch's own rendezvous would wait in here for all ranks, and could not say which is missing; and its store
    would listen on all addresses.
    Raises LaunchError when nobody serves it within `seconds`, ConfigError when no route leads to rank 0.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        names = "MASTER_ADDR and MASTER_PORT"
        raise LaunchError(
            Problem(names, f"{address!r} and {port!r}", "where rank 0 is reached", "or launch by torchrun")
        )
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launcher.on_one_host() and not by_agent:
        address = hosts.LOOPBACK
    serves = rank == 0 and not by_agent
    if serves:
        address = hosts.route_to(address).own_address
    else:
        address = hosts.as_reached(address)
        launcher.await_host(address, int(port), seconds)
    hosts.keep_to(hosts.route_to(hosts.LOOPBACK if launcher.on_one_host() else address).interface)
    try:
        return (stores.serve if serves else stores.connect)(address, int(port), seconds)
    except (OSError, dist.DistError) as error:
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        got = f"{address}:{port}, which rank {rank} cannot use ({why})"
        raise LaunchError(
            Problem("MASTER_ADDR and MASTER_PORT", got, "rank 0's own address and a free port")
        ) from error


def lost_rank(error: BaseException) -> str | None:
    """What a backend said of a broken connection to another rank; None for every other error."""
    is_torch = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    if is_torch or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return str(error).strip().partition("\n")[0]
    return None


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(exit_code: int, together: bool = True) -> NoReturn:
    """Leave the process, `together` with the ranks that mean the same. With several ranks it skips
    interpreter shutdown, where gloo's threads abort now and then (SIGABRT after all work is done)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if together and exit_code in (0, INTERRUPTED_EXIT_CODE):
            dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank. Small picklable values only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value: T) -> list[T]:
    """`value` of every rank, in rank order, on rank 0, and nothing on others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def from_main(value: T) -> T:
    """Rank 0's value on every rank. Small picklable values only."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Any]) -> None:
    """Do `work` on rank 0 alone; a UserError that it raises is raised on every rank."""
    agree(lambda: work() if is_main() else None)


def agree(work: Callable[[], T]) -> T:
    """Do `work` on every rank; a UserError that any rank raises, the first's if several do, is raised on
    all of them, so that none waits for another. `work` must not use collectives of its own."""
    result: Any = None
    problem: UserError | None = None
    try:
        result = work()
    except UserError as error:
        problem = error
    problems = [found for found in gather(problem) if found is not None]
    if problems:
        raise everywhere(problems[0])
    return result


def everywhere(error: UserError) -> UserError:
    """Mark an error that every rank raises alike, so that one of them prints it."""
    error.everywhere = True
    return error
