"""What an encoder–decoder learns by: sources and targets, and how many tokens each has.

Free of torch. The widths depend on the config alone, never on the text: pipelines see one shape, and a row is
the same in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmtrain.config import require
from llmtrain.errors import Problem

if TYPE_CHECKING:
    import numpy as np

SHORTEST_TEXT = 8
"""Tokens that a row of text must hold at least to be worth corrupting."""


class Lengths(NamedTuple):
    """Tokens of one row."""

    text: int
    """Of the corpus, in the objectives that make both sides of one text; 0 with pairs."""
    source: int
    """The encoder's input."""
    target: int
    """The decoder's input, and its labels."""


@dataclass(frozen=True)
class Seq2SeqObjectiveConfig:
    """How sources and targets are made of what a corpus holds."""

    kind: Literal["pairs", "span_corruption", "denoising"] = "pairs"
    """`pairs`: of a corpus of paired texts; `span_corruption`: a text with gaps → what was in them (T5,
    arXiv:1910.10683); `denoising`: a text with noise → the text (BART, arXiv:1910.13461)."""
    target_length: int | None = None
    """Of pairs: tokens of the decoder's input; null: batch.sequence_length, which is the encoder's."""
    mean_span: float = 3.0
    """Mean tokens of a gap, of span corruption and of infilling."""
    share: float = 0.15
    """Of span corruption: the share of tokens that lie in gaps."""
    num_sentinels: int = 100
    """Of span corruption: ids that mark gaps, so the most gaps that a row can have."""
    infilling: float = 0.3
    """Of denoising: the share of tokens that lie in gaps, each of which one [MASK] stands for; their lengths
    are Poisson's, 0 among them."""
    masking: float = 0.0
    """Of denoising: the share of tokens that [MASK] replaces one by one."""
    deletion: float = 0.0
    """Of denoising: the share of tokens that are left out without a trace."""
    permutation: float = 1.0
    """Of denoising: the share of rows whose sentences stand in another order."""
    rotation: float = 0.0
    """Of denoising: the share of rows that begin at a token drawn at random, what was before it behind."""

    def problems(self) -> Iterator[Problem]:
        for name in ("infilling", "masking", "deletion", "permutation", "rotation"):
            yield from require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        yield from require(0 < self.share < 1, "share", self.share, "more than 0, less than 1")
        yield from require(1 <= self.mean_span <= 64, "mean_span", self.mean_span, "1 to 64")
        yield from require(self.num_sentinels >= 1, "num_sentinels", self.num_sentinels, "1 or more")
        yield from require(
            self.target_length is None or self.target_length >= 2,
            "target_length",
            self.target_length,
            "2 or more, or null",
        )
        noise = self.infilling + self.masking + self.deletion
        yield from require(noise < 1, "infilling", f"{noise:g} with masking and deletion", "less than 1")
        asks = noise > 0 or self.permutation > 0 or self.rotation > 0
        yield from require(self.kind != "denoising" or asks, "infilling", 0, "some kind of noise above 0")
        for key in fields(self):
            kinds = _KINDS_OF.get(key.name)
            got = getattr(self, key.name)
            if kinds is not None and self.kind not in kinds and got != key.default:
                allowed = f"nothing with kind={self.kind}: it belongs to {' and '.join(kinds)}"
                remedy = "leave it out, or give another objective=…"
                yield Problem(key.name, str(got), allowed, remedy)

    def lengths(self, sequence_length: int) -> Lengths:
        """What `batch.sequence_length`, the most tokens of the encoder's input, comes to.

        Span corruption takes as many tokens of text as leave an input of that length once gaps are sentinels
        (arXiv:1910.10683, section 3.1.4: 568 for 512 at 15 % and 3). Denoising takes one less, for the end.
        """
        if self.kind == "pairs":
            return Lengths(0, sequence_length, self.target_length or sequence_length)
        if self.kind == "denoising":
            return self.lengths_of_text(sequence_length - 1)
        import numpy as np  # here and below late: plans of other models answer without it

        # What remains of a text grows with it.
        texts = np.arange(int(sequence_length / (1 - self.share)) + 4)
        hidden, gaps = self.gaps_of(texts)
        longest = np.searchsorted(texts - hidden + gaps + 1, sequence_length, side="right")
        return self.lengths_of_text(int(longest) - 1)

    def lengths_of_text(self, text: int) -> Lengths:
        """What rows of so many tokens of the corpus come to, ends included."""
        if self.kind == "denoising":
            return Lengths(text, text + 1, text + 1)
        hidden, gaps = self.gaps_of_one(text)
        return Lengths(text, text - hidden + gaps + 1, hidden + gaps + 1)

    def gaps_of(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Span corruption of texts of so many tokens → (tokens in gaps, gaps), int64 of the same shape. A
        text of a single token has none."""
        import numpy as np

        n = np.asarray(lengths, dtype=np.int64)
        hidden = np.clip(np.floor(n * self.share + 0.5).astype(np.int64), 1, np.maximum(n - 1, 1))
        hidden = np.where(n > 1, hidden, 0)
        gaps = np.maximum(np.floor(hidden / self.mean_span + 0.5).astype(np.int64), np.minimum(hidden, 1))
        # A gap follows a token that stays.
        return hidden, np.minimum(gaps, n - hidden)

    def gaps_of_one(self, text: int) -> tuple[int, int]:
        """`gaps_of` one text of so many tokens."""
        import numpy as np

        hidden, gaps = self.gaps_of(np.array(text))
        return int(hidden), int(gaps)

    def length_problems(self, sequence_length: int) -> Iterator[Problem]:
        """What keeps a row from being made; keys stand under the model's `objective`."""
        if self.kind == "pairs":
            return
        text = self.lengths(sequence_length).text
        least = next(n for n in range(SHORTEST_TEXT, 1 << 12) if self.lengths(n).text >= SHORTEST_TEXT)
        if text < SHORTEST_TEXT:
            yield Problem("batch.sequence_length", str(sequence_length), f"{least} or more with {self.kind}")
        if self.kind == "span_corruption":
            _, gaps = self.gaps_of_one(text)
            yield from require(
                gaps <= self.num_sentinels,
                "model.objective.num_sentinels",
                self.num_sentinels,
                f"{gaps} or more, the gaps of a row with batch.sequence_length={sequence_length}",
            )


_KINDS_OF = {
    "target_length": ("pairs",),
    "mean_span": ("span_corruption", "denoising"),
    "share": ("span_corruption",),
    "num_sentinels": ("span_corruption",),
    **dict.fromkeys(("infilling", "masking", "deletion", "permutation", "rotation"), ("denoising",)),
}
"""Key → the kinds that it means something to."""
