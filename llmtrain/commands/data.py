"""`llmtrain data VERB`: which documents made a step of a run, what they say, and one hash over all that a
run consumed. In one process and without a GPU; nothing of a run is changed.

A run's stream is a pure function of what data.json in its folder tells, so it is computed again and not
kept; the data_digest that every step recorded proves that what is read now is what was read then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from llmtrain.commands.data_show import show
from llmtrain.config import decode, require
from llmtrain.errors import FEW, CheckpointError, ConfigError, Problem
from llmtrain.files import disk_problem, write_atomically
from llmtrain.train.recorded_data import METRICS, MovedConfig, Run, recorded_digests, steps_of

__all__ = ["digest", "show", "trace"]

DIFFERENT = 1
"""Exit code of `trace` when what is read now is not what the run recorded."""


@dataclass(frozen=True)
class TraceConfig:
    run: Path
    """A run folder."""
    step: str
    """A step N, or FIRST:LAST, both included."""
    output: Path | None = None
    """A file for one JSON object a document; null: a table is printed."""
    data: MovedConfig = field(default_factory=MovedConfig)


def trace(mapping: Mapping[str, Any]) -> int:
    """A line for each document of the steps, then what their digests say; → exit code.

    Raises UserError for whatever a user can mend.
    """
    from llmtrain.data.trace import digest_of, parts_of, samples_of

    config = decode(TraceConfig, mapping)
    steps = steps_of(config.step)
    run = Run(config.run, config.data)
    run.check_reached(steps)
    records: list[dict[str, Any]] = []
    verdicts: list[str] = []
    code = 0
    for step in steps:
        opened = run.open(step)
        skipped = opened.skipped(step)
        for sample in samples_of(opened.stream, step, skipped):
            facts = dataclasses.asdict(sample)
            parts = parts_of(opened.sources, sample)
            records += [{**facts, **dataclasses.asdict(part)} for part in parts] or [facts]
        found, recorded = digest_of(opened.stream, step, skipped), run.digests.get(step)
        verdict = f"step {step}: data_digest {found}, "
        if recorded is None:
            verdict += "none was recorded"
        elif found == recorded:
            verdict += "as recorded"
        else:
            verdict += f"recorded was {recorded}: these are not the data that the run read"
            code = DIFFERENT
        verdicts.append(verdict)
    if config.output is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            write_atomically(config.output, lines)
        except OSError as error:
            raise ConfigError(disk_problem(error, config.output, key="output")) from error
    else:
        _print_table(records)
    print("\n".join(verdicts), flush=True)
    return code


def _print_table(records: Sequence[Mapping[str, Any]]) -> None:
    """Columns that say nothing are left out: the corpus of a run over one, documents of images."""
    from llmtrain.data.datasets.base import EMPTY

    columns = {
        "step": len({record["step"] for record in records}) > 1,
        "sample": True,
        "corpus": any(record["corpus"] for record in records),
        "epoch": True,
        "row": True,
        "shard": any("shard" in record for record in records),
        "document": any("document" in record for record in records),
        "tokens": any("tokens" in record for record in records),
    }
    names = [name for name, is_shown in columns.items() if is_shown]
    rows = [names]
    for record in records:
        cells = {name: str(record.get(name, "")) for name in names}
        if record["row"] == EMPTY:
            cells["row"] = "skipped"
        if "shard" in record:
            cells["shard"] = PurePosixPath(record["shard"]).name
        rows.append(list(cells.values()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    is_text = [name in ("corpus", "shard") for name in names]
    for row in rows:
        cells_of = zip(row, widths, is_text, strict=True)
        print("  ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in cells_of).rstrip())


@dataclass(frozen=True)
class DigestConfig:
    run: Path
    """A run folder."""
    steps: int | None = None
    """Number of steps from the first on; null: all that are recorded."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more, or null")


def digest(mapping: Mapping[str, Any]) -> None:
    """One hash over what the run's first steps consumed, the same for whoever consumed the same.

    Raises UserError where steps are not recorded.
    """
    from llmtrain.data.trace import hash_digests

    config = decode(DigestConfig, mapping)
    path = config.run / METRICS
    digests = recorded_digests(config.run)
    if not digests:
        raise CheckpointError(Problem(str(path), "no step with a data_digest", "a run of llmtrain train"))
    last = config.steps if config.steps is not None else max(digests)
    missing = list(_gaps(sorted(step for step in digests if 1 <= step <= last), last))
    if missing:
        got = f"no data_digest of {_told(missing)}"
        raise CheckpointError(Problem(str(path), got, f"one of each step from 1 to {last}"))
    together = hash_digests((step, digests[step]) for step in range(1, last + 1))
    print(f"{together}  steps 1 to {last}", flush=True)


def _gaps(steps: Sequence[int], last: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each stretch of 1 … `last` that none of the ascending `steps` is in."""
    for before, after in pairwise([0, *steps, last + 1]):
        if after > before + 1:
            yield before + 1, after - 1


def _told(gaps: Sequence[tuple[int, int]]) -> str:
    """step 3, 5 to 8."""
    told = [str(first) if first == last else f"{first} to {last}" for first, last in gaps[:FEW]]
    more = f" and {len(gaps) - FEW} stretches more" if len(gaps) > FEW else ""
    return ("step " if gaps[0][0] == gaps[-1][1] else "steps ") + ", ".join(told) + more
