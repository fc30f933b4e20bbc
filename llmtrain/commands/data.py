"""`llmtrain data VERB`: the documents of a step, their text, and one hash over all that a run consumed.

This runs in one process, without a GPU, and changes nothing of the run.

The stream of a run is a pure function of data.json in its folder, so it is computed again instead of being
stored. The data_digest that every step recorded proves that the same data is read now as then.
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
"""Exit code of `trace` when the data differs from what the run recorded."""


@dataclass(frozen=True)
class TraceConfig:
    run: Path
    """A run folder."""
    step: str
    """A step N, or FIRST:LAST, both included."""
    output: Path | None = None
    """A file for one JSON object per document; null: print a table."""
    data: MovedConfig = field(default_factory=MovedConfig)


def trace(mapping: Mapping[str, Any]) -> int:
    """Print a line for each document of the steps, then a verdict on each digest; return the exit code.

    Raise UserError for whatever a user can fix.
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
        if left_out := run.left_out_before(step):
            first, last = left_out.start, left_out.stop - 1
            verdicts.append(f"step {step}: samples {first} to {last} before it were left out")
        verdicts.append(verdict)
        if step in run.skipped:
            verdicts.append(f"step {step}: not taken: {run.skipped[step]}")
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
    """Print a table without columns that say nothing, such as the corpus of a run over only one."""
    from llmtrain.data.datasets.base import EMPTY

    columns = {
        "step": len({record["step"] for record in records}) > 1,
        "sample": True,
        "corpus": any(record["corpus"] for record in records),
        "epoch": True,
        "row": True,
        "tar": any("tar" in record for record in records),
        "document": any("document" in record for record in records),
        "tokens": any("tokens" in record for record in records),
    }
    names = [name for name, is_shown in columns.items() if is_shown]
    rows = [names]
    for record in records:
        cells = {name: str(record.get(name, "")) for name in names}
        if record["row"] == EMPTY:
            cells["row"] = "skipped"
        if "tar" in record:
            cells["tar"] = PurePosixPath(record["tar"]).name
        rows.append(list(cells.values()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    is_text = [name in ("corpus", "tar") for name in names]
    for row in rows:
        cells_of = zip(row, widths, is_text, strict=True)
        print("  ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in cells_of).rstrip())


@dataclass(frozen=True)
class DigestConfig:
    run: Path
    """A run folder."""
    steps: int | None = None
    """Number of steps, from the first on; null: all recorded steps."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more, or null")


def digest(mapping: Mapping[str, Any]) -> None:
    """Print one hash over the data of the first steps; runs that consumed the same data have the same hash.

    Raise UserError if a step was not recorded.
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
    """Yield (first, last) of each range within 1 … `last` that contains none of the ascending `steps`."""
    for before, after in pairwise([0, *steps, last + 1]):
        if after > before + 1:
            yield before + 1, after - 1


def _told(gaps: Sequence[tuple[int, int]]) -> str:
    """Return ranges in words, such as "steps 3, 5 to 8"."""
    told = [str(first) if first == last else f"{first} to {last}" for first, last in gaps[:FEW]]
    more = f" and {len(gaps) - FEW} stretches more" if len(gaps) > FEW else ""
    return ("step " if gaps[0][0] == gaps[-1][1] else "steps ") + ", ".join(told) + more
