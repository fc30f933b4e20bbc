"""The folders of a run, from the text of its overrides: a launcher composes no configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from llmtrain.files import expand_home
from llmtrain.reading import read_bytes


def run_folder(overrides: Iterable[str]) -> Path:
    """Return the run folder that the overrides select, by default as in conf/train.yaml."""
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (o.partition("=") for o in overrides)}
    return expand_home(given.get("run.dir") or f"runs/{given.get('run.name') or 'default'}").absolute()


def log_folder(environment: Mapping[str, str], overrides: Iterable[str]) -> Path:
    """Return LOG_DIR, or logs/ in the run folder."""
    if environment.get("LOG_DIR"):
        return expand_home(environment["LOG_DIR"]).absolute()
    return run_folder(overrides) / "logs"


def last_report(folder: Path, since: float) -> str:
    """Return the first line of the newest report of a watch among the logs, and its path; "" without one
    since then, in seconds since 1970."""
    reports = sorted((path.stat().st_mtime, path) for path in folder.glob("watch.*.txt"))
    if not reports or reports[-1][0] < since:
        return ""
    first = read_bytes(reports[-1][1], 1 << 20).decode(errors="replace").partition("\n")[0]
    return f"{first.removeprefix('llmtrain: error: ')}; the report: {reports[-1][1]}"
