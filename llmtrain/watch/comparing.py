"""Compare the collectives of ranks while they run: those of one host directly, those of several by checksums
first.

The judge asks all hosts for the checksum of each group's collectives up to a number that all its ranks have
reached. Only if these differ do hosts send the collectives themselves.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmtrain.errors import Problem
from llmtrain.watch import layout
from llmtrain.watch.checker import Calls, first_divergence
from llmtrain.watch.neighbours import Folder


class Comparing:
    """The comparison of collectives on one host."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def _calls(self) -> list[Calls]:
        folder = self._folder
        return [Calls(rank, folder.host, *layout.read_ring(folder.file_of(rank))) for rank in folder.ranks]

    def on_this_host(self) -> Problem | None:
        """Return the first collective in which ranks of this host differ."""
        return first_divergence(self._calls())

    def said(self, asked: dict[str, int]) -> dict[str, Any]:
        """Return how far each group has come on this host, and the checksums at the numbers that the judge
        asked for."""
        last: dict[str, int] = {}
        chains: dict[str, int] = {}
        for calls in self._calls():
            for key, (number, _) in calls.last().items():
                last[str(key)] = min(number, last.get(str(key), number))
                chain = calls.chain_at(key, asked[str(key)]) if str(key) in asked else None
                if chain is not None:
                    chains[str(key)] = chain
        return {"last": last, "asked": asked, "chains": chains}

    def next_numbers(self, said: Iterable[dict[str, Any]]) -> dict[str, int]:
        """Return key of each group of several hosts → number that all of them have reached."""
        lasts: dict[str, list[int]] = {}
        for of_host in said:
            for key, number in of_host["last"].items():
                lasts.setdefault(key, []).append(number)
        return {key: min(numbers) for key, numbers in lasts.items() if len(numbers) > 1}

    def differ(self, said: Sequence[dict[str, Any]]) -> bool:
        """Return whether hosts gave different checksums for what they were asked."""
        keys = {key for of_host in said for key in of_host["chains"]}
        return any(len({of_host["chains"].get(key) for of_host in said} - {None}) > 1 for key in keys)

    def rings(self) -> list[dict[str, Any]]:
        """Return the last collectives of each rank of this host, as JSON."""
        return [
            {
                "rank": calls.rank,
                "host": calls.host,
                "records": base64.b85encode(zlib.compress(calls.records.tobytes())).decode(),
                "places": calls.places,
            }
            for calls in self._calls()
        ]

    def of_rings(self, answers: Iterable[dict[str, Any]]) -> Problem | None:
        """Return the first collective in which ranks of any host differ."""
        found = []
        for ring in (ring for answer in answers for ring in answer["rings"]):
            content = zlib.decompress(base64.b85decode(ring["records"]))
            records = np.frombuffer(content, layout.RECORD)
            found.append(Calls(ring["rank"], ring["host"], records, ring["places"]))
        return first_divergence(sorted(found, key=lambda calls: calls.rank))
