"""Where the launchers of a run's hosts meet, and which place each one takes.

They meet over a store that listens on one address, and write numbers and JSON into it. torch's own `c10d`
rendezvous listens on all addresses, and unpickles what anybody wrote there.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from llmtrain.distributed import stores
from llmtrain.distributed.hosts import Hosts, Route, refuse_foreign
from llmtrain.distributed.launcher import await_host
from llmtrain.errors import ConfigError, LaunchError, Problem

BACKEND = "llmtrain"
"""The name under which torch's agent finds the rendezvous."""
POLL_SECONDS = 0.2
ALIVE_SECONDS = 10.0
"""A launcher that gave no sign for so long has ended, and may have been started anew."""


class Rendezvous(RendezvousHandler):
    """One launcher's part in the meeting, as torch's agent asks for it."""

    def __init__(self, hosts: Hosts, route: Route, seconds: float) -> None:
        """Serve the store where this host does, or connect to it.

        seconds: how long to wait for the store, and then for the other hosts.
        Raises ConfigError where this host cannot listen, or another program has its port; LaunchError when
        host 0 does not answer.
        """
        self._hosts, self._seconds = hosts, seconds
        self._serves, self._address, self._store = _open_store(hosts, route, seconds)

    def settings(self) -> dict[str, RendezvousHandler]:
        """What torch's launcher needs beside BACKEND to hand this to its agent."""
        rendezvous_handler_registry.register(BACKEND, _from_settings)
        return {"handler": self}

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all hosts; return this one's place among them, and the store, which the ranks use too.

        Raises LaunchError when hosts are missing, or this one is not of their run.
        """
        place = self._take_place()
        ranks_store = RendezvousStoreInfo(self._address, self._store.port)
        return RendezvousInfo(PrefixStore("agent", self._store), place, self._hosts.num_nodes, ranks_store)

    def _take_place(self) -> int:
        store = PrefixStore("launchers", self._store)
        run = store.compare_set("run", "", self._hosts.run_id).decode()
        if run != self._hosts.run_id:
            got = f"{self._store.port} of {self._address}, where the run {run!r} meets"
            remedy = "give each run a port of its own, or all hosts of one the same RDZV_ID"
            raise LaunchError(Problem(self._hosts.port_variable, got, remedy=remedy))
        name = self._name(store)
        signs, deadline = _Signs(store), time.monotonic() + self._seconds
        while True:
            store.add(f"signs of {name}", 1)
            missing = self._let_in(store, signs) if self._serves else "host 0 waits for others"
            if store.check(["places"]):
                break
            if time.monotonic() > deadline:
                got = f"not all {self._hosts.num_nodes} hosts within {self._seconds:g} s ({missing})"
                remedy = "see what the others said, or wait longer by START_TIMEOUT=seconds"
                raise LaunchError(Problem("start", got, remedy=remedy))
            time.sleep(POLL_SECONDS)
        places: list[int] = json.loads(store.get("places"))
        if name not in places or store.add(f"taken {name}", 1) > 1:
            got = f"a host too many: all {self._hosts.num_nodes} have met without this one"
            remedy = "give each host a NODE_RANK of its own, or wait for the earlier launch to end"
            raise LaunchError(Problem("start", got, remedy=remedy))
        return places.index(name)

    def _name(self, store: Store) -> int:
        """The number by which this launcher goes; the one that serves is 0."""
        if self._serves:
            return 0
        return store.add("names", 1) if self._hosts.node_rank is None else self._hosts.node_rank

    def _let_in(self, store: Store, signs: _Signs) -> str:
        """Give out the places once all have come; return who is missing."""
        wanted = self._hosts.num_nodes
        number_themselves = self._hosts.node_rank is None
        names = range(store.add("names", 0) + 1 if number_themselves else wanted)
        alive = signs.alive(names)
        if len(alive) >= wanted:
            store.set("places", json.dumps(alive[:wanted]))
        came = f"{len(alive)} of {wanted} came"
        if number_themselves:
            return came
        return f"{came}, not NODE_RANK {', '.join(str(name) for name in names if name not in alive)}"

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._hosts.run_id

    def num_nodes_waiting(self) -> int:
        """No host joins a run that has begun."""
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


def _from_settings(parameters: RendezvousParameters) -> RendezvousHandler:
    handler: RendezvousHandler = parameters.config["handler"]
    return handler


class _Signs:
    """Signs of life that launchers give: each counts up a number of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: dict[int, tuple[int, float]] = {}

    def alive(self, names: Iterable[int]) -> list[int]:
        """Those of `names` that gave a sign of late."""
        now = time.monotonic()
        for name in names:
            count = self._store.add(f"signs of {name}", 0)
            if count != self._last.get(name, (0, now))[0]:
                self._last[name] = (count, now)
        return [name for name in names if name in self._last and now - self._last[name][1] < ALIVE_SECONDS]


def _open_store(hosts: Hosts, route: Route, seconds: float) -> tuple[bool, str, TCPStore]:
    """Whether this launcher serves the store, the address at which this host reaches it, and the store."""
    address = route.own_address if route.to_itself else hosts.address
    if hosts.node_rank == 0 or (hosts.node_rank is None and route.to_itself):
        address = route.own_address
        try:
            return True, address, stores.serve(address, hosts.port, seconds)
        except OSError as error:
            # Of hosts that number themselves the first launcher on this one serves.
            if hosts.node_rank == 0 or error.errno != errno.EADDRINUSE:
                why = os.strerror(error.errno or errno.EADDRINUSE)
                got = f"{hosts.port}, which this host cannot listen on at {address} ({why})"
                holder = f"end what holds it (ss -ltnp 'sport = {hosts.port}' names it)"
                remedy = f"{holder}, or give all hosts another {hosts.port_variable}"
                problem = Problem(hosts.port_variable, got, "a free port of host 0", remedy)
                raise ConfigError(problem) from None
    else:
        await_host(address, hosts.port, seconds, "host 0")
    refuse_foreign(address, hosts.port, hosts.port_variable)
    return False, address, stores.connect(address, hosts.port, seconds)
