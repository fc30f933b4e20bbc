"""The weights of attention over texts, drawn as HTML and as a picture."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COLUMNS = 110
"""Characters of a line of the picture."""
_DPI, _LINE_INCHES, _COLUMN_INCHES = 100, 0.2, 0.1
"""A column is a whole number of dots, to which characters are rounded."""
_GLYPH = 0.602
"""Width of a character of DejaVu Sans Mono, as a share of the size of the font."""
_FAINTEST = 0.02
_COLOR = (1.0, 0.55, 0.0)


@dataclass(frozen=True)
class AttendedText:
    """A text that a model has read, and the weight of each of its tokens."""

    caption: str
    """What the model says of it."""
    text: str
    spans: Sequence[tuple[int, int]]
    """Characters [begin, end) of each token that the model has read."""
    weights: np.ndarray
    """(heads, tokens); of each head the sum over the text is 1."""

    @property
    def mean(self) -> np.ndarray:
        """Return the mean of the heads, (tokens,)."""
        return np.asarray(self.weights.mean(0))

    @property
    def read(self) -> int:
        """Return the number of characters that the model has read."""
        return max((end for _, end in self.spans), default=0)


def shades(weights_T: np.ndarray) -> np.ndarray:
    """Return how strongly each token is marked, 0 to 1: its share of the largest weight."""
    largest = weights_T.max(initial=0.0)
    return weights_T / largest if largest > 0 else np.zeros_like(weights_T)


def as_html(texts: Sequence[AttendedText], title: str) -> str:
    """Return a page by itself: each text with its tokens marked, the mean of the heads first."""
    blocks = []
    for number, text in enumerate(texts, 1):
        block = f"<h2>{number}. {html.escape(text.caption)}</h2>\n<p>{_marked(text, text.mean)}</p>\n"
        if len(text.weights) > 1:
            heads = (
                f"<p><b>head {head}</b> {_marked(text, weights)}</p>"
                for head, weights in enumerate(text.weights)
            )
            block += f"<details><summary>each head</summary>{''.join(heads)}</details>\n"
        blocks.append(block)
    style = "body{font:16px/1.7 sans-serif;max-width:60em;margin:2em auto}h2{font-size:1em}i{color:#888}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>The darker a word, the greater its weight in what the model says of the text.</p>\n"
        f"{''.join(blocks)}</body></html>\n"
    )


def _marked(text: AttendedText, weights_T: np.ndarray) -> str:
    """Return a text with its tokens marked; what the model has not read is grey."""
    pieces, at = [], 0
    red, green, blue = (round(255 * part) for part in _COLOR)
    for (begin, end), weight, shade in zip(text.spans, weights_T, shades(weights_T), strict=True):
        pieces.append(html.escape(text.text[at:begin]))
        mark = f"background:rgba({red},{green},{blue},{shade:.3f})"
        said = html.escape(text.text[max(at, begin) : end])
        pieces.append(f'<span style="{mark}" title="{weight:.4f}">{said}</span>')
        at = max(at, end)
    rest = f"<i>{html.escape(text.text[at:])}</i>" if text.text[at:].strip() else ""
    return "".join(pieces) + rest


def as_png(texts: Sequence[AttendedText], title: str) -> bytes:
    """Return a picture of the texts as far as the model has read them, with their tokens marked."""
    # The import takes a second: do it when something is drawn.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines: list[tuple[str, np.ndarray | None]] = [(title, None), ("", None)]
    for number, text in enumerate(texts, 1):
        lines.append((f"{number}. {text.caption}"[:COLUMNS], None))
        lines += _lines(text)
        lines.append(("", None))
    size = ((COLUMNS + 2) * _COLUMN_INCHES, _LINE_INCHES * (len(lines) + 1))
    figure = Figure(figsize=size, dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-1, COLUMNS + 1), ylim=(len(lines) + 0.5, -0.5))
    axes.axis("off")
    font = _COLUMN_INCHES * 72 / _GLYPH
    for row, (line, marks) in enumerate(lines):
        for begin, end, mark in () if marks is None else _runs(marks):
            place = (begin, row - 0.1)
            axes.add_patch(Rectangle(place, end - begin, 0.95, facecolor=(*_COLOR, mark), linewidth=0))
        weight = "bold" if marks is None else "normal"
        # A dollar sign would begin a formula.
        axes.text(
            0, row + 0.7, line, fontsize=font, family="DejaVu Sans Mono", weight=weight, parse_math=False
        )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    return png.getvalue()


def _runs(marks: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield (begin, end, mark) of the characters of a line with the same mark."""
    ends = [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    for begin, end in zip([0, *ends], ends, strict=False):
        if end > begin and marks[begin] > _FAINTEST:
            yield begin, end, float(marks[begin])


def _lines(text: AttendedText) -> list[tuple[str, np.ndarray | None]]:
    """Return the lines of a text with the mark of each character."""
    marks = np.zeros(text.read)
    for (begin, end), shade in zip(text.spans, shades(text.mean), strict=True):
        marks[begin:end] = np.maximum(marks[begin:end], shade)
    shown = "".join(" " if character.isspace() else character for character in text.text[: text.read])
    lines: list[tuple[str, np.ndarray | None]] = []
    start = 0
    while start < len(shown):
        stop = min(len(shown), start + COLUMNS)
        if stop < len(shown) and (space := shown.rfind(" ", start + 1, stop)) > start:
            stop = space + 1
        lines.append((shown[start:stop], marks[start:stop]))
        start = stop
    return lines
