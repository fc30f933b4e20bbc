"""What describes an encoder–decoder and what it learns by: frozen dataclasses with their arithmetic, free of
torch.

Dim names: V vocabulary, D hidden_size, S source tokens, T target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmtrain.models.objective_config import Seq2SeqObjectiveConfig


@dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder–decoder; covers the Transformer (arXiv:1706.03762), T5 (arXiv:1910.10683) and BART
    (arXiv:1910.13461)."""

    family: Literal["seq2seq"] = "seq2seq"
    vocab_size: int | None = None
    """Rows of the embedding; null takes the corpus' vocabulary and the special tokens that are missing."""
    start_id: int | None = None
    """Id that begins the decoder's input; null: the first behind the corpus' vocabulary."""
    mask_id: int | None = None
    """Id of [MASK] for denoising; null: the second."""
    sentinel_id: int | None = None
    """Id of the first gap's sentinel for span corruption, those of further gaps count DOWN from it (T5's
    order); null: the last row of the embedding."""
    objective: Seq2SeqObjectiveConfig = field(default_factory=Seq2SeqObjectiveConfig)
