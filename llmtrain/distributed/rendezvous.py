"""Rendezvous of the launchers of a run's hosts: wait for the hosts, assign a node rank to each, and after a
failure meet again.

Uses a store that listens on one address and holds numbers and JSON. torch's own `c10d` rendezvous listens on
all addresses and unpickles whatever anybody writes there.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from llmtrain.distributed import stores
from llmtrain.distributed.admission import Admission, Helpers
from llmtrain.distributed.hosts import Hosts, Route, require_store
from llmtrain.distributed.launcher import MissingHostsError, await_host
from llmtrain.distributed.liveness import Heartbeats, Pulse, beat
from llmtrain.distributed.restarts import Ending, Verdict
from llmtrain.distributed.succession import Succession, may_succeed
from llmtrain.errors import ConfigError, LaunchError, Problem

BACKEND = "llmtrain"
"""The name under which the rendezvous is registered with torch's agent."""
POLL_SECONDS = 0.2
LOOK_SECONDS = 0.5
"""Interval of looking whether another host has failed."""
FOLLOW_SECONDS = 6.0
"""How long the ranks of a host may go on, and say what they know, once those of another have failed."""
GOODBYE_SECONDS = 5.0
"""How long host 0, which serves the store, waits for the others to read what becomes of the job."""


class StoppedWaitingError(Exception):
    """This launcher was asked to stop while it waited for others."""


class JobOverError(Exception):
    """The job ended while this launcher waited for a restart."""

    def __init__(self, code: int) -> None:
        """code: the exit code of the job."""
        super().__init__(f"the job ended with exit code {code}")
        self.code = code


class Rendezvous(RendezvousHandler):
    """The rendezvous handler of one launcher, called by torch's agent, once for each attempt of the job."""

    def __init__(
        self, hosts: Hosts, route: Route, seconds: float, helpers: Helpers | None = None, first: int = 1
    ) -> None:
        """Serve the store if this is the serving host, else connect to it.

        seconds: timeout for the store, and again for the other hosts. first: number of the first attempt.
        Raise ConfigError if this host cannot listen, or another program uses the port; MissingHostsError if
        host 0 does not answer.
        """
        self._hosts, self._seconds, self._first = hosts, seconds, first
        self._own_address, self._addresses = route.own_address, [""]
        self._helpers = helpers or Helpers()
        self._serves, self._address, self._store = _open_store(hosts, route, seconds)
        self._launchers = PrefixStore("launchers", self._store)
        self._heartbeats = Heartbeats(self._launchers)
        self._name: int | None = None
        self._pulse: Pulse | None = None
        self._members: list[int] = []
        self.attempt = 0
        """The number of the attempt that this host takes part in."""
        self._next_look = self._follows_at = 0.0
        self._followed = False

    @property
    def is_supervised(self) -> bool:
        """Return whether the job goes on after a failure."""
        return self._hosts.max_restarts > 0

    @property
    def serves(self) -> bool:
        """Return whether this host decides what becomes of the job."""
        return self._serves

    @property
    def followed(self) -> bool:
        """Return whether this host ended its ranks in the attempt because those of another had failed."""
        return self._followed

    @property
    def num_nodes(self) -> int:
        """Return the number of hosts of the attempt."""
        return len(self._members)

    def settings(self) -> dict[str, RendezvousHandler]:
        """Return the `rdzv_configs` by which torch's launcher passes this handler to its agent."""
        rendezvous_handler_registry.register(BACKEND, _from_settings)
        return {"handler": self}

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the hosts; return the node rank of this host and the store, which the ranks use too.

        Raise MissingHostsError if hosts are missing; LaunchError if this host does not belong to the run;
        StoppedWaitingError if this launcher is asked to stop meanwhile, JobOverError if the job ends.
        """
        node_rank = self._node_rank()
        ranks_store = RendezvousStoreInfo(self._address, self._store.port)
        own = PrefixStore(f"agent/{self.attempt}", self._store)
        return RendezvousInfo(own, node_rank, self.num_nodes, ranks_store)

    def _node_rank(self) -> int:
        store = self._launchers
        run = store.compare_set("run", "", self._hosts.run_id).decode()
        if run != self._hosts.run_id:
            got = f"{self._store.port} of {self._address}, which the run {run!r} uses"
            remedy = "give each run its own port, or all hosts of one run the same RDZV_ID"
            raise LaunchError(Problem(self._hosts.port_variable, got, remedy=remedy))
        if self._name is None:
            self._name = self._new_name()
        while True:
            attempt = int(store.compare_set("attempt", "", str(self._first)))
            node_rank = self._join(attempt)
            if node_rank is not None:
                self.attempt = attempt
                self._follows_at, self._followed = 0.0, False
                self._helpers.check_folder(self._of_attempt, node_rank, self.num_nodes)
                return node_rank
            if not self.is_supervised:
                got = f"too many hosts: all {self._hosts.num_nodes} have joined without this one"
                remedy = "give each host its own NODE_RANK, or wait for the earlier launch to end"
                raise LaunchError(Problem("start", got, remedy=remedy))
            self._helpers.left_out()
            print("llmtrain: the job runs without this host, which waits for a restart", file=sys.stderr)
            self._await_attempt_after(attempt)

    def _give_signs_of_life(self) -> None:
        if self.is_supervised and self._pulse is None:
            assert self._name is not None
            self._pulse = Pulse(self._address, self._store.port, self._name, self._on_lost)

    @property
    def _of_attempt(self) -> Store:
        return PrefixStore(f"attempt {self.attempt}", self._launchers)

    def _new_name(self) -> int:
        """Return the number that identifies this launcher; the serving one is 0."""
        if self._serves:
            return 0
        return self._launchers.add("names", 1) if self._hosts.node_rank is None else self._hosts.node_rank

    def _join(self, attempt: int) -> int | None:
        """Wait until the hosts of an attempt are admitted; return the node rank of this one, None if it is
        not among them."""
        own = PrefixStore(f"attempt {attempt}", self._launchers)
        if self.is_supervised and own.check(["admitted"]):
            return None  # it began without this host, which may have come in the place of one that is gone
        self._give_signs_of_life()
        own.set(f"ready {self._name}", self._own_address)
        deadline = time.monotonic() + self._seconds
        admission = Admission(self._hosts, self._heartbeats, own, self._helpers, attempt == self._first)
        while not own.check(["admitted"]):
            assert self._name is not None
            beat(self._launchers, self._name)
            missing = admission.admit(self._names()) if self._serves else "host 0 waits for others"
            if self._helpers.is_stopping():
                raise StoppedWaitingError
            if time.monotonic() > deadline and not own.check(["admitted"]):
                wanted = f"{self._hosts.num_nodes} hosts"
                if self._hosts.is_elastic:
                    wanted = f"{self._hosts.least} to {wanted}"
                got = f"not all {wanted} within {self._seconds:g} s ({missing})"
                remedy = "see the messages of the other hosts, or wait longer with START_TIMEOUT=seconds"
                raise MissingHostsError(Problem("start", got, remedy=remedy))
            time.sleep(POLL_SECONDS)
        admitted: list[int] = json.loads(own.get("admitted"))
        if self._name not in admitted or own.add(f"taken {self._name}", 1) > 1:
            return None
        self._members = admitted
        self._addresses = [own.get(f"ready {name}").decode() for name in admitted]
        return admitted.index(self._name)

    def _names(self) -> range:
        """Return the names that launchers can have."""
        if self._hosts.node_rank is None:
            return range(self._launchers.add("names", 0) + 1)
        return range(self._hosts.num_nodes)

    def _await_attempt_after(self, attempt: int) -> None:
        assert self._name is not None
        own, predecessor = PrefixStore(f"attempt {attempt}", self._launchers), Heartbeats(self._launchers)
        has_predecessor = self._name in json.loads(own.get("admitted"))
        while int(self._launchers.get("attempt")) <= attempt:
            # Host 0 knows hosts by their names alone: a sign of life of this launcher would be taken for one
            # of the launcher that it replaces, and the end of that one's ranks be waited for.
            if not has_predecessor:
                self._give_signs_of_life()
            elif not predecessor.alive([self._name]):
                own.set(f"gone {self._name}", "")
                has_predecessor = False
            if self._helpers.is_stopping():
                raise StoppedWaitingError
            if self._launchers.check(["over"]):
                code = int(self._launchers.get("over"))
                own.add("read", 1)
                print("llmtrain: the job ended while this host waited", file=sys.stderr)
                raise JobOverError(code)
            time.sleep(POLL_SECONDS)

    @property
    def succession(self) -> Succession | None:
        """What is known for the case that host 0 is lost; None where the job does not go on without it."""
        if self._serves or not self.attempt or not may_succeed(self._hosts):
            return None
        assert self._name is not None
        own = self._members.index(self._name)
        return Succession(tuple(self._addresses), own, self.attempt + 1)

    def _on_lost(self) -> None:
        self._helpers.end_ranks()
        if (succession := self.succession) is not None:
            self._helpers.on_lost(succession)

    # The end of an attempt

    def conclude(self, ending: Ending, decide: Callable[[dict[str, Ending | None]], Verdict]) -> Verdict:
        """Tell the other hosts how the ranks of this one ended; return what becomes of the job, which host 0
        decides when all have ended or are gone.

        decide: name of each host → its ending, None for one that is gone → the verdict; host 0 calls it.
        """
        own = self._of_attempt
        if self._followed:
            ending = Ending(ending.code, ending.what, ending.asked, followed=True)
        own.set(f"ending {self._name}", json.dumps(asdict(ending)))
        if ending.code:
            own.set("failed", "")
        if not self._serves:
            while not own.check(["verdict"]):
                time.sleep(POLL_SECONDS)
            verdict = Verdict(**json.loads(own.get("verdict")))
            own.add("read", 1)
            return verdict
        verdict = decide(self._endings(own))
        if verdict.restart:
            self._launchers.set("attempt", str(self.attempt + 1))
        else:
            self._launchers.set("over", str(verdict.code))
        own.set("verdict", json.dumps(asdict(verdict)))
        if not verdict.restart:
            deadline = time.monotonic() + GOODBYE_SECONDS
            others = len(self._heartbeats.alive(self._names())) - 1  # those that wait read it too
            while own.add("read", 0) < others and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        return verdict

    def _endings(self, own: Store) -> dict[str, Ending | None]:
        """Wait until the ranks of each host have ended, or the host is gone."""
        found: dict[int, Ending | None] = {}
        while len(found) < len(self._members):
            alive = self._heartbeats.alive(self._members)
            for name in self._members:
                if own.check([f"ending {name}"]):
                    found[name] = Ending(**json.loads(own.get(f"ending {name}")))
                elif name not in alive or own.check([f"gone {name}"]):
                    found[name] = None
            time.sleep(POLL_SECONDS)
        return {str(self._members.index(name)): found[name] for name in self._members}

    def _follow_failures(self) -> None:
        """End the ranks of this host some seconds after those of another one failed, which they may wait
        for."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        try:
            self._look(now)
        except DistError:
            self._helpers.end_ranks()
            raise

    def _look(self, now: float) -> None:
        own = self._of_attempt
        if self._serves and len(self._heartbeats.alive(self._members)) < len(self._members):
            own.set("failed", "")
        if not self._follows_at and own.check(["failed"]):
            self._follows_at = now + FOLLOW_SECONDS
        if self._follows_at and now > self._follows_at and not self._followed:
            self._followed = True
            self._helpers.end_ranks()

    # What torch's agent asks

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._hosts.run_id

    def num_nodes_waiting(self) -> int:
        """Return 0: no host joins an attempt that has begun. The agent asks several times a second."""
        if self.is_supervised:
            self._follow_failures()
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True

    def close(self) -> None:
        """Give no further signs of life."""
        if self._pulse is not None:
            self._pulse.stop()


def _from_settings(parameters: RendezvousParameters) -> RendezvousHandler:
    handler: RendezvousHandler = parameters.config["handler"]
    return handler


def _open_store(hosts: Hosts, route: Route, seconds: float) -> tuple[bool, str, TCPStore]:
    """Return whether this launcher serves the store, the address at which this host reaches it, and the
    store."""
    address = route.own_address if route.is_local else hosts.address
    if hosts.node_rank == 0 or (hosts.node_rank is None and route.is_local):
        address = route.own_address
        try:
            return True, address, stores.serve(address, hosts.port, seconds)
        except OSError as error:
            # If hosts number themselves, the first launcher on this host serves; a later one connects.
            if hosts.node_rank == 0 or error.errno != errno.EADDRINUSE:
                why = os.strerror(error.errno or errno.EADDRINUSE)
                got = f"{hosts.port}, on which this host cannot listen at {address} ({why})"
                holder = f"end the program that uses it (ss -ltnp 'sport = {hosts.port}' names it)"
                remedy = f"{holder}, or give all hosts another {hosts.port_variable}"
                problem = Problem(hosts.port_variable, got, "a free port of host 0", remedy)
                raise ConfigError(problem) from None
    else:
        await_host(address, hosts.port, seconds, "host 0")
    require_store(address, hosts.port, hosts.port_variable)
    return False, address, stores.connect(address, hosts.port, seconds)
