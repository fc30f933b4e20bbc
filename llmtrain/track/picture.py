"""Tracker that draws loss.png, training and validation loss over the steps, when training ends."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import files
from llmtrain.track.base import Metrics, WrittenText
from llmtrain.track.jsonl import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PictureTracker:
    """Draws the losses in metrics.jsonl, including the steps before a resume."""

    def __init__(self, path: Path, metrics_file: Path, run_name: str) -> None:
        self._path, self._metrics_file, self._run_name = path, metrics_file, run_name

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        pass

    def write(self, step: int, texts: Sequence[WrittenText]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def alert(self, title: str, text: str) -> None:
        """Do nothing: no one is there to be told."""

    def keep(self, step: int, checkpoint: Path) -> None:
        """Do nothing: checkpoints lie in the run folder."""

    def close(self, failed: bool) -> None:
        title = f"{self._run_name} (failed)" if failed else self._run_name
        files.write_atomically(self._path, draw_losses(read_curves(self._metrics_file), title))


Curves = dict[str, tuple[list[int], list[float]]]
"""Name of a loss → its steps and values."""


def read_curves(metrics_file: Path) -> Curves:
    """Read the losses of a metrics file, without values that were not finite."""
    curves: Curves = {"loss": ([], []), "validation_loss": ([], [])}
    for record in read_metrics(metrics_file):
        for name, (steps, values) in curves.items():
            if type(record.get(name)) in (int, float):
                steps.append(record["step"])
                values.append(record[name])
    return curves


def draw_losses(curves: Curves, title: str) -> bytes:
    """Return a PNG of the curves."""
    # The import takes a second: do it at the end of a run, not at its start.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curves["loss"], linewidth=0.8, color="tab:blue", label="training, each step's batch")
    axes.plot(*curves["validation_loss"], marker="o", color="tab:orange", label="validation")
    axes.set(title=title, xlabel="optimizer steps", ylabel="loss (nats per predicted token or label)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


MOST_LABELLED = 20
"""Runs up to which a legend names them."""


def draw_several(curves: Mapping[str, Curves], title: str) -> bytes:
    """Return a PNG of the losses of several runs by name: training on the left, validation on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, what in ((left, "loss", "training"), (right, "validation_loss", "validation")):
        for run, of_run in curves.items():
            steps, values = of_run[name]
            shown = _smoothed(values) if name == "loss" else values
            axes.plot(steps, shown, linewidth=1.2, label=run.replace("$", r"\$"))
        axes.set(title=f"{what} loss", xlabel="optimizer steps", ylabel="nats per predicted token or label")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if len(curves) <= MOST_LABELLED:
        right.legend(fontsize=8)
    figure.suptitle(title.replace("$", r"\$"))
    return _png(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and up to nine before it."""
    return [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(values))]


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
