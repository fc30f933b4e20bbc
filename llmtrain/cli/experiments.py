"""Experiments of conf/ that are sweeps by themselves: `hydra.mode: MULTIRUN`, with what is swept."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from llmtrain.cli.explain import conf_folder


def swept_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that the chosen experiment sweeps; empty if it is no sweep, or there is none."""
    chosen = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("experiment=")]
    path = conf_folder() / "experiment" / f"{chosen[-1] if chosen else ''}.yaml"
    if not chosen or not path.is_file():
        return set()
    hydra = (yaml.safe_load(path.read_text()) or {}).get("hydra") or {}
    return {*hydra["sweeper"]["params"]} if hydra.get("mode") == "MULTIRUN" else set()
