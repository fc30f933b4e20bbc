"""The table at the end of a sweep: the validation figures of each job, and their mean over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.sweeps import FIGURES_FILE
from llmtrain.track.picture import draw_several, read_curves

SEED = "seed"
MOST_FIGURES = 3
"""Figures of each job that are printed; the files have all."""
CSV_FILE, JSON_FILE, CURVES_FILE = "sweep.csv", "sweep.json", "curves.png"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class SweptJob:
    """One job of a sweep that has ended."""

    values: Mapping[str, str]
    """Swept key → its value, as it was typed."""
    folder: Path
    """Its run folder."""
    step: int | None = None
    """The step that was evaluated; None: the job has no figures."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Those of its best evaluation, if it was asked to find that, else of its last one."""

    @classmethod
    def of(cls, overrides: Sequence[str], swept: set[str], folder: Path, is_complete: bool) -> SweptJob:
        """Return the job with the figures in its run folder.

        overrides: those of the job, `key=value` each; swept: keys that have several values.
        """
        pairs = [override.lstrip("+").partition("=") for override in overrides]
        values = {key: value.strip("'") for key, _, value in pairs if key in swept}
        step, figures = _read(folder) if is_complete else (None, {})
        return cls(values, folder, step, figures)


def _read(folder: Path) -> tuple[int | None, dict[str, float]]:
    try:
        found = json.loads((folder / FIGURES_FILE).read_text())
        chosen = found["best"] or found
        figures = {name: value for name, value in chosen["figures"].items() if value is not None}
        return chosen["step"], figures
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}


def report(jobs: Sequence[SweptJob], folders: Sequence[Path]) -> Iterator[str]:
    """Write the table into the folder of the sweep as csv and JSON; yield the lines to print.

    folders: the folder of the sweep as each job has it. Raise OSError if it cannot be written.
    """
    if not any(job.figures for job in jobs):
        return
    keys = list(dict.fromkeys(key for job in jobs for key in job.values))
    names = list(dict.fromkeys(name for job in jobs for name in job.figures))
    folder = _common(folders)
    groups = list(_groups(jobs))
    _write(folder, jobs, keys, names, groups)
    shown = names[:MOST_FIGURES]
    rows = [[*keys, "step", *shown]]
    for job in jobs:
        figures = [_short(job.figures.get(name)) for name in shown]
        rows.append([*(job.values.get(key, "") for key in keys), _short(job.step), *figures])
    yield "figures of the validation split:"
    yield from _aligned(rows)
    for others, of_seeds, summary in groups:
        which = "".join(f"{key}={value} " for key, value in others.items())
        figures = [f"{name} {mean:.4f} ± {deviation:.4f}" for name, (mean, deviation) in summary.items()]
        yield f"{which}mean ± standard deviation of {of_seeds} seeds: {', '.join(figures[:MOST_FIGURES])}"
    yield f"written to {folder / CSV_FILE} and {folder / JSON_FILE}"


def draw_curves(jobs: Sequence[SweptJob], folders: Sequence[Path]) -> Path | None:
    """Draw the losses of all jobs beside each other into the folder of the sweep; return the picture's path,
    None where fewer than two jobs have any. Raise OSError if it cannot be written."""
    curves = {}
    for job in jobs:
        metrics = job.folder / METRICS_FILE
        name = ", ".join(f"{key}={value}" for key, value in job.values.items()) or job.folder.name
        if metrics.is_file():
            curves[name] = read_curves(metrics)
    if len(curves) < 2:
        return None
    path = _common(folders) / CURVES_FILE
    files.write_atomically(path, draw_several(curves, path.parent.name))
    return path


def _common(folders: Sequence[Path]) -> Path:
    """Return the folder of a sweep."""
    if len(set(folders)) == 1:
        return folders[0]
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))


def _groups(
    jobs: Sequence[SweptJob],
) -> Iterator[tuple[dict[str, str], int, dict[str, tuple[float, float]]]]:
    """Yield for jobs that differ by seed alone: their other values, how many they are, and the mean and the
    standard deviation of each figure that all of them have."""
    together: dict[tuple[tuple[str, str], ...], list[SweptJob]] = {}
    for job in jobs:
        if job.figures and SEED in job.values:
            others = tuple((key, value) for key, value in job.values.items() if key != SEED)
            together.setdefault(others, []).append(job)
    for others, group in together.items():
        if len(group) < 2:
            continue
        common = [name for name in group[0].figures if all(name in job.figures for job in group)]
        summary = {}
        for name in common:
            values = [job.figures[name] for job in group]
            summary[name] = statistics.fmean(values), statistics.stdev(values)
        yield dict(others), len(group), summary


def _write(
    folder: Path,
    jobs: Sequence[SweptJob],
    keys: Sequence[str],
    names: Sequence[str],
    groups: Sequence[tuple[dict[str, str], int, dict[str, tuple[float, float]]]],
) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow([*keys, "run_dir", "step", *names])
    for job in jobs:
        figures = [job.figures.get(name) for name in names]
        writer.writerow([*(job.values.get(key) for key in keys), job.folder, job.step, *figures])
    files.write_atomically(folder / CSV_FILE, table.getvalue())
    document: dict[str, Any] = {
        "jobs": [
            {"overrides": job.values, "run_dir": str(job.folder), "step": job.step, "figures": job.figures}
            for job in jobs
        ],
        "over_seeds": [
            {
                "overrides": others,
                "seeds": count,
                "figures": {name: {"mean": m, "deviation": d} for name, (m, d) in summary.items()},
            }
            for others, count, summary in groups
        ],
    }
    files.write_json_atomically(folder / JSON_FILE, document)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if math.isfinite(value) else "-"
