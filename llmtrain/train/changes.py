"""The settings that a resumed run has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmtrain.sweeps import CHANGES_NO_TRAINING

NAMED_BY_USERS = (
    "data.mixture",
    "data.sources",
    "data.shares",
    "objective.weights",
    "objective.verbalizer",
)
"""Sections whose keys the user chooses: an added or removed key is a change."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each setting in which two encoded configurations differ.

    Keys that only one of them has are left out: they belong to another version or to another kind of
    section, and that change is reported itself.
    """
    # `before` was read from a checkpoint, so `now` becomes JSON too.
    return list(_changes(before, json.loads(json.dumps(now, default=str)), ""))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in now:
        name = prefix + key
        if key not in before or name in CHANGES_NO_TRAINING or before[key] == now[key]:
            continue
        sections = isinstance(before[key], dict) and isinstance(now[key], dict)
        if sections and (name not in NAMED_BY_USERS or set(before[key]) == set(now[key])):
            yield from _changes(before[key], now[key], f"{name}.")
        else:
            yield f"{name} was {_shown(before[key])} and is {_shown(now[key])}"


def _shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 60 else f"{text[:60]}…"
