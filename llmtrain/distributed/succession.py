"""Which host serves the store of an elastic job once host 0 is lost, and how the others come to it.

Each launcher knows the addresses of the hosts of its attempt, in one order. Once the store is gone, it ends
its ranks and begins anew as another process of its program (exec), since calls of the lost store may never
return. That one looks for a store at the hosts before it in the list, from the first on; if none serves one,
it serves itself. Whoever serves waits for as many hosts as the job needs at least.

Two parts of a cut network must not both go on: so MIN of NNODES=MIN:MAX must be more than half of MAX.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import NoReturn

from llmtrain.config import decode_json
from llmtrain.distributed import guard, memory_folder
from llmtrain.distributed.hosts import Hosts
from llmtrain.distributed.launcher import MissingHostsError, await_host
from llmtrain.errors import ConfigError

SUCCESSION = "LLMTRAIN_SUCCESSION"
"""Variable by which a launcher tells the process that goes on in its place."""
LOST_HOST_SECONDS = 5.0
"""How long to look for host 0, whose network may be whole again."""
HEIR_SECONDS = 60.0
"""How long to look for the store of another host, which may notice later that host 0 is lost."""


@dataclass(frozen=True)
class Succession:
    """What a launcher that has lost host 0 knows."""

    addresses: tuple[str, ...]
    """Of the hosts of the attempt, the lost one first."""
    own: int
    """The place of this host among them."""
    attempt: int
    """The number of the next attempt."""

    def meeting_place(self, hosts: Hosts) -> Hosts:
        """Return the description of the launch in which the hosts meet at the first of them that serves a
        store: this one, if none before it does."""
        for place, address in enumerate(self.addresses[: self.own]):
            with suppress(MissingHostsError):
                await_host(address, hosts.port, HEIR_SECONDS if place else LOST_HOST_SECONDS)
                return replace(hosts, node_rank=None, address=address)
        return replace(hosts, node_rank=None, address=self.addresses[self.own])


def may_succeed(hosts: Hosts) -> bool:
    """Return whether a job goes on without host 0."""
    return hosts.is_elastic and 2 * hosts.least > hosts.num_nodes


def inherited(environment: MutableMapping[str, str]) -> Succession | None:
    """Return what this launcher knew before it began anew; None if it did not."""
    text = environment.pop(SUCCESSION, "")
    if not text:
        return None
    with suppress(ChildProcessError):  # the ranks that it ended
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    try:
        return decode_json(Succession, json.loads(text))
    except (ValueError, ConfigError):  # not of a launcher
        return None


def begin_anew(succession: Succession, overrides: Sequence[str]) -> NoReturn:
    """Become a new process of the launcher, in which it goes on; its ranks must have ended."""
    print("llmtrain: host 0 is lost: looking for another host to meet at", file=sys.stderr, flush=True)
    guard.dismiss()
    memory_folder.hand_on()
    os.environ[SUCCESSION] = json.dumps(asdict(succession))
    command = [sys.executable, "-m", "llmtrain.distributed.torchrun", *overrides]
    os.execv(sys.executable, command)  # noqa: S606
