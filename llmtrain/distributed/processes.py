"""The process group and its collectives; without a process group they act as for a single process.

All collectives that llmtrain issues itself go through here; the libraries of the engines issue theirs over
the same group.
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
from llmtrain.distributed.restarts import ATTEMPT
from llmtrain.errors import INTERRUPTED_EXIT_CODE, ConfigError, LaunchError, Problem, UserError

T = TypeVar("T")
_store_at: tuple[str, int] | None = None
"""Address of the store through which the ranks meet."""

_IMAGINED = False
"""Whether all other ranks are imagined: see `imagine`."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _has_peers() -> bool:
    return world_size() > 1 and not _IMAGINED


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this process. `auto` selects this rank's GPU, or the CPU if there is none, with a
    warning if a GPU stays unused.

    Raise ConfigError if `cuda` is requested and torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and launcher.has_gpu_driver() and launcher.rank() == 0:
            print(
                f"warning: this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU: the "
                "CPU is used; install a torch built for the CUDA version of this driver, or give device=cpu",
                file=sys.stderr,
            )
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                Problem("device", "cuda, but torch sees no GPU", "auto, cpu", "use device=auto")
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
    store: dist.Store | None = None,
) -> None:
    """Join the process group that the launcher's environment describes (torchrun, Slurm).

    A single process gets a group only with `single_process_group`, for engines that need one; it listens on
    the loopback only.

    facts: must be equal on all ranks.
    store: what `open_store` returned, if it was called before.
    Raise LaunchError if ranks are missing or their facts differ, ConfigError if there is no route to rank 0.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launcher.world_size() > 1:
        rank, size, seconds = launcher.rank(), launcher.world_size(), launcher.start_seconds()
        store = store or open_store(rank, seconds)
        # The store of a launcher outlives the ranks that it starts anew.
        variables = (ATTEMPT, "TORCHELASTIC_RESTART_COUNT")
        attempt = ".".join(os.environ.get(name, "0") for name in variables)
        agreement.check_ranks_agree(
            dist.PrefixStore(f"meeting/{attempt}", store), rank, size, facts or {}, seconds
        )
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"group/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    elif single_process_group:
        hosts.restrict_to_interface(hosts.route_to(hosts.LOOPBACK).interface)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        return
    atexit.register(_destroy)


def imagine(rank: int, size: int) -> None:
    """Be the rank `rank` of `size` processes of which no other exists.

    Collectives return at once. What the others would say is what this rank says; a count that is summed over
    ranks is at least 1, since work that others have is not to be taken for none.
    """
    global _IMAGINED
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _IMAGINED = True
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    atexit.register(_destroy)


def open_store(rank: int, seconds: float) -> dist.TCPStore:
    """Return the store that the launcher's environment names, served by torchrun's agent or by rank 0.
    Restrict this process to the network interface that reaches it.

    torch's own rendezvous would wait here for all ranks without naming the missing ones, and its store would
    listen on all addresses.
    Raise LaunchError if no store is served within `seconds`, ConfigError if there is no route to rank 0.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        names = "MASTER_ADDR and MASTER_PORT"
        raise LaunchError(
            Problem(names, f"{address!r} and {port!r}", "those of rank 0", "set them, or launch by torchrun")
        )
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launcher.on_one_host() and not by_agent:
        address = hosts.LOOPBACK
    serves = rank == 0 and not by_agent
    if serves:
        address = hosts.route_to(address).own_address
    else:
        address = hosts.reachable_address(address)
        launcher.await_host(address, int(port), seconds)
    global _store_at
    _store_at = address, int(port)
    reached = hosts.LOOPBACK if launcher.on_one_host() else address
    hosts.restrict_to_interface(hosts.route_to(reached).interface)
    try:
        return (stores.serve if serves else stores.connect)(address, int(port), seconds)
    except (OSError, dist.DistError) as error:
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        got = f"{address}:{port}, which rank {rank} cannot use ({why})"
        raise LaunchError(
            Problem("MASTER_ADDR and MASTER_PORT", got, "rank 0's own address and a free port")
        ) from error


def connect_to_store(seconds: float) -> dist.TCPStore:
    """Return a further connection to the store of the ranks; seconds: timeout of each operation.

    Raise torch's DistError if it does not answer.
    """
    assert _store_at is not None, "only ranks that a launcher started have a store"
    return stores.connect(*_store_at, seconds)


def own_address() -> str:
    """Return the address of this host on the network of the ranks."""
    assert _store_at is not None, "only ranks that a launcher started have a store"
    return hosts.route_to(hosts.LOOPBACK if launcher.on_one_host() else _store_at[0]).own_address


def lost_rank(error: BaseException) -> str | None:
    """Return the backend's message if `error` is a broken connection to another rank, else None."""
    is_torch = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    if is_torch or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return str(error).strip().partition("\n")[0]
    return None


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(exit_code: int, together: bool = True) -> NoReturn:
    """Exit the process.

    together: all ranks exit with this code, so that a success or a stop request can wait at a barrier.
    With several ranks skip the shutdown of the interpreter, in which threads of gloo sometimes abort
    (SIGABRT).
    """
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
    """Sum `values` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    if _IMAGINED and not values.is_floating_point():
        values.clamp_(min=1)
    return values


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank. For small picklable values."""
    if not _has_peers():
        return [value] * world_size()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on rank 0; an empty list on the others."""
    if not _has_peers():
        return [value] * world_size() if is_main() else []
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def from_main(value: T) -> T:
    """Return the value of rank 0 on every rank. For small picklable values."""
    if not _has_peers():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Any]) -> None:
    """Run `work` on rank 0 only; raise a UserError that it raises on every rank."""
    agree(lambda: work() if is_main() else None)


def agree(work: Callable[[], T]) -> T:
    """Run `work` on every rank. If any rank raises a UserError, raise that of the lowest such rank on all of
    them, so that none waits for another. `work` must not call collectives."""
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
    """Mark an error that every rank raises, so that only one of them prints it."""
    error.everywhere = True
    return error
