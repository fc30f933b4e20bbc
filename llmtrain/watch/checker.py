"""Compare the collectives of all ranks, from their rings, and name the first in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.distributed.agreement import format_ranks
from llmtrain.errors import Problem
from llmtrain.watch.layout import KIND_NAMES
from llmtrain.watch.report import short
from llmtrain.watch.ring import DTYPES, NO_TENSOR, SEVERAL


@dataclass(frozen=True)
class Calls:
    """The last collectives of one rank."""

    rank: int
    host: str
    records: np.ndarray
    """layout.RECORD (n,), oldest first."""
    places: list[str]
    """Source lines that the records number."""

    def of_group(self, key: int) -> dict[int, Any]:
        """Return number → record of the group's collectives."""
        chosen = self.records[self.records["key"] == key]
        return {int(record["number"]): record for record in chosen}

    def last(self) -> dict[int, tuple[int, int]]:
        """Return key of each group → (number of its last collective, first number that the ring has)."""
        keys, first = np.unique(self.records["key"], return_index=True)
        reversed_keys, from_end = np.unique(self.records["key"][::-1], return_index=True)
        assert (keys == reversed_keys).all()
        numbers = self.records["number"]
        return {
            int(key): (int(numbers[len(numbers) - 1 - end]), int(numbers[begin]))
            for key, begin, end in zip(keys, first, from_end, strict=True)
        }

    def chain_at(self, key: int, number: int) -> int | None:
        """Return the checksum of all collectives of the group up to a number; None if the ring has not got
        it."""
        chosen = self.records[(self.records["key"] == key) & (self.records["number"] == number)]
        return int(chosen["chain"][0]) if len(chosen) else None


def first_divergence(of_ranks: list[Calls]) -> Problem | None:
    """Return what is wrong with the first collective in which ranks of one group differ; None if all agree
    as far as they have come."""
    lasts = {calls.rank: calls.last() for calls in of_ranks}
    for key in dict.fromkeys(key for last in lasts.values() for key in last):
        members = [calls for calls in of_ranks if key in lasts[calls.rank]]
        common = min(lasts[calls.rank][key][0] for calls in members)
        chains = {calls.chain_at(key, common) for calls in members} - {None}
        if len(chains) > 1:
            return _named(key, common, members)
    return None


def _named(key: int, common: int, members: list[Calls]) -> Problem:
    by_rank = {calls.rank: calls.of_group(key) for calls in members}
    begin = max(min(records) for records in by_rank.values())
    number = next(
        (
            n
            for n in range(begin, common + 1)
            if len({_chain(records, n) for records in by_rank.values()}) > 1
        ),
        common,
    )
    # Of several that differ, the fewest are wrong; of two, both are shown.
    votes = Counter(_chain(records, number) for records in by_rank.values())
    usual, _ = max(
        votes.items(), key=lambda item: (item[1], _chain(by_rank[min(by_rank)], number) == item[0])
    )
    odd = next(calls for calls in members if _chain(by_rank[calls.rank], number) != usual)
    agreeing = [calls for calls in members if _chain(by_rank[calls.rank], number) == usual]
    got = f"{_text(odd, by_rank[odd.rank].get(number))} as number {number:,} among its ranks"
    others = format_ranks([calls.rank for calls in agreeing])
    allowed = f"what {others} called: {_text(agreeing[0], by_rank[agreeing[0].rank].get(number))}"
    remedy = "a rank has left out a collective or called another one; compare these two lines"
    return Problem(f"rank {odd.rank} on {odd.host}", got, allowed, remedy)


def _chain(records: Mapping[int, Any], number: int) -> int | None:
    record = records.get(number)
    return None if record is None else int(record["chain"])


def _text(calls: Calls, record: Any) -> str:
    if record is None:
        return "nothing that is still known"
    dims, dtype = int(record["dims"]), int(record["dtype"])
    what = KIND_NAMES[int(record["kind"])]
    if dtype != NO_TENSOR:
        what += f" of {str(DTYPES[dtype]).removeprefix('torch.')}"
        shape = tuple(int(n) for n in record["shape"])
        what += f", {shape[0]} tensors" if dims == SEVERAL else f" {shape[:dims]}"
    place = int(record["place"])
    where = calls.places[place] if place < len(calls.places) else "?"
    file, _, line = where.rpartition(":")
    micro = f", micro-batch {record['micro']}" if record["micro"] >= 0 else ""
    return f"{what} at {short(file)}:{line} in step {record['step']:,}{micro}"
