"""The folders of a run, from the overrides of its command: a launcher composes no configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from llmtrain.files import expand_home


def run_folder(overrides: Iterable[str]) -> Path:
    """Return the run folder that the overrides select, by default as in conf/train.yaml."""
    given = {key.lstrip("+"): value.strip("'\"") for key, _, value in (o.partition("=") for o in overrides)}
    return expand_home(given.get("run.dir") or f"runs/{given.get('run.name') or 'default'}").absolute()


def log_folder(environment: Mapping[str, str], overrides: Iterable[str]) -> Path:
    """Return LOG_DIR, or logs/ in the run folder."""
    if environment.get("LOG_DIR"):
        return expand_home(environment["LOG_DIR"]).absolute()
    return run_folder(overrides) / "logs"
