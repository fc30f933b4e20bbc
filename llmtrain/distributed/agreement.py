"""Ranks meet and compare what they were started with, before any of them waits for another in training.

They speak through a store alone, not through a process group: ranks that disagree on the device could
not even form one. Costs each rank a few messages, at any number of ranks.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from llmtrain.errors import LaunchError, Problem

if TYPE_CHECKING:
    from torch.distributed import Store

NOT_COMPARED = ("data.path", "data.sources.", "data.cache.")
"""A corpus may lie elsewhere on each host: its content is compared. Not so run.dir, where all ranks
write their parts of one checkpoint."""

POLL_SECONDS = 0.02, 0.5
"""Between looks at the store, at first and at last: torch prints pages when a wait of its own fails."""
GRACE_SECONDS = 30.0
"""How much longer than the judge of a meeting the others wait for what it found."""
GOODBYE_SECONDS = 5.0
"""How long rank 0, which may host the store, waits for the others to read of a failure."""


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on all ranks."""

    value: Any
    """Fit for JSON."""
    remedy: str
    """What to do where it differs."""


Facts = Mapping[str, Fact]


def run_facts(config: Mapping[str, Any], device_type: str, data: str | None) -> dict[str, Fact]:
    """Of a training run: every key of its encoded config, the device, what `data` holds (a fingerprint),
    and the versions of what computes."""
    command, versions = "start all ranks with the same command", "install the same version on all hosts"
    facts = {
        key: Fact(value, command) for key, value in _flat(config).items() if not key.startswith(NOT_COMPARED)
    }
    facts["device type"] = Fact(device_type, "give device=cpu, or a GPU to each rank")
    facts["content of data.path"] = Fact(data, "copy the same corpus to all hosts")
    facts["version of python"] = Fact(platform.python_version(), versions)
    for package in ("llmtrain", "torch", "deepspeed"):
        facts[f"version of {package}"] = Fact(metadata.version(package), versions)
    return facts


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            keys |= _flat(value, f"{prefix}{name}.")
        else:
            keys[prefix + name] = value
    return keys


def disagreements(facts_of_ranks: Sequence[Facts]) -> list[Problem]:
    """A problem for each fact and each group of ranks that differ from most of them; in a tie from rank
    0's side. A fact that a rank lacks is null."""
    problems = []
    for key in dict.fromkeys(key for facts in facts_of_ranks for key in facts):
        values = [json.dumps(facts[key].value) if key in facts else "null" for facts in facts_of_ranks]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        others = "the other rank has" if len(values) == 2 else f"the other {counts[usual]} ranks have"
        if len(counts) > 2:
            others = f"{counts[usual]} ranks have"
        remedy = next(facts[key].remedy for facts in facts_of_ranks if key in facts)
        for value in dict.fromkeys(values):
            if value != usual:
                ranks = [rank for rank, own in enumerate(values) if own == value]
                got = f"{_shown(value)}, {others} {_shown(usual)}"
                problems.append(Problem(f"{name_ranks(ranks)}: {key}", got, remedy=remedy))
    return problems


def _shown(value: str) -> str:
    return value[1:-1] if value.startswith('"') else value


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 4-7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def meet(store: Store, rank: int, size: int, facts: Facts, timeout_seconds: float) -> None:
    """Wait until all `size` ranks are at this point, and compare their facts.

    store: the ranks' own; every launch needs a new one, or another prefix.
    Raises LaunchError on all ranks alike: ranks are missing after `timeout_seconds`, or their facts differ.
    """
    from torch.distributed import DistError

    text = json.dumps({key: [fact.value, fact.remedy] for key, fact in facts.items()})
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    try:
        # Ranks that agree write the same text, which the store so holds once.
        store.set(f"facts/{digest}", text)
        store.set(f"arrived/{rank}", digest)
        place = store.add("arrived", 1)
        if place == size:
            store.set("complete", "")
        if place == 1:
            verdict = _judge(store, size, timeout_seconds)
            store.set("verdict", json.dumps([vars(problem) for problem in verdict]))
        store.wait(["verdict"], datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS))
        problems = [Problem(**problem) for problem in json.loads(store.get("verdict"))]
        if problems and store.add("read", 1) == store.add("arrived", 0):
            store.set("all read", "")
    except DistError as error:
        detail = str(error).partition("\n")[0]
        raise LaunchError(
            Problem("start", f"no word from the other ranks ({detail})", remedy="their own messages tell why")
        ) from error
    if problems:
        if rank == 0:
            _await(store, "all read", GOODBYE_SECONDS)
        failure = LaunchError(problems)
        # Rank 0 tells for all, if it is there.
        failure.everywhere = store.check(["arrived/0"]) if rank else True
        raise failure


def _judge(store: Store, size: int, timeout_seconds: float) -> list[Problem]:
    keys = [f"arrived/{rank}" for rank in range(size)]
    if not _await(store, "complete", timeout_seconds):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        got = f"{size - len(missing)} of {size} ranks within {timeout_seconds:g} s, not {name_ranks(missing)}"
        return [Problem("start", got, remedy="see what those said, or wait longer by START_TIMEOUT=seconds")]
    digests = [digest.decode() for digest in store.multi_get(keys)]
    if len(set(digests)) == 1:
        return []
    known = {
        digest: {key: Fact(*fact) for key, fact in json.loads(store.get(f"facts/{digest}")).items()}
        for digest in set(digests)
    }
    return disagreements([known[digest] for digest in digests])


def _await(store: Store, key: str, seconds: float) -> bool:
    """Whether `key` came in time."""
    deadline = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True
