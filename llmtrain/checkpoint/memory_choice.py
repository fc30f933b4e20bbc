"""Choose the copy of the state in memory that ranks resume from, given what each host still holds. Free of
torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Held:
    """What one host holds of the copy of one step."""

    manifest: str
    """The checksum of its manifest, by which hosts know that they mean the same copy."""
    num_files: int
    """How many files the manifest lists."""
    files: frozenset[str]
    """Those of them that this host holds."""


class Choice(NamedTuple):
    """A copy whose every file some host holds."""

    step: int
    manifest: str
    """The checksum of its manifest."""
    holders: tuple[int, ...]
    """The hosts that have the manifest, and files with it."""


def choose(held: Sequence[Mapping[int, Held]], at_least: int) -> tuple[Choice | None, list[tuple[int, str]]]:
    """Return the newest copy of a step of `at_least` or later of which the hosts together hold every file,
    and the newer steps that were passed over, each with the reason.

    held: of each host, step → what it holds of the copy.
    """
    passed_over: list[tuple[int, str]] = []
    steps = {step for of_host in held for step in of_host if step >= at_least}
    for step in sorted(steps, reverse=True):
        found = {host: of_host[step] for host, of_host in enumerate(held) if step in of_host}
        # Copies of one step with other manifests are of other attempts, and each has files of its own.
        for manifest in sorted({copy.manifest for copy in found.values()}):
            holders = tuple(host for host, copy in found.items() if copy.manifest == manifest)
            there = frozenset.union(*(found[host].files for host in holders))
            of_all = found[holders[0]].num_files
            if len(there) == of_all:
                return Choice(step, manifest, holders), passed_over
            passed_over.append(
                (step, f"no host that is left holds {of_all - len(there)} of its {of_all} files")
            )
    return None, passed_over


def holders_of(file: str, choice: Choice, held: Sequence[Mapping[int, Held]]) -> list[int]:
    """Return the hosts that hold a file of the chosen copy."""
    return [host for host in choice.holders if file in held[host][choice.step].files]
