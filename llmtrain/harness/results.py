"""Results of the harness as a table, as JSON, and as figures of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_ABOUT = ("name", "alias", "sample_len", "sample_count")
"""Keys of a task's results that are no figures."""
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""Parts of the results that are shown as JSON, under the harness's names."""
OF_TASKS = "harness/"
"""Beginning of the name of a figure of a task in a run: harness/TASK/FIGURE."""


def plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results as JSON: null for what is not finite."""
    return {key: _plain(results[key]) for key in _KEPT if key in results}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # of numpy
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return each figure of each task as harness/TASK/FIGURE."""
    return {
        f"{OF_TASKS}{task}/{name}": float(value)
        for task, name, value, _ in _figures(results)
        if isinstance(value, (int, float))
    }


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (task, figure, value, its standard error) in the order of the tasks. A figure of a filter of its
    own is FIGURE_FILTER."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, filter_name = key.partition(",")
            if key in _ABOUT or not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filter_name}")
            yield task, metric if filter_name == "none" else f"{metric}_{filter_name}", value, error


def table(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: task, examples, figure, value ± standard error."""
    rows = [("task", "shots", "figure", "value")]
    shots = results.get("n-shot", {})
    last = None
    for task, name, value, error in _figures(results):
        about = ("", "") if task == last else (task, str(shots.get(task, "")))
        rows.append((*about, name, _shown(value) + (f" ± {_shown(error)}" if _is_number(error) else "")))
        last = task
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip()
        for row in rows
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
