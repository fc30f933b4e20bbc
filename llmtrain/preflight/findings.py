"""What is off: facts and figures of all ranks to problems, each of which names a host, a rank or a link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median, median_high
from typing import Any

from llmtrain.checkpoint.config import SHARED_MEMORY
from llmtrain.errors import Problem
from llmtrain.preflight.config import PreflightConfig
from llmtrain.preflight.links import Link
from llmtrain.preflight.places import Places
from llmtrain.preflight.units import Unit, size_text, speed_text

Inventories = Sequence[Mapping[str, Any]]


def version_problems(inventories: Inventories, places: Places) -> list[Problem]:
    """Return a problem for each version that some ranks have and most have not."""
    known = dict.fromkeys(name for own in inventories for name in own["versions"])
    remedy = "install the same version on all hosts"
    found = []
    for name in known:
        values = [own["versions"].get(name) for own in inventories]
        found += _odd_ones(f"version of {name}", values, places, remedy)
    return found


def host_problems(inventories: Inventories, places: Places, config: PreflightConfig) -> Iterator[Problem]:
    """Yield what is off on single hosts: GPUs, their driver and errors, memory and disks."""
    leaders = [places.leaders[places.host_of(rank)] for rank in range(len(inventories))]
    for key, name in (("driver", "NVIDIA driver"), ("count", "number of GPUs")):
        values = [inventories[leader]["gpus"].get(key) for leader in leaders]
        yield from _odd_ones(name, values, places, "see nvidia-smi there")
    devices = [own["device"]["name"] for own in inventories]
    yield from _odd_ones("device", devices, places, "give all ranks the same kind of device")
    for host, leader in enumerate(places.leaders):
        own = inventories[leader]
        for line in own["gpus"].get("errors", ()):
            yield Problem(f"host {places.names[host]}", line, "none", "take this host out, or reset its GPU")
        disks = {"run": f"disk of {config.run.dir}", "tmp": "disk for temporary files"}
        names = {**disks, "memory": "memory", "shm": str(SHARED_MEMORY)}
        for name, free in own["free"].items():
            least = getattr(config.room, f"{name}_bytes")
            if free is not None and free < least:
                where = f"host {places.names[host]}: {names[name]}"
                remedy = f"make room, or set room.{name}_bytes"
                yield Problem(where, f"{size_text(free)} free", f"{size_text(least)} or more", remedy)


def clock_problems(offsets: Sequence[float], places: Places, config: PreflightConfig) -> Iterator[Problem]:
    """Yield each host whose clock differs from the median of all; of two hosts neither is known to be
    right."""
    if len(offsets) == 2 and abs(offsets[1]) > config.clock_seconds:
        both = " and ".join(places.names)
        got = f"clocks {abs(offsets[1]):.1f} s apart"
        yield Problem(f"hosts {both}", got, f"{config.clock_seconds:g} s", "see their time service (chronyc)")
    if len(offsets) > 2:
        usual = median(offsets)
        for name, offset in zip(places.names, offsets, strict=True):
            if abs(offset - usual) > config.clock_seconds:
                got = f"a clock {offset - usual:+.1f} s from the others'"
                remedy = "see its time service (chronyc)"
                yield Problem(f"host {name}", got, f"{config.clock_seconds:g} s", remedy)


def speed_problems(
    figures: Sequence[Mapping[str, float]], places: Places, config: PreflightConfig
) -> Iterator[Problem]:
    """Yield each host or rank that is slower than the median of all ranks by the factor.

    figures: name → FLOP/s or bytes a second, for each rank. Of two middle values the higher is the median, so
    that of two ranks the slow one is named."""
    for name in dict.fromkeys(name for own in figures for name in own):
        values = {rank: own[name] for rank, own in enumerate(figures) if name in own}
        usual = median_high(values.values())
        slow = [rank for rank, value in values.items() if value * config.factor < usual]
        groups = _by_host(slow, places)
        if name.startswith("all-reduce"):  # its ranks wait for each other
            groups = [list(ranks) for ranks in places.ranks if set(ranks) <= set(slow)]
        for ranks in groups:
            lowest = min(values[rank] for rank in ranks)
            yield _slow(places.name_of(ranks), name, lowest, usual, config)


def link_problems(links: Sequence[Link], places: Places, config: PreflightConfig) -> Iterator[Problem]:
    """Yield each link that is slower than the median of its kind by the factor, and the rank or host that
    several of them have in common."""
    for between_hosts in (False, True):
        kind = [link for link in links if link.between_hosts == between_hosts]
        if not kind:
            continue
        usual = median_high(link.bytes_per_second for link in kind)
        slow = [link for link in kind if link.bytes_per_second * config.factor < usual]

        def place(rank: int, hosts: bool = between_hosts) -> int:
            return places.host_of(rank) if hosts else rank

        shared = _in_common([(place(link.first), place(link.second)) for link in slow])
        for number in shared:
            ends = places.ranks[number] if between_hosts else (number,)
            of_it = [link for link in slow if number in (place(link.first), place(link.second))]
            lowest = min(link.bytes_per_second for link in of_it)
            yield _slow(places.name_of(ends), "messages to its neighbours", lowest, usual, config)
        for link in slow:
            if not {place(link.first), place(link.second)} & set(shared):
                names = f"{places.name_of([link.first])} and {places.name_of([link.second])}"
                yield _slow(names, "messages between them", link.bytes_per_second, usual, config)


def _in_common(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the places that have two slow links or more, that with the most first."""
    left, found = list(pairs), []
    while left:
        counts = Counter(end for pair in set(left) for end in pair)
        place, count = counts.most_common(1)[0]
        if count < 2:
            break
        found.append(place)
        left = [pair for pair in left if place not in pair]
    return found


def _slow(where: str, name: str, value: float, usual: float, config: PreflightConfig) -> Problem:
    unit: Unit = "FLOP" if name.endswith("products") else "B"
    got = f"{speed_text(value, unit)}, {usual / value:.1f} times slower than the median"
    allowed = f"{speed_text(usual / config.factor, unit)} or more (factor={config.factor:g})"
    return Problem(f"{where}: {name}", got, allowed, "see what else runs there, or take it out")


def _odd_ones(name: str, values: Sequence[Any], places: Places, remedy: str) -> list[Problem]:
    """Return a problem for each group of ranks whose value is not the most common; in a tie rank 0's is."""
    counts = Counter(values)
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    found = []
    for value in counts:
        if value != usual:
            ranks = [rank for rank, own in enumerate(values) if own == value]
            others = f"{value or 'none'}, most ranks have {usual or 'none'}"
            if len(counts) == 2 and counts[usual] == counts[value]:
                others = f"{value or 'none'}, the other ranks have {usual or 'none'}"
            found.append(Problem(f"{places.name_of(ranks)}: {name}", others, "", remedy))
    return found


def _by_host(ranks: Sequence[int], places: Places) -> list[list[int]]:
    """Return the ranks in groups: those of a host that has them all together, and the others one by one."""
    found = []
    for own in places.ranks:
        slow = [rank for rank in own if rank in ranks]
        found += [slow] if len(slow) == len(own) else [[rank] for rank in slow]
    return [group for group in found if group]
