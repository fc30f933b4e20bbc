"""How far the clocks of the hosts are apart, asked over the key-value store."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from llmtrain.preflight.places import Places

if TYPE_CHECKING:
    from torch.distributed import Store

ROUNDS = 5
"""Questions to each host; the one with the quickest answer counts."""


def offsets(store: Store, rank: int, places: Places) -> list[float] | None:
    """Return, on rank 0, by how many seconds the clock of each host is ahead of host 0's; None elsewhere.

    All ranks call it. As in NTP (RFC 5905, section 8), an answer is taken to be of the middle between
    question and answer; so an offset is wrong by at most half of the time that passes between them, some
    milliseconds.
    """
    others = list(enumerate(places.leaders))[1:]
    if rank != 0:
        for host, leader in others:
            if leader == rank:
                _answer(store, host)
        return None
    found = [0.0]
    for host, _ in others:
        found.append(_ask(store, host))
    return found


def _ask(store: Store, host: int) -> float:
    best, offset = float("inf"), 0.0
    for number in range(ROUNDS):
        asked, started = time.time(), time.perf_counter()
        store.set(f"clock/{host}/question/{number}", "")
        theirs = json.loads(store.get(f"clock/{host}/answer/{number}"))
        took = time.perf_counter() - started
        if took < best:
            best, offset = took, theirs - (asked + took / 2)
    return offset


def _answer(store: Store, host: int) -> None:
    for number in range(ROUNDS):
        store.get(f"clock/{host}/question/{number}")
        store.set(f"clock/{host}/answer/{number}", json.dumps(time.time()))
