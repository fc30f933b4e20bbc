"""Wait for all ranks at startup and compare their configs, devices, data and package versions.

Uses the key-value store alone, not a process group: ranks that disagree on the device could not form one.
Each rank sends a few messages, whatever the number of ranks.
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
"""Keys that may differ: a corpus may have another path on each host, so its content is compared instead.
run.dir is compared, because all ranks write their parts of one checkpoint there."""

POLL_SECONDS = 0.02, 0.5
"""First and longest interval between polls of the store; torch's own wait prints a long trace on timeout."""
GRACE_SECONDS = 30.0
"""How much longer the other ranks wait for the verdict than the judging rank waits for arrivals."""
GOODBYE_SECONDS = 5.0
"""How long rank 0, which may host the store, waits for the others to read a failure before it exits."""


@dataclass(frozen=True)
class Fact:
    """A value that must be equal on all ranks."""

    value: Any
    """JSON-serializable."""
    remedy: str
    """What the user should do if it differs."""


Facts = Mapping[str, Fact]


def run_facts(config: Mapping[str, Any], device_type: str, data: str | None) -> dict[str, Fact]:
    """Return the facts of a training run: all keys of its encoded config, the device type, the fingerprint of
    the data, and package versions."""
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
    """Return one problem for each fact and each group of ranks that differs from the majority; in a tie, from
    rank 0's group. A fact that a rank lacks counts as null."""
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
                problems.append(Problem(f"{format_ranks(ranks)}: {key}", got, remedy=remedy))
    return problems


def _shown(value: str) -> str:
    return value[1:-1] if value.startswith('"') else value


def format_ranks(ranks: Sequence[int]) -> str:
    """Format as `rank 3` or `ranks 1, 4-7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def check_ranks_agree(store: Store, rank: int, size: int, facts: Facts, timeout_seconds: float) -> None:
    """Wait until all `size` ranks have arrived and compare their facts.

    store: shared by the ranks; every launch needs a new store or a new prefix.
    Raise LaunchError on all ranks if ranks are missing after `timeout_seconds`, or facts differ.
    """
    from torch.distributed import DistError

    text = json.dumps({key: [fact.value, fact.remedy] for key, fact in facts.items()})
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    try:
        # Ranks that agree write the same key, so the store holds the text once.
        store.set(f"facts/{digest}", text)
        store.set(f"arrived/{rank}", digest)
        arrival = store.add("arrived", 1)
        if arrival == size:
            store.set("complete", "")
        if arrival == 1:
            verdict = _judge(store, size, timeout_seconds)
            store.set("verdict", json.dumps([vars(problem) for problem in verdict]))
        store.wait(["verdict"], datetime.timedelta(seconds=timeout_seconds + GRACE_SECONDS))
        problems = [Problem(**problem) for problem in json.loads(store.get("verdict"))]
        if problems and store.add("read", 1) == store.add("arrived", 0):
            store.set("all read", "")
    except DistError as error:
        detail = str(error).partition("\n")[0]
        raise LaunchError(
            Problem("start", f"no answer from the other ranks ({detail})", remedy="see their messages")
        ) from error
    if problems:
        if rank == 0:
            _await(store, "all read", GOODBYE_SECONDS)
        failure = LaunchError(problems)
        # Rank 0 prints the message for all ranks, if it has arrived.
        failure.everywhere = store.check(["arrived/0"]) if rank else True
        raise failure


def _judge(store: Store, size: int, timeout_seconds: float) -> list[Problem]:
    keys = [f"arrived/{rank}" for rank in range(size)]
    if not _await(store, "complete", timeout_seconds):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        got = (
            f"{size - len(missing)} of {size} ranks within {timeout_seconds:g} s, not {format_ranks(missing)}"
        )
        remedy = "see the messages of the missing ranks, or wait longer with START_TIMEOUT=seconds"
        return [Problem("start", got, remedy=remedy)]
    digests = [digest.decode() for digest in store.multi_get(keys)]
    if len(set(digests)) == 1:
        return []
    known = {
        digest: {key: Fact(*fact) for key, fact in json.loads(store.get(f"facts/{digest}")).items()}
        for digest in set(digests)
    }
    return disagreements([known[digest] for digest in digests])


def _await(store: Store, key: str, seconds: float) -> bool:
    """Return whether `key` appeared in time."""
    deadline = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True
