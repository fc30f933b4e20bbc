"""Where the launchers of an elastic job meet once host 0 is lost."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict

import pytest

from llmtrain.distributed import succession
from llmtrain.distributed.hosts import Hosts
from llmtrain.distributed.succession import SUCCESSION, Succession, inherited, may_succeed
from tests.support.ports import free_port

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(2, 3, True), (5, 8, True), (1, 2, False), (4, 8, False), (None, 3, False)],
)
def test_two_parts_of_a_network_cannot_both_go_on(least: int | None, most: int, expected: bool) -> None:
    assert may_succeed(Hosts(num_nodes=most, least_nodes=least)) == expected


@pytest.mark.parametrize(("serving", "expected"), [(0, 0), (1, 1), (None, 2), (2, 2)])
def test_the_first_host_that_serves_a_store(
    serving: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "LOST_HOST_SECONDS", 0.3)
    monkeypatch.setattr(succession, "HEIR_SECONDS", 0.3)
    hosts = Hosts(num_nodes=3, node_rank=2, address=ADDRESSES[0], port=free_port(), least_nodes=2)
    with socket.socket() as listener:
        if serving is not None:
            listener.bind((ADDRESSES[serving], hosts.port))
            listener.listen()
        found = Succession(ADDRESSES, own=2, attempt=4).meeting_place(hosts)
    assert (found.address, found.port, found.node_rank) == (ADDRESSES[expected], hosts.port, None)


def test_what_a_launcher_knew_is_read_once() -> None:
    known = Succession(ADDRESSES, own=1, attempt=4)
    environment = {SUCCESSION: json.dumps(asdict(known))}
    assert inherited(environment) == known
    assert inherited(environment) is None
    assert inherited({SUCCESSION: "what a user set"}) is None
