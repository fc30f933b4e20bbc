"""Pictures of a report: the confusion of classes, the reliability of probabilities, and the worst
mistakes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from llmtrain.scoring.report import Mistakes, Reliability, Report, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CELLS_NAMED = 20
"""Classes up to which the cells of a confusion matrix hold their counts."""
MOST_NAMES = 40
"""Names of classes along a side of a confusion matrix; of more classes some are left unnamed."""
CHARACTER = 0.09
"""Inches that a character of a name takes at most, on average. Margins follow from it: matplotlib's layouts
measure every text several times, which takes as long as all the drawing."""


def draw(report: Report, title: str) -> dict[str, bytes]:
    """Return the pictures that a report allows by name, each a PNG: confusion, calibration, mistakes."""
    pictures = {}
    if report.matrix is not None and report.matrix.any():
        pictures["confusion"] = _png(_confusion(report.matrix, report.names, title))
    if report.reliability is not None and report.reliability.rows.any():
        pictures["calibration"] = _png(_calibration(report.reliability, title))
    if report.mistakes is not None:
        pictures["mistakes"] = _png(_mistakes(report.mistakes, report.names, title))
    return pictures


def grid(pictures_NHWK: np.ndarray, columns: int, scale: int = 2) -> bytes:
    """Return a PNG of pictures, uint8 (N, H, W, K), side by side in rows of `columns`."""
    from PIL import Image

    N, H, W, K = pictures_NHWK.shape
    rows = -(-N // columns)
    sheet = np.zeros((rows, columns, H + 1, W + 1, K), np.uint8)
    sheet.reshape(-1, H + 1, W + 1, K)[:N, :H, :W] = pictures_NHWK
    whole = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (H + 1), columns * (W + 1), K)
    picture = Image.fromarray(whole[..., 0] if K == 1 else whole)
    png = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(png, "PNG")
    return png.getvalue()


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _confusion(matrix: np.ndarray, names: tuple[str, ...], title: str) -> Figure:
    """Color each cell by its share of its label's rows."""
    # The import takes a second: do it when something is drawn.
    from matplotlib.figure import Figure

    count = len(names)
    ticks = range(0, count, -(-count // MOST_NAMES))
    shown = [shortened(names[tick]) for tick in ticks]
    side = float(np.clip(2 + 0.45 * count, 3.5, 13))
    longest = CHARACTER * max(map(len, shown))
    are_turned = longest > 0.9 * side / len(shown)
    left, bottom, top, right = 0.6 + longest, 0.6 + (longest if are_turned else 0.1), 0.5, 1.2
    width, height = left + side + right, bottom + side + top
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    beside = figure.add_axes(((left + side + 0.2) / width, bottom / height, 0.2 / width, side / height))
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, cax=beside, label="share of the label's rows")
    # A dollar sign would begin a formula.
    labels = [name.replace("$", r"\$") for name in shown]
    axes.set_xticks(ticks, labels, rotation=90 if are_turned else 0)
    axes.set_yticks(ticks, labels)
    axes.set(title=title.replace("$", r"\$"), xlabel="predicted", ylabel="label")
    if count <= MOST_CELLS_NAMED:
        for row, column in np.ndindex(count, count):
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{matrix[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure


def _calibration(curve: Reliability, title: str) -> Figure:
    """Draw the accuracy of predictions by their probability, and how many have each."""
    from matplotlib.figure import Figure

    filled = np.flatnonzero(curve.rows)
    confidence, accuracy = (
        values[filled] / curve.rows[filled] for values in (curve.confidence, curve.correct)
    )
    figure = Figure(figsize=(6, 6))
    figure.subplots_adjust(left=0.12, right=0.96, bottom=0.09, top=0.93, hspace=0.08)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--", label="perfectly calibrated")
    above.plot(confidence, accuracy, linewidth=0.8, color="tab:blue", alpha=0.5)
    # Bins of few predictions say little.
    sizes = 12 + 160 * curve.rows[filled] / curve.rows.max()
    above.scatter(confidence, accuracy, sizes, color="tab:blue", zorder=3, clip_on=False, label="predictions")
    above.set(title=title.replace("$", r"\$"), ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    above.grid(alpha=0.3)
    above.legend(loc="upper left")
    edges = np.linspace(0, 1, len(curve.rows) + 1)
    below.bar(
        edges[:-1], curve.rows, width=np.diff(edges), align="edge", color="tab:orange", edgecolor="white"
    )
    below.set(xlabel="probability of the prediction", ylabel="predictions")
    return figure


def _mistakes(worst: Mistakes, names: tuple[str, ...], title: str) -> Figure:
    """Draw the pictures, each with its label, and what was said with which probability."""
    from matplotlib.figure import Figure

    columns, beside, above = 5, 0.1, 0.32
    rows = -(-len(worst.rows) // columns)
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows * (1 + above) / (1 + beside) + 0.5))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.5 / figure.get_figheight())
    # Axes of its own for each picture would take three times as long.
    axes = figure.add_subplot()
    axes.set_axis_off()
    for i, picture in enumerate(worst.pictures):
        label, said = (shortened(names[of[i]]).replace("$", r"\$") for of in (worst.labels, worst.predicted))
        x, y = i % columns * (1 + beside), i // columns * (1 + above) + above
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y))
        told = f"{label}\nnot {said} ({worst.confidence[i]:.0%})"
        axes.text(x + 0.5, y - 0.03, told, ha="center", va="bottom", fontsize=8)
    title = title.replace("$", r"\$")
    axes.set(title=title, xlim=(-beside, columns * (1 + beside)), ylim=(rows * (1 + above), 0))
    return figure
