"""What a run that goes on does otherwise than before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

LEFT_OUT = ("run", "track", "cluster", "checkpoint", "device", "model.path", "data.path", "data.cache")
"""Names and paths, what watches and what keeps: they change nothing that is trained."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting of two encoded configurations that differs, in words.

    Keys that only one of them has came or went with a version or a kind, which is told itself.
    """
    # One of them was read from a checkpoint.
    return list(_changes(before, json.loads(json.dumps(now, default=str)), ""))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in now:
        name = prefix + key
        if key not in before or name in LEFT_OUT or before[key] == now[key]:
            continue
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            yield from _changes(before[key], now[key], f"{name}.")
        else:
            yield f"{name} was {_shown(before[key])} and is {_shown(now[key])}"


def _shown(value: Any) -> str:
    text = "null" if value is None else json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 60 else f"{text[:60]}…"
