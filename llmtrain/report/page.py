"""One HTML page about runs: figures, curves, events, differences of their settings, data. It needs no other
file and runs no script."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

import numpy as np
import yaml

from llmtrain.report.record import RunRecord, Series
from llmtrain.track.progress import duration

CHARTS = {
    "loss": "training loss (nats per target)",
    "validation_loss": "validation loss (nats per target)",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens a second",
    "memory_bytes": "memory (GiB)",
    "data_wait_seconds": "waiting for data (seconds a step)",
}
"""Metric → title of its chart."""
MOST_POINTS = 1500
"""Points of a curve; neighbours are averaged beyond."""
SCALE = {"memory_bytes": 2.0**-30}
FROM_ZERO = ("tokens_per_second", "memory_bytes", "data_wait_seconds")
"""Metrics whose charts begin at zero, since their size matters and not only their change."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
th, td:first-child { white-space: nowrap; }
td { overflow-wrap: anywhere; }
td:not(:first-child):last-child { min-width: 9rem; }
"""


def page_of(records: Sequence[RunRecord]) -> str:
    """Return the page."""
    title = ", ".join(_names(records))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Made on {_moment(datetime.datetime.now().timestamp())}.</p>",
        "<h2>Runs</h2>",
        _summary(records),
        "<h2>Curves</h2>",
        "<p>Dotted lines: the run was started again. Of many steps neighbours are averaged.</p>",
        '<div class="charts">',
        *_charts(records),
        "</div>",
        "<h2>Events</h2>",
        _events(records),
        "<h2>Settings</h2>",
        *_settings(records),
        "<h2>Data</h2>",
        _data(records),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run; those with one name by their folders."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else str(record.path)
        for name, record in zip(names, records, strict=True)
    ]


def table_of(head: Iterable[str], rows: Iterable[Iterable[Any]], *, aligned: bool = True) -> str:
    """Return a table. If columns are `aligned`, cells that are numbers as text, such as 1,234, stand to the
    right."""

    def cell(value: Any) -> str:
        text = str(value)
        is_number = aligned and text.replace(",", "").replace(".", "").replace("%", "").strip().isdigit()
        return f"<td{' class=number' if is_number else ''}>{escape(text)}</td>"

    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _summary(records: Sequence[RunRecord]) -> str:
    facts: dict[str, list[str]] = {}
    for record in records:
        for name, value in _facts(record).items():
            facts.setdefault(name, []).append(value)
    rows = ([name, *values] for name, values in facts.items())
    return table_of(["", *_names(records)], rows, aligned=False)


def _facts(record: RunRecord) -> dict[str, str]:
    """Return the figures of a run; all runs have the same names."""
    best = _values(record, "validation_loss")
    rate, waits = _values(record, "step_tokens_per_second"), _values(record, "data_wait_seconds")
    memory, used = _values(record, "memory_bytes"), _values(record, "mfu")
    ends = [event.at for event in record.events]
    skipped = sum(_values(record, "skipped"))
    return {
        "folder": str(record.path),
        "state": record.state,
        "steps": f"{record.step:,} of {record.steps or 0:,}",
        "last loss": _figure(record.last("loss")),
        "best validation loss": _figure(min(best) if best else None),
        "last validation loss": _figure(record.last("validation_loss")),
        "median tokens a second": f"{median(rate):,.0f}" if rate else "",
        "median MFU": f"{median(used):.1%}" if used else "",
        "most memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "",
        "waited for data": duration(sum(waits)) if waits else "",
        "starts": str(sum(event.kind == "start" for event in record.events)),
        "restarts after a failure": str(sum(event.kind == "restart" for event in record.events)),
        "checkpoints kept": str(len(record.saved)),
        "steps skipped": f"{skipped:,.0f}",
        "from start to last event": duration(ends[-1] - ends[0]) if ends else "",
        "host": str(record.environment.get("host", "")),
        "command": " ".join(map(str, record.environment.get("command") or ())),
    }


def _values(record: RunRecord, name: str) -> list[float]:
    found = record.series.get(name)
    return [] if found is None else found.values


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _charts(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a chart for each metric that any run has, further ones of evaluations among them."""
    others = [
        name
        for record in records
        for name in record.series
        if name.startswith("validation_") and name not in CHARTS and not name.endswith("seconds")
    ]
    # Times of the phases of a step, where the run took them.
    others += [
        name
        for record in records
        for name in record.series
        if name.startswith("seconds/") and not name.endswith("_max")
    ]
    titles = {**CHARTS, **{name: name.replace("_", " ").replace("/", " of a step: ") for name in others}}
    for name, title in titles.items():
        if any(record.series.get(name) for record in records):
            yield _chart(records, name, title)


def _chart(records: Sequence[RunRecord], name: str, title: str) -> str:
    """Return an SVG of one metric of all runs; dotted lines are restarts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, record) in enumerate(zip(_names(records), records, strict=True)):
            series = record.series.get(name)
            if series is None:
                continue
            steps, values = _thinned(series)
            marker = "o" if name.startswith("validation_") else None
            color = f"C{number % 10}"
            axes.plot(
                steps, values * SCALE.get(name, 1.0), linewidth=0.9, marker=marker, markersize=3, color=color
            )
            axes.lines[-1].set_label(label)
            for event in record.events:
                if event.kind == "start" and event.step:
                    axes.axvline(event.step, linewidth=0.7, linestyle=":", color=color)
        axes.set(title=title, xlabel="optimizer steps")
        axes.grid(alpha=0.3)
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(
                lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            )
        if len(records) > 1:
            axes.legend(fontsize="small")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]


def _thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values, neighbours averaged if there are more than MOST_POINTS."""
    steps, values = np.array(series.steps, float), np.array(series.values, float)
    if len(steps) <= MOST_POINTS:
        return steps, values
    cuts = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*cuts, len(steps)])
    return np.add.reduceat(steps, cuts) / counts, np.add.reduceat(values, cuts) / counts


def _events(records: Sequence[RunRecord]) -> str:
    rows = []
    for name, record in zip(_names(records), records, strict=True):
        saves = [event for event in record.events if event.kind == "save"]
        kept = {id(event) for event in (*saves[:1], *saves[-1:])}
        for event in record.events:
            if event.kind == "save" and id(event) not in kept:
                continue
            said = ", ".join(f"{key} {value}" for key, value in event.facts.items())
            rows.append(
                [_moment(event.at), name, event.kind, "" if event.step is None else f"{event.step:,}", said]
            )
        if len(saves) > len(kept):
            rows.append(
                ["", name, "save", "", f"{len(saves) - len(kept)} more between the first and the last"]
            )
    return table_of(["when", "run", "event", "step", ""], rows)


def _settings(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a table of the keys that differ, and each configuration in full."""
    flat = [dict(_flat(record.config)) for record in records]
    if len(records) > 1:
        keys = dict.fromkeys(key for settings in flat for key in settings)
        rows = [[key, *(settings.get(key, "") for settings in flat)] for key in keys]
        different = [row for row in rows if len({str(value) for value in row[1:]}) > 1]
        yield table_of(["key that differs", *_names(records)], different, aligned=False)
    for name, record in zip(_names(records), records, strict=True):
        text = yaml.safe_dump(dict(record.config), sort_keys=False)
        yield f"<details><summary>all settings of {escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data(records: Sequence[RunRecord]) -> str:
    rows = []
    for name, record in zip(_names(records), records, strict=True):
        targets, epoch = _values(record, "num_targets"), record.last("epoch")
        paths = record.data.get("paths")
        where = ", ".join(map(str, paths.values())) if isinstance(paths, Mapping) else ""
        passes = "" if epoch is None else f"{epoch:.2f}"
        rows.append([name, where, str(record.data.get("train", "")), passes, f"{sum(targets):,.0f}"])
    return table_of(["run", "read from", "what", "epochs", "targets"], rows)


def _moment(at: float) -> str:
    return f"{datetime.datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
